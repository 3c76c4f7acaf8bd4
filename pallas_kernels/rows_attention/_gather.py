"""The second kernel of `rows_attention`: what the parts of the cache gave, weighed."""

from __future__ import annotations

from typing import Any

from pallas_kernels.rows_attention._case import LANES, NONE, Case, capped


def gather(asm: Any, c: Case, *refs: Any) -> None:
    """`refs`: results, maxima and sums of parts, slots, then y; no shared memory.

    A thread makes 8 features.
    """
    parts, stats, slots, y = map(asm.pointer, refs)
    Int, Float = asm.Int, asm.Float
    item = asm.special("ctaid.x") * LANES + asm.special("tid.x")
    cells = c.features // 8
    count = c.batch * c.tokens * c.heads * cells
    good = item.less(count)
    item = capped(asm, item, count)
    cell, line = item % cells, item // cells
    head, line = line % c.heads, line // c.heads
    token, row = line % c.tokens, line // c.tokens
    query = token * c.group + head % c.group
    place = (row * c.kv_heads + head // c.group) * (c.splits * c.rows) + query
    (start,) = asm.load(slots, row, 4, words=1, hint="global")
    live = (start + (c.tokens + c.part - 1)) // c.part
    peak, total = Float.of(NONE), Float.of(0.0)
    sums = [Float.of(0.0)] * 8
    for begin in range(0, c.splits, 8):
        some = []
        for split in range(begin, min(begin + 8, c.splits)):
            there = Int.of(split).less(live)
            at = place + asm.select(there, Int.of(split), live - 1) * c.rows
            top, weight = asm.load(stats, at, 8, words=2, hint="global")
            words = [
                w.as_float()
                for i in range(2)
                for w in asm.load(
                    parts, (at * cells + cell) * 2 + i, 16, words=4, hint="global"
                )
            ]
            top = asm.select(there, top.as_float(), Float.of(NONE))
            weight = asm.select(there, weight.as_float(), Float.of(0.0))
            some.append((top, weight, words, there))
        higher = peak
        for top, *_ in some:
            higher = asm.maximum(higher, top)
        fade = asm.exp2(peak - higher)
        total = total * fade
        sums = [s * fade for s in sums]
        for top, weight, words, there in some:
            by = asm.select(there, asm.exp2(top - higher), Float.of(0.0))
            total = total + weight * by
            sums = [s + v * by for s, v in zip(sums, words, strict=True)]
        peak = higher
    # Who sees nothing gets zeros.
    safe = asm.select(Int.of(0).less(total.as_int()), total, Float.of(1.0))
    sums = [s / safe for s in sums]
    words = [asm.pack_bf16(*sums[i : i + 2]) for i in range(0, 8, 2)]
    with asm.when(good):
        asm.store_words_global(y, item, 16, words)
