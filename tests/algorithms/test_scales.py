"""Scales of weights against literal numpy: loops over granules and ratios."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from angeljax.algorithms import RTNOptions, get_algorithm, rtn
from angeljax.algorithms._scales import ScaleOptions, search_scales
from angeljax.formats import format_names, get_format, make_spec, quantize
from angeljax.formats._blocks import to_blocks

RATIOS = np.linspace(1, 0.4, 25, dtype=np.float32)


def outliers(shape, seed=0):
    """Weights with a few large ones, so that clipping pays."""
    return np.random.default_rng(seed).standard_t(4, size=shape).astype(np.float32)


def bf16(x):
    return np.asarray(x, ml_dtypes.bfloat16).astype(np.float64)


def int_sym(w, top_of, bits):
    half = 2 ** (bits - 1)
    s = bf16(np.float32(top_of(np.abs(w).max()) / (half - 0.5)))
    return s * np.clip(np.round(w / s), -half, half - 1)


def int_asym(w, top_of, bits):
    low, high = top_of(min(w.min(), 0)), top_of(max(w.max(), 0))
    s = bf16(np.float32((high - low) / (2**bits - 1)))
    z = np.clip(np.round(-low / s), 0, 2**bits - 1)
    return s * (np.clip(np.round(w / s + z), 0, 2**bits - 1) - z)


def e4m3(x):
    clipped = np.clip(np.asarray(x, np.float32), -448, 448)
    return clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def fp8(w, top_of):
    s = float(np.float32(top_of(np.abs(w).max()) / 448))
    return s * e4m3(w / s)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def e2m1(x):
    near = np.abs(np.abs(x)[..., None] - E2M1).argmin(-1)
    return np.sign(x) * E2M1[near]


def nvfp4_under(scale2):
    def quantizer(w, top_of):
        s = e4m3(top_of(np.abs(w).max()) / 6 / scale2) * scale2
        return s * e2m1(w / s)

    return quantizer


def least_error(w, quantizer, h=None):
    """The least error of a granule over all ratios, and that of ratio 1."""
    h = np.ones_like(w) if h is None else h
    errors = [(h * (quantizer(w, lambda x, r=r: r * x) - w) ** 2).sum() for r in RATIOS]
    return min(errors), errors[0]


def check_groups(w, q, quantizer, size, h=None):
    """The error of each group of a column is the least of all ratios."""
    found = np.asarray(q.dequantize(), np.float64)
    gained = 0
    for n in range(w.shape[1]):
        for start in range(0, w.shape[0], size):
            rows = slice(start, start + size)
            weight = None if h is None else h[rows]
            best, plain = least_error(w[rows, n].astype(np.float64), quantizer, weight)
            scale = 1 if h is None else weight
            error = (scale * (found[rows, n] - w[rows, n]) ** 2).sum()
            assert error == pytest.approx(best, rel=1e-4)
            gained += best < plain * 0.98
    return gained


@pytest.mark.parametrize(
    ("bits", "symmetric", "k"),
    [(4, True, 128), (3, True, 100), (3, False, 128), (2, False, 40)],
)
def test_mse_of_integers(bits, symmetric, k):
    w = outliers((k, 6))
    options = {"group_size": 32, "symmetric": symmetric}
    spec = make_spec(w.shape, w.dtype, format=f"int{bits}", **options)
    q = rtn(jnp.asarray(w), spec, options=RTNOptions(scales="mse"))
    quantizer = int_sym if symmetric else int_asym
    gained = check_groups(w, q, lambda w, top: quantizer(w, top, bits), 32)
    assert gained >= 6


def test_mse_of_nvfp4_keeps_the_tensor_scale():
    w = outliers((64, 6))
    spec = make_spec(w.shape, w.dtype, format="nvfp4")
    q = rtn(jnp.asarray(w), spec, options=RTNOptions(scales="mse"))
    plain = quantize(jnp.asarray(w), format="nvfp4")
    np.testing.assert_array_equal(q.planes["scale2"], plain.planes["scale2"])
    quantizer = nvfp4_under(float(np.float32(np.abs(w).max() / (6 * 448))))
    assert check_groups(w, q, quantizer, 16) >= 6


def test_mse_weighted_by_the_hessian():
    w, x = outliers((96, 5)), outliers((300, 96), 1) * np.geomspace(0.05, 4, 96)
    x = x.astype(np.float32)
    spec = make_spec(w.shape, w.dtype, format="int3", group_size=64)
    options = RTNOptions(scales="mse", weighting="hessian")
    assert get_algorithm("rtn").needs(options) == ("hessian",)
    q = rtn(jnp.asarray(w), spec, {"hessian": jnp.asarray(x.T @ x)}, options)
    h = np.square(x.astype(np.float64)).sum(0)
    assert check_groups(w, q, lambda w, top: int_sym(w, top, 3), 64, h) >= 3


@pytest.mark.parametrize("scales", ["mse", "percentile"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_granules_of_fp8(granularity, scales):
    w = outliers((150, 140))
    options = RTNOptions(scales=scales, percentile=99.0)
    spec = make_spec(w.shape, w.dtype, format="float8_e4m3", granularity=granularity)
    found = np.asarray(rtn(jnp.asarray(w), spec, options=options).dequantize())
    size = {"tensor": (150, 140), "channel": (150, 1), "block": (128, 128)}[granularity]
    for i in range(0, 150, size[0]):
        for j in range(0, 140, size[1]):
            tile = w[i : i + size[0], j : j + size[1]].astype(np.float64)
            got = found[i : i + size[0], j : j + size[1]]
            if scales == "mse":
                error = np.square(got - tile).sum()
                assert error == pytest.approx(least_error(tile, fp8)[0], rel=1e-4)
            else:
                top = np.percentile(np.abs(tile), 99.0)
                want = fp8(tile, lambda amax, top=top: top)
                # One step of a scale in float32 may put a tie on the other side.
                close = np.isclose(got, want, rtol=1e-5, atol=1e-7)
                assert close.mean() > 0.999


def test_blocks_of_fp8_with_a_zero_tile_and_ragged_edges():
    w = outliers((200, 130))
    w[:128, 128:] = 0
    q = quantize(jnp.asarray(w), format="float8_e4m3", granularity="block")
    assert q.planes["scale"].shape == (2, 2)
    found = np.asarray(q.dequantize())
    for i, j in np.ndindex(2, 2):
        tile = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
        scale = float(np.asarray(q.planes["scale"])[i, j])
        if w[tile].any():
            assert scale == pytest.approx(np.abs(w[tile]).max() / 448, rel=1e-6)
            want = fp8(w[tile].astype(np.float64), lambda amax: amax)
            assert np.isclose(found[tile], want, rtol=1e-5).mean() > 0.999
        else:
            assert scale == 1 and not found[tile].any()


@pytest.mark.parametrize("name", format_names())
def test_mse_is_the_least_of_its_candidates_in_every_format(name):
    fmt = get_format(name)
    size = {"group_size": 64} if "channel" in fmt.granularities else {}
    spec = make_spec((100, 3), jnp.float32, format=name, **size)
    w = jnp.asarray(outliers((2, 100, 3), 3))
    options = ScaleOptions(scales="mse", steps=5, lowest=0.5)
    blocks = to_blocks(w, spec)
    chosen = search_scales(blocks, spec, options)
    own = fmt.scales(blocks, spec)
    inside = np.arange(spec.k_padded).reshape(spec.groups, -1) < 100

    def errors(planes):
        levels = fmt.nearest(blocks, planes, spec)
        wrong = np.asarray(fmt.values(levels, planes, spec) - blocks, np.float64)
        return (np.square(wrong) * inside).sum(-1)

    every = []
    for ratio in (1, 0.875, 0.75, 0.625, 0.5):
        if name in ("binary", "seq2", "sherry", "t1_6", "t2"):
            for r in (ratio, 1 / ratio):
                scale = (own["scale"].astype(jnp.float32) * r).astype(jnp.bfloat16)
                every.append(errors({**own, "scale": scale}))
        elif name in ("nvfp4", "int4_fp8"):
            every.append(errors(fmt.scales_under(blocks * ratio, own, spec)))
        else:
            every.append(errors(fmt.scales(blocks * ratio, spec)))
    np.testing.assert_allclose(errors(chosen), np.min(every, 0), rtol=1e-5)
    for key, plane in chosen.items():
        assert (plane.shape, plane.dtype) == (own[key].shape, own[key].dtype)
    assert (errors(chosen) <= errors(own) * (1 + 1e-5)).all()


def test_ties_keep_the_range_and_zeros_stay():
    spec = make_spec((64, 2), jnp.float32, format="int4", group_size=32)
    blocks = to_blocks(jnp.asarray(outliers((64, 2))).at[:, 1].set(0), spec)
    options = ScaleOptions(scales="mse")
    own = get_format("int4").scales(blocks, spec)
    nothing_counts = search_scales(blocks, spec, options, jnp.zeros(64))
    np.testing.assert_array_equal(nothing_counts["scale"], own["scale"])
    assert search_scales(blocks, spec, options)["scale"][1, 0, 0] == 1


def test_batches_are_searched_by_themselves():
    w = jnp.asarray(outliers((2, 64, 3)))
    h = jnp.asarray(np.abs(outliers((2, 64), 5)))
    options = ScaleOptions(scales="mse", steps=5)
    for name in ("int3", "nvfp4"):
        spec = make_spec(w.shape, w.dtype, format=name)
        both = search_scales(to_blocks(w, spec), spec, options, h)
        for i in range(2):
            one = search_scales(to_blocks(w[i], spec), spec, options, h[i])
            for key, plane in one.items():
                np.testing.assert_array_equal(both[key][i], plane)


def test_default_is_the_plain_rounding():
    w = jnp.asarray(outliers((64, 3)))
    spec = make_spec(w.shape, w.dtype, format="int4", group_size=32)
    for a, b in zip(
        jax.tree.leaves(rtn(w, spec)),
        jax.tree.leaves(quantize(w, format="int4", group_size=32)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": "max"}, "scales='max': use amax, percentile, mse"),
        ({"percentile": 0}, "percentile=0: use a number above 0 and up to 100"),
        ({"lowest": 1.5}, "lowest=1.5: use a number above 0 and up to 1"),
        ({"steps": 1}, "steps=1: use an integer of at least 2"),
        ({"weighting": "hessian"}, "weighting='hessian' goes with scales 'mse'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        RTNOptions(**options)
