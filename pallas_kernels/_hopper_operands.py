"""Operands of `mma.m16n8k32` on bytes, from packed words, and its accumulators.

What a kernel for a few tokens multiplies, see `_hopper_bytes`; `c` is its `Decode`.
"""

from __future__ import annotations

from typing import Any

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


def _pair(words: list[Int], group: int, wide: bool) -> list[Float]:
    if wide:
        return [w.as_float() for w in words[2 * group : 2 * group + 2]]
    both = words[group]
    return [(both << 16).as_float(), (both & 0xFFFF0000).as_float()]


def top_of(c: Any) -> float:
    """The integer, or float8, of the largest activation of a token."""
    if c.format in FLOATS:
        return _E4M3_TOP
    return 127.0 if c.pieces == 1 else float(WIDE_TOP)


def split(c: Any, words: list[Int], inverse: Float, inside: Any) -> list[list[Int]]:
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


def operands(c: Any, words: list[Int]) -> list[list[Int]]:
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


class Sums:
    """Accumulators of one row block in one warp: outputs g, g + 8 x two columns."""

    def __init__(self, c: Any) -> None:
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


def _pieces(c: Any) -> list[list[tuple[int, int | None]]]:
    """Steps (and halves of steps) of each scale group of a tile of weights."""
    steps = 4 * c.span
    per = min(steps, c.group_size // 32)
    if per:
        return [[(s, None) for s in range(g, g + per)] for g in range(0, steps, per)]
    return [[(s, half)] for s in range(steps) for half in range(2)]
