"""Runs of neighbouring tokens that are alike."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from angeljax.tokens._choose import unit

FORMS = ("auto", "parallel", "scan")
_PARALLEL = 4096  # tokens up to which all pairs are compared


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """Neighbouring tokens in groups; a pytree.

    Attributes:
      starts: bool `[..., N]`, True for the first token of a group; False in padding.
      scores: float32 `[..., N]`, of every other token its mean cosine with the tokens
        that were in the group before it; infinity for first tokens and padding.
      mask: bool `[..., N]`, True for real tokens.
    """

    starts: jax.Array
    scores: jax.Array
    mask: jax.Array

    @property
    def count(self) -> jax.Array:
        """int32 `[...]`: groups of each row."""
        return jnp.sum(self.starts, axis=-1, dtype=jnp.int32)

    @property
    def first(self) -> jax.Array:
        """int32 `[..., N]`: the first token of each token's group; N in padding."""
        n = self.starts.shape[-1]
        index = jnp.where(self.starts, jnp.arange(n, dtype=jnp.int32), 0)
        first = jax.lax.cummax(index, axis=index.ndim - 1)
        return jnp.where(self.mask, first, n)


def group_adjacent(
    embeds: jax.Array,
    *,
    threshold: float | jax.Array = 0.85,
    mask: jax.Array | None = None,
    form: Literal["auto", "parallel", "scan"] = "auto",
) -> Groups:
    """Groups neighbouring tokens whose mean similarity stays above a threshold.

    From left to right, token i joins the open group `s..i-1` where

        mean over s <= t < i of cos(x_t, x_i)  >=  threshold

    and opens a new one elsewhere (Samp, arXiv 2602.21233, eq. 8). The number of groups
    depends on the audio: many words give many, a pause gives one.

    Two forms give the same groups. "parallel": sums of cosines from the diagonal
    upwards tell for every possible start where its group would end; the true starts are
    what token 0 leads to, found by `log2 N` steps of pointer doubling. `O(N^2 D)`
    work, no sequential part. "scan": one step for each token that keeps the sum of the
    group's unit vectors, `O(N D)` work. A mean within rounding of the threshold may
    fall on either side.

    Args:
      embeds: `[B, N, D]` or `[N, D]`; cosines are float32.
      threshold: a cosine from -1 to 1, also a traced scalar, or `[B]`.
      mask: bool `[B, N]`, True for real tokens, which come first in a row.
      form: "auto" is "parallel" up to 4096 tokens.

    Returns:
      `Groups` of `[B, N]`.

    Raises:
      ValueError: shapes that do not go together, or a threshold that is no cosine.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.tokens import group_adjacent
      >>> x = jnp.array([[1.0, 0], [1, 0.1], [0, 1], [0, 2], [1, 0]])
      >>> groups = group_adjacent(x)
      >>> groups.starts.tolist(), int(groups.count)
      ([True, False, True, False, True], 3)
    """
    if embeds.ndim == 2:
        row = None if mask is None else mask[None]
        batched = group_adjacent(embeds[None], threshold=threshold, mask=row, form=form)
        return jax.tree.map(lambda x: x[0], batched)
    if embeds.ndim != 3:
        raise ValueError(f"embeds must be [B, N, D] or [N, D], not {embeds.shape}")
    if form not in FORMS:
        raise ValueError(f"form={form!r} must be one of {', '.join(FORMS)}")
    check_threshold(threshold)
    n = embeds.shape[1]
    if mask is None:
        mask = jnp.ones(embeds.shape[:2], bool)
    if mask.shape != embeds.shape[:2]:
        raise ValueError(
            f"mask must be {list(embeds.shape[:2])}, not {list(mask.shape)}"
        )
    parallel = n <= _PARALLEL if form == "auto" else form == "parallel"
    return _group(embeds, mask, threshold, parallel=parallel)


# Outside of a `jit`, one program instead of many small ones.
@functools.partial(jax.jit, static_argnames="parallel")
def _group(
    embeds: jax.Array,
    mask: jax.Array,
    threshold: float | jax.Array,
    *,
    parallel: bool,
) -> Groups:
    group = _parallel if parallel else _scan
    per_clip = jnp.broadcast_to(threshold, embeds.shape[:1])
    starts, scores = jax.vmap(group)(unit(embeds), mask, per_clip)
    scores = jnp.where(mask & ~starts, scores, jnp.inf)
    return Groups(starts=starts & mask, scores=scores, mask=mask)


def adjacent_cosine(embeds: jax.Array) -> jax.Array:
    """Cosines of each token with the next one: `[..., N, D]` to `[..., N - 1]`."""
    x = unit(embeds)
    return jnp.sum(x[..., :-1, :] * x[..., 1:, :], axis=-1)


def check_threshold(threshold: float | jax.Array) -> None:
    """A number that is not traced must be a cosine."""
    if not isinstance(threshold, jax.Array) and not -1 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} must be a cosine from -1 to 1")


def _parallel(
    x: jax.Array, mask: jax.Array, threshold: jax.Array
) -> tuple[jax.Array, jax.Array]:
    n = x.shape[0]
    index = jnp.arange(n)
    cosine = jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)
    # Summed from the diagonal upwards, so that no sum holds more than the group does:
    # a difference of two long sums would lose the digits of a short group.
    sums = jax.lax.cumsum(jnp.triu(cosine, 1), axis=0, reverse=True)
    means = sums / jnp.maximum(index - index[:, None], 1)  # [start, token]
    breaks = (means < threshold) & (index > index[:, None]) & mask
    following = jnp.min(jnp.where(breaks, index, n), axis=1)
    starts = _orbit(following)
    first = jax.lax.cummax(jnp.where(starts, index, 0))
    return starts, means[first, index]


def _orbit(following: jax.Array) -> jax.Array:
    """bool `[N]`: what 0 leads to; N leads to itself."""
    n = following.shape[0]
    jump = jnp.append(following, n)
    seen = jnp.zeros(n + 1, jnp.int32).at[0].set(1)
    for _ in range(n.bit_length()):
        seen = seen.at[jump].max(seen)
        jump = jump[jump]
    return seen[:n] > 0


def _scan(
    x: jax.Array, mask: jax.Array, threshold: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del mask  # real tokens come first: what follows them changes none of their groups

    def step(
        group: tuple[jax.Array, jax.Array], x: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        total, size = group
        score = jnp.sum(total * x) / jnp.maximum(size, 1)
        new = (size == 0) | (score < threshold)
        group = jnp.where(new, x, total + x), jnp.where(new, 1, size + 1)
        return group, (new, score)

    empty = jnp.zeros(x.shape[1], x.dtype), jnp.int32(0)
    return jax.lax.scan(step, empty, x)[1]
