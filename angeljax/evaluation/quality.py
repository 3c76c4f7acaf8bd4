"""Perplexity, KL divergence to a reference and top-1 agreement of a language model.

A step sees one batch of windows and returns a few sums per window; logits never leave
the device and never outlive their batch. The sums are added up on the host in float64
at the end, so a result does not depend on the batch size, and nothing in the loop waits
for the device.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from angeljax.evaluation._progress import progress_bar
from angeljax.evaluation._steps import (
    LogitsFn,
    check,
    choose_batch_size,
    score,
    take_batch,
    vocabulary_size,
)
from angeljax.evaluation.reference import ReferenceCache
from angeljax.evaluation.text import Windows


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """What `evaluate` found. Means are over the scored tokens, in nats.

    Standard errors treat windows as independent draws, since tokens of one window are
    not; they are None with fewer than two scored windows.

    Attributes:
      perplexity: exp of `nll`.
      nll: mean negative log-likelihood of a token.
      nll_stderr: its standard error.
      tokens: number of scored tokens.
      kl: mean KL(reference || model) of the next-token distribution, or None.
      kl_stderr: its standard error.
      top1_agreement: share of the positions where both rank the same token first, or
        None.
      top1_agreement_stderr: its standard error.
      seconds: wall time, compilation included.
    """

    perplexity: float
    nll: float
    nll_stderr: float | None
    tokens: int
    kl: float | None = None
    kl_stderr: float | None = None
    top1_agreement: float | None = None
    top1_agreement_stderr: float | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        parts = [f"perplexity {self.perplexity:.4g}"]
        if self.kl is not None and self.top1_agreement is not None:
            parts.append(f"KL {self.kl:.4g} nats")
            parts.append(f"top-1 agreement {self.top1_agreement:.2%}")
        return ", ".join([*parts, f"{self.tokens} tokens in {self.seconds:.1f} s"])


def evaluate(
    logits_fn: LogitsFn,
    params: Any,
    windows: Windows,
    *,
    reference: Any = None,
    reference_fn: LogitsFn | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> EvalResult:
    """Measures a model over windows of text, by itself or against a reference.

    The step is compiled once for a `logits_fn` and a structure of `params`, and used
    again for every later call with both: recipes that differ only in values cost no
    compilation. Statistics are float32 whatever the logits are.

    Args:
      logits_fn: the model.
      params: its params, dense or compressed.
      windows: from `windows()`, or any tokens and score mask of shape `[N, T]`.
      reference: what to compare with: a second params tree, run in the same step, or
        a `ReferenceCache`, which saves that run when many recipes are compared. None
        leaves `kl` and `top1_agreement` out.
      reference_fn: the reference's own model, where it is not `logits_fn`.
      batch_size: windows in a step. By default as many as keep the float32 logits
        below 256 MiB.
      progress: a progress bar on standard error; None shows it on a terminal only.

    Returns:
      The means over all scored tokens.

    Raises:
      ValueError: if shapes do not fit together, nothing is scored, or the cache is of
        other windows.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.evaluation import Windows, evaluate
      >>> def uniform(params, tokens):
      ...     return jnp.zeros((*tokens.shape, 50))
      >>> cut = Windows(np.zeros((1, 4), np.int32), np.array([[False] + 3 * [True]]))
      >>> round(evaluate(uniform, {}, cut).perplexity, 3)
      50.0
    """
    started = time.perf_counter()
    tokens, score_mask = check(windows)
    vocabulary = vocabulary_size(logits_fn, params, tokens)
    cache = reference if isinstance(reference, ReferenceCache) else None
    if reference_fn is not None and (reference is None or cache is not None):
        raise ValueError("reference_fn needs a params tree as reference")
    if cache is not None:
        if not np.array_equal(cache.tokens, tokens):
            raise ValueError("the reference cache was made from other windows")
        expected = cache.log_probs.shape[-1]
    elif reference is not None:
        reference_fn = reference_fn or logits_fn
        expected = vocabulary_size(reference_fn, reference, tokens)
    else:
        expected = vocabulary
    if vocabulary != expected:
        raise ValueError(
            f"the model has {vocabulary} logits per token, the reference {expected}"
        )

    size = choose_batch_size(tokens, vocabulary, batch_size)
    starts = range(0, len(tokens), size)
    outputs: list[dict[str, Array]] = []
    with progress_bar("evaluate", len(starts), progress) as advance:
        for start in starts:
            cut = functools.partial(take_batch, start=start, size=size)
            against = reference
            if cache is not None:
                against = cut(cache.log_probs), cut(cache.top1)
            output = score(
                logits_fn, reference_fn, params, against, cut(tokens), cut(score_mask)
            )
            outputs.append(output)
            advance(output)

    # The only wait for the device: a few numbers per window.
    gathered = jax.device_get(outputs)
    counts = score_mask.sum(axis=1)
    mean, stderr = {}, {}
    for name in gathered[0]:
        sums = np.concatenate([output[name] for output in gathered])[: len(tokens)]
        mean[name], stderr[name] = _mean_and_stderr(sums, counts)
    with np.errstate(over="ignore"):  # a broken model has an infinite perplexity
        perplexity = float(np.exp(mean["nll"]))
    return EvalResult(
        perplexity=perplexity,
        nll=mean["nll"],
        nll_stderr=stderr["nll"],
        tokens=int(counts.sum()),
        kl=mean.get("kl"),
        kl_stderr=stderr.get("kl"),
        top1_agreement=mean.get("top1"),
        top1_agreement_stderr=stderr.get("top1"),
        seconds=time.perf_counter() - started,
    )


def _mean_and_stderr(
    sums: np.ndarray, counts: np.ndarray
) -> tuple[float, float | None]:
    """Mean per token from sums per window, and its error with windows as the draws."""
    sums, total = sums.astype(np.float64), counts.sum()
    mean = sums.sum() / total
    scored = int((counts > 0).sum())
    if scored < 2:
        return float(mean), None
    with np.errstate(invalid="ignore"):  # infinite sums have no finite error
        residuals = sums - mean * counts
        variance = scored / (scored - 1) * (residuals**2).sum() / total**2
    return float(mean), float(np.sqrt(variance))
