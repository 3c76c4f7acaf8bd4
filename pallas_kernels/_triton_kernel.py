"""The Triton kernel of both packed products. Needs triton: import it on use only.

One kernel for every format: `y[m, n] = sum_k x[m, k] w[k, n]`, w decoded in registers.
Planes are K-contiguous, [N, bytes], as the B operands of tensor cores want them. In
each run of `FIELDS * WIDTH` weights byte r holds k = r + field * WIDTH, so that one
field of a tile of bytes is a tile of consecutive k and needs no shuffle.

Integer formats decode to int8 times `1 / FACTOR` (the field stays in the top bits of
its byte). `no_type_check` keeps run-time checkers from wrapping what Triton compiles.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _scale(stored, KIND: tl.constexpr):
    """Stored scales as float32."""
    if KIND == "e8m0":
        bits = stored.to(tl.uint32) << 23
        # Exponent 0 means 2^-127, a denormal.
        bits = tl.where(bits == 0, 1 << 22, bits).to(tl.uint32)
        return bits.to(tl.float32, bitcast=True)
    elif KIND == "e4m3":
        return _e4m3(stored)
    else:
        return stored.to(tl.float32)


@triton.jit
@no_type_check
def _e4m3(byte):
    """float8_e4m3fn as float32: exact, denormals included; NaN is no weight."""
    wide = byte.to(tl.uint32)
    bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
@no_type_check
def _integers(byte, field, zero, FORMAT: tl.constexpr):
    """One field of bytes as int8, `1 / FACTOR` times the weight over its scale."""
    if FORMAT == "t2" or FORMAT == "sherry":
        return ((byte << (6 - 2 * field).to(tl.uint8)) & 0xC0).to(tl.int8, bitcast=True)
    elif FORMAT == "int4":
        return ((byte << (4 - 4 * field).to(tl.uint8)) & 0xF0).to(tl.int8, bitcast=True)
    elif FORMAT == "uint4":
        code = (byte >> (4 * field).to(tl.uint8)) & 0x0F
        return code.to(tl.int8, bitcast=True) - zero.to(tl.int8, bitcast=True)[:, None]
    elif FORMAT == "fp4":
        code = (byte >> (4 * field).to(tl.uint8)) & 0x0F
        m = code & 7
        exponent = tl.where(m < 2, 1, m >> 1).to(tl.uint8)
        value = tl.where(m < 2, m, (2 + (m & 1)) << (exponent - 1)).to(tl.int8)
        return tl.where(code > 7, -value, value)
    elif FORMAT == "uint8":
        return (byte ^ 0x80).to(tl.int8, bitcast=True)
    else:
        return byte.to(tl.int8, bitcast=True)


@triton.jit
@no_type_check
def _floats(byte, field, zero, levels, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """One field of bytes as floats, `1 / FACTOR` times the weight over its scale."""
    if FORMAT == "uint8":
        return (byte.to(tl.int16) - zero.to(tl.int16)[:, None]).to(DTYPE)
    elif FORMAT == "e4m3":
        if DTYPE == tl.float16:
            # Exponents 8 too low: FACTOR makes up for it. Denormals stay exact.
            wide = byte.to(tl.uint16)
            bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
            return bits.to(tl.float16, bitcast=True)
        else:
            return _e4m3(byte).to(DTYPE)
    elif FORMAT == "e5m2":
        return (byte.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(DTYPE)
    elif FORMAT == "nf4":
        code = (byte >> (4 * field).to(tl.uint8)) & 0x0F
        return tl.load(levels + code.to(tl.int32)).to(DTYPE)
    else:
        return _integers(byte, field, zero, FORMAT).to(DTYPE)


@triton.jit
@no_type_check
def _dot(
    part,
    sums,
    x_tile,
    byte,
    field,
    z,
    levels,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,
):
    """`part` plus one tile of x times the weights in one field of bytes.

    With DOT `part` is [BM, BN]; without it [BN, BK], not yet summed over k. `sums`
    collects the rows of x where the integer dot takes code - 128, lest 128 - zero be
    missing.
    """
    if not DOT:
        if DTYPE == tl.int8:
            if FORMAT == "uint8":
                w = byte.to(tl.int32) - z.to(tl.int32)[:, None]
            else:
                w = _integers(byte, field, z, FORMAT).to(tl.int32)
            part += w * x_tile.to(tl.int32)
        else:
            w = _floats(byte, field, z, levels, FORMAT, tl.float32)
            part += w * x_tile.to(tl.float32)
    elif DTYPE == tl.int8:
        w = tl.trans(_integers(byte, field, z, FORMAT))
        part = tl.dot(x_tile, w, part, out_dtype=tl.int32)
        if FORMAT == "uint8":
            sums += tl.sum(x_tile.to(tl.int32), 1)
    else:
        w = tl.trans(_floats(byte, field, z, levels, FORMAT, DTYPE))
        part = tl.dot(x_tile.to(DTYPE), w, part)
    return part, sums


@triton.jit
@no_type_check
def _lane(s0, s1, s2, s3, high, P: tl.constexpr, ODD: tl.constexpr):
    """Parity code to 2-bit fields (sign, non-zero) of one lane: four of eight groups.

    The sign of the zero lane is a stray bit: it is cleared, as int8 would read -128.
    """
    parity = s0 ^ s1 ^ s2 ^ s3
    if P % 2 == 0:
        parity = parity ^ 0xFF
    if P < 2:
        high = high ^ 0xFF
    nonzero = (high & parity) ^ 0xFF
    if P == 0:
        sign = s0 & nonzero
    elif P == 1:
        sign = s1 & nonzero
    elif P == 2:
        sign = s2 & nonzero
    else:
        sign = s3 & nonzero
    if ODD:
        return (sign & 0xAA) | ((nonzero >> 1) & 0x55)
    else:
        return ((sign << 1) & 0xAA) | (nonzero & 0x55)


@triton.jit
@no_type_check
def packed_matmul(
    x,
    codes,
    high,
    scale,
    scale2,
    zero,
    levels,
    x_scale,
    bias,
    M,
    out,
    N: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    X_STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    FACTOR: tl.constexpr,
    FIELDS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPED: tl.constexpr,
    HAS_SCALE2: tl.constexpr,
    HAS_X_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    UNROLL: tl.constexpr,
    DOT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One tile [BM, BN] of y. Arrays that a format lacks are never read.

    UNROLL decodes all fields of a tile of bytes at once (few rows: bytes are read
    once); otherwise a step takes one field, and re-reads the tile from cache. DOT
    uses tensor cores; without it BM is 1 and products are summed by the cores that
    every GPU has.
    """
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BM)
    pid_m = pid % blocks_m
    pid_n = pid // blocks_m
    rm = pid_m * BM + tl.arange(0, BM)
    rn = pid_n * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    # Rows beyond the end repeat the last one: loads along K need no mask for them.
    x_rows = x + (tl.minimum(rm, M - 1).to(tl.int64) * X_STRIDE)[:, None] + rk[None, :]
    n_row = tl.minimum(rn, N - 1).to(tl.int64)
    SHERRY: tl.constexpr = FORMAT == "sherry"
    # A byte of sherry holds eight groups of four weights, odd and even ones decoded
    # apart; x comes lane by lane within a run.
    LANES: tl.constexpr = 4 if SHERRY else 1
    HALVES: tl.constexpr = 2 if SHERRY else 1
    ITEMS: tl.constexpr = HALVES * FIELDS * WIDTH
    w_rows = codes + (n_row * ROW_BYTES * LANES)[:, None] + rk[None, :]
    h_rows = high + (n_row * ROW_BYTES)[:, None] + rk[None, :]
    STEPS: tl.constexpr = 1 if UNROLL else FIELDS
    INNER: tl.constexpr = FIELDS if UNROLL else 1
    ZERO: tl.constexpr = FORMAT == "uint4" or FORMAT == "uint8"
    CENTRED: tl.constexpr = FORMAT == "uint8" and DTYPE == tl.int8 and DOT
    PART: tl.constexpr = tl.int32 if DTYPE == tl.int8 else tl.float32
    ROWS: tl.constexpr = BM if DOT else BN
    COLUMNS: tl.constexpr = BN if DOT else BK
    acc = tl.zeros((ROWS, COLUMNS), tl.float32 if GROUPED else PART)
    sums = tl.zeros((BM,), tl.int32)
    inside = rn < N
    for step in range(0, ROW_BYTES // BK * STEPS):
        row = step // STEPS * BK
        first = step % STEPS
        run = row // WIDTH * ITEMS
        byte = tl.load(w_rows + row)
        if SHERRY:
            s0 = byte
            s1 = tl.load(w_rows + ROW_BYTES + row)
            s2 = tl.load(w_rows + 2 * ROW_BYTES + row)
            s3 = tl.load(w_rows + 3 * ROW_BYTES + row)
            h = tl.load(h_rows + row)
        for odd in tl.static_range(HALVES):
            for i in tl.static_range(INNER):
                field = tl.full((), i, tl.int32) + first
                item = (HALVES * field + odd) * WIDTH + row % WIDTH
                group = tl.minimum((run + item) * LANES // GROUP, GROUPS - 1)
                z = 0
                if ZERO:
                    z = tl.load(zero + group * N + rn, mask=inside, other=0)
                if GROUPED:
                    part = tl.zeros((ROWS, COLUMNS), PART)
                    sums = tl.zeros((BM,), tl.int32)
                else:
                    part = acc
                for p in tl.static_range(LANES):
                    k = run * LANES + p * ITEMS + item
                    if EVEN_K:
                        x_tile = tl.load(x_rows + k)
                    else:
                        left = (rk + k < X_STRIDE)[None, :]
                        x_tile = tl.load(x_rows + k, mask=left, other=0)
                    if SHERRY:
                        byte = _lane(s0, s1, s2, s3, h, p, odd)
                    part, sums = _dot(
                        part, sums, x_tile, byte, field, z, levels, FORMAT, DTYPE, DOT
                    )
                if GROUPED:
                    if CENTRED:
                        part += sums[:, None] * (128 - z.to(tl.int32))[None, :]
                    s = tl.load(scale + group * N + rn, mask=inside, other=0)
                    s = _scale(s, SCALE_KIND)
                    s = s[None, :] if DOT else s[:, None]
                    acc += part.to(tl.float32) * s
                else:
                    acc = part
    if CENTRED and not GROUPED:
        z = tl.load(zero + rn, mask=inside, other=0).to(tl.int32)
        acc += sums[:, None] * (128 - z)[None, :]
    if not DOT:
        acc = tl.sum(acc, 1)[None, :]
    y = acc.to(tl.float32) * FACTOR
    if not GROUPED:
        s = _scale(tl.load(scale + rn, mask=inside, other=0), SCALE_KIND)
        y = y * s[None, :]
    if HAS_SCALE2:
        y = y * tl.load(scale2)
    if HAS_X_SCALE:
        y = y * tl.load(x_scale + rm, mask=rm < M, other=0.0)[:, None]
    if HAS_BIAS:
        y += tl.load(bias + rn, mask=inside, other=0.0).to(tl.float32)[None, :]
    o = out + rm.to(tl.int64)[:, None] * N + rn[None, :]
    tl.store(o, y.to(out.dtype.element_ty), mask=(rm < M)[:, None] & inside[None, :])
