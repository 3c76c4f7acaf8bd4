"""Packed weights times some tokens, by `mma.m16n8k32` on bytes: one pass over them.

Integer codes are left operands as they are (int8), after two masks (int4, held as
16 q), or after a table of eight magnitudes (E2M1, held as 2 q). FP8 codes are operands
of the FP8 instruction. Ternary weights w are held as w + 1 in a field of two bits,
which one mask cuts out of four bytes: field s of a byte counts 4^s, so that each s has
sums of its own, and the sum of the activations is subtracted in the end; with scales of
groups, or many tokens, they are shifted into 64 w instead. The activations of
a token take one column as int8, or two: 16-bit fixed point as 256 h + l, or for FP8
weights an e4m3 value and the e4m3 of 16 times what it leaves. Weights are thus never
expanded to 16 bits, and integer sums are exact inside a scale group.

A warp takes 16 outputs and a slice of K; the warps of a block share the outputs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels import _hopper_tokens as tokens
from pallas_kernels import _ptx as asm
from pallas_kernels._hopper_operands import (
    BLOCK_WORDS,
    FACTOR,
    FLOATS,
    HALF_WORDS,
    ROWS,
    TERNARY,
    TILE,
    Sums,
    split,
    top_of,
)
from pallas_kernels._ptx import Float, Int

# 32-bit words that hold 16 activations.
_WORDS_OF_16 = {"int8": 4, "bfloat16": 8, "float16": 8, "float32": 16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(tokens.Tokens):
    """Everything static about one kernel."""

    format: str
    k_tiles: int
    row_blocks: int
    grouped: bool
    groups: int
    group_size: int
    asymmetric: bool
    wide_scales: bool
    channel_scale: bool  # `scale2`: one more factor for each output
    pieces: int  # columns of a token
    rows_per_block: int = 1
    prefetch: int = 4

    @property
    def span(self) -> int:
        """Tiles of 128 in one tile of weights as they lie in memory."""
        return 2 if self.format in TERNARY else 1

    @property
    def biased(self) -> bool:
        """Ternary weights as w + 1."""
        few = self.column_blocks <= 2
        return self.format in TERNARY and not self.grouped and few

    @property
    def vectors(self) -> int:
        """16-byte loads of a lane for one tile of weights."""
        if self.format == "sherry":
            return 1
        return 4 if self.format in ("int8", *FLOATS) else 2

    @property
    def column_blocks(self) -> int:
        """Instructions for all tokens of one step."""
        return -(-self.m * self.pieces // 8)

    @property
    def tiles_of_warp(self) -> int:
        """Tiles of weights along K that one warp takes."""
        return -(-self.k_tiles // (self.span * self.warps))

    @property
    def tile_words(self) -> int:
        """Shared memory of the operands of one tile, in words."""
        return self.column_blocks * BLOCK_WORDS

    @property
    def plane_words(self) -> int:
        """Shared memory of all operands, in words."""
        return self.tiles_of_warp * self.warps * self.span * self.tile_words

    @property
    def part_words(self) -> int:
        """Shared memory for the partial sums of the warps, in words."""
        return self.rows_per_block * self.m * ROWS * self.warps

    @property
    def smem_words(self) -> int:
        """Shared memory of a block, in words."""
        return self.plane_words + self.part_words + self.stat_words

    @property
    def fits(self) -> bool:
        """Whether a block has that much shared memory."""
        return 4 * self.smem_words <= 200 * 1024

    @property
    def exact(self) -> bool:
        """Whether integers are summed to the end."""
        if self.grouped or self.format in FLOATS:
            return False
        return self.pieces == 1 or self.biased


@functools.cache
def build(c: Decode) -> Callable[..., jax.Array]:
    """The kernel `(x, x_scale, codes[, high], scale[, zero][, scale2][, norm][, bias]
    [, residual]) -> y [M, N]`."""
    more = (c.format == "sherry") + c.asymmetric + c.channel_scale
    more += (c.prologue == "norm") + c.bias + c.residual
    return tokens.launch(c, emit, 4 + more)


def emit(c: Decode, _: Any, *refs: Any, rows: tuple[Int, Int] | None = None) -> None:
    """The kernel; of the tokens only those from `rows[0]` to `rows[1]` are written."""
    pointers = [asm.pointer(r) for r in refs]
    smem, y = pointers.pop(), pointers.pop()
    residual = pointers.pop() if c.residual else None
    bias = pointers.pop() if c.bias else None
    norm = pointers.pop() if c.prologue == "norm" else None
    channel = pointers.pop() if c.channel_scale else None
    zero = pointers.pop() if c.asymmetric else None
    scale = pointers.pop()
    x, x_scale, *codes = pointers
    thread = asm.special("tid.x")
    lane, warp = thread & 31, thread >> 5
    block = asm.special("ctaid.x") * c.rows_per_block
    parts = c.plane_words
    stats = parts + c.part_words

    def fetch(r: Int, i: Int) -> list[list[Int]]:
        """Tile i of this warp; past the end of a row block, of the next one."""
        over = i.less(c.tiles_of_warp)
        r = asm.select(over, r, r + 1)
        i = asm.select(over, i, i - c.tiles_of_warp)
        row = tokens.clamp(block + tokens.clamp(r, c.rows_per_block), c.row_blocks)
        tile = tokens.clamp(warp + i * c.warps, c.k_tiles // c.span)
        words = _fetch_codes(c, codes, row, tile, lane)
        if not c.grouped:
            return [words, [], []]
        zeros = _pairs(c, zero, row, tile, lane, True) if c.asymmetric else []
        return [words, _pairs(c, scale, row, tile, lane, c.wide_scales), zeros]

    ahead = min(c.prefetch, c.tiles_of_warp)
    whole = c.tiles_of_warp % ahead == 0

    def row_block(r: Int, pending: list[Any]) -> list[Any]:
        """Multiplies one row block, and fetches the beginning of the next."""
        sums = Sums(c)

        def some(n: Int, carry: Any) -> Any:
            sums.cells, sums.floats, pending = carry
            for j in range(ahead if whole else c.tiles_of_warp):
                i = n * ahead + j
                # Past the last row block: read what is in the cache.
                pending = [*pending, fetch(r, i + ahead)]
                words, scales, zeros = pending.pop(0)
                sums.add(words, scales, zeros, smem, warp + i * c.warps, lane)
            return [sums.cells, sums.floats, pending]

        carry = [sums.cells, sums.floats, pending]
        times = c.tiles_of_warp // ahead if whole else 1
        sums.cells, sums.floats, pending = asm.loop_tree(times, some, carry)
        sums.write(smem, parts, r, warp, lane)
        return pending

    pending = [fetch(Int.of(0), Int.of(i)) for i in range(ahead)]
    _columns(c, tokens.operands(c, x, norm), smem, stats, thread)
    # Code that outgrows the instruction cache costs more than loops do.
    in_line = max(1, 8 // c.tiles_of_warp)
    asm.loop_tree(c.rows_per_block, row_block, pending, unroll=in_line)
    asm.barrier()
    ends = (x_scale, scale, channel, bias, residual, y)
    _finish(c, smem, parts, stats, ends, block, thread, rows)


def _fetch_codes(
    c: Decode, codes: list[Any], row: Int, tile: Int, lane: Int
) -> list[Int]:
    hint = "global.nc.L1::no_allocate.L2::128B"
    at = row * (c.k_tiles // c.span) + tile
    words: list[Int] = []
    for v in range(c.vectors):
        item = at * (c.vectors * 32) + (lane + 32 * v)
        words += asm.load(codes[0], item, 16, words=4, hint=hint)
    if c.format == "sherry":
        words += asm.load(codes[1], at * 32 + lane, 4, words=1, hint=hint)
    return words


def _pairs(
    c: Decode, array: Any, row: Int, tile: Int, lane: Int, wide: bool
) -> list[Int]:
    """For outputs g and g + 8 of each group in a tile: two float32, or bfloat16s in
    one word."""
    width = TILE * c.span
    per_tile = max(1, width // c.group_size)
    words = 2 if wide else 1
    if c.span == 2:  # [N/16, G, 8]
        out: list[Int] = []
        for s in range(per_tile):
            group = tile * per_tile + s
            if c.group_size >= width:
                group = tile // (c.group_size // width)
            at = (row * c.groups + tokens.clamp(group, c.groups)) * 8 + (lane >> 2)
            out += asm.load(array, at, 4 * words, words=words, hint="global.nc")
        return out
    # [N/16, K/128 or G, 8, groups of a tile]
    held = c.k_tiles if per_tile > 1 else c.groups
    if c.group_size > width:
        tile = tokens.clamp(tile // (c.group_size // width), c.groups)
    at = (row * held + tile) * 8 + (lane >> 2)
    count = per_tile * words
    step = min(count, 4)
    out = []
    for part in range(count // step):
        item = at * (count // step) + part
        out += asm.load(array, item, 4 * step, words=step, hint="global.nc")
    return out


def _columns(c: Decode, arrays: Any, smem: Any, stats: int, thread: Int) -> None:
    """Quantizes the tokens into right operands, `[tile, column block, half, lane, 4]`.

    A thread takes 16 consecutive activations at a time: group j of a tile. Its words
    belong to the four lanes of a column.
    """
    each = _WORDS_OF_16[c.x_dtype]
    count = c.valid_k // 16

    def read(token: Int, item: Int) -> list[Int]:
        words: list[Int] = []
        for pointer, start, rows in arrays:
            first = token * (c.stride // 16) if rows else Int.of(0)
            at = tokens.clamp(item, count) + first + start // 16
            for v in range(each // 4):
                part = at * (each // 4) + v
                words += asm.load(pointer, part, 16, words=4, hint="global")
        if c.prologue == "norm":  # what is read twice must not be counted twice
            inside = item.less(count)
            for w in range(each):
                words[w] = asm.select(inside, words[w], Int.of(0))
        return words

    def cut(token: Int, item: Int, words: list[Int], inverse: Float) -> Int:
        values = split(c, words, inverse, item.less(count))
        total = Int.of(0)
        for piece, four in enumerate(values):
            column = token * c.pieces + piece
            to = (item >> 3) * c.tile_words + (column >> 3) * BLOCK_WORDS
            to = to + ((item >> 2) & 1) * HALF_WORDS + (column & 7) * 16 + (item & 3)
            part = Int.of(0)
            for q, word in enumerate(four):
                asm.store(smem, to + 4 * q, 4, word, "shared.u32")
                part = tokens.dot4(word, part, signed=True) if c.biased else part
            total = total + (part << (8 * (c.pieces - 1 - piece)))
        return total

    tokens.quantize(
        c,
        smem,
        stats,
        thread,
        items=8 * c.tiles_of_warp * c.warps * c.span,
        words=each * len(arrays),
        at_once=(16 if c.vectors == 4 else 32) * len(arrays),
        top=top_of(c),
        read=read,
        cut=cut,
        count=c.biased,
    )


def _finish(
    c: Decode,
    smem: Any,
    parts: int,
    stats: int,
    ends: tuple[Any, Any, Any, Any, Any, Any],
    block: Int,
    thread: Int,
    rows: tuple[Int, Int] | None = None,
) -> None:
    """Sums over the warps, scales, bias; one thread for each output."""
    x_scale, scale, channel, bias, residual, y = ends
    threads = 32 * c.warps
    outputs = c.rows_per_block * c.m * ROWS
    for step in range(-(-outputs // threads)):
        i = thread + step * threads
        row_block, token = i // (c.m * ROWS), (i // ROWS) % c.m
        column = (block + row_block) * ROWS + i % ROWS
        inside = asm.both(i.less(outputs), column.less(c.n))
        with asm.when(tokens.among(rows, token, inside)):
            words: list[Int] = []
            for at in range(0, c.warps, 4):
                words += asm.load(
                    smem, i * c.warps + (parts + at), 4, words=4, hint="shared"
                )
            numbers: list[Any] = words if c.exact else [w.as_float() for w in words]
            total = numbers[0]
            for w in numbers[1:]:
                total = total + w
            if c.biased:
                total = total - tokens.count_of(c, smem, stats, token)
            value = total.to_float() if c.exact else total
            for factors in (None if c.grouped else scale, channel):
                if factors is not None:
                    (f,) = asm.load(factors, column, 4, words=1, hint="global.nc")
                    value = value * f.as_float()
            if FACTOR.get(c.format, 1) != 1 and not c.biased:
                value = value * (1 / FACTOR[c.format])
            factor = tokens.token_scale(c, smem, stats, x_scale, token, top_of(c))
            value = value * factor
            tokens.write_output(c, y, bias, residual, token, column, value)
