"""The definition: one choice after the other, over the whole Gram matrix."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.greedy_select import _terms
from pallas_kernels.greedy_select._terms import Settings

_NEVER = np.iinfo(np.int32).min


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
    objective = {"mmr": _Mmr, "dpp": _Dpp, "facility": _Facility}[settings.objective]

    def row(*args: jax.Array) -> jax.Array:
        return _row(objective(*args[:3], settings), *args[1:], settings)

    return jax.vmap(row)(gram, importance, valid, limit)


def _row(
    objective: Any,
    importance: jax.Array,
    valid: jax.Array,
    limit: jax.Array,
    s: Settings,
) -> jax.Array:
    n = importance.shape[-1]

    def choose(state: Any, free: jax.Array, order: jax.Array, t: Any, key: Any) -> Any:
        worst = -jnp.inf if key.dtype == jnp.float32 else _NEVER
        key = jnp.where(free, key, worst)
        if s.parallel == 1:
            best = jnp.argmax(key)[None].astype(jnp.int32)
        else:
            best = lax.top_k(jnp.where(key == 0, 0, key), s.parallel)[1]
        slots = t * s.parallel + jnp.arange(s.parallel)
        best = jnp.where(slots < limit, best, n)
        order = order.at[slots].set(best, mode="drop")
        for slot, pick in zip(slots, best, strict=True):
            state = jax.tree.map(
                lambda new, old, pick=pick: jnp.where(pick < n, new, old),
                objective.update(state, jnp.minimum(pick, n - 1), slot),
                state,
            )
        return state, free.at[best].set(False, mode="drop"), order

    state, free = objective.start(), valid
    order = jnp.full(s.num_select, n, jnp.int32)
    first = objective.first(state)
    carry = choose(state, free, order, jnp.int32(0), first)

    def step(t: jax.Array, carry: Any) -> Any:
        return choose(*carry, t, objective.key(carry[0]))

    steps = -(-s.num_select // s.parallel)
    return lax.fori_loop(1, steps, step, carry)[2]


class _Mmr:
    """`weight * importance - (1 - weight) * largest similarity to a chosen token`."""

    def __init__(self, gram: Any, importance: Any, valid: Any, s: Settings) -> None:
        del valid
        self.gram, self.importance = gram, importance
        self.base, self.factor = _terms.mmr_base(importance, s), _terms.mmr_factor(s)

    def start(self) -> jax.Array:
        return jnp.full(self.base.shape, -jnp.inf, jnp.float32)

    def first(self, state: jax.Array) -> jax.Array:
        del state
        return self.importance

    def key(self, state: jax.Array) -> jax.Array:
        return self.base - state

    def update(self, state: jax.Array, pick: jax.Array, slot: jax.Array) -> jax.Array:
        del slot
        return jnp.maximum(state, self.gram[pick] * self.factor)


class _Dpp:
    """Variance given the chosen tokens, by rows of a Cholesky factor."""

    def __init__(self, gram: Any, importance: Any, valid: Any, s: Settings) -> None:
        del valid
        self.gram, self.importance, self.steps = gram, importance, s.num_select
        self.variance = importance * importance * jnp.diagonal(gram)
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

    def update(self, state: Any, pick: jax.Array, slot: jax.Array) -> Any:
        variance, rows = state
        here = variance[pick]
        some = here > self.floor[pick]
        known = jnp.dot(rows[:, pick], rows, precision=lax.Precision.HIGHEST)
        kernel = self.importance[pick] * self.gram[pick] * self.importance
        row = (kernel - known) * lax.rsqrt(jnp.where(some, here, 1.0))
        row = jnp.where(some, row, 0.0)
        return variance - row * row, rows.at[slot].set(row, mode="drop")


class _Facility:
    """What a token adds to the coverage of all, times `importance ** weight`."""

    def __init__(self, gram: Any, importance: Any, valid: Any, s: Settings) -> None:
        self.gram, self.importance = _terms.units(gram), importance
        self.covered = jnp.where(valid, 0, _terms.UNIT)
        self.scale = _terms.facility_scale(importance, s)

    def start(self) -> jax.Array:
        return self.covered

    def first(self, state: jax.Array) -> jax.Array:
        return self.key(state)

    def key(self, state: jax.Array) -> jax.Array:
        gain = _terms.exact_sum(jnp.maximum(self.gram - state, 0))
        return _terms.tiered(gain * self.scale, 0.0, self.importance)

    def update(self, state: jax.Array, pick: jax.Array, slot: jax.Array) -> jax.Array:
        del slot
        return jnp.maximum(state, self.gram[pick])
