"""One round: draft, read, choose, accept, commit.

Invariants at the beginning, for each row of length n:
  1. tokens before n are final;
  2. slots before n - 1 of the target's cache hold their keys and values, in order;
  3. everything else, in both, is junk, and is overwritten before anything sees it.
Going back after a rejected draft is therefore nothing but a smaller n.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from angeljax.models.rows import RowCache, hold_rows, settle_rows
from angeljax.speculative._rows import (
    cache_slots,
    chain_mask,
    key_positions,
    move_rows,
    put_rows,
    tree_mask,
)
from angeljax.speculative._top import target_rows, top_tokens
from angeljax.speculative.drafter import Context, Draft, Drafter, Target, Verified
from angeljax.speculative.tree import DynamicTree, Tree, ancestors, climb, levels, walk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stats:
    """Counts over all rounds in which a row was not finished.

    Attributes:
      rounds: int32 `[B]`, forwards of the target.
      drafted: int32 `[B]`, tokens that were proposed.
      accepted: int32 `[B]`, proposed tokens that became text.
      hits: int32 `[R]`, over all rows: rounds in which the first r + 1 drafts in a row
        were what the target chose.
    """

    rounds: jax.Array
    drafted: jax.Array
    accepted: jax.Array
    hits: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that a round changes.

    Attributes:
      tokens, lengths, cache, active: see `Context`.
      limits: int32 `[B]`, lengths that no row may exceed.
      drafter: state of the drafter.
      stats: counts so far.
    """

    tokens: jax.Array
    lengths: jax.Array
    cache: Any
    active: jax.Array
    limits: jax.Array
    drafter: Any
    stats: Stats

    @property
    def context(self) -> Context:
        """What a drafter sees."""
        return Context(self.tokens, self.lengths, self.cache, self.active)


class Book(NamedTuple):
    """The small counters of a loop in one array, `numbers`, and all else of its state.

    What is computed for one array is one kernel on a GPU, and each of many one more.
    """

    numbers: jax.Array
    rest: State

    @classmethod
    def of(cls, done: jax.Array, state: State) -> Book:
        """Of a number of rounds and the state after these."""
        parts = done[None], *_numbers(state)
        flat = jnp.concatenate([x.astype(jnp.int32) for x in parts])
        return cls(flat, _with_numbers(state, [None] * len(parts[1:])))

    def read(self) -> tuple[jax.Array, State]:
        """The number of rounds, and the state."""
        batch, parts = len(self.rest.limits), []
        for place in range(5):
            start = 1 + place * batch
            parts.append(self.numbers[start : start + batch])
        parts.append(self.numbers[1 + 5 * batch :])
        parts[1] = parts[1] != 0
        return self.numbers[0], _with_numbers(self.rest, parts)


def _numbers(state: State) -> tuple[jax.Array, ...]:
    stats = state.stats
    some = stats.rounds, stats.drafted, stats.accepted, stats.hits
    return (state.lengths, state.active, *some)


def _with_numbers(state: State, numbers: Sequence[Any]) -> State:
    lengths, active, *stats = numbers
    new: Any = dataclasses.replace
    return new(state, lengths=lengths, active=active, stats=Stats(*stats))


def depth_of(drafter: Drafter) -> int:
    """How many drafts one round can accept."""
    return drafter.width - 1 if drafter.tree is None else drafter.tree.depth


def reach_of(drafter: Drafter) -> int:
    """Slots of the target's cache, from the last token's on, that a round may write."""
    own = max(drafter.width, drafter.reach)
    # What was accepted of a tree is put in place along with the next one.
    return own if drafter.tree is None else own + drafter.tree.depth + 1


def ready(drafter: Drafter, state: State) -> State:
    """The state as it enters rounds and leaves them: a tree's holds entries."""
    cache = state.cache
    if drafter.tree is None or not isinstance(cache, RowCache):
        return state
    start = state.lengths - 1
    path = jnp.zeros((len(start), drafter.tree.depth + 1), jnp.int32)
    none = jnp.zeros_like(start)
    held = hold_rows(cache, start, path, none)
    return dataclasses.replace(state, cache=held)


def settled(state: State) -> State:
    """The state with all entries of the cache in their places."""
    if not isinstance(state.cache, RowCache):
        return state
    cache = settle_rows(state.cache, state.lengths - 1)
    return dataclasses.replace(state, cache=cache)


def decode_round(
    target: Target,
    drafter: Drafter,
    state: State,
    stops: jax.Array,
    *,
    always_wide: bool,
) -> State:
    """The state after one round.

    Args:
      target: whose text it is.
      drafter: proposes.
      state: see `State`.
      stops: int32 `[n]`, tokens that end a row.
      always_wide: read `width` tokens even where nothing was drafted.
    """
    before, batch = state.context, len(state.lengths)
    draft, memory = drafter.draft(target, state.drafter, before)
    cache = state.cache if draft.cache is None else draft.cache
    _check(drafter, draft, batch, target.sampler.rejection)
    tokens = jnp.concatenate([before.last[:, None], draft.tokens], axis=1)
    tokens = tokens.astype(jnp.int32)
    proposed = (tokens >= 0) & state.active[:, None]
    shape = _Shape.of(drafter, draft, before.lengths, cache_slots(cache))

    after, sampler = shape.positions + 1, target.sampler

    def read(width: int) -> Any:
        rows = target.model.read_rows(
            target.params,
            cache,
            jnp.maximum(tokens[:, :width], 0),
            positions=shape.positions[:, :width],
            slots=before.lengths - 1,
            mask=shape.mask(width),
            key_positions=shape.keys,
            hidden=drafter.hidden,
        )
        logits = target.model.head_rows(target.params, rows.final)
        # What the branches of a choice give is padded: choices, not logits.
        told = []
        if drafter.top_k:
            rows_of = target_rows(target.model)
            top = top_tokens(logits, drafter.top_k, rows=rows_of)
            told.append(top.ids)
        if sampler.rejection:
            told.append(logits)
        elif drafter.top_k and sampler.greedy:
            told.append(_likeliest(top.values, top.ids))
        else:
            told.append(sampler.choose(logits, after[:, :width])[..., None])
        rest = [(0, 0), (0, drafter.width - width), (0, 0)]
        pad = functools.partial(jnp.pad, pad_width=rest)
        return *jax.tree.map(pad, (told, rows.hidden)), rows.cache

    if drafter.optional and drafter.width > 1 and not always_wide:
        some = jnp.any(proposed[:, 1:])
        out = jax.lax.cond(some, lambda: read(drafter.width), lambda: read(1))
    else:
        out = read(drafter.width)
    told, hidden, cache = out
    if sampler.rejection:
        chosen, good = sampler.reject(told[-1], draft.tokens, draft.log_probs, after)
    else:
        chosen = told[-1][..., 0]
        good = draft.tokens == chosen[:, :-1]

    if drafter.tree is None:
        path = jnp.broadcast_to(jnp.arange(drafter.width), (batch, drafter.width))
        accepted = _first(~good)
        path, text = jnp.minimum(path, accepted[:, None]), chosen
    else:
        path, accepted = walk(shape.lines, tokens, chosen)
        text = jnp.take_along_axis(chosen, path, axis=1)
        hidden = tuple(jnp.take_along_axis(h, path[..., None], axis=1) for h in hidden)

    read_tokens = jnp.take_along_axis(tokens, path, axis=1)
    text, accepted, memory = drafter.steer(memory, read_tokens, text, accepted)
    place = jnp.arange(text.shape[1])
    last = _first(_any([text == stops[i] for i in range(len(stops))], text.shape))
    room = state.limits - before.lengths
    emitted = jnp.minimum(jnp.minimum(accepted + 1, last + 1), room)
    emitted = jnp.where(state.active, emitted, 0).astype(jnp.int32)
    lengths = before.lengths + emitted
    if drafter.tree is not None:
        root, nodes = before.lengths - 1, drafter.width
        if isinstance(cache, RowCache):
            cache = hold_rows(cache, root, path, emitted)
        else:
            cache = move_rows(cache, root, path, nodes)
    active = state.active & (last >= emitted) & (lengths < state.limits)
    now = dataclasses.replace(
        state,
        tokens=put_rows(state.tokens, text, before.lengths),
        lengths=lengths,
        cache=cache,
        active=active,
        stats=Stats(
            rounds=state.stats.rounds + state.active,
            drafted=state.stats.drafted + _count(proposed[:, 1:]),
            accepted=state.stats.accepted + jnp.minimum(accepted, emitted),
            hits=state.stats.hits
            + jnp.sum((place[:-1] < accepted[:, None]) & state.active[:, None], axis=0),
        ),
    )
    verified = Verified(
        context=now.context,
        emitted=emitted,
        accepted=jnp.where(state.active, accepted, 0),
        tokens=tokens,
        read=proposed,
        chosen=chosen,
        path=path,
        hidden=hidden,
        top_ids=told[0] if drafter.top_k else None,
    )
    return dataclasses.replace(now, drafter=drafter.update(target, memory, verified))


def _likeliest(best: jax.Array, ids: jax.Array) -> jax.Array:
    """What `argmax` takes, `[..., 1]`, of the largest logits `[..., k]` in order.

    The lowest id of equal ones, in whatever order they are.
    """
    first = ids[..., :1]
    for r in range(1, ids.shape[-1]):
        same = best[..., r : r + 1] == best[..., :1]
        first = jnp.where(same, jnp.minimum(first, ids[..., r : r + 1]), first)
    return first


# Sums over a few columns that are written out become part of what is around them, where
# XLA for GPUs makes a kernel of each reduction.
_FEW = 32


def _first(flags: jax.Array) -> jax.Array:
    """int32 `[B]`: the first column that is true; their number if none is."""
    count = flags.shape[1]
    if count > _FEW:
        first = jnp.argmax(flags, axis=1)
        return jnp.where(flags.any(axis=1), first, count).astype(jnp.int32)
    first = jnp.full(len(flags), count, jnp.int32)
    for r in reversed(range(count)):
        first = jnp.where(flags[:, r], r, first)
    return first


def _count(flags: jax.Array) -> jax.Array:
    """int32 `[B]`: how many columns are true."""
    if flags.shape[1] > _FEW:
        return jnp.sum(flags, axis=1, dtype=jnp.int32)
    none = jnp.zeros(len(flags), jnp.int32)
    return sum((flags[:, r].astype(jnp.int32) for r in range(flags.shape[1])), none)


def _any(flags: list[jax.Array], shape: Any) -> jax.Array:
    return functools.reduce(jnp.logical_or, flags, jnp.zeros(shape, bool))


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Where the nodes of a draft stand and what they see."""

    positions: jax.Array
    slots: int
    seen: Any = None
    keys: jax.Array | None = None
    lines: Any = None

    @classmethod
    def of(
        cls, drafter: Drafter, draft: Draft, lengths: jax.Array, slots: int
    ) -> _Shape:
        tree, root = drafter.tree, lengths[:, None] - 1
        if tree is None:
            positions = root + jnp.arange(drafter.width)
            return cls(positions, slots)
        if isinstance(tree, Tree):
            lines = jnp.asarray(tree.lines)[None]
            seen = jnp.asarray(tree.ancestors)[None]
        else:
            assert isinstance(tree, DynamicTree) and draft.parents is not None
            lines = climb(draft.parents.astype(jnp.int32), tree.depth)
            seen = ancestors(lines)
        positions = root + levels(lines)
        keys = key_positions(positions, root[:, 0], slots)
        return cls(positions, slots, seen, keys, lines)

    def mask(self, width: int) -> jax.Array:
        """Made where it is used, as what goes into a branch is written to memory."""
        if self.seen is None:
            return chain_mask(self.positions[:, :width], self.slots)
        return tree_mask(self.seen[:, :width], self.positions[:, 0], self.slots)


def _check(drafter: Drafter, draft: Draft, batch: int, rejection: bool) -> None:
    """Refuses a draft of the wrong form, with a ValueError, while tracing."""
    name, width = type(drafter).__name__, drafter.width
    if draft.tokens.shape != (batch, width - 1):
        raise ValueError(
            f"{name} is {width} wide and must draft {(batch, width - 1)} tokens, not "
            f"{draft.tokens.shape}"
        )
    dynamic = isinstance(drafter.tree, DynamicTree)
    if dynamic != (draft.parents is not None):
        raise ValueError(
            f"{name} must give parents where its tree is a DynamicTree, and only there"
        )
    if draft.parents is not None and draft.parents.shape != (batch, width):
        raise ValueError(
            f"{name} must give {(batch, width)} parents, not {draft.parents.shape}"
        )
    if draft.log_probs is not None and not rejection:
        raise ValueError(
            f"{name} gives log_probs, which only the rejection rule looks at: draw "
            "with sampler.draft, which says when they are wanted"
        )
