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
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ptx as asm
from pallas_kernels._implementation import WIDE_TOP
from pallas_kernels._ptx import Float, Int

TILE = 256  # weights along K in one instruction
ROWS = 16  # outputs of a warp
_WORDS = {"t2": 256, "sherry": 128}  # 32-bit words of `codes` in one 16 x 256 tile


@dataclasses.dataclass(frozen=True)
class Decode:
    """Everything static about one kernel."""

    format: str
    m: int
    k_tiles: int
    row_blocks: int
    n: int
    groups: int  # scale groups along K; 1 is one scale for each output
    group_size: int
    x_dtype: str
    out_dtype: str
    x_bytes: int  # activations as 8 or 16 bit integers
    bias: bool
    wide_scales: bool = False  # scales of groups in float32, not bfloat16
    warps: int = 8
    rows_per_block: int = 1  # row blocks of 16 outputs that a thread block takes
    prefetch: int = 4  # tiles in flight
    pdl: bool = False  # the next kernel may start before this one ends

    @property
    def k(self) -> int:
        """Activations of a token, padding included."""
        return TILE * self.k_tiles

    @property
    def units(self) -> int:
        """Pieces of 32 activations in one token."""
        return 8 * self.k_tiles

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
    def warps_per_token(self) -> int:
        """Warps that quantize one token together."""
        return max(1, self.warps // self.m)

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


@functools.cache
def build(c: Decode) -> Callable[..., jax.Array]:
    """The kernel `(x, x_scale, codes[, high], scale[, bias]) -> y [M, N]`."""
    n_in = 4 + (c.format == "sherry") + c.bias

    def body(*refs: Any) -> None:
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (n_in + 2))(
            functools.partial(emit, c)
        )(*refs)
        if c.pdl:  # tells the launcher; the kernel itself has said it before
            plgpu.griddepcontrol_launch_dependents()

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
    x, x_scale, codes = (asm.pointer(r) for r in refs[:3])
    high = asm.pointer(refs[3]) if c.format == "sherry" else None
    scale = asm.pointer(refs[3 + (c.format == "sherry")])
    bias = asm.pointer(refs[-3]) if c.bias else None
    y, smem = asm.pointer(refs[-2]), asm.pointer(refs[-1])
    thread = asm.special("tid.x")
    lane, warp = thread & 31, thread >> 5
    block = asm.special("ctaid.x") * c.rows_per_block
    parts = c.plane_words
    stats = parts + c.part_words
    if c.pdl:
        asm.ptx("griddepcontrol.wait;")

    def fetch(r: Int, i: int) -> list[list[Int]]:
        row = clamp(block + clamp(r, c.rows_per_block), c.row_blocks)
        tile = row * c.k_tiles + clamp(warp + c.warps * i, c.k_tiles)
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
    _planes(c, x, smem, stats, thread)
    # Code that outgrows the instruction cache costs more than loops do.
    in_line = max(1, 8 // c.tiles_of_warp)
    asm.loop_tree(c.rows_per_block, row_block, pending, unroll=in_line)
    if c.pdl:
        asm.ptx("griddepcontrol.launch_dependents;")
    asm.barrier()
    _finish(c, smem, parts, stats, x_scale, scale, bias, y, block, thread, rows)


def clamp(i: Int, count: int) -> Int:
    """A tile past the end reads the last one again; its activations are 0."""
    return asm.select(i.less(count), i, Int.of(count - 1))


def among(rows: tuple[Int, Int] | None, token: Int, inside: Any) -> Any:
    """`inside`, for the tokens of `rows` only."""
    if rows is None:
        return inside
    return asm.both(inside, asm.both((rows[0] - 1).less(token), token.less(rows[1])))


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
        at = (row * c.groups + clamp(group, c.groups)) * 8 + (lane >> 2)
        pair = asm.load(scale, at, 4 * words, words=words, hint="global.nc")
        if not c.wide_scales:
            pair = [pair[0] << 16, pair[0] & 0xFFFF0000]
        out += pair
    return out


def masks(format: str, weights: list[Int]) -> tuple[list[Int], list[Int]]:
    """Four words each of `pos` and `keep` bits of a tile."""
    if format == "t2":
        return weights[:4], weights[4:]
    zeros = [_zeros(weights[:4], weights[4], i) for i in range(4)]
    pos = [~(s | z) for s, z in zip(weights, zeros, strict=False)]
    keep = [~s | z for s, z in zip(weights, zeros, strict=False)]
    return pos, keep


def _zeros(signs: list[Int], high: Int, i: int) -> Int:
    """Which bits of word i of the parity code stand for a zero weight."""
    s = signs[i]
    # Parity of each group in all four bytes, then which lane of it is zero.
    t = s ^ _permute(s, s, 0x1032)
    parity = t ^ _permute(t, t, 0x2301) ^ 0x00FF00FF
    upper = _permute(high, ~high, (i << 12) | (i << 8) | ((4 + i) << 4) | (4 + i))
    return parity & upper


_ODD, _EVEN = 0xAAAAAAAA, 0x55555555


def _paired(high: Int, low: Int) -> tuple[Int, Int]:
    """Fields (high, low) of two bits: groups 0, 2, 4, 6, and groups 1, 3, 5, 7."""
    odd = (high & _ODD) | ((low >> 1) & _EVEN)
    even = ((high << 1) & _ODD) | (low & _EVEN)
    return even, odd


def fields(format: str, words: list[Int], i: int) -> list[Int]:
    """The eight groups of word i: group j holds w + 1 times 4^(j // 2) in each byte."""
    if format == "t2":
        pos, zero = words[i], words[4 + i] & ~words[i]
    else:
        zero = _zeros(words[:4], words[4], i)
        pos = ~(words[i] | zero)
    pair = _paired(pos, zero)
    return [pair[j & 1] & (0x03030303 << (j & 6)) for j in range(8)]


def signed_bytes(format: str, words: list[Int], i: int) -> list[Int]:
    """The eight groups of word i, each as four bytes of 64 w."""
    if format == "t2":
        negative = ~words[4 + i]
        present = words[i] | negative
    else:
        present = ~_zeros(words[:4], words[4], i)
        negative = words[i] & present
    pair = _paired(negative, present)
    shifts = [(6 - (j & 6)) for j in range(8)]
    return [
        ((pair[j & 1] << s) if s else pair[j & 1]) & 0xC0C0C0C0
        for j, s in enumerate(shifts)
    ]


def _permute(a: Int, b: Int, selector: int) -> Int:
    return asm.ptx(
        f"prmt.b32 $0, $1, $2, 0x{selector:04x};", a, b, out=(Int,), pure=True
    )


def _planes(c: Decode, x: Any, smem: Any, stats: int, thread: Int) -> None:
    """Quantizes the tokens and writes their bit planes, sums and scales.

    The planes of (tile, token) are 32 lanes x (byte, half) words, each what that lane
    hands to the instruction. Past the end of K, tokens or threads the last item is
    done again, which writes the same words to the same place.
    """
    lane, warp = thread & 31, thread >> 5
    team = c.warps_per_token
    at_once = c.warps // team
    units = 8 * c.tiles_of_warp * c.warps
    steps = -(-units // (32 * team))
    tokens = [clamp(warp // team + r * at_once, c.m) for r in range(-(-c.m // at_once))]
    member = (warp % team) * 32 + lane

    def read(token: Int, i: Int) -> list[Int]:
        return words_of_unit(c, x, token, clamp(i * (32 * team) + member, c.units))

    # Few enough to stay in registers: one trip to memory for all of them.
    held: list[list[list[Int]]] = []
    if len(tokens) * steps * WORDS_OF_UNIT[c.x_dtype] <= 32:
        held = [[read(t, Int.of(i)) for i in range(steps)] for t in tokens]

    inverse = [Float.of(1.0)] * len(tokens)
    if c.x_dtype != "int8":
        inverse = inverse_scales(
            c, smem, stats, tokens, held, read, steps, warp % team, lane, _top(c)
        )
    for r, token in enumerate(tokens):

        def cut(
            i: Int, words: list[Int], total: Int, token: Int = token, r: int = r
        ) -> Int:
            at = i * (32 * team) + member
            unit = clamp(at, units)
            inside, fresh = unit.less(c.units), at.less(units)
            for byte, regs in enumerate(_quantized(c, words, inverse[r], inside)):
                part = Int.of(0)
                for w in regs:
                    part = dot4(w, part, signed=byte == c.x_bytes - 1)
                part = asm.select(fresh, part, Int.of(0))
                total = total + (part << (8 * byte))
                _write_planes(c, smem, _transposed(regs), unit, token, byte)
            return total

        total = Int.of(0)
        if held:
            for i, words in enumerate(held[r]):
                total = cut(Int.of(i), words, total)
        else:
            (total,) = asm.loop(
                steps,
                lambda i, total, token=token, cut=cut: [cut(i, read(token, i), total)],
                [total],
                unroll=2,
            )
        at = token * c.warps + warp % team + stats
        asm.store(smem, at, 4, across("add", total), "shared.u32")
    asm.barrier()


def inverse_scales(
    c: Any,
    smem: Any,
    stats: int,
    tokens: list[Int],
    held: list[list[list[Int]]],
    read: Callable[[Int, Int], list[Int]],
    steps: int,
    member: Int,
    lane: Int,
    top: float,
) -> list[Float]:
    """`top / amax` of each token; leaves the maxima in shared memory."""

    def biggest(words: list[Int], seen: Int) -> Int:
        for v in floats_of(c, words):
            seen = larger(seen, v.as_int() & 0x7FFFFFFF)
        return seen

    for r, token in enumerate(tokens):
        seen = Int.of(0)
        if held:
            for words in held[r]:
                seen = biggest(words, seen)
        else:
            (seen,) = asm.loop(
                steps,
                lambda i, seen, token=token: [biggest(read(token, i), seen)],
                [seen],
            )
        at = token * c.warps + member + stats + c.m * c.warps
        asm.store(smem, at, 4, across("max", seen), "shared.u32")
    asm.barrier()
    return [inverse_scale(c, smem, stats, token, top) for token in tokens]


def inverse_scale(c: Any, smem: Any, stats: int, token: Int, top: float) -> Float:
    """`top / amax` of a token, from the maxima in shared memory."""
    amax = _amax(c, smem, stats, token)
    safe = asm.select(amax.equals(0), Float.of(1.0), amax.as_float())
    return Float.of(top) / safe


def _top(c: Decode) -> float:
    return 127.0 if c.x_bytes == 1 else float(WIDE_TOP)


def across(op: str, value: Int) -> Int:
    """Maximum or sum over the lanes of a warp."""
    return asm.ptx(
        f"redux.sync.{op}.s32 $0, $1, 0xffffffff;", value, out=(Int,), convergent=True
    )


def larger(a: Int, b: Int) -> Int:
    return asm.select(a.less(b), b, a)


def _amax(c: Decode, smem: Any, stats: int, token: Int) -> Int:
    """Bits of the largest |x| of a token: non-negative floats order as integers."""
    at = token * c.warps + stats + c.m * c.warps
    top = Int.of(0)
    for w in range(c.warps_per_token):
        top = larger(top, asm.load(smem, at + w, 4, words=1, hint="shared")[0])
    return top


def _start(c: Decode, token: Int, unit: Int, j: int) -> Int:
    """Index of the four activations of group j of a unit, in items of four.

    A unit is what lane column q sees of half a tile: k = 16 j + 4 q + lane position.
    """
    half, q = unit >> 2, unit & 3
    return token * (c.k // 4) + half * 32 + q + j * 4


# 32-bit words that hold the 32 activations of a unit.
WORDS_OF_UNIT = {"int8": 8, "bfloat16": 16, "float16": 16, "float32": 32}


def words_of_unit(c: Any, x: Any, token: Int, unit: Int) -> list[Int]:
    """The activations of a unit as they lie in memory, in the order (group, lane)."""
    words = WORDS_OF_UNIT[c.x_dtype] // 8
    out: list[Int] = []
    for j in range(8):
        at = _start(c, token, unit, j)
        out += asm.load(x, at, 4 * words, words=words, hint="global")
    return out


def floats_of(c: Any, words: list[Int]) -> list[Float]:
    """The 32 float activations of a unit."""
    if c.x_dtype == "float32":
        return [w.as_float() for w in words]
    out: list[Float] = []
    for w in words:
        if c.x_dtype == "bfloat16":
            out += [(w << 16).as_float(), (w & 0xFFFF0000).as_float()]
        else:
            out += _halves(w)
    return out


def _halves(w: Int) -> list[Float]:
    code = "{{ .reg .b16 l, h; mov.b32 {{l, h}}, $1; cvt.f32.f16 $0, {part}; }}"
    return [
        asm.ptx(code.format(part=part), w, out=(Float,), pure=True) for part in "lh"
    ]


def _quantized(
    c: Decode, words: list[Int], inverse: Float, inside: Any
) -> list[list[Int]]:
    """Integers of a unit: for each byte, lowest first, a word for each group of 4."""
    if c.x_dtype == "int8":
        return [[asm.select(inside, w, Int.of(0)) for w in words]]
    inverse = asm.select(inside, inverse, Float.of(0.0))
    # Adding 1.5 * 2^23 rounds to nearest even and leaves the integer in the low bits.
    ints = [(v * inverse + 12582912.0).as_int() for v in floats_of(c, words)]
    return [
        [gather_bytes(ints[4 * j : 4 * j + 4], byte) for j in range(8)]
        for byte in range(c.x_bytes)
    ]


def gather_bytes(four: list[Int], byte: int) -> Int:
    """One byte of each of four words."""
    pick = 0x0040 + 0x0011 * byte
    low, high = _permute(four[0], four[1], pick), _permute(four[2], four[3], pick)
    return _permute(low, high, 0x5410)


def dot4(w: Int, total: Int, signed: bool) -> Int:
    kind = "s32.s32" if signed else "u32.u32"
    return asm.ptx(
        f"dp4a.{kind} $0, $1, 0x01010101, $2;", w, total, out=(Int,), pure=True
    )


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
    x_scale: Any,
    scale: Any,
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
        with asm.when(among(rows, token, inside)):
            words: list[Int] = []
            for four in range(0, c.warps, 4):
                words += asm.load(
                    smem, i * c.warps + (parts + four), 4, words=4, hint="shared"
                )
            if c.groups == 1:
                total = words[0]
                for w in words[1:]:
                    total = total + w
                first = token * c.warps + stats
                for warp in range(c.warps_per_token):
                    count = asm.load(smem, first + warp, 4, words=1, hint="shared")[0]
                    total = total - count
                factor = asm.load(scale, column, 4, words=1, hint="global.nc")[0]
                value = total.to_float() * factor.as_float()
            else:
                value = words[0].as_float()
                for w in words[1:]:
                    value = value + w.as_float()
            value = value * token_scale(c, smem, stats, x_scale, token, _top(c))
            if c.bias:
                b = asm.load(bias, column, 4, words=1, hint="global.nc")[0]
                value = value + b.as_float()
            write_output(c, y, token * c.n + column, value)


def token_scale(
    c: Any, smem: Any, stats: int, x_scale: Any, token: Int, top: float
) -> Float:
    """What an integer activation of a token stands for."""
    if c.x_dtype == "int8":
        return asm.load(x_scale, token, 4, words=1, hint="global")[0].as_float()
    return _amax(c, smem, stats, token).as_float() * (1 / top)


def write_output(c: Any, y: Any, at: Int, value: Float) -> None:
    if c.out_dtype == "float32":
        asm.store(y, at, 4, value, "global.f32")
        return
    kind = {"bfloat16": "bf16", "float16": "f16"}[c.out_dtype]
    asm.ptx(
        f"{{ .reg .b16 h; cvt.rn.{kind}.f32 h, $1; st.global.b16 [$0], h; }}",
        asm.offset(y, at, 2),
        value,
    )
