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
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _hopper_tokens as tokens
from pallas_kernels import _ptx as asm
from pallas_kernels._implementation import WIDE_TOP
from pallas_kernels._ptx import Float, Int
from pallas_kernels.ternary_matmul import _codes

TILE = 128  # weights along K of one tile
ROWS = 16
FLOATS = {"float8_e4m3": "e4m3", "float8_e5m2": "e5m2", "mxfp8": "e4m3"}
# What the integer operand is times the code.
FACTOR = {"int8": 1, "int4": 16, "nvfp4": 2, "mxfp4": 2, "t2": 64, "sherry": 64}
TERNARY = ("t2", "sherry")
_E4M3_TOP = 448.0
# Operands of eight columns, in words: two halves of [lane, 4], four words apart.
HALF_WORDS = 32 * 4 + 4
BLOCK_WORDS = 2 * HALF_WORDS


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

    def body(*refs: Any) -> None:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (6 + more))(
            functools.partial(emit, c)
        )(*refs)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((c.m, c.n), jnp.dtype(c.out_dtype)),
        grid=(-(-c.row_blocks // c.rows_per_block),),
        grid_names=("rows",),
        num_threads=c.warps // 4,
        thread_name="group",
        scratch_types=(plgpu.SMEM((c.smem_words,), jnp.int32),),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )


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
        sums = _Sums(c)

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


def _pair(words: list[Int], group: int, wide: bool) -> list[Float]:
    if wide:
        return [w.as_float() for w in words[2 * group : 2 * group + 2]]
    both = words[group]
    return [(both << 16).as_float(), (both & 0xFFFF0000).as_float()]


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
        values = _split(c, words, inverse, item.less(count))
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
        top=_top(c),
        read=read,
        cut=cut,
        count=c.biased,
    )


def _top(c: Decode) -> float:
    if c.format in FLOATS:
        return _E4M3_TOP
    return 127.0 if c.pieces == 1 else float(WIDE_TOP)


def _split(c: Decode, words: list[Int], inverse: Float, inside: Any) -> list[list[Int]]:
    """Four words for each piece of 16 activations."""
    if c.x_dtype == "int8":
        return [[asm.select(inside, w, Int.of(0)) for w in words]]
    inverse = asm.select(inside, inverse, Float.of(0.0))
    scaled = [v * inverse for v in tokens.activations(c, words)]
    if c.format in FLOATS:
        first = [_to_e4m3(scaled[4 * j : 4 * j + 4]) for j in range(4)]
        rest = []
        for j, word in enumerate(first):
            back = _from_e4m3(word)
            rest.append(
                _to_e4m3(
                    [
                        (v - b) * 16.0
                        for v, b in zip(scaled[4 * j : 4 * j + 4], back, strict=True)
                    ]
                )
            )
        return [first, rest]
    ints = [(v + tokens.ROUND).as_int() for v in scaled]
    if c.pieces == 1:
        return [[tokens.gather_bytes(ints[4 * j : 4 * j + 4], 0) for j in range(4)]]
    upper = [i + 128 for i in ints]
    return [
        [tokens.gather_bytes(upper[4 * j : 4 * j + 4], 1) for j in range(4)],
        [tokens.gather_bytes(ints[4 * j : 4 * j + 4], 0) for j in range(4)],
    ]


def _to_e4m3(v: list[Float]) -> Int:
    return asm.ptx(
        "{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; "
        "cvt.rn.satfinite.e4m3x2.f32 h, $4, $3; mov.b32 $0, {l, h}; }",
        *v,
        out=(Int,),
        pure=True,
    )


def _from_e4m3(word: Int) -> list[Float]:
    return asm.ptx(
        "{ .reg .b16 l, h, a, b, c, d; .reg .b32 x, y; mov.b32 {l, h}, $4; "
        "cvt.rn.f16x2.e4m3x2 x, l; cvt.rn.f16x2.e4m3x2 y, h; "
        "mov.b32 {a, b}, x; mov.b32 {c, d}, y; cvt.f32.f16 $0, a; "
        "cvt.f32.f16 $1, b; cvt.f32.f16 $2, c; cvt.f32.f16 $3, d; }",
        word,
        out=(Float,) * 4,
        pure=True,
    )


def operands(c: Decode, words: list[Int]) -> list[list[Int]]:
    """Left operands of the steps of a tile of weights, four words each."""
    if c.format in TERNARY:
        fields = _codes.fields if c.biased else _codes.signed_bytes
        rows = [fields(c.format, words, w) for w in range(4)]
        return [
            [rows[2 * b + h][2 * s + j] for j in range(2) for h in range(2)]
            for b in range(2)
            for s in range(4)
        ]
    if c.vectors == 4:
        return [words[4 * s : 4 * s + 4] for s in range(4)]
    out = []
    for u in range(2):
        packed = words[4 * u : 4 * u + 4]
        if c.format == "int4":
            out.append([(w << 4) & 0xF0F0F0F0 for w in packed])
            out.append([w & 0xF0F0F0F0 for w in packed])
            continue
        low = [_e2m1(w & 0x0F0F0F0F) for w in packed]
        out += [low, [_e2m1((w >> 4) & 0x0F0F0F0F) for w in packed]]
    return out


def _e2m1(codes: Int) -> Int:
    """Four E2M1 codes, one in each byte, to twice their values as int8."""
    # A selector of a byte permutation is a nibble; bring four of them side by side.
    pair = codes | (codes >> 4)
    selector = asm.ptx("prmt.b32 $0, $1, $1, 0x4420;", pair, out=(Int,), pure=True)
    three = selector & 0x7777
    plus = _lookup(0x03020100, 0x0C080604, three)
    minus = _lookup(0xFDFEFF00, 0xF4F8FAFC, three)
    # Bit 3 of a code is its sign; a byte of ones where it is set.
    negative = asm.ptx(
        "prmt.b32 $0, $1, $1, 0xba98;", codes << 4, out=(Int,), pure=True
    )
    return (plus & ~negative) | (minus & negative)


def _lookup(low: int, high: int, selector: Int) -> Int:
    return asm.ptx(
        "prmt.b32 $0, $1, $2, $3;",
        Int.of(low),
        Int.of(high),
        selector,
        out=(Int,),
        pure=True,
    )


class _Sums:
    """Accumulators of one row block in one warp: outputs g, g + 8 x two columns."""

    def __init__(self, c: Decode) -> None:
        self.c = c
        self.kind: Any = Float if c.format in FLOATS else Int
        fields = 4 if c.biased else 1
        self.cells = [[self._zero()] * fields for _ in range(c.column_blocks)]
        width = 2 if c.pieces == 1 else 1
        self.floats = [[[Float.of(0.0)] * width for _ in range(2)] for _ in self.cells]

    def _zero(self) -> list[Any]:
        return [self.kind.of(0)] * 4

    def add(
        self,
        words: list[Int],
        scales: list[Int],
        zeros: list[Int],
        smem: Any,
        tile: Int,
        lane: Int,
    ) -> None:
        """One tile of weights."""
        c = self.c
        steps = operands(c, words)
        for block in range(c.column_blocks):
            b: list[Int] = []
            for part in range(c.span):
                at = (tile * c.span + part) * c.tile_words
                at = at + (lane * 4 + block * BLOCK_WORDS)
                b += asm.load(smem, at, 4, words=4, hint="shared")
                b += asm.load(smem, at + HALF_WORDS, 4, words=4, hint="shared")
            if c.grouped:
                self._add_groups(block, steps, b, scales, zeros)
                continue
            cells = self.cells[block]
            for s, a in enumerate(steps):
                i = s % len(cells)
                cells[i] = self._mma(cells[i], a, b[2 * s : 2 * s + 2])

    def _add_groups(
        self,
        block: int,
        steps: list[list[Int]],
        b: list[Int],
        scales: list[Int],
        zeros: list[Int],
    ) -> None:
        c = self.c
        ones, none = [Int.of(0x01010101)] * 4, Int.of(0)
        for group, pieces in enumerate(_pieces(c)):
            cells, total = self._zero(), self._zero()
            for s, half in pieces:
                a, pair = steps[s], b[2 * s : 2 * s + 2]
                if half is not None:
                    a = [*a[:2], none, none] if half == 0 else [none, none, *a[2:]]
                cells = self._mma(cells, a, pair)
                if c.asymmetric:
                    total = self._mma(total, ones, pair)
            factors = _pair(scales, group, c.wide_scales)
            for h, factor in enumerate(factors):
                values = self._values(cells[2 * h : 2 * h + 2])
                if c.asymmetric:
                    shift = _pair(zeros, group, True)[h]
                    less = self._values(total[2 * h : 2 * h + 2])
                    values = [v - t * shift for v, t in zip(values, less, strict=True)]
                sums = self.floats[block][h]
                self.floats[block][h] = [
                    f + v * factor for f, v in zip(sums, values, strict=True)
                ]

    def _results(self, block: int, h: int) -> list[Any]:
        """Of outputs g + 8 h, for each token of this lane."""
        if self.c.grouped:
            return list(self.floats[block][h])
        if not self.c.biased:
            two = self.cells[block][0][2 * h : 2 * h + 2]
            return two if self.c.exact else self._values(two)
        two = [Int.of(0)] * 2
        for s, cells in enumerate(self.cells[block]):
            fields = cells[2 * h : 2 * h + 2]
            two = [t + f.divided(2 * s) for t, f in zip(two, fields, strict=True)]
        return two if self.c.pieces == 1 else [(two[0] << 8) + two[1]]

    def _values(self, two: list[Any]) -> list[Float]:
        """Columns as float32; the two pieces of one token together."""
        floats = [v if isinstance(v, Float) else v.to_float() for v in two]
        if self.c.pieces == 1:
            return floats
        if self.kind is Float:
            return [floats[0] + floats[1] * (1 / 16)]
        return [floats[0] * 256.0 + floats[1]]

    def _mma(self, cells: list[Any], a: list[Int], b: list[Int]) -> list[Any]:
        kind = FLOATS.get(self.c.format)
        types = f"f32.{kind}.e4m3.f32" if kind else "s32.s8.s8.s32"
        if self.c.biased:
            types = "s32.u8.s8.s32"
        return asm.ptx(
            f"mma.sync.aligned.m16n8k32.row.col.{types} "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            *a,
            *b,
            *cells,
            out=(self.kind,) * 4,
            pure=True,
            convergent=True,
        )

    def write(self, smem: Any, parts: int, r: Int, warp: Int, lane: Int) -> None:
        """Leaves the sums of this warp to the others."""
        c, q = self.c, lane & 3
        for block in range(c.column_blocks):
            for h in range(2):
                values = self._results(block, h)
                for i, value in enumerate(values):
                    token = q * len(values) + (block * 4 * len(values) + i)
                    row = (r * c.m + token) * ROWS + (lane >> 2) + 8 * h
                    with asm.when(token.less(c.m)):
                        at = row * c.warps + warp + parts
                        bits = value if isinstance(value, Int) else value.as_int()
                        asm.store(smem, at, 4, bits, "shared.u32")


def _pieces(c: Decode) -> list[list[tuple[int, int | None]]]:
    """Steps (and halves of steps) of each scale group of a tile of weights."""
    steps = 4 * c.span
    per = min(steps, c.group_size // 32)
    if per:
        return [[(s, None) for s in range(g, g + per)] for g in range(0, steps, per)]
    return [[(s, half)] for s in range(steps) for half in range(2)]


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
            factor = tokens.token_scale(c, smem, stats, x_scale, token, _top(c))
            value = value * factor
            tokens.write_output(c, y, bias, residual, token, column, value)
