"""Each format against an implementation that shares no code with it."""

import functools

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import qwix

import angeljax as aj
from angeljax.formats import get_format, microscaling
from angeljax.formats._packing import (
    pack_base3,
    pack_bits,
    pack_planar2,
    unpack_base3,
    unpack_bits,
    unpack_planar2,
)
from angeljax.formats.float8 import E4M3, E5M2, cast
from angeljax.formats.nf4 import LEVELS
from tests.formats._cases import OPTIMIZED, normal


def unpack_lsb(data, bits):
    """Codes along axis 0 from bytes, bit by bit."""
    stream = np.unpackbits(np.asarray(data), axis=0, bitorder="little")
    n = stream.shape[0] // bits
    digits = stream.reshape(n, bits, *stream.shape[1:]).astype(np.int64)
    return np.tensordot(1 << np.arange(bits), digits, axes=(0, 1))


# --- packing


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_dense_packing_is_a_little_endian_bit_stream(bits, rng):
    codes = rng.integers(0, 2**bits, (3, 48)).astype(np.uint8)
    packed = np.asarray(pack_bits(jnp.asarray(codes), bits))
    assert packed.shape == (3, 48 * bits // 8)
    np.testing.assert_array_equal(unpack_lsb(packed.T, bits).T, codes)
    np.testing.assert_array_equal(unpack_bits(jnp.asarray(packed), bits), codes)


@pytest.mark.parametrize("run", [4, 32, 128])
def test_planar_packing(run, rng):
    codes = rng.integers(0, 4, (2, 256)).astype(np.uint8)
    packed = np.asarray(pack_planar2(jnp.asarray(codes), run))
    q = run // 4
    for i in range(256):
        byte = packed[:, i // run * q + i % q]
        shift = 2 * (i % run // q)
        np.testing.assert_array_equal((byte >> shift) & 3, codes[:, i])
    np.testing.assert_array_equal(unpack_planar2(jnp.asarray(packed), run), codes)


@pytest.mark.parametrize("n", [1, 5, 32, 128, 243])
def test_base3_packing(n, rng):
    digits = rng.integers(0, 3, (4, n)).astype(np.uint8)
    packed = pack_base3(jnp.asarray(digits))
    assert packed.shape == (4, -(-n // 5))
    np.testing.assert_array_equal(unpack_base3(packed, n), digits)


def test_base3_holds_all_243_values():
    digits = np.stack(np.unravel_index(np.arange(243), (3,) * 5), -1).astype(np.uint8)
    packed = np.asarray(pack_base3(jnp.asarray(digits)))[:, 0]
    assert len(set(packed.tolist())) == 243
    np.testing.assert_array_equal(packed, -(-np.arange(243) * 256 // 243))
    np.testing.assert_array_equal(unpack_base3(jnp.asarray(packed)[:, None], 5), digits)


# --- element types


def test_e2m1_matches_ml_dtypes_on_all_codes_and_ties():
    codes = np.arange(16, dtype=np.uint8)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(microscaling.e2m1_decode(jnp.asarray(codes)), values)
    x = np.linspace(-7, 7, 14001).astype(np.float32)
    x = np.concatenate([x, [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -5, -0.0]])
    want = np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    got = np.asarray(microscaling.e2m1_encode(jnp.asarray(x, jnp.float32)))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("dtype", "oracle"),
    [(E4M3, ml_dtypes.float8_e4m3fn), (E5M2, ml_dtypes.float8_e5m2)],
)
def test_fp8_cast_matches_ml_dtypes_and_saturates(dtype, oracle, rng):
    x = rng.normal(size=20000).astype(np.float32) * np.exp2(
        rng.integers(-18, 17, 20000)
    )
    values = np.arange(256, dtype=np.uint8).view(oracle).astype(np.float32)
    finite = np.sort(values[np.isfinite(values)])
    ties = (finite[1:] + finite[:-1]) / 2
    x = np.concatenate([x, finite, ties, [1e30, -1e30]]).astype(np.float32)
    top = float(ml_dtypes.finfo(oracle).max)
    want = np.clip(x, -top, top).astype(oracle)
    got = np.asarray(cast(jnp.asarray(x), dtype))
    np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


def test_e8m0_rounding():
    x = np.float32([1.0, 1.0001, 1.9999, 2.0, 0.75, 3e-38, 1e38])
    ceil = np.asarray(microscaling.e8m0_encode(jnp.asarray(x), "ceil")).astype(int)
    floor = np.asarray(microscaling.e8m0_encode(jnp.asarray(x), "floor")).astype(int)
    exact = np.log2(x.astype(np.float64))
    np.testing.assert_array_equal(ceil - 127, np.ceil(exact))
    np.testing.assert_array_equal(floor - 127, np.floor(exact))
    codes = np.arange(1, 255, dtype=np.uint8)
    want = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(microscaling.e8m0_decode(jnp.asarray(codes)), want)


# --- qwix, a library of the same purpose


def qwix_quantize(w, qtype, group=None, method="absmax"):
    """Compiled as users do: XLA's older emitters round twice on the way to float4."""
    quantize = functools.partial(
        qwix.quantize,
        qtype=qtype,
        channelwise_axes=(1,),
        tiled_axes={0: group} if group else {},
        calibration_method=method,
    )
    return jax.jit(quantize, compiler_options=OPTIMIZED)(w)


def stored_codes(q, bits):
    if bits == 8:
        return np.asarray(q.planes["codes"]).astype(np.int64)
    codes = unpack_lsb(q.planes["codes"], bits)
    if not q.spec.option("symmetric"):
        return codes
    return np.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)


@pytest.mark.parametrize("group", [None, 32, 128])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_integers_equal_qwix(bits, group):
    w = normal((256, 48))
    qtype = {8: jnp.int8, 4: jnp.int4}.get(bits, f"int{bits}")
    want = qwix_quantize(w, qtype, group)
    q = aj.quantize(
        w,
        format=f"int{bits}",
        granularity="group" if group else "channel",
        group_size=group,
        narrow_range="no",
        scale_dtype="float32",
    )
    np.testing.assert_array_equal(q.planes["scale"], want.scale)
    np.testing.assert_array_equal(
        stored_codes(q, bits), np.asarray(want.qvalue).astype(np.int64)
    )


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("bits", [8, 4])
def test_asymmetric_integers_equal_qwix(bits, group):
    w = normal((256, 48)) + 0.3
    want = qwix_quantize(w, {8: jnp.int8, 4: jnp.int4}[bits], group, "minmax")
    q = aj.quantize(
        w,
        format=f"int{bits}",
        granularity="group" if group else "channel",
        group_size=group,
        symmetric=False,
        scale_dtype="float32",
    )
    half = 2 ** (bits - 1)
    np.testing.assert_array_equal(q.planes["scale"], want.scale)
    zero = np.asarray(q.planes["zero"]).astype(int) - half
    np.testing.assert_array_equal(zero, np.asarray(want.zero_point).astype(int))
    codes = unpack_lsb(q.planes["codes"], bits) - half
    np.testing.assert_array_equal(codes, np.asarray(want.qvalue).astype(int))


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("name", ["float8_e4m3", "float8_e5m2"])
def test_fp8_equals_qwix(name, group):
    w = normal((256, 48))
    qtype = {"float8_e4m3": jnp.float8_e4m3fn, "float8_e5m2": jnp.float8_e5m2}[name]
    want = qwix_quantize(w, qtype, group)
    q = aj.quantize(
        w,
        format=name,
        granularity="group" if group else "channel",
        group_size=group,
        scale_dtype="float32",
    )
    np.testing.assert_array_equal(q.planes["scale"], want.scale)
    np.testing.assert_array_equal(
        np.asarray(q.planes["codes"]).view(np.uint8),
        np.asarray(want.qvalue).view(np.uint8),
    )


def test_nf4_equals_qwix():
    w = normal((256, 48))
    want = qwix_quantize(w, "nf4", 64)
    q = aj.quantize(w, format="nf4", group_size=64, scale_dtype="float32")
    np.testing.assert_array_equal(q.planes["scale"], want.scale)
    codes = unpack_lsb(q.planes["codes"], 4)
    np.testing.assert_array_equal(codes, np.asarray(want.qvalue).astype(int))


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_mx_equals_qwix(name):
    w = normal((256, 48))
    want = qwix_quantize(w, name, 32)
    q = aj.quantize(w, format=name)
    scale = np.exp2(np.asarray(q.planes["scale"]).astype(np.float64) - 127)
    np.testing.assert_array_equal(scale, want.scale)
    np.testing.assert_array_equal(q.dequantize(), qwix_dequantize(want))


def qwix_dequantize(x):
    return np.asarray(x.qvalue).astype(np.float32) * np.repeat(
        np.asarray(x.scale), x.qvalue.shape[0] // x.scale.shape[0], axis=0
    )


# --- formats without a library: numpy from the definition


def test_nvfp4_from_its_definition():
    w = np.asarray(normal((64, 8)))
    q = aj.quantize(jnp.asarray(w), format="nvfp4")
    s2 = np.float32(np.abs(w).max() / np.float32(6 * 448))
    blocks = w.reshape(4, 16, 8)
    amax = np.abs(blocks).max(1, keepdims=True)
    sb = np.clip(amax / np.float32(6) / s2, 2.0**-9, 448)
    sb = sb.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    x = np.clip(blocks / (sb * s2), -6, 6)
    want = x.astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * (sb * s2)
    np.testing.assert_allclose(q.dequantize(), want.reshape(64, 8), rtol=1e-6)
    assert q.planes["scale2"].shape == (1, 1)
    np.testing.assert_allclose(q.planes["scale2"], s2, rtol=1e-6)
    low = np.asarray(q.planes["codes"])[0] & 15  # K index 0 lies in the low nibble
    np.testing.assert_array_equal(
        np.asarray(microscaling.e2m1_decode(jnp.asarray(low))),
        x[0, 0].astype(ml_dtypes.float4_e2m1fn).astype(np.float32),
    )


def test_nvfp4_has_one_tensor_scale_for_each_expert():
    w = normal((3, 32, 8)) * jnp.asarray([1.0, 10.0, 100.0])[:, None, None]
    q = aj.quantize(w, format="nvfp4")
    assert q.planes["scale2"].shape == (3, 1, 1)
    assert len(set(np.asarray(q.planes["scale2"]).ravel().tolist())) == 3


def test_fp8_blocks_from_their_definition():
    w = np.asarray(normal((200, 150)))
    q = aj.quantize(jnp.asarray(w), format="float8_e4m3", granularity="block")
    assert q.planes["scale"].shape == (2, 2)
    want = np.empty_like(w)
    for i in range(0, 200, 128):
        for j in range(0, 150, 128):
            tile = w[i : i + 128, j : j + 128]
            s = np.float32(np.abs(tile).max() / np.float32(448))
            codes = np.clip(tile / s, -448, 448).astype(ml_dtypes.float8_e4m3fn)
            want[i : i + 128, j : j + 128] = codes.astype(np.float32) * s
            np.testing.assert_allclose(
                np.asarray(q.planes["scale"])[i // 128, j // 128], s, rtol=1e-6
            )
    np.testing.assert_allclose(q.dequantize(), want, rtol=1e-6)


def test_nf4_levels_are_quantiles():
    assert len(LEVELS) == 16 and LEVELS[0] == -1 and LEVELS[15] == 1 and 0.0 in LEVELS
    assert list(LEVELS) == sorted(LEVELS)


@pytest.mark.parametrize("method", ["absmean", "twn", "lstsq"])
def test_ternary_from_its_definition(method):
    w = np.asarray(normal((128, 6)), np.float64)
    a = np.abs(w)
    if method == "absmean":
        scale = a.mean(0)
        t = np.sign(w) * (a >= scale / 2)
    else:
        t = np.sign(w) * (a >= 0.75 * a.mean(0))
        scale = (w * t).sum(0) / (t * t).sum(0)
    for _ in range(10 if method == "lstsq" else 0):
        t = np.sign(w) * (a >= scale / 2)
        scale = (w * t).sum(0) / (t * t).sum(0)
    q = aj.quantize(
        jnp.asarray(w, jnp.float32),
        format="t2",
        granularity="channel",
        scale_method=method,
    )
    np.testing.assert_allclose(np.asarray(q.planes["scale"])[0], scale, rtol=1e-5)
    np.testing.assert_allclose(q.dequantize(), t * scale, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "gaussian"),
    [
        ({"format": "t2", "scale_method": "absmean"}, 0.261),
        ({"format": "t2", "scale_method": "twn"}, 0.188),
        ({"format": "t2", "scale_method": "lstsq"}, 0.187),
        ({"format": "sherry"}, 0.282),
    ],
)
def test_distortion_of_a_gaussian(options, gaussian):
    # Relative mean squared error in groups of 128.
    w = np.asarray(normal((1024, 256)))
    d = np.asarray(aj.quantize(jnp.asarray(w), group_size=128, **options).dequantize())
    assert np.mean((w - d) ** 2) / np.mean(w**2) == pytest.approx(gaussian, rel=0.03)


# --- gguf, the container of llama.cpp


def on_grid_ternary(rng, k=512, n=8):
    t = rng.integers(-1, 2, (k, n))
    t[::256] = 1  # a block of zeros would have no scale
    return t.astype(np.float32), t


def test_t2_bytes_equal_tq2_0(rng):
    w, t = on_grid_ternary(rng)
    q = aj.quantize(jnp.asarray(w), format="t2", group_size=256, scale_method="lstsq")
    blocks = gguf.quants.quantize(w.T.copy(), gguf.GGMLQuantizationType.TQ2_0)
    payload = blocks.reshape(w.shape[1], -1, 66)[:, :, :64].reshape(w.shape[1], -1)
    np.testing.assert_array_equal(np.asarray(q.planes["codes"]).T, payload)
    np.testing.assert_array_equal(q.dequantize(), t)


def test_t1_6_bytes_follow_tq1_0(rng):
    # TQ1_0 packs runs of 160 values as 32 bytes of 5, in the order that a group of 160
    # has here.
    w, _ = on_grid_ternary(rng, k=256)
    blocks = gguf.quants.quantize(w.T.copy(), gguf.GGMLQuantizationType.TQ1_0)
    first = aj.quantize(
        jnp.asarray(w[:160]), format="t1_6", group_size=160, scale_method="lstsq"
    )
    np.testing.assert_array_equal(np.asarray(first.planes["codes"]).T, blocks[:, :32])


def test_every_integer_level_round_trips():
    for bits in (8, 4, 3, 2):
        top = 2 ** (bits - 1) - 1
        levels = np.arange(-top, top + 1, dtype=np.float32)
        levels = np.resize(levels, 256 if bits == 8 else 128)
        levels[:2] = -top, top
        w = jnp.asarray(np.stack([levels * 0.5, levels * 2], 1))
        q = aj.quantize(
            w, format=f"int{bits}", granularity="channel", narrow_range="yes"
        )
        np.testing.assert_array_equal(q.dequantize(), w)
        np.testing.assert_array_equal(q.planes["scale"], [[0.5, 2.0]])


def test_every_asymmetric_level_round_trips():
    for bits in (8, 4, 3, 2):
        levels = np.resize(np.arange(2**bits, dtype=np.float32), 256) - 2
        w = jnp.asarray(levels[:, None] * 0.25)
        q = aj.quantize(w, format=f"int{bits}", granularity="channel", symmetric=False)
        np.testing.assert_array_equal(q.dequantize(), w)


def test_every_float_value_round_trips():
    e4m3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    e5m2 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e5m2)
    for name, values in (("float8_e4m3", e4m3), ("float8_e5m2", e5m2)):
        x = values.astype(np.float32)
        x = x[np.isfinite(x)]
        w = jnp.asarray(np.resize(x, 256)[:, None]) * 0.5
        q = aj.quantize(w, format=name)
        np.testing.assert_array_equal(q.dequantize(), w)
    nf4 = jnp.asarray(np.resize(np.float32(LEVELS), 64)[:, None]) * 2
    np.testing.assert_array_equal(aj.quantize(nf4, format="nf4").dequantize(), nf4)
    e2m1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn)
    x = jnp.asarray(np.resize(e2m1.astype(np.float32), 64)[:, None]) * 4
    np.testing.assert_array_equal(aj.quantize(x, format="mxfp4").dequantize(), x)
    np.testing.assert_array_equal(aj.quantize(x, format="nvfp4").dequantize(), x)
    assert jax.tree.leaves(aj.quantize(x, format="nvfp4"))


# --- int4_fp8


def test_int4_fp8_codes_are_nearest_after_the_cast(rng):
    """Every weight has the nearest of 16 values; what they stand for comes back."""
    w = rng.standard_t(4, (128, 6)).astype(np.float32)
    w[64:] *= 2.0**-12  # steps near the subnormal numbers of E4M3
    w[0, 0] = -np.abs(w).max()
    q = aj.quantize(jnp.asarray(w), format="int4_fp8", group_size=32)
    s2 = np.float32(np.abs(w).max() / 448)
    np.testing.assert_allclose(q.planes["scale2"], [[s2]], rtol=1e-6)
    s2 = np.asarray(q.planes["scale2"])[0, 0]
    got = np.asarray(q.dequantize())
    scale = np.asarray(q.planes["scale"], np.float32)
    codes = unpack_lsb(q.planes["codes"], 4)
    codes = np.where(codes > 7, codes - 16, codes)
    for i, j in np.ndindex(w.shape):
        step = np.float32(scale[i // 32, j] * np.float32(1 / s2))
        grid = np.clip(np.float32(range(-8, 8)) * step, -448, 448)
        grid = grid.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * s2
        assert got[i, j] == grid[codes[i, j] + 8]
        assert abs(got[i, j] - w[i, j]) <= np.abs(grid - w[i, j]).min() * (1 + 1e-5)
    # The largest weight saturates instead of overflowing, with either sign.
    assert got[0, 0] == pytest.approx(w[0, 0], rel=1e-6) and np.isfinite(got).all()
    # What was encoded stays where it is under the same scales.
    fmt = get_format("int4_fp8")
    granules = {n: q.planes[n].T[..., None] for n in ("scale", "scale2")}
    blocks = jnp.asarray(got).T.reshape(6, 4, 32)
    levels = fmt.nearest(blocks, granules, q.spec)
    np.testing.assert_array_equal(fmt.values(levels, granules, q.spec), blocks)
