"""Static scales of activations: from raw values in numpy, and from their histogram."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import angeljax as aj
from angeljax.algorithms.input_scale import (
    METHODS,
    PERCENTILE,
    input_scale,
    needs,
    quantile,
)
from angeljax.calibration import _measure
from angeljax.calibration._statistics import for_weight
from angeljax.formats import make_spec
from angeljax.qat import fake_quantize_activation

KINDS = ("count", "amax", "histogram")
TOP = {"int8": 127, "int4": 7, "float8_e4m3": 448}


def spec_of(kind):
    return make_spec((64, 8), jnp.float32, format="int8", activation=kind)


def inputs(seed=0, rows=500):
    """Heavy tails, and a feature that stands out."""
    x = np.random.default_rng(seed).standard_t(3, size=(rows, 64)).astype(np.float32)
    x[:, 7] *= 20
    return x


def measured(x):
    valid = jnp.ones(x.shape[0], bool)
    return _measure.measure(jnp.asarray(x), valid, kinds=KINDS)


def e4m3(x):
    clipped = np.clip(x, -448, 448).astype(np.float32)
    return clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def mse(x, scale, kind):
    """Of the values themselves."""
    q = x.astype(np.float64) / scale
    top = TOP[kind]
    q = e4m3(q) if kind == "float8_e4m3" else np.clip(np.round(q), -top, top)
    return np.square(q * scale - x).mean()


def test_percentile_of_the_histogram_and_of_the_values():
    x = inputs()
    found = measured(x)
    for p in (0.5, 0.99, 0.9999, 1.0):
        got = float(quantile(found["histogram"], found["amax"], p))
        # Literal: walk down from the top until the share is passed.
        counts = np.asarray(found["histogram"], np.float64)
        left = (1 - p) * counts.sum()
        for b in range(_measure.BINS - 1, -1, -1):
            if counts[b] > left:
                low = 2.0 ** (b / 51.2 - 24)
                high = 2.0 ** ((b + 1) / 51.2 - 24)
                want = low + (high - low) * (1 - left / counts[b])
                break
            left -= counts[b]
        assert got == pytest.approx(min(want, np.abs(x).max()), rel=1e-4)
        low, high = (
            np.quantile(np.abs(x), p, method=method) for method in ("lower", "higher")
        )
        assert low * 0.985 <= got <= high * 1.015
    scale = input_scale(found, spec_of("int8"), "percentile")
    assert scale.shape == (1, 1) and scale.dtype == jnp.float32
    top = quantile(found["histogram"], found["amax"], PERCENTILE / 100)
    assert float(scale[0, 0]) == pytest.approx(float(top) / 127, rel=1e-6)


@pytest.mark.parametrize("kind", ["int8", "int4", "float8_e4m3"])
def test_mse_is_nearly_the_least_of_the_values(kind):
    x = inputs()
    got = float(input_scale(measured(x), spec_of(kind), "mse")[0, 0])
    tops = np.abs(x).max() * 2.0 ** (-np.arange(129) / 16)
    errors = [mse(x, top / TOP[kind], kind) for top in tops]
    assert mse(x, got, kind) <= min(errors) * 1.03
    assert np.isclose(got, tops / TOP[kind], rtol=1e-5).any()
    if kind != "float8_e4m3":
        # Here clipping pays; amax is what FP8 nearly has to keep.
        assert mse(x, got, kind) < errors[0] * 0.95


def test_lepto():
    x = inputs(1)
    a = np.sort(np.abs(x).ravel())
    s0 = float(a[-1]) / 448
    candidates = []
    for r in range(8, 21):
        n = min(round(a.size * (0.999 + 5e-5 * r)), a.size - 1)
        candidates.append(float(a[-1]) / e4m3(a[n] / s0))
    assert candidates[-1] == s0 and max(candidates) > 1.5 * s0
    got = float(input_scale(measured(x), spec_of("float8_e4m3"), "lepto")[0, 0])
    assert np.isclose(got, candidates, rtol=1e-5).any()
    errors = [mse(x, s, "float8_e4m3") for s in candidates]
    # Little is to be gained by another alignment of FP8's grid; some of it is.
    assert mse(x, got, "float8_e4m3") <= min(errors) * 1.001
    assert mse(x, got, "float8_e4m3") < errors[-1] * 0.998


def test_ema_is_corrected_and_experts_without_tokens_share_it():
    tops = [[3.0, 1.0], [5.0, 2.0], [1.0, 7.0]]
    start = {"amax": jnp.zeros(2), "ema": jnp.zeros(2), "batches": jnp.zeros(2)}
    found, mean = start, np.zeros(2)
    for top in tops:
        found = _measure.combine(found, {"amax": jnp.asarray(top)})
        mean = 0.98 * mean + 0.02 * np.asarray(top)
    want = mean / (1 - 0.98**3)
    got = input_scale(found, spec_of("int8"), "ema")
    np.testing.assert_allclose(got[:, 0, 0], want / 127, rtol=1e-5)
    # The third expert saw nothing.
    more = {k: jnp.append(v, v[0] if k == "batches" else 0) for k, v in found.items()}
    more["count"] = jnp.asarray([4.0, 4.0, 0.0])
    stats = aj.Statistics({"w": more})
    shared = for_weight(stats, "w", 64, (3,), ("ema", "batches"))
    got = input_scale(shared, spec_of("int8"), "ema")
    np.testing.assert_allclose(got[:, 0, 0], [*want / 127, max(want) / 127], rtol=1e-5)


@pytest.mark.parametrize("method", METHODS[1:])
def test_batches_zeros_and_tracing(method):
    """Two experts, one of which saw zeros only."""
    kind = "float8_e4m3"
    one, zero = measured(inputs(rows=50)), measured(np.zeros((50, 64)))
    for f in (one, zero):
        f["ema"], f["batches"] = 0.02 * f["amax"], jnp.asarray(1.0)
    both = {k: jnp.stack([one[k], zero[k]]) for k in one}
    both = {k: both[k] for k in needs(method)}
    run = jax.jit(lambda found: input_scale(found, spec_of(kind), method))
    got = run(both)
    assert got.shape == (2, 1, 1) and np.isfinite(got).all()
    assert got[1, 0, 0] == 1
    alone = input_scale({k: one[k] for k in both}, spec_of(kind), method)
    np.testing.assert_allclose(got[0], alone, rtol=1e-6)
    clipped = fake_quantize_activation(jnp.asarray(inputs()), kind, got[0])
    assert np.isfinite(clipped).all()


def test_static_fp8_clips_before_the_cast():
    x = jnp.asarray([[447.0, 449, 463, 465, 1e30, -1e30, jnp.inf]])
    y = fake_quantize_activation(x, "float8_e4m3", jnp.asarray(1.0))
    np.testing.assert_array_equal(y, [[448, 448, 448, 448, 448, -448, 448]])


def test_block128_activations_with_a_short_last_block():
    rng = np.random.default_rng(0)
    x = rng.standard_t(3, size=(2, 3, 200)).astype(np.float32)
    x[0, 1, :128] = 0
    want = np.empty_like(x)
    for i, j in np.ndindex(2, 3):
        for start in (0, 128):
            part = x[i, j, start : start + 128]
            s = np.float32(np.abs(part).max() / 448) or np.float32(1)
            want[i, j, start : start + 128] = e4m3(part / s) * s
    got = fake_quantize_activation(jnp.asarray(x), "float8_e4m3_block128")
    close = np.isclose(got, want, rtol=1e-5, atol=1e-7)
    assert close.mean() > 0.998 and np.isfinite(got).all()
    assert (
        np.square(got - x).mean()
        < np.square(fake_quantize_activation(jnp.asarray(x), "float8_e4m3") - x).mean()
        * 1.01
    )
    w = aj.compress(
        {"kernel": jnp.asarray(rng.normal(size=(200, 140)), jnp.float32)},
        aj.Recipe(
            rules=[
                aj.Rule(
                    format="float8_e4m3",
                    granularity="block",
                    activation="float8_e4m3_block128",
                )
            ]
        ),
    )["kernel"]
    y = aj.ops.dot(jnp.asarray(x), w)
    product = want.astype(np.float64) @ np.asarray(w.dequantize(), np.float64)
    np.testing.assert_allclose(y, product, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"activation": "int8", "activation_scale": "lepto"}, "is for .* float8_e4m3"),
        ({"activation": "nvfp4", "activation_scale": "mse"}, "not for .* nvfp4"),
        ({"activation": "int8", "activation_scale": "max"}, "use dynamic, amax, ema"),
        (
            {"activation": "float8_e4m3_block128", "activation_scale": "amax"},
            "needs an activation of int8",
        ),
    ],
)
def test_what_does_not_go_together(rule, message):
    with pytest.raises(aj.RecipeError, match=message):
        aj.Rule(format="int8", **rule)


def test_from_calibration_to_the_plane():
    x = jnp.asarray(inputs(rows=40))
    params = {"kernel": jnp.asarray(np.eye(64, 8, dtype=np.float32))}
    rule = {"format": "int8", "activation": "int8"}
    found = {}
    for method in ("amax", "ema", "percentile"):
        recipe = aj.Recipe(rules=[aj.Rule(**rule, activation_scale=method)])
        run = lambda p, x: aj.ops.dot(x, p["kernel"])  # noqa: E731
        stats = aj.calibrate(run, params, [x[:20], x[20:]], recipe)
        q = aj.compress(params, recipe, stats)["kernel"]
        found[method] = float(q.planes["input_scale"][0, 0])
    a, b = (float(jnp.abs(part).max()) for part in (x[:20], x[20:]))
    assert found["amax"] == pytest.approx(max(a, b) / 127, rel=1e-6)
    mean = (0.98 * 0.02 * a + 0.02 * b) / (1 - 0.98**2)
    assert found["ema"] == pytest.approx(mean / 127, rel=1e-5)
    assert found["percentile"] <= found["amax"]
