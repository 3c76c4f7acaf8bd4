"""The kernels of `rows_attention` for Hopper: attention by parts of the cache, and sums.

A thread block takes some queries of one head of keys and some slots of the cache, a
warp 16 of these or a few times as many. Keys, values and queries go from memory into
the operands of `mma.sync`, eight neighbours in a load: sums do not depend on the order
of features, and the columns of a result may be any. New keys and values are computed by
whoever takes their slots, used at once, and written to the cache by the way, so that
nothing waits for that. Which slots are summed together depends on nothing else.
`gather` then weighs what the parts of the cache gave.
"""

from __future__ import annotations

import dataclasses
from typing import Any

_LOG2E = 1.4426950408889634
_NONE = -1e30  # the logit of what is not seen
WARPS = 4
LANES = 32 * WARPS
SPLITS = 32  # at most, of a cache


@dataclasses.dataclass(frozen=True)
class Case:
    """What the kernels are specialised for.

    Attributes:
      batch, tokens, heads, kv_heads, features, slots: B, T, H, Hkv, D and S.
      held: entries that go before the new ones, at most; 0 without.
      norms: whether there are scales of norms of queries and keys.
      eps: of those.
      runs: of 16 slots that a warp takes.
      tiles: of 16 queries that a thread block takes, at most.
    """

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    features: int
    slots: int
    held: int
    norms: bool
    eps: float
    runs: int
    tiles: int

    @property
    def group(self) -> int:
        """Query heads of a head of keys."""
        return self.heads // self.kv_heads

    @property
    def queries(self) -> int:
        """Of a head of keys."""
        return self.tokens * self.group

    @property
    def own(self) -> int:
        """Tiles of a thread block."""
        return min(self.tiles, -(-self.queries // 16))

    @property
    def shares(self) -> int:
        """Thread blocks that divide the queries."""
        return -(-self.queries // (16 * self.own))

    @property
    def rows(self) -> int:
        """Queries, with those that fill the last tiles."""
        return 16 * self.own * self.shares

    @property
    def part(self) -> int:
        """Slots of a thread block."""
        return 16 * WARPS * self.runs

    @property
    def splits(self) -> int:
        """Parts of the cache."""
        return -(-self.slots // self.part)

    @property
    def columns(self) -> int:
        """Of queries, keys and values."""
        return (self.heads + 2 * self.kv_heads) * self.features

    @property
    def grid(self) -> int:
        """Thread blocks of the attention."""
        return self.batch * self.kv_heads * self.shares * self.splits

    @property
    def stride(self) -> int:
        """Words of a query in shared memory."""
        return self.features + 4

    @property
    def smem_words(self) -> int:
        """Of results, maxima and sums."""
        return WARPS * 16 * self.own * (self.stride + 2)

    @property
    def gather_grid(self) -> int:
        """Thread blocks of `gather`."""
        return -(-self.batch * self.tokens * self.heads * self.features // (8 * LANES))


def capped(asm: Any, i: Any, count: int) -> Any:
    """`i`, or the last one."""
    return asm.select(i.less(count), i, asm.Int.of(count - 1))


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
    Int, Float = asm.Int, asm.Float
    thread, block = asm.special("tid.x"), asm.special("ctaid.x")
    lane, warp = thread & 31, thread >> 5
    g, t = lane >> 2, lane & 3
    split, block = block % c.splits, block // c.splits
    share, block = block % c.shares, block // c.shares
    head, row = block % c.kv_heads, block // c.kv_heads
    (start,) = asm.load(slots, row, 4, words=1, hint="global")
    end = start + c.tokens
    count = asm.load(valid, row, 4, words=1, hint="global")[0] if c.held else Int.of(0)
    held_from = start - count
    chunks, half = c.features // 32, c.features // 64
    cells = c.features // 8  # of 16 bytes, of a head
    store_row = row * c.kv_heads + head
    first_slot = split * c.part + warp * (16 * c.runs)

    def of_token(token: Any, column: Any) -> Any:
        """Cell of qkv where a head begins; `column` counts heads."""
        return (row * c.tokens + token) * (c.columns // 8) + column * cells

    def floats(words: list[Any]) -> list[Any]:
        return [v for word in words for v in asm.unpack_bf16(word)]

    def packed(wide: list[Any]) -> list[Any]:
        return [asm.pack_bf16(*wide[i : i + 2]) for i in range(0, len(wide), 2)]

    def normed(words: list[Any], scale: Any) -> list[Any]:
        """A head divided by its root mean square; all lanes together."""
        if scale is None:
            return words
        wide = [floats(w) for w in words]
        square = Float.of(0.0)
        for v in (v for some in wide for v in some):
            square = square + v * v
        for distance in (1, 2):
            square = square + asm.shuffle_xor(square, distance)
        factor = asm.rsqrt(square * (1.0 / c.features) + c.eps)
        out = []
        for chunk, some in enumerate(wide):
            by = floats(
                asm.load(scale, t + 4 * chunk, 16, words=4, hint="global.nc")
            )
            made = floats(packed([v * factor for v in some]))
            out.append(packed([v * s for v, s in zip(made, by, strict=True)]))
        return out

    def angles(token: Any) -> list[Any]:
        """For each chunk of the first half of a head: cosines, sines."""
        at = (row * c.tokens + token) * (c.features // 2)
        out = []
        for chunk in range(half):
            by = []
            for table in (cos, sin):
                cell = (at + (t * 8 + 32 * chunk)) >> 2
                found = [
                    asm.load(table, cell + i, 16, words=4, hint="global.nc")
                    for i in range(2)
                ]
                by.append([w.as_float() for some in found for w in some])
            out.append(by)
        return out

    def turned(words: list[Any], by: list[Any]) -> list[Any]:
        """A head turned by the angles of its position."""
        out: list[Any] = [None] * chunks
        for chunk in range(half):
            a, b = floats(words[chunk]), floats(words[chunk + half])
            new = [
                (p * x - q * y, q * x + p * y)
                for p, q, x, y in zip(a, b, *by[chunk], strict=True)
            ]
            out[chunk] = packed([p for p, _ in new])
            out[chunk + half] = packed([q for _, q in new])
        return out

    with asm.when((split * c.part).less(end)):

        def source(slot: Any, column: int, cache: Any, ahead: Any) -> Any:
            """Where the head of a slot begins, and whether it is new or held."""
            fresh = asm.both((start - 1).less(slot), slot.less(end))
            token = asm.select(fresh, slot - start, Int.of(0))
            inside = capped(asm, slot, c.slots)
            at = (store_row * c.slots + inside) * cells
            pointer = asm.select_pointer(
                fresh,
                asm.offset(qkv, of_token(token, head + column), 16),
                asm.offset(cache, at, 16),
            )
            moved = fresh
            if c.held:
                old = asm.both((held_from - 1).less(slot), slot.less(start))
                entry = asm.select(old, slot - held_from, Int.of(0))
                other = (store_row * c.held + entry) * cells
                pointer = asm.select_pointer(
                    old, asm.offset(ahead, other, 16), pointer
                )
                moved = asm.either(fresh, old)
            return pointer, fresh, token, moved, at

        wanted = share.less(1)

        # Keys: a thread has 8 features in each 32 of one key of eight.
        sources = [
            source(first_slot + g + 8 * j, c.heads, keys, hk)
            for j in range(2 * c.runs)
        ]
        raw = [
            [asm.load(s[0], t + 4 * i, 16, words=4, hint="global") for i in range(chunks)]
            for s in sources
        ]
        # Values: all of 8 features of four keys of each 16.
        at_keys = [
            source(
                first_slot + (t * 2 + 16 * run + near), c.heads + c.kv_heads, values, hv
            )
            for run in range(c.runs)
            for near in (0, 1, 8, 9)
        ]
        worth = [
            [asm.load(s[0], g + 8 * i, 16, words=4, hint="global") for i in range(half)]
            for s in at_keys
        ]
        queries = []
        places = []
        for tile in range(c.own):
            two = []
            for i in range(2):
                place = share * (16 * c.own) + g + (16 * tile + 8 * i)
                place = capped(asm, place, c.queries)
                token, member = place // c.group, place % c.group
                at = of_token(token, head * c.group + member)
                words = [
                    asm.load(qkv, at + t + 4 * n, 16, words=4, hint="global")
                    for n in range(chunks)
                ]
                two.append((words, angles(token)))
                places.append(token)
            queries.append(two)
        around = [angles(s[2]) for s in sources]
        told = []
        for tile in range(c.own):
            for j in range(2 * c.runs):
                for i in range(4):
                    slot = first_slot + (t * 2 + (8 * j + i % 2))
                    at = row * c.tokens + places[2 * tile + i // 2]
                    at = at * c.slots + capped(asm, slot, c.slots)
                    told.append((asm.load_byte(mask, at, "global"), slot))
        queries = [
            [turned(normed(words, q_norm), by) for words, by in two] for two in queries
        ]

        logits = []
        for j, (_, fresh, _, moved, at) in enumerate(sources):
            words = [w for some in raw[j] for w in some]
            plain = normed(raw[j], k_norm)

            def new(plain: Any = plain, by: Any = around[j]) -> list[Any]:
                return [w for some in turned(plain, by) for w in some]

            words = asm.choose(fresh, new, lambda words=words: words)
            own = [words[4 * i : 4 * i + 4] for i in range(chunks)]
            with asm.when(asm.both(moved, wanted)):
                for i in range(chunks):
                    asm.store_words_global(keys, at + t + 4 * i, 16, own[i])
            column = []
            for two in queries:
                acc = [Float.of(0.0)] * 4
                for i in range(chunks):
                    for s in range(2):
                        p, q = two[0][i][2 * s : 2 * s + 2], two[1][i][2 * s : 2 * s + 2]
                        acc = asm.mma_bf16(
                            acc, [p[0], q[0], p[1], q[1]], own[i][2 * s : 2 * s + 2]
                        )
                column.append(acc)
            logits.append(column)
        for s, words in zip(at_keys, worth, strict=True):
            with asm.when(asm.both(s[3], wanted)):
                for i in range(half):
                    asm.store_words_global(values, s[4] + g + 8 * i, 16, words[i])

        # [tile][two rows]: the largest logit of the warp, and the sum of weights.
        factor = c.features**-0.5 * _LOG2E
        peaks, totals, outs = [], [], []
        for tile in range(c.own):
            peak = [Float.of(_NONE)] * 2
            shown: list[list[Any]] = []
            for j in range(2 * c.runs):
                some = []
                for i in range(4):
                    byte, slot = told[(tile * 2 * c.runs + j) * 4 + i]
                    seen = asm.both(Int.of(0).less(byte), slot.less(c.slots))
                    value = logits[j][tile][i] * factor
                    value = asm.select(seen, value, Float.of(_NONE))
                    peak[i // 2] = asm.maximum(peak[i // 2], value)
                    some.append((seen, value))
                shown.append(some)
            for i in range(2):
                for distance in (1, 2):
                    peak[i] = asm.maximum(peak[i], asm.shuffle_xor(peak[i], distance))
            total = [Float.of(0.0)] * 2
            weights: list[list[Any]] = []
            for some in shown:
                made = []
                for i, (seen, value) in enumerate(some):
                    weight = asm.exp2(value - peak[i // 2])
                    weight = asm.select(seen, weight, Float.of(0.0))
                    total[i // 2] = total[i // 2] + weight
                    made.append(weight)
                weights.append(made)
            for i in range(2):
                for distance in (1, 2):
                    total[i] = total[i] + asm.shuffle_xor(total[i], distance)
            out = [[Float.of(0.0)] * 4 for _ in range(8 * half)]
            for run in range(c.runs):
                low, high = weights[2 * run], weights[2 * run + 1]
                a = [asm.pack_bf16(*p[i : i + 2]) for p in (low, high) for i in (0, 2)]
                four = worth[4 * run : 4 * run + 4]
                for n in range(8 * half):
                    b = [
                        _couple(*(four[k + i][n // 8][n % 8 // 2] for i in range(2)), n)
                        for k in (0, 2)
                    ]
                    out[n] = asm.mma_bf16(out[n], a, b)
            peaks.append(peak)
            totals.append(total)
            outs.append(out)

        # Of the warps together: [warps, rows, stride], then maxima, then sums.
        rows = 16 * c.own
        tops = WARPS * rows * c.stride
        sums = tops + WARPS * rows
        for tile in range(c.own):
            for i in range(2):
                at = warp * rows + g + (tops + 16 * tile + 8 * i)
                asm.store(smem, at, 4, peaks[tile][i], "shared.f32")
        asm.barrier()
        for tile in range(c.own):
            for i in range(2):
                query = g + (16 * tile + 8 * i)
                top = Float.of(_NONE)
                for w in range(WARPS):
                    (bits,) = asm.load(
                        smem, query + (tops + w * rows), 4, words=1, hint="shared"
                    )
                    top = asm.maximum(top, bits.as_float())
                fade = asm.exp2(peaks[tile][i] - top)
                at = warp * rows + query
                asm.store(smem, at + sums, 4, totals[tile][i] * fade, "shared.f32")
                base = at * c.stride + t * 16
                for e in range(half):
                    # Features 64 e + 16 t + (0 ... 7) in one, 8 further in the other.
                    line = [
                        (outs[tile][8 * e + n][2 * i + far] * fade).as_int()
                        for far in range(2)
                        for n in range(8)
                    ]
                    for n in range(4):
                        to = base + (64 * e + 4 * n)
                        asm.store_words(smem, to, line[4 * n : 4 * n + 4])
        asm.barrier()

        place = (store_row * c.splits + split) * c.rows + share * rows
        quads = c.features // 4
        for begin in range(0, rows * quads, LANES):
            item = thread + begin
            query, quad = item // quads, item % quads
            total_ = [Float.of(0.0)] * 4
            for w in range(WARPS):
                cell = ((query + w * rows) * c.stride + quad * 4) >> 2
                some = asm.load(smem, cell, 16, words=4, hint="shared")
                total_ = [
                    a + b.as_float() for a, b in zip(total_, some, strict=True)
                ]
            asm.store_words_global(
                parts,
                (place + query) * quads + quad,
                16,
                [v.as_int() for v in total_],
            )
        query = capped(asm, thread, rows)
        top, weight = Float.of(_NONE), Float.of(0.0)
        for w in range(WARPS):
            (bits,) = asm.load(
                smem, query + (tops + w * rows), 4, words=1, hint="shared"
            )
            top = asm.maximum(top, bits.as_float())
            (bits,) = asm.load(
                smem, query + (sums + w * rows), 4, words=1, hint="shared"
            )
            weight = weight + bits.as_float()
        with asm.when(thread.less(rows)):
            at = (place + query) * 2
            asm.store(stats, at, 4, top, "global.f32")
            asm.store(stats, at + 1, 4, weight, "global.f32")


def _couple(low: Any, high: Any, n: int) -> Any:
    """The n-th halves of two words, of which the even ones are low, in one."""
    if n % 2:
        return (low >> 16) | (high & 0xFFFF0000)
    return (low & 0xFFFF) | (high << 16)


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
    peak, total = Float.of(_NONE), Float.of(0.0)
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
            top = asm.select(there, top.as_float(), Float.of(_NONE))
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
