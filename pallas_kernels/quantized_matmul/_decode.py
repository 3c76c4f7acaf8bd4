"""Weights of 8 or 4 bits times a few tokens: one pass over the packed weights.

All of it is `mma.m16n8k32` on bytes. Integer codes are left operands as they are
(int8), after two masks (int4, held as 16 q), or after a table of eight magnitudes
(E2M1, held as 2 q). FP8 codes are operands of the FP8 instruction. The activations of
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

from pallas_kernels import _ptx as asm
from pallas_kernels._implementation import WIDE_TOP
from pallas_kernels._ptx import Float, Int
from pallas_kernels.ternary_matmul import _decode as tokens

TILE = 128  # weights along K of one tile
ROWS = 16
FLOATS = {"float8_e4m3": "e4m3", "float8_e5m2": "e5m2", "mxfp8": "e4m3"}
# What the integer operand is times the code.
FACTOR = {"int8": 1, "int4": 16, "nvfp4": 2, "mxfp4": 2}
_E4M3_TOP = 448.0


@dataclasses.dataclass(frozen=True)
class Decode:
    """Everything static about one kernel."""

    format: str
    m: int
    k_tiles: int
    row_blocks: int
    n: int
    grouped: bool
    groups: int
    group_size: int
    asymmetric: bool
    wide_scales: bool
    channel_scale: bool  # `scale2`: one more factor for each output
    x_dtype: str
    out_dtype: str
    pieces: int  # columns of a token
    bias: bool
    warps: int = 8
    rows_per_block: int = 1
    prefetch: int = 4

    @property
    def k(self) -> int:
        """Activations of a token, padding included."""
        return TILE * self.k_tiles

    @property
    def vectors(self) -> int:
        """16-byte loads of a lane for one tile."""
        return 4 if self.format in ("int8", *FLOATS) else 2

    @property
    def units(self) -> int:
        """Pieces of 32 activations in one token."""
        return 4 * self.k_tiles

    @property
    def column_blocks(self) -> int:
        """Instructions for all tokens of one step."""
        return -(-self.m * self.pieces // 8)

    @property
    def tiles_of_warp(self) -> int:
        """Tiles along K that one warp takes."""
        return -(-self.k_tiles // self.warps)

    @property
    def warps_per_token(self) -> int:
        """Warps that quantize one token together."""
        return max(1, self.warps // self.m)

    @property
    def tile_words(self) -> int:
        """Shared memory of the operands of one tile, in words."""
        return self.column_blocks * 256

    @property
    def plane_words(self) -> int:
        """Shared memory of all operands, in words."""
        return self.tiles_of_warp * self.warps * self.tile_words

    @property
    def part_words(self) -> int:
        """Shared memory for the partial sums of the warps, in words."""
        return self.rows_per_block * self.m * ROWS * self.warps

    @property
    def smem_words(self) -> int:
        """Shared memory of a block, in words."""
        return self.plane_words + self.part_words + 2 * self.m * self.warps

    @property
    def fits(self) -> bool:
        """Whether a block has that much shared memory."""
        return 4 * self.smem_words <= 200 * 1024

    @property
    def exact(self) -> bool:
        """Whether integers are summed to the end."""
        return not self.grouped and self.pieces == 1 and self.format not in FLOATS


@functools.cache
def build(c: Decode) -> Callable[..., jax.Array]:
    """The kernel `(x, x_scale, codes, scale[, zero][, scale2][, bias]) -> y [M, N]`."""
    n_in = 4 + c.asymmetric + c.channel_scale + c.bias

    def body(*refs: Any) -> None:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (n_in + 2))(
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
    bias = pointers.pop() if c.bias else None
    channel = pointers.pop() if c.channel_scale else None
    zero = pointers.pop() if c.asymmetric else None
    x, x_scale, codes, scale = pointers
    thread = asm.special("tid.x")
    lane, warp = thread & 31, thread >> 5
    block = asm.special("ctaid.x") * c.rows_per_block
    plan = [(r, i) for r in range(c.rows_per_block) for i in range(c.tiles_of_warp)]

    def fetch(r: int, i: int) -> tuple[list[Int], list[Int], list[Int]]:
        row = clamp(block + r, c.row_blocks)
        tile = clamp(warp + c.warps * i, c.k_tiles)
        at = (row * c.k_tiles + tile) * (c.vectors * 32) + lane
        words: list[Int] = []
        for v in range(c.vectors):
            hint = "global.nc.L1::no_allocate.L2::128B"
            words += asm.load(codes, at + 32 * v, 16, words=4, hint=hint)
        if not c.grouped:
            return words, [], []
        return (
            words,
            _pairs(c, scale, row, tile, lane, c.wide_scales),
            _pairs(c, zero, row, tile, lane, True) if c.asymmetric else [],
        )

    pending = [fetch(*at) for at in plan[: c.prefetch]]
    parts = c.plane_words
    stats = parts + c.part_words
    _columns(c, x, smem, stats, thread)
    for at, (r, i) in enumerate(plan):
        words, scales, zeros = pending.pop(0)
        if at + c.prefetch < len(plan):
            pending.append(fetch(*plan[at + c.prefetch]))
        if i == 0:
            sums = _Sums(c)
        tile = warp + c.warps * i
        sums.add(words, scales, zeros, smem, tile, lane)
        if i == c.tiles_of_warp - 1:
            sums.write(smem, parts, r, warp, lane)
    asm.barrier()
    ends = (x_scale, scale, channel, bias, y)
    _finish(c, smem, parts, stats, *ends, block, thread, rows)


clamp = tokens.clamp


def _pairs(
    c: Decode, array: Any, row: Int, tile: Int, lane: Int, wide: bool
) -> list[Int]:
    """Float32 bits for outputs g and g + 8 of each group in a tile."""
    per_tile = max(1, TILE // c.group_size)
    out: list[Int] = []
    for s in range(per_tile):
        group = tile * per_tile + s
        if c.group_size >= TILE:
            group = tile // (c.group_size // TILE)
        at = (row * c.groups + clamp(group, c.groups)) * 8 + (lane >> 2)
        words = 2 if wide else 1
        pair = asm.load(array, at, 4 * words, words=words, hint="global.nc")
        out += pair if wide else [pair[0] << 16, pair[0] & 0xFFFF0000]
    return out


def _columns(c: Decode, x: Any, smem: Any, stats: int, thread: Int) -> None:
    """Quantizes the tokens into right operands: [tile, column block, lane, 8 words]."""
    lane, warp = thread & 31, thread >> 5
    team = c.warps_per_token
    at_once = c.warps // team
    units = 4 * c.tiles_of_warp * c.warps
    steps = -(-units // (32 * team))
    rows = [clamp(warp // team + r * at_once, c.m) for r in range(-(-c.m // at_once))]
    member = (warp % team) * 32 + lane

    def read(token: Int, i: Int) -> list[Int]:
        unit = clamp(i * (32 * team) + member, c.units)
        return tokens.words_of_unit(c, x, token, unit)

    held: list[list[list[Int]]] = []
    if len(rows) * steps * tokens.WORDS_OF_UNIT[c.x_dtype] <= 32:
        held = [[read(t, Int.of(i)) for i in range(steps)] for t in rows]
    inverse = [Float.of(1.0)] * len(rows)
    if c.x_dtype != "int8":
        inverse = tokens.inverse_scales(
            c, smem, stats, rows, held, read, steps, warp % team, lane, _top(c)
        )
    for r, token in enumerate(rows):

        def cut(i: Int, words: list[Int], token: Int = token, r: int = r) -> None:
            unit = clamp(i * (32 * team) + member, units)
            inside = unit.less(c.units)
            for piece, regs in enumerate(_split(c, words, inverse[r], inside)):
                column = token * c.pieces + piece
                tile, q = unit >> 2, unit & 3
                at = tile * c.tile_words + (column >> 3) * 256
                at = at + ((column & 7) * 4 + q) * 8
                asm.store_words(smem, at, regs[:4])
                asm.store_words(smem, at + 4, regs[4:])

        if held:
            for i, words in enumerate(held[r]):
                cut(Int.of(i), words)
        else:

            def step(i: Int, token: Int = token, cut: Any = cut) -> list[Any]:
                cut(i, read(token, i))
                return []

            asm.loop(steps, step, unroll=2)
    asm.barrier()


def _top(c: Decode) -> float:
    if c.format in FLOATS:
        return _E4M3_TOP
    return 127.0 if c.pieces == 1 else float(WIDE_TOP)


def _split(c: Decode, words: list[Int], inverse: Float, inside: Any) -> list[list[Int]]:
    """Eight words for each piece of a unit."""
    if c.x_dtype == "int8":
        return [[asm.select(inside, w, Int.of(0)) for w in words]]
    inverse = asm.select(inside, inverse, Float.of(0.0))
    scaled = [v * inverse for v in tokens.floats_of(c, words)]
    if c.format in FLOATS:
        first = [_to_e4m3(scaled[4 * j : 4 * j + 4]) for j in range(8)]
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
    # Adding 1.5 * 2^23 rounds to nearest even and leaves the integer in the low bits.
    ints = [(v + 12582912.0).as_int() for v in scaled]
    if c.pieces == 1:
        return [[tokens.gather_bytes(ints[4 * j : 4 * j + 4], 0) for j in range(8)]]
    upper = [i + 128 for i in ints]
    return [
        [tokens.gather_bytes(upper[4 * j : 4 * j + 4], 1) for j in range(8)],
        [tokens.gather_bytes(ints[4 * j : 4 * j + 4], 0) for j in range(8)],
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
    """Left operands of the four steps of a tile, four words each."""
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
        self.cells = [self._zero() for _ in range(c.column_blocks)]
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
        """One tile."""
        c = self.c
        steps = operands(c, words)
        ones = [Int.of(0x01010101)] * 4
        for block in range(c.column_blocks):
            at = tile * c.tile_words + (lane * 8 + block * 256)
            b = asm.load(smem, at, 4, words=4, hint="shared")
            b += asm.load(smem, at + 4, 4, words=4, hint="shared")
            if not c.grouped:
                for s, a in enumerate(steps):
                    pair = b[2 * s : 2 * s + 2]
                    self.cells[block] = self._mma(self.cells[block], a, pair)
                continue
            for group, pieces in enumerate(_pieces(c)):
                cells, total = self._zero(), self._zero()
                for s, half in pieces:
                    a, pair = steps[s], b[2 * s : 2 * s + 2]
                    if half is not None:
                        none = Int.of(0)
                        a = [*a[:2], none, none] if half == 0 else [none, none, *a[2:]]
                    cells = self._mma(cells, a, pair)
                    if c.asymmetric:
                        total = self._mma(total, ones, pair)
                for h in range(2):
                    factor = scales[2 * group + h].as_float()
                    values = self._values(cells[2 * h : 2 * h + 2])
                    if c.asymmetric:
                        shift = zeros[2 * group + h].as_float()
                        less = self._values(total[2 * h : 2 * h + 2])
                        values = [
                            v - t * shift for v, t in zip(values, less, strict=True)
                        ]
                    sums = self.floats[block][h]
                    self.floats[block][h] = [
                        f + v * factor for f, v in zip(sums, values, strict=True)
                    ]

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

    def write(self, smem: Any, parts: int, r: int, warp: Int, lane: Int) -> None:
        """Leaves the sums of this warp to the others."""
        c, q = self.c, lane & 3
        for block, cells in enumerate(self.cells):
            for h in range(2):
                if c.grouped:
                    values: list[Any] = self.floats[block][h]
                elif c.exact:
                    values = cells[2 * h : 2 * h + 2]
                else:
                    values = self._values(cells[2 * h : 2 * h + 2])
                for i, value in enumerate(values):
                    token = q * len(values) + (block * 4 * len(values) + i)
                    row = (token + r * c.m) * ROWS + (lane >> 2) + 8 * h
                    with asm.when(token.less(c.m)):
                        at = row * c.warps + warp + parts
                        bits = value if isinstance(value, Int) else value.as_int()
                        asm.store(smem, at, 4, bits, "shared.u32")


def _pieces(c: Decode) -> list[list[tuple[int, int | None]]]:
    """Steps (and halves of steps) of each scale group of a tile."""
    if c.group_size >= TILE:
        return [[(s, None) for s in range(4)]]
    if c.group_size >= 32:
        per = c.group_size // 32
        return [[(s, None) for s in range(g, g + per)] for g in range(0, 4, per)]
    return [[(s, half)] for s in range(4) for half in range(2)]


def _finish(
    c: Decode,
    smem: Any,
    parts: int,
    stats: int,
    x_scale: Any,
    scale: Any,
    channel: Any,
    bias: Any,
    y: Any,
    block: Int,
    thread: Int,
    rows: tuple[Int, Int] | None = None,
) -> None:
    """Sums over the warps, scales, bias; one thread for each output."""
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
            value = total.to_float() if c.exact else total
            for factors in (None if c.grouped else scale, channel):
                if factors is not None:
                    (f,) = asm.load(factors, column, 4, words=1, hint="global.nc")
                    value = value * f.as_float()
            if FACTOR.get(c.format, 1) != 1:
                value = value * (1 / FACTOR[c.format])
            factor = tokens.token_scale(c, smem, stats, x_scale, token, _top(c))
            value = value * factor
            if c.bias:
                (b,) = asm.load(bias, column, 4, words=1, hint="global.nc")
                value = value + b.as_float()
            tokens.write_output(c, y, token * c.n + column, value)
