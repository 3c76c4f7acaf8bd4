"""The kernel of `top_logits` for Hopper, launched for parts of rows and for what they
gave.

Threads hold a few numbers each. A warp takes its largest k times over: the largest of
each thread, the largest of these, and the first place where it stands; that one is
struck out. What four warps have found goes through shared memory, and every warp finds
the largest of it in the same way.
"""

from __future__ import annotations

import dataclasses
from typing import Any

WARPS = 4
_THREADS = 32 * WARPS
_LOADS = 3  # of four numbers that a thread of the first launch makes
MOST_LOADS = 8  # of the second
_STRUCK, _NOBODY = -(2**31), 2**31 - 1
_LOWEST = -3.0e38  # stands for the largest of nothing, and can be subtracted
_LOG2E, _LN2 = 1.4426950408889634, 0.6931471805599453


@dataclasses.dataclass(frozen=True)
class Case:
    """What a launch is specialised for.

    Attributes:
      rows, n: of numbers; `n` is a multiple of 4.
      k: numbers wanted, at most 32.
      log_probs: sum exponentials as well, for logarithms of probabilities.
      offset: add a number to those of each row.
      first: whether the numbers come alone, not with ids and sums of parts.
      blocks: thread blocks of a row.
      loads: of four numbers that a thread makes.
      parts: of a row, whose sums the second launch adds.
    """

    rows: int
    n: int
    k: int
    log_probs: bool
    offset: bool
    first: bool
    blocks: int
    loads: int
    parts: int = 0

    @property
    def smem_words(self) -> int:
        """Of numbers and ids, and of maxima and sums behind them."""
        return 2 * WARPS * (self.k + 1)


def stages(
    rows: int, n: int, k: int, *, log_probs: bool = False, offset: bool = False
) -> tuple[Case, Case]:
    """Both launches."""
    blocks = -(-n // (4 * _LOADS * _THREADS))
    blocks += -blocks % 4  # so that what they give is a multiple of 4
    loads = -(-blocks * k // (4 * _THREADS))
    return (
        Case(rows, n, k, log_probs, False, True, blocks, _LOADS),
        Case(rows, blocks * k, k, log_probs, offset, False, 1, loads, blocks),
    )


def emit(asm: Any, c: Case, *refs: Any) -> None:
    """`refs`: x, or what the first launch gave; then values, ids and, of the first with
    `log_probs`, maxima and sums of parts; then shared memory. An `offset` is before the
    values.
    """
    given, smem = list(map(asm.pointer, refs[:-1])), asm.pointer(refs[-1])
    thread, block = asm.special("tid.x"), asm.special("ctaid.x")
    lane, warp = thread & 31, thread >> 5
    numbers = given.pop(0)
    names = None if c.first else given.pop(0)
    sums = not c.first and c.log_probs
    before = [given.pop(0), given.pop(0)] if sums else []
    offset = given.pop(0) if c.offset else None

    floats, keys, ids = _own(asm, c, numbers, names, thread, block)
    kept, found, top = _strongest(asm, c, lane, keys, ids)
    if c.log_probs and c.first:
        _share_sum(asm, c, smem, floats, top, lane, warp)
    with asm.when(lane.less(c.k)):
        asm.store(smem, warp * c.k + lane, 4, kept, "shared.u32")
        asm.store(smem, warp * c.k + lane + WARPS * c.k, 4, found, "shared.u32")
    asm.barrier()

    kept, found, _ = _strongest(asm, c, lane, *_shared(asm, c, smem, lane))
    # A part with fewer numbers than k gives others that nobody has.
    none = kept.equals(asm.Int.of(_STRUCK))
    best = asm.select(none, asm.Float.of(-float("inf")), _number(kept))
    if c.log_probs and c.first:
        peak, total = _sum_of_block(asm, c, smem)
    if sums:
        peak, total = _sum_of_parts(asm, c, before, lane, block // c.blocks)
        best = best - peak - asm.log2(_over_lanes(asm, total)) * _LN2
    if offset is not None:
        (more,) = asm.load(offset, block // c.blocks, 4, words=1, hint="global")
        best = best + more.as_float()
    with asm.when(asm.both(warp.equals(0), lane.less(c.k))):
        at = block * c.k + lane
        asm.store(given[0], at, 4, best, "global.f32")
        asm.store(given[1], at, 4, found, "global.u32")
    if c.log_probs and c.first:
        with asm.when(thread.equals(0)):
            asm.store(given[2], block, 4, peak, "global.f32")
            asm.store(given[3], block, 4, total, "global.f32")


def _own(
    asm: Any, c: Case, numbers: Any, names: Any, thread: Any, block: Any
) -> tuple[list[Any], list[Any], list[Any]]:
    """The numbers of a thread, their keys and ids; struck out beyond the row."""
    row, part = block // c.blocks, block % c.blocks
    floats, keys, ids = [], [], []
    for i in range(c.loads):
        place = (part * c.loads + i) * _THREADS + thread
        good = place.less(c.n // 4)
        at = asm.select(good, place, asm.Int.of(0)) + row * (c.n // 4)
        words = asm.load(numbers, at, 16, words=4, hint="global")
        if names is None:
            found = [place * 4 + j for j in range(4)]
        else:
            found = asm.load(names, at, 16, words=4, hint="global")
        for word, name in zip(words, found, strict=True):
            x = word.as_float()
            floats.append(asm.select(good, x, asm.Float.of(-float("inf"))))
            keys.append(asm.select(good, _key(x), asm.Int.of(_STRUCK)))
            ids.append(asm.select(good, name, asm.Int.of(_NOBODY)))
    return floats, keys, ids


def _strongest(
    asm: Any, c: Case, lane: Any, keys: list[Any], ids: list[Any]
) -> tuple[Any, Any, Any]:
    """Keys and ids of a warp's largest, one in each lane; the key of the very first."""
    struck, nobody = asm.Int.of(_STRUCK), asm.Int.of(_NOBODY)
    kept, names, very = struck, nobody, None
    for rank in range(c.k):
        top = keys[0]
        for key in keys[1:]:
            top = asm.select(top.less(key), key, top)
        top = asm.highest(top)
        who = nobody
        for key, name in zip(keys, ids, strict=True):
            candidate = asm.select(key.equals(top), name, nobody)
            who = asm.select(candidate.less(who), candidate, who)
        who = asm.lowest(who)
        here = lane.equals(rank)
        kept, names = asm.select(here, top, kept), asm.select(here, who, names)
        very = top if very is None else very
        keys = [
            asm.select(name.equals(who), struck, key)
            for key, name in zip(keys, ids, strict=True)
        ]
    return kept, names, very


def _shared(asm: Any, c: Case, smem: Any, lane: Any) -> tuple[list[Any], list[Any]]:
    """Keys and ids that the warps have found, those of a lane."""
    keys, ids = [], []
    for start in range(0, WARPS * c.k, 32):
        place = lane + start
        good = place.less(WARPS * c.k)
        at = asm.select(good, place, asm.Int.of(0))
        (key,) = asm.load(smem, at, 4, words=1, hint="shared")
        (name,) = asm.load(smem, at + WARPS * c.k, 4, words=1, hint="shared")
        keys.append(asm.select(good, key, asm.Int.of(_STRUCK)))
        ids.append(asm.select(good, name, asm.Int.of(_NOBODY)))
    return keys, ids


def _share_sum(
    asm: Any, c: Case, smem: Any, floats: list[Any], top: Any, lane: Any, warp: Any
) -> None:
    """The maximum of a warp and its sum of exponentials, to shared memory."""
    peak = asm.maximum(_number(top), asm.Float.of(_LOWEST))
    total = asm.Float.of(0.0)
    for x in floats:
        total = total + _faded(asm, x, peak)
    total = _over_lanes(asm, total)
    behind = 2 * WARPS * c.k
    with asm.when(lane.equals(0)):
        asm.store(smem, warp + behind, 4, peak, "shared.f32")
        asm.store(smem, warp + (behind + WARPS), 4, total, "shared.f32")


def _sum_of_block(asm: Any, c: Case, smem: Any) -> tuple[Any, Any]:
    """The maximum and the sum over the warps."""
    behind = 2 * WARPS * c.k
    each = [
        [
            asm.load(smem, asm.Int.of(at + i), 4, words=1, hint="shared")[0]
            for at in (behind, behind + WARPS)
        ]
        for i in range(WARPS)
    ]
    return _joined(asm, each, lambda peak: peak)


def _sum_of_parts(
    asm: Any, c: Case, before: list[Any], lane: Any, row: Any
) -> tuple[Any, Any]:
    """The maximum of a row in all lanes, and the sum over the parts that a lane has."""
    each = []
    for start in range(0, c.parts, 32):
        good = (lane + start).less(c.parts)
        at = asm.select(good, lane + start, asm.Int.of(0)) + row * c.parts
        peak, total = (
            asm.load(ref, at, 4, words=1, hint="global")[0] for ref in before
        )
        # One that is there already, with nothing to add to it.
        each.append([peak, asm.select(good, total, asm.Int.of(0))])
    return _joined(asm, each, lambda x: _number(asm.highest(_key(x))))


def _joined(asm: Any, each: list[list[Any]], whole: Any) -> tuple[Any, Any]:
    """Of maxima and sums one; `whole` makes the maximum that of all lanes."""
    pairs = [[word.as_float() for word in pair] for pair in each]
    peak = pairs[0][0]
    for other, _ in pairs[1:]:
        peak = asm.maximum(peak, other)
    peak, total = whole(peak), asm.Float.of(0.0)
    for other, weight in pairs:
        total = total + weight * _faded(asm, other, peak)
    return peak, total


def _faded(asm: Any, x: Any, peak: Any) -> Any:
    return asm.exp2((x - peak) * _LOG2E)


def _over_lanes(asm: Any, x: Any) -> Any:
    """The sum over the lanes of a warp, in all of them."""
    for distance in (1, 2, 4, 8, 16):
        x = x + asm.shuffle_xor(x, distance)
    return x


def _key(x: Any) -> Any:
    """Signed integers in the order of the numbers; both zeros are one."""
    bits = (x + 0.0).as_int()
    return bits ^ (bits.divided(31) & 0x7FFFFFFF)


def _number(key: Any) -> Any:
    return (key ^ (key.divided(31) & 0x7FFFFFFF)).as_float()
