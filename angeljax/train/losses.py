"""Losses of language models: cross entropy and distillation, on logits.

All are means over valid tokens, in float32. `angeljax.train.chunked` has the form for
training, in which the logits of a whole batch never exist at once.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.train._options import HIDDEN_LOSSES, LOSSES, DistillOptions
from angeljax.train._token_losses import TopK, terms

__all__ = [
    "HIDDEN_LOSSES",
    "LOSSES",
    "DistillOptions",
    "TopK",
    "check_vocabularies",
    "cross_entropy",
    "distillation",
    "next_tokens",
]


def next_tokens(tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Labels: at each position the token after it.

    Args:
      tokens: int `[B, T]`.
      mask: bool `[B, T]`, True where a token may be a target; default all.

    Returns:
      int32 `[B, T]`; -100 at the last position and where the next token is masked.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.train.losses import next_tokens
      >>> next_tokens(jnp.asarray([[5, 6, 7]])).tolist()
      [[6, 7, -100]]
    """
    labels = tokens if mask is None else jnp.where(mask, tokens, -100)
    labels = jnp.roll(labels.astype(jnp.int32), -1, axis=-1)
    return labels.at[..., -1].set(-100)


def cross_entropy(
    logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Mean negative log-likelihood of the labels, in nats.

    Args:
      logits: `[..., V]`, any float dtype.
      labels: int `[...]`; negative ones (-100) are left out.
      mask: bool `[...]`, False leaves out more.

    Returns:
      float32 scalar; 0 if nothing is valid.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.train.losses import cross_entropy
      >>> float(cross_entropy(jnp.zeros((1, 2, 4)), jnp.asarray([[1, -100]])))
      1.3862943649291992
    """
    options = DistillOptions(weight=0.0)
    labels = _labels(labels, mask)
    ce, _ = _per_token(options, logits.astype(jnp.float32), None, labels)
    return _mean(ce, labels)


def distillation(
    student: jax.Array,
    teacher: jax.Array | TopK,
    labels: jax.Array,
    mask: jax.Array | None = None,
    *,
    loss: str = "kl",
    temperature: float = 1.0,
    top_k: int = 1000,
) -> jax.Array:
    """Mean divergence of the student from the teacher, in nats.

    Args:
      student: logits `[..., V]`.
      teacher: logits `[..., V]`, or its likeliest entries; no gradient flows into it.
      labels: int `[...]`, the true tokens; negative ones are left out.
      mask: bool `[...]`, False leaves out more.
      loss, temperature, top_k: see `DistillOptions`.

    Returns:
      float32 scalar, times `temperature ** 2`; 0 if nothing is valid.

    Raises:
      ValueError: an option is out of range, the vocabularies differ, or the loss cannot
        be had from a teacher's likeliest entries.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.train.losses import distillation
      >>> z = jnp.asarray([[1.0, 2.0, 3.0]])
      >>> float(distillation(z, z, jnp.asarray([0]), loss="cakld"))
      0.0
    """
    options = DistillOptions(loss=loss, temperature=temperature, top_k=top_k)
    check_teacher(teacher, student.shape[-1], options)
    labels = _labels(labels, mask)
    if not isinstance(teacher, TopK):
        teacher = teacher.astype(jnp.float32)
    _, kd = _per_token(options, student.astype(jnp.float32), teacher, labels)
    return _mean(kd, labels)


def check_vocabularies(student: int, teacher: int) -> None:
    """Refuses a teacher whose entries mean other tokens.

    Raises:
      ValueError: the sizes differ.
    """
    if student != teacher:
        raise ValueError(
            f"the student has a vocabulary of {student} and the teacher of {teacher}: "
            "distillation on logits needs one tokenizer; let the teacher generate text "
            "instead and train on it"
        )


def check_teacher(teacher: Any, vocabulary: int, options: DistillOptions) -> None:
    """Refuses what `terms` cannot compute."""
    if not isinstance(teacher, TopK):
        return check_vocabularies(vocabulary, teacher.shape[-1])
    if options.loss in ("mse", "rkl_top"):
        raise ValueError(
            f"loss {options.loss!r} needs all logits of the teacher, and of this one "
            "only the likeliest are kept: use kl, rkl, cakld or kl_top"
        )
    if options.loss != "kl_top" and options.temperature != 1:
        raise ValueError(
            f"loss {options.loss!r} at a temperature of {options.temperature} needs "
            "all logits of the teacher: use kl_top, or a temperature of 1"
        )
    if options.loss == "kl_top" and options.top_k > teacher.ids.shape[-1]:
        raise ValueError(
            f"top_k is {options.top_k} and the teacher's {teacher.ids.shape[-1]} "
            "likeliest entries are kept: lower top_k, or write more"
        )
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _per_token(
    options: DistillOptions, student: jax.Array, teacher: Any, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return terms(student, teacher, labels, options)[:2]


def _per_token_fwd(options: DistillOptions, *args: Any) -> Any:
    return _per_token(options, *args), args


def _per_token_bwd(options: DistillOptions, args: Any, weights: Any) -> Any:
    student, teacher, labels = args
    grad = terms(student, teacher, labels, options)[2](*weights)
    # Integers have no gradient, and the teacher gets none.
    none = jax.tree.map(_no_gradient, (teacher, labels))
    return (grad, *none)


def _no_gradient(x: jax.Array) -> Any:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


_per_token.defvjp(_per_token_fwd, _per_token_bwd)


def _labels(labels: jax.Array, mask: jax.Array | None) -> jax.Array:
    return labels if mask is None else jnp.where(mask, labels, -100)


def _mean(values: jax.Array, labels: jax.Array) -> jax.Array:
    return values.sum() / jnp.maximum((labels >= 0).sum(), 1)
