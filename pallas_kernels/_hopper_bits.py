"""Ternary weights times a few tokens, on the binary tensor cores of Hopper.

A ternary weight is two bits and an integer activation is 8 or 16 of them, so that

  sum_k w x = sum_b 2^b (popc(pos & x_b) - popc(neg & x_b))

with x_b the b-th bit plane of x (the top one counts -2^b). `mma.m16n8k256` with
`and.popc` does 16 rows x 256 weights x 8 planes in one instruction, from the packed
bits as they lie in memory: 2-bit weights need no decoding at all, and the 1.25-bit code
seven instructions for 32 weights. With `keep = ~neg`, popc(keep & x) is a constant less
popc(neg & x), so that both products run into the same accumulators.

A warp takes 16 outputs and a slice of K, the warps of a block share the 16 outputs, and
float activations are quantized and cut into planes in shared memory while the first
weights are on their way.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels import _hopper_tokens as tokens
from pallas_kernels import _ptx as asm
from pallas_kernels._implementation import WIDE_TOP
from pallas_kernels._ptx import Float, Int
from pallas_kernels.ternary_matmul._codes import masks

TILE = 256  # weights along K in one instruction
ROWS = 16  # outputs of a warp
_WORDS = {"t2": 256, "sherry": 128}  # 32-bit words of `codes` in one 16 x 256 tile


# 32-bit words that hold 32 activations.
_WORDS_OF_UNIT = {"int8": 8, "bfloat16": 16, "float16": 16, "float32": 32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(tokens.Tokens):
    """Everything static about one kernel."""

    format: str
    k_tiles: int
    row_blocks: int
    groups: int  # scale groups along K; 1 is one scale for each output
    group_size: int
    x_bytes: int  # activations as 8 or 16 bit integers
    wide_scales: bool = False  # scales of groups in float32, not bfloat16
    rows_per_block: int = 1  # row blocks of 16 outputs that a thread block takes
    prefetch: int = 4  # tiles in flight

    @property
    def plane_words(self) -> int:
        """Shared memory for the bit planes, in words."""
        return self.tiles_of_warp * self.warps * self.tile_words

    @property
    def tile_words(self) -> int:
        """Words of one tile, all tokens; 8 more to spread the stores over banks."""
        return self.m * 64 * self.x_bytes + 8

    @property
    def tiles_of_warp(self) -> int:
        """Tiles along K that one warp takes."""
        return -(-self.k_tiles // self.warps)

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


@functools.cache
def build(c: Decode) -> Callable[..., jax.Array]:
    """`(x, x_scale, codes[, high], scale[, norm][, bias][, residual]) -> y [M, N]`."""
    more = (c.format == "sherry") + (c.prologue == "norm") + c.bias + c.residual
    return tokens.launch(c, emit, 4 + more)


def emit(c: Decode, _: Any, *refs: Any, rows: tuple[Int, Int] | None = None) -> None:
    """The kernel; of the tokens only those from `rows[0]` to `rows[1]` are written."""
    pointers = [asm.pointer(r) for r in refs]
    smem, y = pointers.pop(), pointers.pop()
    residual = pointers.pop() if c.residual else None
    bias = pointers.pop() if c.bias else None
    norm = pointers.pop() if c.prologue == "norm" else None
    scale = pointers.pop()
    high = pointers.pop() if c.format == "sherry" else None
    x, x_scale, codes = pointers
    thread = asm.special("tid.x")
    lane, warp = thread & 31, thread >> 5
    block = asm.special("ctaid.x") * c.rows_per_block
    parts = c.plane_words
    stats = parts + c.part_words

    def fetch(r: Int, i: int) -> list[list[Int]]:
        row = tokens.clamp(block + tokens.clamp(r, c.rows_per_block), c.row_blocks)
        tile = row * c.k_tiles + tokens.clamp(warp + c.warps * i, c.k_tiles)
        weights = _fetch_codes(c, codes, high, tile, lane)
        factors: list[Int] = []
        if c.groups > 1:
            factors = _fetch_scales(c, scale, row, warp + c.warps * i, lane)
        return [weights, factors]

    def row_block(r: Int, pending: list[Any]) -> list[Any]:
        """Multiplies one row block, and fetches as much of the next."""
        sums = _Sums(c)
        for i in range(c.tiles_of_warp):
            over, inner = divmod(i + c.prefetch, c.tiles_of_warp)
            # Past the last row block: read what is in the cache.
            pending.append(fetch(r + over, inner))
            weights, factors = pending.pop(0)
            _multiply(c, sums, weights, factors, smem, warp + c.warps * i, lane)
        sums.write(smem, parts, r, warp, lane)
        return pending

    first = [divmod(i, c.tiles_of_warp) for i in range(c.prefetch)]
    pending = [fetch(Int.of(r), i) for r, i in first]
    _planes(c, tokens.operands(c, x, norm), smem, stats, thread)
    # Code that outgrows the instruction cache costs more than loops do.
    in_line = max(1, 8 // c.tiles_of_warp)
    asm.loop_tree(c.rows_per_block, row_block, pending, unroll=in_line)
    asm.barrier()
    ends = (x_scale, scale, bias, residual, y)
    _finish(c, smem, parts, stats, ends, block, thread, rows)


def _fetch_codes(c: Decode, codes: Any, high: Any, tile: Int, lane: Int) -> list[Int]:
    hint = "global.nc.L1::no_allocate.L2::128B"
    at = tile * (_WORDS[c.format] // 4) + lane
    got = asm.load(codes, at, 16, words=4, hint=hint)
    if c.format == "t2":
        return got + asm.load(codes, at + 32, 16, words=4, hint=hint)
    return got + asm.load(high, tile * 32 + lane, 4, words=1, hint=hint)


def _fetch_scales(c: Decode, scale: Any, row: Int, tile: Int, lane: Int) -> list[Int]:
    """Pairs (outputs r, r + 8) of the groups that a tile touches."""
    words = 2 if c.wide_scales else 1
    per_tile = max(1, TILE // c.group_size)
    out = []
    for s in range(per_tile):
        group = (
            tile * per_tile + s
            if c.group_size <= TILE
            else tile // (c.group_size // TILE)
        )
        at = (row * c.groups + tokens.clamp(group, c.groups)) * 8 + (lane >> 2)
        pair = asm.load(scale, at, 4 * words, words=words, hint="global.nc")
        if not c.wide_scales:
            pair = [pair[0] << 16, pair[0] & 0xFFFF0000]
        out += pair
    return out


def _planes(c: Decode, arrays: Any, smem: Any, stats: int, thread: Int) -> None:
    """Quantizes the tokens and writes their bit planes, sums and scales.

    The planes of (tile, token) are 32 lanes x (byte, half) words, each what that lane
    hands to the instruction. A thread takes what lane column q sees of half a tile:
    k = 16 j + 4 q + lane position.
    """
    words = _WORDS_OF_UNIT[c.x_dtype] // 8

    def inside(unit: Int, j: int) -> tuple[Int, Any]:
        """Index along K of group j, in items of four, and whether there is one."""
        at = (unit >> 2) * 32 + (unit & 3) + j * 4
        return at, at.less(c.valid_k // 4)

    def read(token: Int, unit: Int) -> list[Int]:
        out: list[Int] = []
        for pointer, start, rows in arrays:
            first = (token * c.stride if rows else Int.of(0)) + start
            for j in range(8):
                at = tokens.clamp(inside(unit, j)[0], c.valid_k // 4) + first // 4
                got = asm.load(pointer, at, 4 * words, words=words, hint="global")
                out += got
        if c.prologue == "norm":  # what is read twice must not be counted twice
            for j in range(8):
                for w in range(j * words, (j + 1) * words):
                    out[w] = asm.select(inside(unit, j)[1], out[w], Int.of(0))
        return out

    def cut(token: Int, unit: Int, got: list[Int], inverse: Float) -> Int:
        total = Int.of(0)
        for byte, regs in enumerate(_quantized(c, got, inverse)):
            regs = [
                asm.select(inside(unit, j)[1], w, Int.of(0)) for j, w in enumerate(regs)
            ]
            part = Int.of(0)
            for w in regs:
                part = tokens.dot4(w, part, signed=byte == c.x_bytes - 1)
            total = total + (part << (8 * byte))
            _write_planes(c, smem, _transposed(regs), unit, token, byte)
        return total

    tokens.quantize(
        c,
        smem,
        stats,
        thread,
        items=8 * c.tiles_of_warp * c.warps,
        words=_WORDS_OF_UNIT[c.x_dtype] * len(arrays),
        at_once=32 * len(arrays),
        top=_top(c),
        read=read,
        cut=cut,
        count=True,
    )


def _quantized(c: Decode, words: list[Int], inverse: Float) -> list[list[Int]]:
    """Integers of a unit: for each byte, lowest first, a word for each group of 4."""
    if c.x_dtype == "int8":
        return [words]
    ints = [(v * inverse + tokens.ROUND).as_int() for v in tokens.activations(c, words)]
    return [
        [tokens.gather_bytes(ints[4 * j : 4 * j + 4], byte) for j in range(8)]
        for byte in range(c.x_bytes)
    ]


def _top(c: Decode) -> float:
    return 127.0 if c.x_bytes == 1 else float(WIDE_TOP)


def _transposed(regs: list[Int]) -> list[Int]:
    """8 words of bytes -> 8 bit planes: bit j of byte p of plane b is bit b of byte p
    of word j (an 8x8 bit transpose in each byte, in three rounds of swaps)."""
    rows = list(regs)
    for s, mask in ((4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        for j in range(8):
            if not j & s:
                a, b = rows[j], rows[j + s]
                rows[j] = (a & mask) | ((b & mask) << s)
                rows[j + s] = ((a >> s) & mask) | (b & (mask ^ 0xFFFFFFFF))
    return rows


def _write_planes(
    c: Decode, smem: Any, planes: list[Int], unit: Int, token: Int, byte: int
) -> None:
    tile, half, q = unit >> 3, (unit >> 2) & 1, unit & 3
    base = tile * c.tile_words + (token * 32 + q) * (2 * c.x_bytes) + half + 2 * byte
    for b, plane in enumerate(planes):
        asm.store(smem, base + 8 * c.x_bytes * b, 4, plane, "shared.u32")


class _Sums:
    """Accumulators of one row block in one warp, for all tokens."""

    def __init__(self, c: Decode) -> None:
        self.c = c
        zero = Int.of(0)
        self.ints = [[[zero] * 4 for _ in range(c.x_bytes)] for _ in range(c.m)]
        self.floats = [[Float.of(0.0)] * 2 for _ in range(c.m)]

    def combined(self, token: int, q: Int) -> list[Int]:
        """Sums of the two planes of this lane, for outputs r and r + 8, less the place
        value 4^q of the lane's planes; the bytes of wide activations together."""
        out = [Int.of(0)] * 2
        for byte, cells in enumerate(self.ints[token]):
            two = Int.of(2)
            if byte == self.c.x_bytes - 1:  # the top plane counts negatively
                two = asm.select(q.equals(3), Int.of(-2), two)
            for h in range(2):
                value = cells[2 * h] + cells[2 * h + 1] * two
                out[h] = out[h] + (value << (8 * byte))
        return out

    def write(self, smem: Any, parts: int, r: Int, warp: Int, lane: Int) -> None:
        """Sums over the four lanes of a quad and leaves them to the other warps."""
        c, q = self.c, lane & 3
        for token in range(c.m):
            if c.groups == 1:
                values: list[Any] = [v << (q * 2) for v in self.combined(token, q)]
            else:
                place = ((q * 2 + 127) << 23).as_float()
                values = [v * place for v in self.floats[token]]
            for h, value in enumerate(values):
                value = value + asm.shuffle_xor(value, 1)
                value = value + asm.shuffle_xor(value, 2)
                row = (r * c.m + token) * ROWS + (lane >> 2) + 8 * h
                with asm.when(q.equals(0)):
                    bits = value if c.groups == 1 else value.as_int()
                    asm.store(smem, row * c.warps + warp + parts, 4, bits, "shared.u32")


def _multiply(
    c: Decode,
    sums: _Sums,
    weights: list[Int],
    factors: list[Int],
    smem: Any,
    tile: Int,
    lane: Int,
) -> None:
    pos, keep = masks(c.format, weights)
    words = 2 * c.x_bytes
    grouped = c.groups > 1
    for token in range(c.m):
        at = tile * c.tile_words + (lane * words + token * 32 * words)
        planes = asm.load(smem, at, 4, words=words, hint="shared")
        for byte in range(c.x_bytes):
            b = planes[2 * byte : 2 * byte + 2]
            cells = sums.ints[token][byte]
            if not grouped:
                cells = _mma256(_mma256(cells, pos, b), keep, b)
                sums.ints[token][byte] = cells
        if grouped:
            _grouped(c, sums, token, pos, keep, planes, factors, lane & 3)


def _mma256(cells: list[Int], a: list[Int], b: list[Int]) -> list[Int]:
    return asm.ptx(
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        *a,
        *b,
        *cells,
        out=(Int,) * 4,
        pure=True,
        convergent=True,
    )


def _mma128(cells: list[Int], a: list[Int], b: Int) -> list[Int]:
    return asm.ptx(
        "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc "
        "{$0, $1, $2, $3}, {$4, $5}, {$6}, {$7, $8, $9, $10};",
        *a,
        b,
        *cells,
        out=(Int,) * 4,
        pure=True,
        convergent=True,
    )


def _grouped(
    c: Decode,
    sums: _Sums,
    token: int,
    pos: list[Int],
    keep: list[Int],
    planes: list[Int],
    factors: list[Int],
    q: Int,
) -> None:
    """One tile with a scale for every group: integer sums of a group, then float32."""
    zero = [Int.of(0)] * 4
    per_half = max(1, 128 // c.group_size)  # groups in half a tile
    whole = c.group_size >= TILE
    pieces = [None] if whole else [(h, s) for h in range(2) for s in range(per_half)]
    for index, piece in enumerate(pieces):
        plus, minus = [], []
        for byte in range(c.x_bytes):
            b = planes[2 * byte : 2 * byte + 2]
            if piece is None:
                plus.append(_mma256(zero, pos, b))
                minus.append(_mma256(zero, [~w for w in keep], b))
                continue
            half, part = piece
            bits = b[half]
            if per_half > 1:  # weights of other groups see activations of 0
                width = 8 // per_half
                bits = bits & ((2**width - 1) * 0x01010101 << width * part)
            two = slice(2 * half, 2 * half + 2)
            plus.append(_mma128(zero, pos[two], bits))
            minus.append(_mma128(zero, [~w for w in keep[two]], bits))
        sums.ints[token] = [
            [p - n for p, n in zip(ps, ns, strict=True)]
            for ps, ns in zip(plus, minus, strict=True)
        ]
        scales = [f.as_float() for f in factors[2 * index : 2 * index + 2]]
        for h, value in enumerate(sums.combined(token, q)):
            total = sums.floats[token][h]
            sums.floats[token][h] = total + value.to_float() * scales[h]


def _finish(
    c: Decode,
    smem: Any,
    parts: int,
    stats: int,
    ends: tuple[Any, Any, Any, Any, Any],
    block: Int,
    thread: Int,
    rows: tuple[Int, Int] | None = None,
) -> None:
    """Sums over the warps, scales, bias; one thread for each output."""
    x_scale, scale, bias, residual, y = ends
    threads = 32 * c.warps
    outputs = c.rows_per_block * c.m * ROWS
    for step in range(-(-outputs // threads)):
        i = thread + step * threads
        row_block, token = i // (c.m * ROWS), (i // ROWS) % c.m
        column = (block + row_block) * ROWS + i % ROWS
        inside = asm.both(i.less(outputs), column.less(c.n))
        with asm.when(tokens.among(rows, token, inside)):
            words: list[Int] = []
            for four in range(0, c.warps, 4):
                words += asm.load(
                    smem, i * c.warps + (parts + four), 4, words=4, hint="shared"
                )
            if c.groups == 1:
                total = words[0]
                for w in words[1:]:
                    total = total + w
                total = total - tokens.count_of(c, smem, stats, token)
                factor = asm.load(scale, column, 4, words=1, hint="global.nc")[0]
                value = total.to_float() * factor.as_float()
            else:
                value = words[0].as_float()
                for w in words[1:]:
                    value = value + w.as_float()
            value = value * tokens.token_scale(c, smem, stats, x_scale, token, _top(c))
            tokens.write_output(c, y, bias, residual, token, column, value)
