"""Greedy selection in one launch on Hopper GPUs (H100, H200), by Pallas' Mosaic.

A thread block takes one row of the batch and keeps its scores in registers for all of
the choices. A step is a chain of latencies: a row of the Gram matrix from the L2 cache
(the longest), the maximum within a warp by integer `redux`, one exchange through shared
memory with one barrier, the maximum over warps, which every warp finds by itself.

While a row is on its way, the row of the second best candidate is fetched too: scores
only fall, so it is likely to be the next choice, and then lies in the L1 cache.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.greedy_select import _terms
from pallas_kernels.greedy_select._terms import Settings

# Scores of a thread, in vectors of four: base and nearest of each stay in registers.
_VECTORS = 8
_MOST = 512 * 4 * _VECTORS
_LARGE = 0x7FFFFFFF


@dataclasses.dataclass(frozen=True)
class Shape:
    """Everything static about one kernel.

    Attributes:
      batch, n, num_select: of the call; n is a multiple of 4.
      factor: of similarities.
      warps: of a thread block, 4, 8 or 16.
      early: how the row of the runner-up is fetched early: "copy" copies words of it to
        shared memory, through the L1 cache; "prefetch" asks for them; "" does not.
    """

    batch: int
    n: int
    num_select: int
    factor: float
    warps: int
    early: str = "copy"

    @property
    def vectors(self) -> int:
        """Vectors of four scores that a thread has."""
        return -(-self.n // (128 * self.warps))

    @property
    def touches(self) -> int:
        """Words of a row that a thread fetches early."""
        return -(-self.n // (256 * self.warps))


def unsupported(batch: int, n: int, settings: Settings) -> str | None:
    """Why this cannot run here, or None."""
    del batch
    return _terms.one_launch(n, settings, _MOST)


def select(
    gram: jax.Array,
    importance: jax.Array,
    valid: jax.Array,
    limit: jax.Array,
    settings: Settings,
    **tuning: Any,
) -> jax.Array:
    """See `_terms`; `tuning` overrides fields of `Shape`."""
    batch, n = importance.shape
    first, base = _terms.mmr_start(importance, valid, settings)
    factor = _terms.mmr_factor(settings)
    rest = -n % 4  # rows are read by 16 bytes
    if rest:
        gram = jnp.pad(gram, ((0, 0), (0, rest), (0, rest)))
        first, base = (
            jnp.pad(x, ((0, 0), (0, rest)), constant_values=-jnp.inf)
            for x in (first, base)
        )
    settled = {"warps": warps_for(n + rest), **tuning}
    shape = Shape(batch, n + rest, settings.num_select, factor, **settled)
    order = build(shape)(gram, first, base, limit)
    return jnp.minimum(order, n) if rest else order


def warps_for(n: int) -> int:
    """Warps that share n scores: few, as every one of them takes part in each step."""
    return next((w for w in (4, 8) if n <= 128 * w * 3), 16)


def scratch(c: Shape) -> tuple[int, int]:
    """Words of shared memory.

    The best of every warp, twice: one barrier a step then is enough. And words that are
    fetched early, which nothing reads.
    """
    return 4 * c.warps, -(-c.n // 8)


@functools.lru_cache(maxsize=512)
def build(c: Shape) -> Callable[..., jax.Array]:
    """The kernel `(gram, first, base, limit) -> order`."""

    def body(*refs: Any) -> None:
        from pallas_kernels.greedy_select import _lanes

        types = (plgpu.RefType(),) * 7
        plgpu.inline_mgpu(arg_types=types)(lambda _, *inner: emit(c, _lanes, *inner))(
            *refs
        )

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((c.batch, c.num_select), jnp.int32),
        grid=(c.batch,),
        grid_names=("row",),
        num_threads=c.warps // 4,
        thread_name="group",
        scratch_types=tuple(plgpu.SMEM((s,), jnp.int32) for s in scratch(c)),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )


class _Block:
    """The place of a thread and what it reads."""

    def __init__(self, c: Shape, m: Any, slots: Any) -> None:
        self.c, self.m, self.slots = c, m, slots
        self.thread = m.special("tid.x")
        self.warp, self.lane = self.thread >> 5, self.thread & 31
        self.starts, self.inside = [], []
        for v in range(c.vectors):
            start = self.warp * (128 * c.vectors) + self.lane * 4 + 128 * v
            inside = start.less(c.n)
            # What is past the end reads the last vector again; its scores are -inf.
            self.starts.append(m.select(inside, start, m.Int.of(c.n - 4)))
            self.inside.append(inside)

    def read(self, row: Any) -> list[Any]:
        """The scores' places of a row of n."""
        words = [
            word
            for start in self.starts
            for word in self.m.load(row, start, 4, words=4, hint="global.nc")
        ]
        return [word.as_float() for word in words]

    def masked(self, values: list[Any]) -> list[Any]:
        never = self.m.Float.of(float("-inf"))
        return [
            self.m.select(self.inside[i // 4], value, never)
            for i, value in enumerate(values)
        ]

    def columns(self) -> list[Any]:
        return [start + i for start in self.starts for i in range(4)]

    def best_here(self, scores: list[Any]) -> tuple[Any, Any]:
        """Largest score of a thread and its column, the lowest of equal ones."""
        m = self.m
        found = list(zip(scores, self.columns(), strict=True))
        while len(found) > 1:
            pairs = [
                (m.larger(a, b), m.select(m.exceeds(b, a), j, i))
                for (a, i), (b, j) in zip(found[::2], found[1::2], strict=False)
            ]
            found = pairs + found[2 * len(pairs) :]
        return found[0]

    def best(self, scores: list[Any], t: Any) -> tuple[Any, Any, Any]:
        """The best column, and key and column of the best of the lane's warp."""
        m, warps = self.m, self.c.warps
        score, column = self.best_here(scores)
        bits = score.as_int()
        # Integers that ascend as the numbers do; a score is never -0.
        key = bits ^ (bits.divided(31) & _LARGE)
        top, column = self._over_warp(key, column)
        half = (t & 1) * warps
        with m.when(self.lane.equals(0)):
            m.store_pair(self.slots, half + self.warp, top, column)
        m.barrier()
        place = half + (self.lane & (warps - 1))
        keys, columns = m.load(self.slots, place, 8, words=2, hint="shared")
        return self._over_warp(keys, columns)[1], keys, columns

    def _over_warp(self, key: Any, column: Any) -> tuple[Any, Any]:
        """The largest key of the lanes, with the lowest column that has it."""
        m = self.m
        top = m.highest(key)
        return top, m.lowest(m.select(key.equals(top), column, m.Int.of(_LARGE)))

    def second(self, best: Any, keys: Any, columns: Any) -> Any:
        """The best column of another warp than that of the best."""
        m = self.m
        lowest = m.Int.of(-_LARGE - 1)
        return self._over_warp(m.select(columns.equals(best), lowest, keys), columns)[1]


def emit(
    c: Shape,
    m: Any,
    gram: Any,
    first: Any,
    base: Any,
    limit: Any,
    order: Any,
    slots: Any,
    unread: Any,
) -> None:
    """The kernel in the words of `m`, which is `_lanes`."""
    here = _Block(c, m, m.pointer(slots))
    row = m.special("ctaid.x")
    gram, first, base = (
        m.offset(m.pointer(ref), row, 4 * size)
        for ref, size in ((gram, c.n * c.n), (first, c.n), (base, c.n))
    )
    order = m.offset(m.pointer(order), row, 4 * c.num_select)
    (count,) = m.load(m.pointer(limit), row, 4, words=1, hint="global.nc")
    threads = 32 * c.warps
    for part in range(-(-c.num_select // threads)):
        slot = here.thread + threads * part
        with m.when(slot.less(c.num_select)), m.when((count - 1).less(slot)):
            m.store(order, slot, 4, m.Int.of(c.n), "global.u32")
    scores = here.masked(here.read(first))
    base = here.masked(here.read(base))
    items = len(base)

    def choose(t: Any, scores: list[Any]) -> tuple[Any, Any, Any]:
        found = here.best(scores, t)
        with m.when(here.thread.equals(0)), m.when(t.less(count)):
            m.store(order, t, 4, found[0], "global.u32")
        return found

    def step(t: Any, best: Any, keys: Any, columns: Any, *state: Any) -> Any:
        near, base = list(state[:items]), list(state[items:])
        similar = here.read(m.offset(gram, best, 4 * c.n))
        if c.early:
            other = here.second(best, keys, columns)
            _fetch(c, here, m.offset(gram, other, 4 * c.n), m.pointer(unread))
        never = m.Float.of(float("-inf"))
        base = [
            m.select(column.equals(best), never, x)
            for column, x in zip(here.columns(), base, strict=True)
        ]
        near = [
            m.larger(x, m.times(y, c.factor))
            for x, y in zip(near, similar, strict=True)
        ]
        scores = [m.minus(x, y) for x, y in zip(base, near, strict=True)]
        return *choose(t, scores), *near, *base

    near = [m.Float.of(-_terms.LARGE)] * items
    m.span(1, count, step, [*choose(m.Int.of(0), scores), *near, *base])
    if c.early == "copy":
        m.wait_for_copies()


def _fetch(c: Shape, here: _Block, row: Any, unread: Any) -> None:
    """Brings a row into the L1 cache; no register waits for it."""
    m, last = here.m, (c.n - 1) // 8
    for part in range(c.touches):
        # A word of every 32 bytes; past the end the last ones again.
        sector = here.thread + 32 * c.warps * part
        sector = m.select(sector.less(last), sector, m.Int.of(last))
        if c.early == "copy":
            m.start_copy(unread, sector, m.offset(row, sector, 32))
        else:
            m.prefetch(m.offset(row, sector, 32))


__all__ = ["Shape", "build", "emit", "scratch", "select", "unsupported", "warps_for"]
