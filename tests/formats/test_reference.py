"""Each case of the contract against float64 numpy, with lengths that divide nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax.formats import format_names
from tests.formats._cases import CASES, IDS
from tests.formats._numpy import reference


def heavy_tailed(shape):
    """Student-t weights of many magnitudes: columns from 1e-3 to 10."""
    rng = np.random.default_rng(7)
    w = rng.standard_t(4, shape) * np.logspace(-3, 1, shape[-1])
    return w.astype(np.float32)


def assert_holds(w, q):
    """`q` is `w` as the reference has it; they may differ at ties only."""
    got, want = np.asarray(q.dequantize(jnp.float32), np.float64), reference(w, q.spec)
    near = np.abs(got - want) <= 2e-6 * np.abs(want)
    # The library multiplies by a float32 reciprocal where the reference divides.
    assert near.mean() > 0.998
    error, best = np.abs(got - w)[~near], np.abs(want - w)[~near]
    np.testing.assert_allclose(error, best, rtol=1e-4, atol=1e-7 * np.abs(w).max())


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_every_case(name, options):
    w = heavy_tailed((200, 136 if options.get("granularity") == "block" else 12))
    assert_holds(w, aj.quantize(jnp.asarray(w), format=name, **options))


@pytest.mark.parametrize("k", [1, 33])
@pytest.mark.parametrize("name", format_names())
def test_fewer_weights_than_a_group_or_a_unit(name, k):
    w = heavy_tailed((k, 5))
    q = aj.quantize(jnp.asarray(w), format=name)
    assert_holds(w, q)
    # No more than one packed unit is stored beyond the weights.
    payload = sum(x.nbytes for n, x in q.planes.items() if n in ("codes", "high"))
    assert payload <= 5 * (k + 31 if name == "sherry" else k + 7)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("int4", {}),
        ("int8", {"symmetric": False}),
        ("float8_e4m3", {}),
        ("nf4", {}),
        ("t2", {}),
        ("sherry", {}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_codes_are_chosen_for_the_scale_that_is_stored(name, options, scale_dtype):
    w = heavy_tailed((64, 12))
    q = aj.quantize(
        jnp.asarray(w), format=name, group_size=32, scale_dtype=scale_dtype, **options
    )
    assert q.planes["scale"].dtype == scale_dtype
    assert_holds(w, q)


@pytest.mark.parametrize("name", format_names())
def test_a_zero_granule_is_zero_beside_others(name):
    w = heavy_tailed((128, 8))
    w[:, 1] = 0
    w[:, 2] *= 1e-30
    q = aj.quantize(jnp.asarray(w), format=name)
    d = np.asarray(q.dequantize())
    np.testing.assert_array_equal(d[:, 1], 0)
    assert np.abs(d[:, 2]).max() <= 2 * np.abs(w[:, 2]).max()
    assert all(np.isfinite(np.asarray(s, np.float32)).all() for s in jax.tree.leaves(q))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_a_zero_point_serves_weights_of_one_sign(bits):
    w = np.abs(heavy_tailed((128, 12))) + 0.5
    w[:, ::2] *= -1
    options = {"granularity": "channel", "symmetric": False}
    q = aj.quantize(jnp.asarray(w), format=f"int{bits}", **options)
    assert_holds(w, q)
    # The range holds 0: the zero point is one of the codes, at one end of them.
    zero = np.asarray(q.planes["zero"])
    assert set(zero[0, ::2].tolist()) == {2**bits - 1}
    assert set(zero[0, 1::2].tolist()) == {0}


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_err_by_half_a_step(bits, symmetric):
    w = heavy_tailed((128, 12))
    q = aj.quantize(
        jnp.asarray(w),
        format=f"int{bits}",
        granularity="channel",
        symmetric=symmetric,
        **({"narrow_range": "yes"} if symmetric else {}),
    )
    half = np.asarray(q.planes["scale"]) / 2
    error = np.abs(np.asarray(q.dequantize()) - w)
    # With a zero point its own rounding takes up to half a step at one end.
    assert (error <= half * 1.0001 * (1 if symmetric else 2)).all()


@pytest.mark.parametrize(
    ("name", "mantissa"), [("float8_e4m3", 3), ("float8_e5m2", 2), ("mxfp8", 3)]
)
def test_floats_err_by_half_a_unit_in_the_last_place(name, mantissa):
    w = np.random.default_rng(1).normal(size=(128, 8)).astype(np.float32)
    d = np.asarray(aj.quantize(jnp.asarray(w), format=name).dequantize())
    bound = 2.0 ** -(mantissa + 1)
    assert (np.abs(d - w) <= bound * np.abs(w) + 2e-4 * np.abs(w).max()).all()
