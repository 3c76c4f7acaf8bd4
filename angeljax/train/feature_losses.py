"""Losses on hidden states and on attention relations.

Both compare layers of a student with layers of a teacher, which may be deeper or wider.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.train._options import DistillOptions

__all__ = [
    "hidden_loss",
    "init_projections",
    "layer_pairs",
    "relation_layers",
    "relation_loss",
]

Relations = tuple[jax.Array, jax.Array, jax.Array]


def layer_pairs(
    options: DistillOptions, student_layers: int, teacher_layers: int
) -> tuple[tuple[int, int], ...]:
    """Which layer of the student learns from which of the teacher.

    Args:
      options: `hidden_layers` of it, or an even spread that ends at both last layers.
      student_layers, teacher_layers: how many there are.

    Returns:
      Pairs, from 0.

    Raises:
      ValueError: a layer does not exist.

    Example:
      >>> from angeljax.train.feature_losses import layer_pairs
      >>> from angeljax.train.losses import DistillOptions
      >>> layer_pairs(DistillOptions(), 2, 6)
      ((0, 2), (1, 5))
    """
    pairs = options.hidden_layers or tuple(
        (i, max((i + 1) * teacher_layers // student_layers - 1, 0))
        for i in range(student_layers)
    )
    for pair in pairs:
        _check_pair("hidden_layers", pair, student_layers, teacher_layers)
    return pairs


def relation_layers(
    options: DistillOptions, student_layers: int, teacher_layers: int
) -> tuple[int, int]:
    """The pair of layers whose relations are compared; default the last of each.

    Raises:
      ValueError: a layer does not exist.
    """
    pair = options.relation_layers or (student_layers - 1, teacher_layers - 1)
    _check_pair("relation_layers", pair, student_layers, teacher_layers)
    return pair


def _check_pair(name: str, pair: tuple[int, int], student: int, teacher: int) -> None:
    counts = {"student": student, "teacher": teacher}
    for layer, (who, count) in zip(pair, counts.items(), strict=True):
        if layer >= count:
            raise ValueError(
                f"distill.{name}: layer {layer} is none of the {who}'s {count}, 0 first"
            )


def init_projections(
    key: jax.Array, pairs: int, student_width: int, teacher_width: int
) -> list[jax.Array] | None:
    """Learned maps from the student's width to the teacher's, one for each pair.

    Args:
      key: for the random start.
      pairs: how many.
      student_width, teacher_width: sizes of the hidden states.

    Returns:
      float32 `[student_width, teacher_width]` each, of unit gain; None if the widths
      are one, for then hidden states are compared as they are.
    """
    if student_width == teacher_width:
        return None
    shape = (student_width, teacher_width)
    keys = jax.random.split(key, pairs)
    return [jax.random.normal(k, shape) * student_width**-0.5 for k in keys]


def hidden_loss(
    student: Sequence[jax.Array],
    teacher: Sequence[jax.Array],
    valid: jax.Array,
    *,
    kind: str = "mse",
    projections: Sequence[jax.Array] | None = None,
) -> jax.Array:
    """Distance of hidden states, summed over tokens, mean over pairs of layers.

    Args:
      student: hidden states `[B, T, D]`, one for each pair.
      teacher: `[B, T, D']`; no gradient flows into them.
      valid: bool `[B, T]`, which tokens count.
      kind: "mse", the mean square over the features divided by the teacher's mean
        square (so that layers weigh the same), or "cosine", 1 - cosine similarity.
      projections: see `init_projections`; needed if the widths differ.

    Returns:
      float32 scalar; divide by the number of valid tokens for the mean.

    Raises:
      ValueError: the widths differ and there are no projections.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.train.feature_losses import hidden_loss
      >>> x, valid = jnp.ones((1, 3, 4)), jnp.ones((1, 3), bool)
      >>> float(hidden_loss([-x], [x], valid, kind="cosine"))
      6.0
    """
    total = jnp.zeros((), jnp.float32)
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        s, t = s.astype(jnp.float32), jax.lax.stop_gradient(t).astype(jnp.float32)
        if projections is not None:
            s = s @ projections[i]
        if s.shape != t.shape:
            raise ValueError(
                f"hidden states of widths {s.shape[-1]} and {t.shape[-1]} need "
                "projections: see init_projections"
            )
        if kind == "mse":
            size = jnp.sum(jnp.where(valid[..., None], t * t, 0.0))
            size /= jnp.maximum(valid.sum(), 1) * t.shape[-1]
            each = jnp.square(s - t).mean(-1) / jnp.maximum(size, 1e-12)
        else:
            inner = jnp.sum(s * t, -1)
            squares = jnp.sum(s * s, -1) * jnp.sum(t * t, -1)
            each = 1 - inner * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))
        total += jnp.where(valid, each, 0.0).sum()
    return total / max(len(student), 1)


def relation_loss(
    student: Relations,
    teacher: Relations,
    valid: jax.Array,
    *,
    heads: int | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """KL between self-relations of queries, keys and values, summed over tokens.

    As MiniLMv2 (arXiv 2012.15828, section 3): the heads of a layer are joined and cut
    into relation heads, and softmax of `A A^T / sqrt(d)` of the teacher is the target
    of the student's, for A = Q, K and V. A token relates to itself and what precedes
    it, as in the attention of a decoder.

    Args:
      student: q `[B, T, H, Dh]`, k and v `[B, T, Hkv, Dh]`.
      teacher: the same with its own heads; no gradient flows into them.
      valid: bool `[B, T]`, which tokens count.
      heads: relation heads; default the student's key heads.
      mask: bool `[B, T]`, True for real tokens.

    Returns:
      float32 scalar, mean over heads and over the three relations; divide by the
      number of valid tokens.

    Raises:
      ValueError: the width of a relation does not divide by the heads.
    """
    heads = student[1].shape[2] if heads is None else heads
    length = valid.shape[-1]
    seen = jnp.tril(jnp.ones((length, length), bool))
    if mask is not None:
        # A token always sees itself, so that no row is empty.
        seen = seen & (mask[:, None, :] | jnp.eye(length, dtype=bool))

    # One head at a time, and again in the gradient: a head takes B T T numbers.
    @jax.checkpoint
    def one(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        s, t = (_log_relations(a, seen) for a in pair)
        kl = jnp.where(seen, jnp.exp(t) * (t - s), 0.0).sum(-1)
        return jnp.where(valid, kl, 0.0).sum()

    teacher = jax.lax.stop_gradient(teacher)
    split = functools.partial(_relation_heads, heads=heads)
    total = jnp.zeros((), jnp.float32)
    for s, t in zip(student, teacher, strict=True):
        total += jax.lax.map(one, (split(s), split(t))).mean()
    return total / 3


def _relation_heads(a: jax.Array, heads: int) -> jax.Array:
    batch, length, *inner = a.shape
    width = inner[0] * inner[1]
    if width % heads:
        raise ValueError(
            f"{inner[0]} heads of {inner[1]} cannot be cut into {heads} relation "
            "heads: set distill.relation_heads to a divisor of all widths"
        )
    return jnp.moveaxis(a.reshape(batch, length, heads, width // heads), 2, 0)


def _log_relations(a: jax.Array, seen: jax.Array) -> Any:
    scores = jnp.einsum("btd,bsd->bts", a, a, preferred_element_type=jnp.float32)
    scores = jnp.where(seen, scores * a.shape[-1] ** -0.5, -1e30)
    return jax.nn.log_softmax(scores, axis=-1)
