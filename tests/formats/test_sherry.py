"""Sherry: the 5-bit code, both groupings, the quantiser's rules, golden vectors."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax.formats.sherry import from_quads, pack_parity, to_quads, unpack_parity
from tests.formats._cases import normal

STATES = [
    (z, signs) for z in range(4) for signs in itertools.product((1, -1), repeat=3)
]


def state_vector(z, signs):
    v = list(signs)
    v.insert(z, 0)
    return v


def slot_and_sign(quad):
    """STQ1_0's view of a group: zero lane and relative signs, and the first sign."""
    quad = [int(v) for v in quad]
    z = quad.index(0)
    a, b, c = (v for v in quad if v)
    return 4 * z + (b != a) + 2 * (c != a), int(a < 0)


def test_all_32_states_round_trip_in_5_bits():
    t = np.array([state_vector(*s) for s in STATES], np.float32)
    zero = jnp.asarray([z for z, _ in STATES], jnp.uint8)
    codes, high = pack_parity(zero, jnp.asarray(t < 0))
    assert codes.size * 8 + high.size * 8 == 32 * 5
    np.testing.assert_array_equal(unpack_parity(codes, high), t)


def test_every_byte_pattern_decodes_to_three_of_four(rng):
    codes = jnp.asarray(rng.integers(0, 256, (64, 16)), jnp.uint8)
    high = jnp.asarray(rng.integers(0, 256, (64, 4)), jnp.uint8)
    t = np.asarray(unpack_parity(codes, high))
    assert ((t == 0).sum(-1) == 1).all() and set(np.unique(t)) == {-1, 0, 1}


def test_bits_lie_where_the_module_says(rng):
    # 32 weights: byte p holds the sign of lane p of group j at bit j.
    z = rng.integers(0, 4, 8)
    t = np.array([state_vector(zi, rng.choice([1, -1], 3)) for zi in z])
    codes, high = pack_parity(jnp.asarray(z, jnp.uint8), jnp.asarray(t < 0))
    codes, high = np.asarray(codes), np.asarray(high)
    for j, p in itertools.product(range(8), range(4)):
        if p != z[j]:
            assert (codes[p] >> j) & 1 == (t[j, p] < 0)
    for j in range(8):
        parity = sum((codes[p] >> j) & 1 for p in range(4)) % 2
        assert 2 * ((high[0] >> j) & 1) + parity == z[j]


@pytest.mark.parametrize("stride", [1, 16])
def test_grouping(stride):
    x = jnp.arange(128)
    quads = np.asarray(to_quads(x, stride))
    for g in range(32):
        want = (
            [4 * g + p for p in range(4)]
            if stride == 1
            else [64 * (g // 16) + g % 16 + 16 * p for p in range(4)]
        )
        assert quads[g].tolist() == want
    np.testing.assert_array_equal(from_quads(jnp.asarray(quads), stride), x)


def test_golden_quantiser():
    w = jnp.asarray([0.9, -0.1, 0.3, -0.4, 0.2, 0.2, -0.8, 0.05])[:, None]
    q = aj.quantize(w, format="sherry", granularity="channel")
    alpha = float(q.planes["scale"][0, 0])
    assert alpha == pytest.approx(0.4666667, rel=1e-6)
    t = np.round(np.asarray(q.dequantize())[:, 0] / alpha)
    assert t.tolist() == [1, 0, 1, -1, 1, 1, -1, 0]
    assert slot_and_sign(t[:4]) == (6, 0) and slot_and_sign(t[4:]) == (14, 0)


@pytest.mark.parametrize(
    ("stride", "alpha", "slots", "signs"),
    [
        (
            16,
            0.7669115,
            "f2a72a7f2a7faaf27faa72a7f2a7fa77a7f2772a7f2a7fa72a7faaf2a7f2a72a",
            "c183e0e1f8f07cf8",
        ),
        (
            1,
            0.7813761,
            "0077aacc0070a7ca0c0077aacc0c70a7cacc0077aacc0c0077aacc0070a7ca0c",
            "56ad5ab56a55aa54",
        ),
    ],
)
def test_golden_codes_of_stq1_0(stride, alpha, slots, signs):
    x = np.sin(0.7 * np.arange(256)).astype(np.float32)
    q = aj.quantize(
        jnp.asarray(x)[:, None],
        format="sherry",
        group_size=256,
        group_stride=stride,
        scale_dtype="float32",
    )
    scale = float(q.planes["scale"][0, 0])
    assert scale == pytest.approx(alpha, rel=1e-6)
    t = np.round(np.asarray(q.dequantize())[:, 0] / scale)
    pairs = [slot_and_sign(g) for g in np.asarray(to_quads(jnp.asarray(t), stride))]
    nibbles = [s for s, _ in pairs]
    packed = bytes(
        lo | hi << 4 for lo, hi in zip(nibbles[::2], nibbles[1::2], strict=True)
    )
    assert packed.hex() == slots
    sign_bits = np.packbits([s for _, s in pairs], bitorder="little")
    assert sign_bits.tobytes().hex() == signs


def test_exactly_one_and_a_quarter_bits_and_scales():
    q = aj.quantize(normal((1024, 8)), format="sherry", group_size=128)
    payload = q.planes["codes"].nbytes + q.planes["high"].nbytes
    assert 8 * payload / q.size == 1.25
    assert q.bits_per_weight == 1.25 + 16 / 128
    assert q.spec.option("group_stride") == 1


def test_smallest_is_zero_the_first_of_equals_and_the_scale_is_least_squares():
    w = np.asarray(normal((64, 4)))
    q = aj.quantize(jnp.asarray(w), format="sherry", granularity="channel")
    d = np.asarray(q.dequantize()).reshape(16, 4, 4)
    np.testing.assert_array_equal(
        (d == 0).argmax(1), np.abs(w).reshape(16, 4, 4).argmin(1)
    )
    t = np.sign(d).reshape(64, 4)
    best = (w * t).sum(0) / (t * t).sum(0)
    np.testing.assert_allclose(q.planes["scale"][0], best, rtol=1e-6)
    tie = aj.quantize(jnp.full((32, 1), -0.5), format="sherry").dequantize()
    np.testing.assert_array_equal(tie.reshape(8, 4), [[0, -0.5, -0.5, -0.5]] * 8)


def test_zeros_stay_zeros_by_their_scale():
    # Every code has three signs in four weights; a zero matrix has the scale 0.
    q = aj.quantize(jnp.zeros((32, 2)), format="sherry")
    np.testing.assert_array_equal(q.dequantize(), 0)
    np.testing.assert_array_equal(q.planes["scale"], 0)
    codes, high = q.planes["codes"][:, 0], q.planes["high"][:, 0]
    np.testing.assert_array_equal(unpack_parity(codes, high), [[0, 1, 1, 1]] * 8)


def test_a_kept_zero_is_positive():
    # Of several zeros in a group the first is dropped; the others become +scale.
    w = jnp.asarray([0.0, -0.0, 0.0, -3.0] * 8)[:, None]
    d = aj.quantize(w, format="sherry", granularity="channel").dequantize()
    np.testing.assert_array_equal(d.reshape(8, 4), [[0, 1, 1, -1]] * 8)


def test_padding_does_not_dilute_the_scale():
    w = jnp.ones((36, 1)).at[::4].set(0.0)
    q = aj.quantize(w, format="sherry", granularity="channel")
    assert float(q.planes["scale"][0, 0]) == 1.0
    np.testing.assert_array_equal(q.dequantize(), w)
