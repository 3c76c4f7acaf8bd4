"""`allocate`: mixed precision, the formats that lose least under a budget."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from angeljax._jobs import BASE
from angeljax.allocation import _candidates
from angeljax.allocation._divergence import Divergence
from angeljax.allocation._measure import Work, measured
from angeljax.allocation._table import Allocation, AllocationError
from angeljax.calibration._statistics import Statistics
from angeljax.calibration.calibrate import calibrate, own_params
from angeljax.recipe import DEFAULT_SKIP, Recipe

MEASURES = ("kl", "linear", "error")


def allocate(
    model: Any,
    params: Any,
    stats: Statistics | None = None,
    *,
    formats: Sequence[Any],
    batches: Iterable[Any] = (),
    budget_mb: float | None = None,
    budget_bits: float | None = None,
    budget_ms: float | None = None,
    measure: str = "kl",
    group: str | Sequence[str] = "weight",
    fused: bool = True,
    latency: Mapping[tuple[int, int], Mapping[str, float]] | None = None,
    skip: Sequence[str] = DEFAULT_SKIP,
    base: Any = None,
    top_k: int | None = None,
    verify: bool = True,
    progress: bool | None = None,
) -> Allocation:
    """Chooses a format for each weight, so that the model loses least under a budget.

    Each group of weights is quantized alone with each candidate, and what the model
    loses by it is measured. Small losses add up, so that the best choice is a
    multiple-choice knapsack, which is solved exactly by integer programming. Sizes are
    those of `compress`, to the byte, scales and padding included.

    The loss of a candidate for a group, by `measure`:

    * "kl": KL(full || changed) of the next token, mean over the tokens of `batches`:
      one pass of the model for each group, candidate and batch. All passes are one
      compiled program; only candidates with `activation`, whose products change, are
      compiled for each group.
    * "linear": KL is measured for the coarsest candidate of each group only, and goes
      with the squared error from there to the others (the linearity theorem of HIGGS,
      arXiv 2411.17525, section 3): as many times fewer passes as there are candidates.
    * "error": the squared error of each layer's outputs over their own square, with the
      Hessians of `stats` if it has them, else that of the weights; no pass at all.

    Args:
      model: as in `calibrate`; it returns logits `[..., V]`, alone or first of a tuple.
      params: its params, not compressed.
      stats: what `calibrate` found, for candidates that need it (and "error").
      formats: the candidates: `"format[:group_size][:algorithm]"`, mappings of a rule's
        fields, `Rule`s, or None (or "none") to leave a weight as it is. One with
        `match` competes for those leaves only, others for the default selection.
      batches: as in `calibrate`, for "kl" and "linear"; also what the choice is
        verified on. Some thousand tokens do; not those that `stats` are of, which
        candidates that look at statistics are fitted to.
      budget_mb: of the whole tree, in 10^6 bytes.
      budget_bits: bits per weight over the weights that candidates may take.
      budget_ms: of all products of one pass, by `latency`.
      measure: "kl", "linear" or "error".
      group: who shares a choice: "weight" (each leaf by itself; a stack of layers is
        one leaf), "layer" (weights with the same first number in their path), or a list
        of regular expressions, of which the first that matches decides; leaves that
        differ in what it captures are apart, and those that none matches are each by
        themselves. Tied weights always share.
      fused: q, k and v share a choice, and so do gate and up, so that
        `fuse_projections` can join them.
      latency: `(inputs, outputs) -> name of a candidate -> milliseconds`, such as
        `measure_latency` gives. The entries of a stack count each.
      skip: regular expressions of paths that candidates without `match` leave alone.
      base: as in `compress`.
      top_k: keep the full model's predictions as so many of their largest entries and
        one for all others, which bounds the KL from below. Default: all entries if they
        fit in 1 GiB, else 1024.
      verify: measure the KL of the whole choice, if there are batches.
      progress: show a progress bar on stderr; default: if it is a terminal.

    Returns:
      An `Allocation`: its `recipe` for `compress(params, recipe, stats)`, its table of
      measurements, predicted and measured loss; `at` solves for another budget.

    Raises:
      AllocationError: nothing meets the budget (says what the least is), or a loss is
        not finite.
      RecipeError: a candidate is wrong, or does not fit the tree.
      StatisticsError: a candidate needs statistics that are not there.
      ValueError: another argument is wrong; named.

    Example:
      >>> import jax, jax.numpy as jnp, angeljax as aj
      >>> def model(params, x):
      ...     return jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"]
      >>> x, a, b = (jax.random.normal(k, (64, 64)) for k in jax.random.split(
      ...     jax.random.key(0), 3))
      >>> params = {"a": {"kernel": a / 8}, "b": {"kernel": b / 99}}
      >>> formats = ["int4:64", "int8:64"]
      >>> found = aj.allocate(
      ...     model, params, formats=formats, batches=[x], budget_bits=6.5
      ... )
      >>> [(rule.match, rule.format) for rule in found.recipe.rules]
      [('b/kernel', 'int4'), ('a/kernel', 'int8')]
    """
    start = time.perf_counter()
    params = own_params(model, params)
    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r}: use {', '.join(MEASURES)}")
    batches = list(batches)
    if measure != "error" and not batches:
        raise ValueError(f"measure={measure!r} needs batches of text")
    candidates = _candidates.parse(formats)
    if budget_ms is not None and latency is None:
        raise AllocationError(
            "budget_ms needs latency=, such as measure_latency(params, formats) gives"
        )
    work = Work.of(params, candidates, skip, stats, base)
    if measure != "kl" and any(c.rule and c.rule.activation for c in candidates):
        raise ValueError(
            f"measure={measure!r} looks at weights alone: use 'kl' for candidates with "
            "an activation"
        )
    table = work.table(measure, group, fused=fused, latency=latency)
    limits = dict(budget_mb=budget_mb, budget_bits=budget_bits, budget_ms=budget_ms)
    # A budget that nothing meets is refused before the work.
    table.at(**limits)
    divergence = None
    if batches and (verify or measure != "error"):
        divergence = Divergence(model, work.leaves, work.treedef, batches, top_k)
    found = measured(table, work, divergence, progress).at(**limits)
    kl = None
    if verify and divergence is not None:
        kl = float(divergence(work.changed(found)))
    return dataclasses.replace(
        found,
        kl=kl,
        passes=0 if divergence is None else divergence.passes,
        seconds=time.perf_counter() - start,
    )


def calibrate_for(
    model: Any,
    params: Any,
    batches: Iterable[Any],
    formats: Sequence[Any],
    *,
    statistics: tuple[str, ...] = (),
    skip: Sequence[str] = DEFAULT_SKIP,
    progress: bool | None = None,
) -> Statistics | None:
    """Statistics that serve every candidate, by `calibrate`.

    Args:
      model, params, batches: as in `calibrate`.
      formats, skip: as in `allocate`. Rotations of candidates must agree.
      statistics: more that is to be measured: "hessian" lets `measure="error"` look at
        outputs instead of weights.
      progress: show a progress bar on stderr; default: if it is a terminal.

    Returns:
      `Statistics`, or None if no candidate needs any and none are asked for.

    Raises:
      RecipeError, StatisticsError, ValueError: as `calibrate`.

    Example:
      >>> import jax.numpy as jnp, angeljax as aj
      >>> from angeljax.allocation import calibrate_for
      >>> params, x = {"kernel": jnp.ones((64, 8))}, jnp.ones((4, 64))
      >>> stats = calibrate_for(
      ...     lambda p, x: aj.ops.dot(x, p["kernel"]), params, [x],
      ...     ["int4:64", "int8"], statistics=("hessian",),
      ... )
      >>> stats["kernel"]["hessian"].shape
      (64, 64)
    """
    rules = [c.rule for c in _candidates.parse(formats) if c.rule is not None]
    kinds = [kind for rule in rules for kind in rule.needs() if kind != BASE]
    kinds = list(dict.fromkeys([*kinds, *statistics]))
    if not kinds:
        return None
    # The first rule that takes a leaf decides on its rotation; the kinds are of all.
    return calibrate(
        model,
        params,
        batches,
        Recipe(rules=rules, skip=skip),
        statistics=tuple(kinds),
        progress=progress,
    )
