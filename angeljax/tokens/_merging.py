"""What the methods share that merge neighbouring tokens of audio."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.tokens._attention_weights import (
    HEADS,
    AttentionWeights,
    Heads,
    pool_attention,
)
from angeljax.tokens._keep import keep_count
from angeljax.tokens._selection import Selection
from pallas_kernels import greedy_select

ROUNDINGS = ("round", "floor")
WEIGHTS = ("attention", "uniform")
PRUNERS = ("dpp", "mmr")
Rounding = Literal["round", "floor"]
Weights = Literal["attention", "uniform"]
Pruner = Literal["dpp", "mmr"]
# An array is the attention of all heads between all frames, still to be pooled.
Attention = AttentionWeights | tuple[jax.Array, jax.Array] | jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What all methods have and no array says; see `samp`."""

    keep: int | float
    weights: Weights
    relevance: Heads
    pruner: Pruner | None
    weight: float
    rounding: Rounding
    least: int

    def __post_init__(self) -> None:
        _one_of("weights", self.weights, WEIGHTS)
        _one_of("relevance", self.relevance, HEADS)
        _one_of("rounding", self.rounding, ROUNDINGS)
        if self.pruner is not None:
            _one_of("pruner", self.pruner, PRUNERS)
        if type(self.least) is not int or self.least < 1:
            raise ValueError(f"least={self.least!r} must be an integer of 1 or more")

    def kept_of(self, n: int) -> np.ndarray:
        """int32 `[n + 1]`: tokens kept of 0, 1, ... n real ones."""
        most = keep_count(n, self.keep)
        if isinstance(self.keep, numbers.Integral):
            return np.minimum(np.arange(n + 1), most).astype(np.int32)
        # In Python's floats: float32 rounds some halves away.
        how = round if self.rounding == "round" else math.floor
        share = float(self.keep)
        kept = [min(max(how(i * share), self.least), i) for i in range(n + 1)]
        return np.asarray(kept, np.int32)


@dataclasses.dataclass(frozen=True)
class Clips:
    """A batch of clips whose real tokens come first.

    Attributes:
      embeds: `[B, N, D]`.
      mask: bool `[B, N]`, True for real tokens, all of them before the padding.
      counts: int32 `[B]`, tokens to keep.
      num_keep: K, the most of them, static.
      places: int32 `[B, N]`, where the tokens were; None if there was no mask.
      single: the caller has one clip without a batch axis.
      real: bool `[B, N]`, the mask as it was given.
    """

    embeds: jax.Array
    mask: jax.Array
    counts: jax.Array
    num_keep: int
    places: jax.Array | None
    single: bool
    real: jax.Array

    @classmethod
    def of(cls, embeds: jax.Array, mask: jax.Array | None, options: Options) -> Clips:
        """Checks the arguments that all methods have, and moves the padding back."""
        single = embeds.ndim == 2
        if embeds.ndim not in (2, 3):
            raise ValueError(
                f"embeds must be [B, N, D] or [N, D], not {list(embeds.shape)}"
            )
        if mask is not None and mask.shape != embeds.shape[:-1]:
            raise ValueError(
                f"mask must be {list(embeds.shape[:-1])} as embeds, not "
                f"{list(mask.shape)}"
            )
        if single:
            embeds, mask = embeds[None], None if mask is None else mask[None]
        batch, n, _ = embeds.shape
        table = options.kept_of(n)
        if mask is None:
            full = jnp.ones((batch, n), bool)
            counts = jnp.full(batch, table[-1])
            return cls(embeds, full, counts, int(table[-1]), None, single, full)
        places = jnp.argsort(~mask, axis=-1, stable=True).astype(jnp.int32)
        length = jnp.sum(mask, axis=-1, dtype=jnp.int32)
        return cls(
            jnp.take_along_axis(embeds, places[..., None], axis=1),
            jnp.arange(n) < length[:, None],
            jnp.asarray(table)[length],
            int(table.max()),
            places,
            single,
            mask,
        )

    @property
    def length(self) -> jax.Array:
        """int32 `[B]`: real tokens."""
        return jnp.sum(self.mask, axis=-1, dtype=jnp.int32)

    def row(self, name: str, x: jax.Array) -> jax.Array:
        """Numbers `[B, N]` or `[N]` of the tokens as float32, in the order of `mask`.

        Zeros in padding.
        """
        if self.single and x.ndim == 1:
            x = x[None]
        if x.shape != self.mask.shape:
            want = list(self.mask.shape[1 if self.single else 0 :])
            raise ValueError(f"{name} must be {want}, not {list(x.shape)}")
        if self.places is not None:
            x = jnp.take_along_axis(x, self.places, axis=1)
        return jnp.where(self.mask, x.astype(jnp.float32), 0)

    def selection(self, order: jax.Array, rows: jax.Array) -> Selection:
        """From chosen tokens `[B, K]` and the rows `[B, N, D]` that stand for them."""
        n = self.mask.shape[1]
        merged = jnp.take_along_axis(
            rows, jnp.sort(order)[..., None], axis=1, mode="fill", fill_value=0
        )
        if self.places is not None:
            order = jnp.take_along_axis(
                self.places, order, axis=1, mode="fill", fill_value=n
            )
        chosen = Selection.of(order, n)
        chosen = dataclasses.replace(chosen, merged=merged.astype(self.embeds.dtype))
        return jax.tree.map(lambda x: x[0], chosen) if self.single else chosen


def token_weights(
    clips: Clips,
    attn: Attention | None,
    importance: jax.Array | None,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """Weights of merging and relevance for pruning, float32 `[B, N]`.

    Raises:
      ValueError: neither attention nor importance is there though `weights` is
        "attention", or shapes that do not go together.
    """
    if attn is None and importance is None and options.weights == "attention":
        raise ValueError(
            'give attn (or importance), or weights="uniform" to merge and prune '
            "without attention"
        )
    summed = None if attn is None else _summed(clips, attn, options.relevance)
    ones = clips.mask.astype(jnp.float32)
    if importance is not None:
        relevant = clips.row("importance", importance)
    else:
        relevant = ones if summed is None else clips.row("attn", summed.diagonal)
    if options.weights == "uniform":
        return ones, relevant
    if summed is None:
        return relevant, relevant
    return clips.row("attn", summed.received), relevant


def _summed(clips: Clips, attn: Attention, relevance: Heads) -> AttentionWeights:
    if isinstance(attn, AttentionWeights):
        return attn
    if isinstance(attn, tuple):
        return AttentionWeights(received=attn[0], diagonal=attn[1])
    attn = attn[None] if clips.single and attn.ndim == 3 else attn
    n = clips.mask.shape[1]
    if attn.ndim != 4 or attn.shape[-1] % n or attn.shape[-1] != attn.shape[-2]:
        raise ValueError(
            "attn must be AttentionWeights, (received, diagonal), or weights "
            f"[B, heads, p * {n}, p * {n}] of p frames to each of the {n} tokens, not "
            f"{list(attn.shape)}"
        )
    pool = attn.shape[-1] // n
    return pool_attention(attn, pool, mask=clips.real, relevance=relevance)


def merge(x: jax.Array, weights: jax.Array, owner: jax.Array) -> jax.Array:
    """Weighted means of the tokens that have one owner: `[B, N, D]`, float32.

    Args:
      x: `[B, N, D]`.
      weights: float32 `[B, N]`, not negative. Where they sum up to 0 the mean is plain.
      owner: int32 `[B, N]`, the place of each token's mean; N for none.
    """
    n = x.shape[1]
    total = _sums(weights, owner)
    none = _take(total, owner) <= 0
    weights = jnp.where(none, 1.0, weights)
    total = _sums(weights, owner)
    sums = _sums(weights[..., None] * x.astype(jnp.float32), owner)
    # A group of one is its token to the bit.
    alone = _sums(jnp.ones_like(weights), owner) == 1
    means = sums / jnp.where(total > 0, total, 1)[..., None]
    own = (owner == jnp.arange(n)) & alone
    return jnp.where(own[..., None], x.astype(jnp.float32), means)


def mean_of(values: jax.Array, owner: jax.Array) -> jax.Array:
    """Plain means of numbers `[B, N]` that have one owner."""
    sizes = _sums(jnp.ones_like(values), owner)
    return _sums(values, owner) / jnp.maximum(sizes, 1)


def choose(
    clips: Clips,
    rows: jax.Array,
    relevant: jax.Array,
    leaders: jax.Array,
    options: Options,
) -> jax.Array:
    """What the pruner keeps of the rows at `leaders`, in order: int32 `[B, K]`."""
    relevant = jax.lax.stop_gradient(relevant)
    # Neither depends on the scale, and attention to oneself may be tiny.
    high = jnp.max(relevant, axis=-1, keepdims=True, where=leaders, initial=0)
    relevant = relevant / jnp.where(high > 0, high, 1)
    if options.pruner == "mmr":
        low = jnp.min(relevant, axis=-1, keepdims=True, where=leaders, initial=1)
        relevant = (relevant - low) / (1 - low + 1e-6)
    return greedy_select(
        jnp.where(leaders[..., None], rows, 0),
        relevant,
        clips.num_keep,
        objective=options.pruner or "dpp",
        weight=options.weight,
        mask=leaders,
        counts=clips.counts,
    )


def first_of(leaders: jax.Array, num_keep: int) -> jax.Array:
    """The True places of `[B, N]` in ascending order: int32 `[B, K]`, N where none."""
    n = leaders.shape[1]
    places = jnp.where(leaders, jnp.arange(n, dtype=jnp.int32), n)
    return jnp.sort(places, axis=-1)[:, :num_keep]


def ranks(scores: jax.Array, among: jax.Array, *, descending: bool) -> jax.Array:
    """Ranks of `[B, N]` from 0 where `among`; ties by place; N or more elsewhere."""
    scores = -scores if descending else scores
    order = jnp.argsort(jnp.where(among, scores, jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1, stable=True)
    return jnp.where(among, rank, scores.shape[-1])


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raises ValueError with what is known."""
    if value not in known:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")


def _sums(x: jax.Array, owner: jax.Array) -> jax.Array:
    rows = jnp.arange(x.shape[0])[:, None]
    return jnp.zeros_like(x).at[rows, owner].add(x, mode="drop")


def _take(x: jax.Array, owner: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, owner, axis=1, mode="fill", fill_value=0)
