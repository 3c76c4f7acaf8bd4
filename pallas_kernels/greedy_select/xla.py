"""Greedy selection in plain XLA: runs anywhere, and without the whole Gram matrix.

Scores only fall as tokens are chosen, and so do their roundings. A score of an earlier
step is therefore a bound, and a token whose score of now exceeds the bounds of all
others is the next choice (lazy greedy; Minoux 1978). Two objectives use that:

- "facility" looks at the gains of a few tokens of the highest bounds, not of all;
- "mmr" without a matrix compares a block of candidates with all tokens, and chooses
  among them for as long as their scores exceed the best one outside.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.greedy_select import _terms, reference
from pallas_kernels.greedy_select._terms import Settings
from pallas_kernels.greedy_select.reference import NEVER

_LOOKED_AT = 32  # gains that are computed at a time
_CANDIDATES = 128  # tokens that are compared with all others at a time


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
    if settings.objective == "facility" and settings.parallel == 1:
        row = functools.partial(_facility, s=settings)
        return jax.vmap(row)(gram, importance, valid, limit)
    # A step of the others is as cheap as what would save it.
    return reference.select(gram, importance, valid, limit, settings)


def select_without(
    rows: jax.Array,
    importance: jax.Array,
    valid: jax.Array,
    limit: jax.Array,
    settings: Settings,
) -> jax.Array:
    """`select` from unit rows `[B, N, D]`, for more tokens than a matrix has room for.

    For "mmr" and "dpp". One row of the batch after the other.
    """

    def row(args: Any) -> jax.Array:
        unit, importance, valid, limit = args
        lazy = settings.objective == "mmr" and settings.parallel == 1
        run = _blocks if lazy else reference.select_row
        return run(Rows(unit), importance, valid, limit, settings)

    return lax.map(row, (rows, importance, valid, limit))


@dataclasses.dataclass(frozen=True)
class Rows:
    """Similarities of unit rows, computed when they are needed."""

    unit: jax.Array

    def of(self, picks: jax.Array) -> jax.Array:
        """Those of one token or of several."""
        some = self.unit[picks]
        return lax.dot_general(
            some,
            self.unit,
            (((some.ndim - 1,), (1,)), ((), ())),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    def diagonal(self) -> jax.Array:
        """Those of each token to itself."""
        unit = self.unit.astype(jnp.float32)
        return jnp.sum(unit * unit, axis=-1)


def _facility(
    gram: jax.Array, importance: jax.Array, valid: jax.Array, limit: jax.Array, s: Any
) -> jax.Array:
    n = importance.shape[0]
    units, scale = _terms.units(gram), _terms.facility_scale(importance, s)
    covered = jnp.where(valid, 0, _terms.UNIT)
    few = min(_LOOKED_AT, n)
    bounds = _terms.gains(units, covered, scale, importance)

    def look(state: Any) -> Any:
        t, bounds, covered, order = state
        top, picks = lax.top_k(bounds, few)
        picks = jnp.sort(picks)
        now = _terms.gains(units[picks], covered, scale[picks], importance[picks])
        # Those that are taken or not there stay below all others.
        now = jnp.where(bounds[picks] == NEVER, NEVER, now)
        bounds = bounds.at[picks].set(now)
        # The next choice if nothing else can be better, nor equal with a lower index.
        best = jnp.argmax(bounds)
        chosen = jnp.any(picks == best)
        order = order.at[t].set(jnp.where(chosen, best, n).astype(jnp.int32))
        covered = jnp.where(chosen, jnp.maximum(covered, units[best]), covered)
        taken = jnp.where(chosen, best, n)
        bounds = bounds.at[taken].set(NEVER, mode="drop")
        return t + chosen, bounds, covered, order

    order = jnp.full(s.num_select, n, jnp.int32)
    state = jnp.int32(0), jnp.where(valid, bounds, NEVER), covered, order
    return lax.while_loop(lambda state: state[0] < limit, look, state)[3]


def _blocks(
    similar: Rows, importance: jax.Array, valid: jax.Array, limit: jax.Array, s: Any
) -> jax.Array:
    n = importance.shape[0]
    factor = _terms.mmr_factor(s)
    first, base = _terms.mmr_start(importance, valid, s)
    few = min(_CANDIDATES, n)

    def compare(state: Any) -> Any:
        t, near, base, order = state
        top, picks = lax.top_k(base - near, min(few + 1, n))
        outside = top[few] if few < n else -jnp.inf
        picks = jnp.sort(picks[:few])
        rows = similar.of(picks) * factor
        block, own = rows[:, picks], base[picks]

        def choose(inner: Any) -> Any:
            t, near, taken, order, _ = inner
            score = jnp.where(taken, -jnp.inf, own - near)
            best = jnp.argmax(score)
            # The first one is the best of all: equal ones outside have a higher index.
            ok = (t < limit) & ((score[best] > outside) | ~jnp.any(taken))
            order = order.at[jnp.where(ok, t, s.num_select)].set(
                picks[best].astype(jnp.int32), mode="drop"
            )
            near = jnp.where(ok, jnp.maximum(near, block[best]), near)
            taken = taken.at[best].set(taken[best] | ok)
            return t + ok, near, taken, order, ok & ~jnp.all(taken)

        start = t, near[picks], jnp.zeros(few, bool), order, jnp.bool_(True)
        t, _, taken, order, _ = lax.while_loop(lambda c: c[-1], choose, start)
        chosen = jnp.where(taken[:, None], rows, -_terms.LARGE)
        base = base.at[picks].set(jnp.where(taken, -jnp.inf, own))
        return t, jnp.maximum(near, jnp.max(chosen, axis=0)), base, order

    best = jnp.argmax(first).astype(jnp.int32)
    some = limit > 0
    order = jnp.full(s.num_select, n, jnp.int32)
    order = order.at[0].set(jnp.where(some, best, n))
    near, base = similar.of(best) * factor, base.at[best].set(-jnp.inf)
    state = some.astype(jnp.int32), near, base, order
    return lax.while_loop(lambda c: c[0] < limit, compare, state)[3]
