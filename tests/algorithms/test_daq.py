"""DAQ against literal numpy: granule by granule, ratio by ratio."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import angeljax as aj
from angeljax.algorithms import DAQOptions, daq
from angeljax.formats import make_spec, quantize


def pair(shape, seed=0, change=0.02):
    """A base model, and what fine-tuning made of it."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=shape).astype(np.float32)
    return base, (base + change * rng.normal(size=shape)).astype(np.float32)


def rounded(w, ratio, dtype=ml_dtypes.float8_e4m3fn):
    top = float(ml_dtypes.finfo(dtype).max)
    s = float(np.float32(np.abs(w).max() / top * ratio)) or 1.0
    return np.clip(w / s, -top, top).astype(np.float32).astype(dtype).astype(float) * s


def score(w, base, q, metric):
    change, kept = w - base, q - base
    if metric == "mse":
        return -np.square(w - q).mean()
    if metric == "cosine":
        return (change * kept).sum() / (
            np.sqrt(np.square(change).sum() * np.square(kept).sum()) or 1.0
        )
    same = total = 0
    for d, k in zip(change.ravel(), kept.ravel(), strict=True):
        if abs(d) > 1e-5:
            total += 1
            same += np.sign(d) == np.sign(k)
    return same / max(total, 1)


def searched(w, base, metric):
    """The best score, and that of ratio 1."""

    def of(ratio):
        return score(w, base, rounded(w, ratio), metric)

    coarse = np.linspace(0.8, 1.5, 5)
    best = coarse[np.argmax([of(r) for r in coarse])]
    delta = 0.7 / 4
    low, high = max(best - delta / 2, 0.8), min(best + delta / 2, 1.5)
    fine = np.linspace(low, high, 10)
    return max([of(1.0), of(best), *(of(r) for r in fine)]), of(1.0)


@pytest.mark.parametrize("metric", ["sign", "cosine", "mse"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_every_granule_has_the_best_scale(granularity, metric):
    shape = (40, 6) if granularity == "channel" else (150, 130)
    base, w = pair(shape)
    w[:, 1] = base[:, 1]  # not changed at all
    spec = make_spec(w.shape, w.dtype, format="float8_e4m3", granularity=granularity)
    q = daq(
        jnp.asarray(w), spec, {"base": jnp.asarray(base)}, DAQOptions(metric=metric)
    )
    got = np.asarray(q.dequantize(), np.float64)
    plain = np.asarray(
        quantize(w, format="float8_e4m3", granularity=granularity).dequantize()
    )
    size = {"tensor": shape, "channel": (40, 1), "block": (128, 128)}[granularity]
    gained = 0
    for i in range(0, shape[0], size[0]):
        for j in range(0, shape[1], size[1]):
            tile = (slice(i, i + size[0]), slice(j, j + size[1]))
            a, b = w[tile].astype(np.float64), base[tile].astype(np.float64)
            best, at_one = searched(a, b, metric)
            found = score(a, b, got[tile], metric)
            # One weight at a tie may fall to the other side.
            slack = 1.5 / a.size if metric == "sign" else 2e-4 * abs(best)
            assert found == pytest.approx(best, abs=max(slack, 1e-9))
            assert found >= score(a, b, plain[tile].astype(np.float64), metric) - 1e-6
            gained += found > at_one
    assert gained >= (4 if granularity == "channel" else 1)


def test_zeros_no_change_and_large_weights():
    base, w = pair((256, 130))
    w[:128, :128] = base[:128, :128] = 0  # a tile of zeros
    w[128:, 128:] = base[128:, 128:] * 1e30
    base[128:, 128:] = w[128:, 128:]  # not changed
    spec = make_spec(w.shape, w.dtype, format="float8_e4m3", granularity="block")
    q = daq(jnp.asarray(w), spec, {"base": jnp.asarray(base)}, DAQOptions())
    got = np.asarray(q.dequantize())
    assert np.isfinite(got).all() and not got[:128, :128].any()
    assert np.asarray(q.planes["scale"])[0, 0] == 1
    plain = quantize(w, format="float8_e4m3", granularity="block")
    np.testing.assert_array_equal(got[128:, 128:], plain.dequantize()[128:, 128:])


def test_through_compress_with_experts():
    base, w = pair((3, 64, 8))
    recipe = aj.Recipe(rules=[aj.Rule(format="float8_e4m3", algorithm="daq")])
    q = aj.compress({"w": jnp.asarray(w)}, recipe, base={"w": jnp.asarray(base)})["w"]
    for i in range(3):
        spec = make_spec((64, 8), jnp.float32, format="float8_e4m3")
        one = daq(jnp.asarray(w[i]), spec, {"base": jnp.asarray(base[i])}, DAQOptions())
        for a, b in zip(jax.tree.leaves(q[i]), jax.tree.leaves(one), strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="w: .*pass its params as base="):
        aj.compress({"w": jnp.asarray(w)}, recipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "sine"}, "metric='sine': use sign, cosine, mse"),
        ({"threshold": -1}, "threshold=-1: use a number of at least 0"),
        ({"low": 2.0}, "use 0 < low < high"),
        ({"coarse": 1}, "coarse=1: use an integer of at least 2"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DAQOptions(**options)
    with pytest.raises(
        aj.RecipeError, match="makes float8_e4m3, float8_e5m2, not int8"
    ):
        aj.Rule(format="int8", algorithm="daq")
