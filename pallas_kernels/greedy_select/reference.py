"""The definition: one choice after the other, over the whole Gram matrix."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.greedy_select import _terms
from pallas_kernels.greedy_select._terms import Settings

NEVER = np.iinfo(np.int32).min  # below every key


def unsupported(batch: int, n: int, settings: Settings) -> str | None:
    """Why this cannot run here, or None."""
    del batch, n, settings
    return None


def select(
    gram: jax.Array,
    importance: jax.Array,
    valid: jax.Array,
    limit: jax.Array,
    settings: Settings,
) -> jax.Array:
    """See `_terms`."""

    row = functools.partial(select_row, s=settings)
    return jax.vmap(lambda gram, *rest: row(Gram(gram), *rest))(
        gram, importance, valid, limit
    )


@dataclasses.dataclass(frozen=True)
class Gram:
    """Similarities of one row of the batch, all there."""

    matrix: jax.Array

    def of(self, pick: jax.Array) -> jax.Array:
        """Those of one token."""
        return self.matrix[pick]

    def diagonal(self) -> jax.Array:
        """Those of each token to itself."""
        return jnp.diagonal(self.matrix)


def select_row(
    similar: Any,
    importance: jax.Array,
    valid: jax.Array,
    limit: jax.Array,
    s: Settings,
) -> jax.Array:
    """Choices int32 `[K]` of one row; `similar` is a `Gram` or what acts as one."""
    kind = {"mmr": _Mmr, "dpp": _Dpp, "facility": _Facility}[s.objective]
    return _row(kind(similar, importance, valid, s), importance, valid, limit, s)


def _row(
    objective: Any,
    importance: jax.Array,
    valid: jax.Array,
    limit: jax.Array,
    s: Settings,
) -> jax.Array:
    n = importance.shape[-1]

    def choose(state: Any, free: jax.Array, order: jax.Array, t: Any, key: Any) -> Any:
        worst = -jnp.inf if key.dtype == jnp.float32 else NEVER
        key = jnp.where(free, key, worst)
        if s.parallel == 1:
            best = jnp.argmax(key)[None].astype(jnp.int32)
        else:
            best = lax.top_k(jnp.where(key == 0, 0, key), s.parallel)[1]
        slots = t * s.parallel + jnp.arange(s.parallel)
        best = jnp.where(slots < limit, best, n)
        order = order.at[slots].set(best, mode="drop")
        for slot, pick in zip(slots, best, strict=True):
            state = objective.update(state, jnp.minimum(pick, n - 1), slot, pick < n)
        return state, free.at[best].set(False, mode="drop"), order

    state, free = objective.start(), valid
    order = jnp.full(s.num_select, n, jnp.int32)
    first = objective.first(state)
    carry = choose(state, free, order, jnp.int32(0), first)

    def step(t: jax.Array, carry: Any) -> Any:
        state, free, order = carry
        return choose(state, free, order, t, objective.key(state))

    steps = -(-s.num_select // s.parallel)
    return lax.fori_loop(1, steps, step, carry)[2]


class _Mmr:
    """`weight * importance - (1 - weight) * largest similarity to a chosen token`."""

    def __init__(self, similar: Any, importance: Any, valid: Any, s: Settings) -> None:
        del valid
        self.similar, self.importance = similar, importance
        self.base, self.factor = _terms.mmr_base(importance, s), _terms.mmr_factor(s)

    def start(self) -> jax.Array:
        return jnp.full(self.base.shape, -_terms.LARGE, jnp.float32)

    def first(self, state: jax.Array) -> jax.Array:
        del state
        return self.importance

    def key(self, state: jax.Array) -> jax.Array:
        return self.base - state

    def update(self, state: jax.Array, pick: Any, slot: Any, ok: Any) -> jax.Array:
        del slot
        near = jnp.maximum(state, self.similar.of(pick) * self.factor)
        return jnp.where(ok, near, state)


class _Dpp:
    """Variance given the chosen tokens, by rows of a Cholesky factor."""

    def __init__(self, similar: Any, importance: Any, valid: Any, s: Settings) -> None:
        del valid
        self.similar, self.importance, self.steps = similar, importance, s.num_select
        self.variance = importance * importance * similar.diagonal()
        self.floor = jnp.maximum(
            _terms.DPP_FLOOR, _terms.DPP_RELATIVE_FLOOR * self.variance
        )

    def start(self) -> tuple[jax.Array, jax.Array]:
        rows = jnp.zeros((self.steps, *self.importance.shape), jnp.float32)
        return self.variance, rows

    def first(self, state: Any) -> jax.Array:
        del state
        return self.importance

    def key(self, state: Any) -> jax.Array:
        return _terms.tiered(state[0], self.floor, self.importance)

    def update(self, state: Any, pick: Any, slot: Any, ok: Any) -> Any:
        variance, rows = state
        here = variance[pick]
        some = ok & (here > self.floor[pick])
        known = jnp.dot(rows[:, pick], rows, precision=lax.Precision.HIGHEST)
        kernel = self.importance[pick] * self.similar.of(pick) * self.importance
        row = (kernel - known) * lax.rsqrt(jnp.where(some, here, 1.0))
        row = jnp.where(some, row, 0.0)
        return variance - row * row, rows.at[slot].set(row, mode="drop")


class _Facility:
    """What a token adds to the coverage of all, times `importance ** weight`."""

    def __init__(self, similar: Gram, importance: Any, valid: Any, s: Settings) -> None:
        self.units, self.importance = _terms.units(similar.matrix), importance
        self.covered = jnp.where(valid, 0, _terms.UNIT)
        self.scale = _terms.facility_scale(importance, s)

    def start(self) -> jax.Array:
        return self.covered

    def first(self, state: jax.Array) -> jax.Array:
        return self.key(state)

    def key(self, state: jax.Array) -> jax.Array:
        return _terms.gains(self.units, state, self.scale, self.importance)

    def update(self, state: jax.Array, pick: Any, slot: Any, ok: Any) -> jax.Array:
        del slot
        return jnp.where(ok, jnp.maximum(state, self.units[pick]), state)
