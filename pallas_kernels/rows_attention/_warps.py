"""The first kernel of `rows_attention` for Hopper: attention by parts of the cache.

A thread block takes some queries of one head of keys and some slots of the cache, a
warp 16 of these or a few times as many. New keys and values are computed by whoever
takes their slots, used at once, and written to the cache by the way, so that nothing
waits for that. Which slots are summed together depends on nothing else.
"""

from __future__ import annotations

from typing import Any

from pallas_kernels.rows_attention._case import LANES, NONE, WARPS, Case, capped
from pallas_kernels.rows_attention._operands import Operands, Source, Words, couple

_LOG2E = 1.4426950408889634


def attend_part(asm: Any, c: Case, *refs: Any) -> None:
    """`refs`: qkv, cos, sin, mask, slots, k, v, [held k, v, valid], [norms of queries
    and keys], then results of parts, their maxima and sums, and shared memory.

    k and v are read and written.
    """
    qkv, cos, sin, mask, slots, keys, values, *rest, parts, stats, smem = map(
        asm.pointer, refs
    )
    q_norm = k_norm = None
    if c.norms:
        *rest, q_norm, k_norm = rest
    hk, hv, valid = rest or (None, None, None)
    o = Operands(asm, c, (qkv, cos, sin, slots), valid)
    with asm.when(o.live):
        # All that is needed is asked for before anything waits.
        key_sources, value_sources = o.keys(keys, hk), o.values(values, hv)
        raw = [o.words(s.pointer, o.t, o.chunks, 4) for s in key_sources]
        worth = [o.words(s.pointer, o.g, o.half, 8) for s in value_sources]
        tokens, asked = o.queries()
        around = [o.angles(token) for token in tokens]
        fresh = [o.angles(s.token) for s in key_sources]
        told = _told(o, mask, tokens)
        queries = [
            o.turned(o.normed(words, q_norm), by)
            for words, by in zip(asked, around, strict=True)
        ]
        known = [
            _key(o, s, words, o.normed(words, k_norm), by)
            for s, words, by in zip(key_sources, raw, fresh, strict=True)
        ]
        # Others with the same head have the same entries.
        mine = o.share.less(1)
        for s, words in zip(key_sources, known, strict=True):
            _put(o, s, mine, keys, words, o.t, 4)
        for s, words in zip(value_sources, worth, strict=True):
            _put(o, s, mine, values, words, o.g, 8)
        found = []
        for tile in range(c.own):
            two = queries[2 * tile : 2 * tile + 2]
            logits = [_logits(o, two, key) for key in known]
            found.append(_weighed(o, logits, told[tile], worth))
        _together(o, found, parts, stats, smem)


def _told(o: Operands, mask: Any, tokens: list[Any]) -> list[list[list[Any]]]:
    """Whether each logit of a lane is seen, by tile and group of 8 slots."""
    asm, c, out = o.asm, o.c, []
    for tile in range(c.own):
        groups = []
        for j in range(2 * c.runs):
            some = []
            for i in range(4):
                slot = o.first + (o.t * 2 + (8 * j + i % 2))
                at = (o.row * c.tokens + tokens[2 * tile + i // 2]) * c.slots
                byte = asm.load_byte(mask, at + capped(asm, slot, c.slots), "global")
                seen = asm.both(asm.Int.of(0).less(byte), slot.less(c.slots))
                some.append(seen)
            groups.append(some)
        out.append(groups)
    return out


def _key(
    o: Operands, s: Source, words: list[Words], normed: list[Words], by: Any
) -> list[Words]:
    """A key as it stands in the cache: new ones are divided and turned."""
    flat = o.asm.choose(
        s.fresh,
        lambda: [w for some in o.turned(normed, by) for w in some],
        lambda: [w for some in words for w in some],
    )
    return [flat[4 * i : 4 * i + 4] for i in range(o.chunks)]


def _put(
    o: Operands,
    s: Source,
    mine: Any,
    cache: Any,
    words: list[Words],
    at: Any,
    step: int,
) -> None:
    """Writes an entry that is new or held."""
    with o.asm.when(o.asm.both(s.moved, mine)):
        for i, four in enumerate(words):
            o.asm.store_words_global(cache, s.at + at + step * i, 16, four)


def _logits(o: Operands, two: list[list[Words]], key: list[Words]) -> list[Any]:
    """Of 16 queries and 8 keys, without their factor."""
    acc = [o.asm.Float.of(0.0)] * 4
    for i in range(o.chunks):
        for s in range(2):
            p, q, k = (x[i][2 * s : 2 * s + 2] for x in (*two, key))
            acc = o.asm.mma_bf16(acc, [p[0], q[0], p[1], q[1]], k)
    return acc


def _weighed(
    o: Operands, logits: list[Any], told: list[list[Any]], worth: list[list[Words]]
) -> tuple[list[Any], list[Any], list[list[Any]]]:
    """Of the warp: the largest logit and the sum of weights of both rows, and values
    by these weights, for each group of columns.
    """
    asm, c, Float = o.asm, o.c, o.asm.Float
    factor = c.features**-0.5 * _LOG2E
    shown = [
        [
            asm.select(seen, x * factor, Float.of(NONE))
            for x, seen in zip(some, sees, strict=True)
        ]
        for some, sees in zip(logits, told, strict=True)
    ]
    peak, total = [Float.of(NONE)] * 2, [Float.of(0.0)] * 2
    for some in shown:
        for i, x in enumerate(some):
            peak[i // 2] = asm.maximum(peak[i // 2], x)
    for distance in (1, 2):
        peak = [asm.maximum(x, asm.shuffle_xor(x, distance)) for x in peak]
    weights = []
    for some, sees in zip(shown, told, strict=True):
        made = []
        for i, (x, seen) in enumerate(zip(some, sees, strict=True)):
            weight = asm.exp2(x - peak[i // 2])
            made.append(asm.select(seen, weight, Float.of(0.0)))
            total[i // 2] = total[i // 2] + made[i]
        weights.append(made)
    for distance in (1, 2):
        total = [x + asm.shuffle_xor(x, distance) for x in total]
    out = [[Float.of(0.0)] * 4 for _ in range(8 * o.half)]
    for run in range(c.runs):
        pair = weights[2 * run : 2 * run + 2]
        a = [asm.pack_bf16(*p[i : i + 2]) for p in pair for i in (0, 2)]
        four = worth[4 * run : 4 * run + 4]
        for n in range(8 * o.half):
            near = [words[n // 8][n % 8 // 2] for words in four]
            b = [couple(near[k], near[k + 1], n) for k in (0, 2)]
            out[n] = asm.mma_bf16(out[n], a, b)
    return peak, total, out


def _together(o: Operands, found: list[Any], parts: Any, stats: Any, smem: Any) -> None:
    """What the warps have, summed and written."""
    asm, c, Float = o.asm, o.c, o.asm.Float
    thread = asm.special("tid.x")
    # [warps, rows, stride], then maxima, then sums.
    rows = 16 * c.own
    tops = WARPS * rows * c.stride
    sums = tops + WARPS * rows

    def top_of(query: Any) -> Any:
        top = Float.of(NONE)
        for w in range(WARPS):
            at = query + (tops + w * rows)
            top = asm.maximum(top, shared(at))
        return top

    def shared(at: Any) -> Any:
        return asm.load(smem, at, 4, words=1, hint="shared")[0].as_float()

    of_rows = [
        (tile, i, o.g + (16 * tile + 8 * i)) for tile in range(c.own) for i in range(2)
    ]
    for tile, i, query in of_rows:
        at = o.warp * rows + query + tops
        asm.store(smem, at, 4, found[tile][0][i], "shared.f32")
    asm.barrier()
    for tile, i, query in of_rows:
        peak, total, out = found[tile]
        fade = asm.exp2(peak[i] - top_of(query))
        at = o.warp * rows + query
        asm.store(smem, at + sums, 4, total[i] * fade, "shared.f32")
        for e in range(o.half):
            # Features 64 e + 16 t + (0 ... 7) in one word, 8 further in the other.
            line = [
                (out[8 * e + n][2 * i + far] * fade).as_int()
                for far in range(2)
                for n in range(8)
            ]
            for n in range(0, 16, 4):
                to = at * c.stride + o.t * 16 + (64 * e + n)
                asm.store_words(smem, to, line[n : n + 4])
    asm.barrier()

    place = (o.store_row * c.splits + o.split) * c.rows + o.share * rows
    quads = c.features // 4
    for begin in range(0, rows * quads, LANES):
        item = thread + begin
        query, quad = item // quads, item % quads
        added = [Float.of(0.0)] * 4
        for w in range(WARPS):
            cell = ((query + w * rows) * c.stride + quad * 4) >> 2
            some = asm.load(smem, cell, 16, words=4, hint="shared")
            added = [a + b.as_float() for a, b in zip(added, some, strict=True)]
        words = [v.as_int() for v in added]
        asm.store_words_global(parts, (place + query) * quads + quad, 16, words)
    query = capped(asm, thread, rows)
    weight = Float.of(0.0)
    for w in range(WARPS):
        weight = weight + shared(query + (sums + w * rows))
    top = top_of(query)
    with asm.when(thread.less(rows)):
        at = (place + query) * 2
        asm.store(stats, at, 4, top, "global.f32")
        asm.store(stats, at + 1, 4, weight, "global.f32")
