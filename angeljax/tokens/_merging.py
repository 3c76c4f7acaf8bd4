"""From groups of neighbouring audio tokens to a method that merges and prunes."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.tokens import _choose
from angeljax.tokens._attention_weights import HEADS, AttentionWeights, pool_attention
from angeljax.tokens._grouping import check_threshold
from angeljax.tokens._method import Choice, Tokens, method, one_of, positive, within
from angeljax.tokens._selection import Selection
from pallas_kernels import greedy_select

# Options of every method that merges.
_OPTIONS = (
    "threshold",
    "weights",
    "relevance",
    "pruner",
    "weight",
    "rounding",
    "least",
)
Weights = Literal["attention", "uniform"]
# For each token of `[R, N]` the place of the one that stands for it, N in padding, and
# True for those that stand for themselves and others.
Groupings = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What all methods have and no array says; see `samp`."""

    keep: int | float
    full: bool  # no padding anywhere
    weights: str
    pruner: str | None
    weight: float
    rounding: str
    least: int
    own: tuple[tuple[str, Any], ...]  # options of one method

    def __post_init__(self) -> None:
        one_of("weights", self.weights, ("attention", "uniform"))
        one_of("rounding", self.rounding, ("round", "floor"))
        within("weight", self.weight, 0, 1)
        positive("least", self.least)

    @property
    def own_counts(self) -> bool:
        """Whether a share is rounded in another way than `keep_count` does."""
        share = not isinstance(self.keep, numbers.Integral)
        return share and (self.rounding, self.least) != ("round", 1)

    def counts(self, mask: jax.Array, most: int) -> jax.Array:
        """int32 `[R]`: tokens that rows keep, K at most."""
        # In Python's floats: float32 rounds some halves away.
        how = round if self.rounding == "round" else math.floor
        share, n = float(self.keep), mask.shape[-1]
        kept = [min(max(how(i * share), self.least), i, most) for i in range(n + 1)]
        length = jnp.sum(mask, axis=-1, dtype=jnp.int32)
        return jnp.asarray(np.asarray(kept, np.int32))[length]


@dataclasses.dataclass(frozen=True)
class Clips:
    """Rows whose real tokens come first, for decisions: without a gradient.

    Attributes:
      embeds: float32 `[R, N, D]`.
      mask: bool `[R, N]`, True for real tokens, all of them before the padding.
      counts: int32 `[R]`, tokens to keep.
      weights: float32 `[R, N]`, of means.
      threshold: float32 `[R]`, a cosine.
      pruned: whether a pruner follows, so that more than `counts` may be left.
    """

    embeds: jax.Array
    mask: jax.Array
    counts: jax.Array
    weights: jax.Array
    threshold: jax.Array
    pruned: bool

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.mask.shape[1]

    @property
    def length(self) -> jax.Array:
        """int32 `[R]`: real tokens."""
        return jnp.sum(self.mask, axis=-1, dtype=jnp.int32)


def merging(
    *, weights: Weights, pruner: str | None
) -> Callable[[Callable[..., Groupings]], Callable[..., Selection]]:
    """Makes a method of a function from `Clips` to groups.

    The method takes what `prune` takes, the options of `samp`, and those of the
    function. Each group becomes the weighted mean of its tokens, and the pruner chooses
    among these.

    Args:
      weights: default of the option.
      pruner: default of the option; where it is not None the method needs one.
    """
    pruners = ("dpp", "mmr", None) if pruner is None else ("dpp", "mmr")

    def wrap(core: Callable[..., Groupings]) -> Callable[..., Selection]:
        def chosen(tokens: Tokens, *, settings: Settings) -> Choice:
            return _chosen(tokens, core, settings)

        own = list(inspect.signature(core).parameters.values())[1:]
        known = [*_OPTIONS, *(p.name for p in own)]
        chosen.__name__ = core.__name__
        inner = method(batched=True, arrays={"diagonal": 0, "threshold": 0})(chosen)

        def run(
            embeds: jax.Array,
            *,
            keep: int | float,
            importance: jax.Array | None = None,
            mask: jax.Array | None = None,
            text: jax.Array | None = None,
            attn: Any = None,
            key: jax.Array | None = None,
            groups: jax.Array | None = None,
            quota: str = "global",
            num_groups: int | None = None,
            group_size: int | None = None,
            group_keep: int | None = None,
            threshold: float | jax.Array = 0.85,
            weights: str = weights,
            relevance: str = "mean",
            pruner: str | None = pruner,
            weight: float = 0.5,
            rounding: str = "round",
            least: int = 1,
            **options: Any,
        ) -> Selection:
            for option in options.keys() - {p.name for p in own}:
                raise ValueError(_unknown(core.__name__, option, known))
            one_of("pruner", pruner, pruners)
            one_of("relevance", relevance, HEADS)
            check_threshold(threshold)
            settings = Settings(
                keep=keep,
                full=mask is None and groups is None,
                weights=weights,
                pruner=pruner,
                weight=weight,
                rounding=rounding,
                least=least,
                own=tuple(options.items()),
            )
            if settings.own_counts and quota == "proportional":
                raise ValueError(
                    'rounding and least are for a share of each row: quota="'
                    'proportional" shares out one budget'
                )
            if weights == "attention" and attn is None and importance is None:
                raise ValueError(
                    f'{core.__name__} with weights="attention" needs attn, such as '
                    "angeljax.tokens.attention_weights computes, or importance [B, N]; "
                    'weights="uniform" needs neither'
                )
            embeds = jnp.asarray(embeds)
            received, diagonal = _summed(embeds, attn, mask, relevance)
            per_row = jnp.asarray(threshold, jnp.float32)[..., None]
            return inner(
                embeds,
                keep=keep,
                importance=importance,
                mask=mask,
                text=text,
                attn=received,
                key=key,
                groups=groups,
                quota=quota,
                num_groups=num_groups,
                group_size=group_size,
                group_keep=group_keep,
                diagonal=diagonal,
                threshold=jnp.broadcast_to(per_row, embeds.shape[:-1]),
                settings=settings,
            )

        # Before `run` looks like `core`, and through a type checker around it.
        takes = inspect.signature(run)
        functools.update_wrapper(run, core)
        before = list(takes.parameters.values())[:-1]
        run.__signature__ = takes.replace(parameters=[*before, *own])  # type: ignore[attr-defined]
        return run

    return wrap


def _chosen(
    tokens: Tokens,
    core: Callable[..., Groupings],
    settings: Settings,
) -> Choice:
    mask, n = tokens.mask, tokens.num_tokens
    attn, diagonal = tokens.attn, tokens.arrays.get("diagonal")
    given = (tokens.importance, diagonal, attn)
    relevant = next((x for x in given if x is not None), jnp.ones_like(mask, float))
    heavy = jnp.ones_like(relevant)
    if settings.weights == "attention":
        heavy = jnp.maximum(relevant if attn is None else attn, 0)
    counts = tokens.count
    if settings.own_counts:
        counts = settings.counts(mask, tokens.keep)
    threshold = jnp.max(tokens.arrays["threshold"], axis=-1, where=mask, initial=-1.0)
    places = jnp.argsort(~mask, axis=-1, stable=True)

    def front(x: jax.Array) -> jax.Array:
        """Real tokens first."""
        if settings.full:
            return x
        index = places.reshape(*places.shape, *[1] * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=1)

    real, rows = front(mask), front(tokens.rows)
    heavy, relevant = front(heavy), front(relevant)
    clips = Clips(
        embeds=front(tokens.embeds),
        mask=real,
        counts=counts,
        weights=heavy,
        threshold=threshold,
        pruned=settings.pruner is not None,
    )
    owner, leaders = core(clips, **dict(settings.own))
    rows = merge(rows, heavy, owner)
    if settings.pruner is None:
        order = _choose.first(first_of(leaders)[:, : tokens.keep], counts, n)
    else:
        order = _pruned(
            rows, _mean(relevant, owner), leaders, counts, tokens.keep, settings
        )
    if not settings.full:
        order = jnp.take_along_axis(places, order, axis=1, mode="fill", fill_value=n)
        back = jnp.argsort(places, axis=-1)
        rows = jnp.take_along_axis(rows, back[..., None], axis=1)
    return order.astype(jnp.int32), rows


def _pruned(
    rows: jax.Array,
    relevant: jax.Array,
    leaders: jax.Array,
    counts: jax.Array,
    num_keep: int,
    settings: Settings,
) -> jax.Array:
    """What the pruner keeps of the rows at `leaders`, in order: int32 `[R, K]`."""
    # No pruner depends on the scale, and attention to oneself may be tiny.
    high = jnp.max(relevant, axis=-1, keepdims=True, where=leaders, initial=0)
    relevant = relevant / jnp.where(high > 0, high, 1)
    if settings.pruner == "mmr":
        relevant = _choose.min_max(relevant, leaders)
    return greedy_select(
        jnp.where(leaders[..., None], rows, 0),
        relevant,
        num_keep,
        objective=settings.pruner or "",
        weight=settings.weight,
        mask=leaders,
        counts=counts,
    )


def merge(x: jax.Array, weights: jax.Array, owner: jax.Array) -> jax.Array:
    """Weighted means of the tokens that have one owner: `[R, N, D]`, float32.

    Args:
      x: `[R, N, D]`.
      weights: float32 `[R, N]`, not negative. Where they sum up to 0 the mean is plain.
      owner: int32 `[R, N]`, the place of each token's mean; N for none.
    """
    weights = jnp.where(_at(_sums(weights, owner), owner) > 0, weights, 1.0)
    total = _sums(weights, owner)
    sums = _sums(weights[..., None] * x.astype(jnp.float32), owner)
    means = sums / jnp.where(total > 0, total, 1)[..., None]
    # A group of one is its token to the bit.
    alone = _sums(jnp.ones_like(weights), owner) == 1
    own = alone & (owner == jnp.arange(x.shape[1]))
    return jnp.where(own[..., None], x.astype(jnp.float32), means)


def first_of(leaders: jax.Array) -> jax.Array:
    """The True places of `[R, N]` in ascending order, then N: int32 `[R, N]`."""
    n = leaders.shape[1]
    places = jnp.where(leaders, jnp.arange(n, dtype=jnp.int32), n)
    return jnp.sort(places, axis=-1)


def ranks(scores: jax.Array, among: jax.Array, *, descending: bool) -> jax.Array:
    """Ranks of `[R, N]` from 0 where `among`; ties by place; N elsewhere."""
    scores = -scores if descending else scores
    order = jnp.argsort(jnp.where(among, scores, jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1, stable=True)
    return jnp.where(among, rank, scores.shape[-1])


def _summed(
    embeds: jax.Array, attn: Any, mask: jax.Array | None, relevance: str
) -> tuple[jax.Array | None, jax.Array | None]:
    """Attention received and to oneself, of any of the forms that `samp` takes."""
    if attn is None:
        return None, None
    if isinstance(attn, AttentionWeights):
        return attn.received, attn.diagonal
    if isinstance(attn, tuple):
        return attn[0], attn[1]
    attn, n = jnp.asarray(attn), embeds.shape[-2]
    if attn.ndim != embeds.ndim + 1:  # received only, of all heads or their mean
        return attn, None
    if attn.shape[-1] % n or attn.shape[-1] != attn.shape[-2]:
        raise ValueError(
            f"attn must be [B, heads, p * {n}, p * {n}] for p frames to each of {n} "
            f"tokens, not {list(attn.shape)}"
        )
    pool = attn.shape[-1] // n
    heads: Any = relevance
    summed = pool_attention(attn, pool, mask=mask, relevance=heads)
    return summed.received, summed.diagonal


def _unknown(name: str, option: str, known: list[str]) -> str:
    near = difflib.get_close_matches(option, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{name} has no option {option!r}: {hint}its options: {', '.join(known)}"


def _mean(values: jax.Array, owner: jax.Array) -> jax.Array:
    """Plain means of numbers `[R, N]` that have one owner."""
    sizes = _sums(jnp.ones_like(values), owner)
    return _sums(values, owner) / jnp.maximum(sizes, 1)


def _sums(x: jax.Array, owner: jax.Array) -> jax.Array:
    rows = jnp.arange(x.shape[0])[:, None]
    return jnp.zeros_like(x).at[rows, owner].add(x, mode="drop")


def _at(x: jax.Array, owner: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, owner, axis=1, mode="fill", fill_value=0)
