"""Queries, keys and values as `mma.sync` takes them, straight from memory.

A lane has eight neighbours of a row in a load. Sums do not depend on the order of
features, so word s of eight features is the lane's part of the s-th half of the 16 that
an instruction takes, for queries and keys alike; and which columns of a result a lane
has may be chosen, so that its columns of values are neighbours too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels.rows_attention._case import Case, capped

Words = list[Any]


@dataclasses.dataclass(frozen=True)
class Source:
    """A slot of the cache, and where its head is read.

    Attributes:
      pointer: to the cache, to the new entries, or to those that are held.
      fresh: whether it is new.
      token: which of the new ones.
      moved: whether it is new or held, and must be written.
      at: the cell of the cache where the head begins.
    """

    pointer: Any
    fresh: Any
    token: Any
    moved: Any
    at: Any


class Operands:
    """What a thread block reads, from the point of view of a thread.

    Attributes:
      row, head, share, split: of the thread block.
      warp, g, t: the lane is `4 g + t` of the warp.
      start, end: slots of the new entries.
      first: slot of the warp.
      chunks, half: groups of 32 features of a head, and half as many.
    """

    def __init__(self, asm: Any, c: Case, refs: tuple[Any, ...], valid: Any) -> None:
        self.asm, self.c = asm, c
        self.qkv, self.cos, self.sin, slots = refs
        thread, block = asm.special("tid.x"), asm.special("ctaid.x")
        lane, self.warp = thread & 31, thread >> 5
        self.g, self.t = lane >> 2, lane & 3
        self.split, block = block % c.splits, block // c.splits
        self.share, block = block % c.shares, block // c.shares
        self.head, self.row = block % c.kv_heads, block // c.kv_heads
        (self.start,) = asm.load(slots, self.row, 4, words=1, hint="global")
        self.end = self.start + c.tokens
        count = asm.Int.of(0)
        if c.held:
            (count,) = asm.load(valid, self.row, 4, words=1, hint="global")
        self.held_from = self.start - count
        self.chunks, self.half = c.features // 32, c.features // 64
        self.cells = c.features // 8  # of 16 bytes, of a head
        self.store_row = self.row * c.kv_heads + self.head
        self.first = self.split * c.part + self.warp * (16 * c.runs)

    @property
    def live(self) -> Any:
        """Whether any slot of the thread block is to be seen."""
        return (self.split * self.c.part).less(self.end)

    def of_token(self, token: Any, column: Any) -> Any:
        """Cell of qkv where a head begins; `column` counts heads."""
        row = self.row * self.c.tokens + token
        return row * (self.c.columns // 8) + column * self.cells

    def source(self, slot: Any, column: int, cache: Any, ahead: Any) -> Source:
        """Where the entry of a slot is; `column` is that of the first head in qkv."""
        asm, c = self.asm, self.c
        fresh = asm.both((self.start - 1).less(slot), slot.less(self.end))
        token = asm.select(fresh, slot - self.start, asm.Int.of(0))
        at = (self.store_row * c.slots + capped(asm, slot, c.slots)) * self.cells
        pointer = asm.select_pointer(
            fresh,
            asm.offset(self.qkv, self.of_token(token, self.head + column), 16),
            asm.offset(cache, at, 16),
        )
        if not c.held:
            return Source(pointer, fresh, token, fresh, at)
        old = asm.both((self.held_from - 1).less(slot), slot.less(self.start))
        entry = asm.select(old, slot - self.held_from, asm.Int.of(0))
        other = (self.store_row * c.held + entry) * self.cells
        pointer = asm.select_pointer(old, asm.offset(ahead, other, 16), pointer)
        return Source(pointer, fresh, token, asm.either(fresh, old), at)

    def keys(self, cache: Any, ahead: Any) -> list[Source]:
        """A lane has 8 features in each 32 of one key of eight."""
        return [
            self.source(self.first + self.g + 8 * j, self.c.heads, cache, ahead)
            for j in range(2 * self.c.runs)
        ]

    def values(self, cache: Any, ahead: Any) -> list[Source]:
        """A lane has 8 features in each 64 of four keys of 16."""
        column = self.c.heads + self.c.kv_heads
        return [
            self.source(
                self.first + (self.t * 2 + 16 * run + near), column, cache, ahead
            )
            for run in range(self.c.runs)
            for near in (0, 1, 8, 9)
        ]

    def words(self, base: Any, at: Any, count: int, step: int) -> list[Words]:
        """Cells `at`, `at + step` and so on."""
        return [
            self.asm.load(base, at + step * i, 16, words=4, hint="global")
            for i in range(count)
        ]

    def queries(self) -> tuple[list[Any], list[list[Words]]]:
        """Of both rows of each tile: its token, and the words of its head."""
        c, tokens, found = self.c, [], []
        for i in range(2 * c.own):
            place = self.share * (16 * c.own) + self.g + 8 * i
            place = capped(self.asm, place, c.queries)
            token, member = place // c.group, place % c.group
            at = self.of_token(token, self.head * c.group + member) + self.t
            tokens.append(token)
            found.append(self.words(self.qkv, at, self.chunks, 4))
        return tokens, found

    def angles(self, token: Any) -> list[list[list[Any]]]:
        """For each chunk of the first half of a head: cosines, sines."""
        asm = self.asm
        at = (self.row * self.c.tokens + token) * (self.c.features // 2)
        out = []
        for chunk in range(self.half):
            by = []
            for table in (self.cos, self.sin):
                cell = (at + (self.t * 8 + 32 * chunk)) >> 2
                found = [
                    asm.load(table, cell + i, 16, words=4, hint="global.nc")
                    for i in range(2)
                ]
                by.append([w.as_float() for some in found for w in some])
            out.append(by)
        return out

    def floats(self, words: Words) -> list[Any]:
        """What words hold."""
        return [v for word in words for v in self.asm.unpack_bf16(word)]

    def packed(self, wide: list[Any]) -> Words:
        """Floats as words."""
        return [self.asm.pack_bf16(*wide[i : i + 2]) for i in range(0, len(wide), 2)]

    def normed(self, words: list[Words], scale: Any) -> list[Words]:
        """A head divided by its root mean square; all lanes together."""
        asm = self.asm
        if scale is None:
            return words
        wide = [self.floats(w) for w in words]
        square = asm.Float.of(0.0)
        for v in (v for some in wide for v in some):
            square = square + v * v
        for distance in (1, 2):
            square = square + asm.shuffle_xor(square, distance)
        factor = asm.rsqrt(square * (1.0 / self.c.features) + self.c.eps)
        out = []
        for chunk, some in enumerate(wide):
            at = self.t + 4 * chunk
            by = self.floats(asm.load(scale, at, 16, words=4, hint="global.nc"))
            made = self.floats(self.packed([v * factor for v in some]))
            out.append(self.packed([v * s for v, s in zip(made, by, strict=True)]))
        return out

    def turned(self, words: list[Words], by: list[list[list[Any]]]) -> list[Words]:
        """A head turned by the angles of its position."""
        first, second = [], []
        for chunk in range(self.half):
            a, b = (self.floats(words[chunk + j * self.half]) for j in range(2))
            new = [
                (p * x - q * y, q * x + p * y)
                for p, q, x, y in zip(a, b, *by[chunk], strict=True)
            ]
            first.append(self.packed([p for p, _ in new]))
            second.append(self.packed([q for _, q in new]))
        return first + second


def couple(low: Any, high: Any, n: int) -> Any:
    """The n-th halves of two words, of which the even ones are low, in one."""
    if n % 2:
        return (low >> 16) | (high & 0xFFFF0000)
    return (low & 0xFFFF) | (high << 16)
