"""FOCUS and learned scales: what they compute, and that they learn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import angeljax as aj
from angeljax.qat import focus, scales
from angeljax.train.recovery import learn_focus, tune_scales
from tests.formats._cases import OPTIMIZED

E2M1, E4M3 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn
NAMES = ("nvfp4", "mxfp4")


def tree(k: int = 72) -> dict:
    w = jax.random.normal(jax.random.key(0), (2, k, 6)) * jnp.logspace(-2, 0, 6)
    return {"stack": {"kernel": w.at[0, :40, 1].set(0)}}


def shaken(state: focus.FocusState, seed: int = 1) -> focus.FocusState:
    """Another state, as training may leave it."""
    leaves, treedef = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    new = [
        x * (1 + 0.3 * jax.random.uniform(k, x.shape, minval=-1))
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(treedef, new)


def recipe(name: str, **more) -> aj.Recipe:
    return aj.Recipe(rules=[aj.Rule(format=name, match=".*", **more)])


def oracle(w, p, m, name: str) -> np.ndarray:
    """One [K, N] weight, block by block, sub-block by sub-block, in float64."""
    out = np.zeros(w.shape)
    size = {"nvfp4": 16, "mxfp4": 32}[name]
    s2 = np.float32(np.abs(w).max() / (6 * 448))
    for n in range(w.shape[1]):
        for b in range(-(-len(w) // size)):
            block = w[b * size : (b + 1) * size, n].astype(np.float64)
            amax = np.abs(block).max() * m[n, b, 0]
            if amax == 0:
                continue
            if name == "nvfp4":
                s = np.clip(amax / 6 / s2, 2.0**-6, 448)
                s = float(np.float32(s).astype(E4M3)) * s2
            else:
                s = 2.0 ** np.ceil(np.log2(amax / 6))
            for j, v in enumerate(block):
                c = 1 / (1 + np.exp(-p[n, b, j // 8]))
                code = np.float32(np.clip(v / (s * c), -6, 6)).astype(E2M1)
                out[b * size + j, n] = float(code) * s
    return out


@pytest.mark.parametrize("name", NAMES)
def test_apply_is_the_paper_and_finalize_is_apply(name: str) -> None:
    params = tree()
    state = shaken(focus.init(params, recipe(name)))
    got = jax.jit(focus.apply, compiler_options=OPTIMIZED)(params, state)
    packed = focus.finalize(params, state)["stack"]["kernel"]
    w = np.asarray(got["stack"]["kernel"])
    # Contract: what is trained is what is deployed, compiled in whatever way.
    np.testing.assert_array_equal(w, packed.dequantize())
    np.testing.assert_array_equal(w, focus.apply(params, state)["stack"]["kernel"])
    assert packed.spec.format == name
    plain = aj.quantize(params["stack"]["kernel"], format=name, axis=-2, batch_axes=1)
    assert jax.tree.structure(packed) == jax.tree.structure(plain)
    path = "stack/kernel"
    for i in range(2):
        want = oracle(
            np.asarray(params["stack"]["kernel"][i]),
            np.asarray(state.rounding[path][i], np.float64),
            np.asarray(state.max_scale[path][i], np.float64),
            name,
        )
        # A few may lie at a tie of float32.
        assert np.isclose(w[i], want, rtol=1e-5, atol=1e-8).mean() > 0.99


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_close_to_rounding_to_nearest(name: str) -> None:
    params = tree(64)
    start = focus.finalize(params, focus.init(params, recipe(name)))
    plain = aj.compress(params, recipe(name))
    a, b = (np.asarray(t["stack"]["kernel"].dequantize()) for t in (start, plain))
    assert (a == b).mean() > 0.97


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_straight_through(name: str) -> None:
    params = {"a": {"kernel": jax.random.normal(jax.random.key(2), (32, 3))}}
    state = focus.init(params, recipe(name))
    g = jax.random.normal(jax.random.key(3), (32, 3))

    def loss(params, state):
        return jnp.sum(g * focus.apply(params, state)["a"]["kernel"])

    to_weights, to_state = jax.grad(loss, argnums=(0, 1))(params, state)
    assert not np.asarray(to_weights["a"]["kernel"]).any()
    # By hand, in numpy: q = round(clip(y)), y = w / (S c), w' = q S.
    q = focus.finalize(params, state)["a"]["kernel"]
    w, size = np.asarray(params["a"]["kernel"]), q.spec.group_size
    scale = np.asarray(q.planes["scale"])
    if name == "nvfp4":
        scale = scale.astype(np.float64) * np.asarray(q.planes["scale2"])
    else:
        scale = 2.0 ** (scale.astype(np.float64) - 127)
    s = np.repeat(scale, size, axis=0)
    c = 1 / (1 + np.exp(-6.0))
    y = w / (s * c)
    inside = np.abs(y) < 6
    d_rounding = (np.asarray(g) * np.where(inside, -y * s, 0)) * (1 - c)
    want = d_rounding.reshape(-1, 8, 3).sum(1)
    got = np.moveaxis(np.asarray(to_state.rounding["a/kernel"]), 0, -1).reshape(-1, 3)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    level = np.asarray(q.dequantize()) / s
    d_scale = np.asarray(g) * (level - np.where(inside, y, 0))
    amax = np.abs(w).reshape(-1, size, 3).max(1)
    per_m = amax / 6 if name == "nvfp4" else scale
    want = d_scale.reshape(-1, size, 3).sum(1) * per_m
    got = np.moveaxis(np.asarray(to_state.max_scale["a/kernel"]), 0, -1).reshape(-1, 3)
    # The largest block of all has the largest scale there is: a corner.
    free = ~((name == "nvfp4") & (np.asarray(q.planes["scale"]).astype(float) == 448))
    assert free.sum() > 2
    np.testing.assert_allclose(got[free], want[free], rtol=1e-4, atol=1e-6)


def model(params, tokens):
    return jnp.tanh(params["table"][tokens] @ params["a"]) @ params["b"]


def toy() -> tuple[dict, list]:
    k = jax.random.split(jax.random.key(0), 4)
    params = {
        "table": jax.random.normal(k[0], (40, 64)),
        "a": jax.random.normal(k[1], (64, 64)) / 8,
        "b": jax.random.normal(k[2], (64, 40)) / 4,
    }
    return params, list(jax.random.randint(k[3], (2, 4, 24), 0, 40))


def weights(name: str, **more) -> aj.Recipe:
    return aj.Recipe(rules=[aj.Rule(format=name, match="[ab]", **more)])


def test_focus_learns() -> None:
    params, batches = toy()
    both = aj.Recipe(
        rules=[aj.Rule(format=n, match=m) for n, m in zip(NAMES, "ab", strict=True)]
    )
    packed, losses = learn_focus(
        model,
        params,
        both,
        batches,
        steps=60,
        max_scale_rate=2e-3,
        rounding_rate=2e-2,
        top_k=20,
    )
    assert losses.shape == (60,)
    assert tuple(packed[k].spec.format for k in "ab") == NAMES
    assert packed["table"] is params["table"]

    def kl(tree) -> float:
        p, q = (jax.nn.log_softmax(model(t, jnp.arange(40))) for t in (params, tree))
        return float((jnp.exp(p) * (p - q)).sum(-1).mean())

    assert kl(packed) < 0.9 * kl(aj.compress(params, both))


def test_scales_learn_and_codes_stay() -> None:
    params, batches = toy()
    packed = aj.compress(params, weights("t2", group_size=32, shift=True))
    tuned, losses = tune_scales(
        model, params, packed, batches, steps=40, learning_rate=1e-2, top_k=20
    )
    assert losses[-2:].mean() < 0.8 * losses[:2].mean()
    for name in "ab":
        before, after = packed[name].planes, tuned[name].planes
        np.testing.assert_array_equal(before["codes"], after["codes"])
        assert after["scale"].dtype == before["scale"].dtype
        assert (np.asarray(before["shift"]) != np.asarray(after["shift"])).any()
    gains = jax.tree.map(lambda g: 1.1 * g, scales.init(packed))
    dense = jax.jit(scales.apply)(packed, gains)["a"]
    np.testing.assert_array_equal(
        dense, scales.finalize(packed, gains)["a"].dequantize()
    )


def test_what_does_not_go_is_refused() -> None:
    params, batches = toy()
    with pytest.raises(aj.RecipeError, match="a: FOCUS learns mxfp4 and nvfp4, not t2"):
        focus.init(params, weights("t2"))
    with pytest.raises(ValueError, match="no batches"):
        learn_focus(model, params, weights("nvfp4"), [])
    with pytest.raises(ValueError, match="steps=0"):
        learn_focus(model, params, weights("nvfp4"), batches, steps=0)
    with pytest.raises(ValueError, match="rounding_rate=-1"):
        learn_focus(model, params, weights("nvfp4"), batches, rounding_rate=-1)
    with pytest.raises(ValueError, match="no packed weight with scales of 16 or 32"):
        tune_scales(model, params, params, batches)
    state = focus.init(params, weights("nvfp4"))
    broken = jax.tree.map(lambda x: x * jnp.nan, state)
    with pytest.raises(ValueError, match="learned rounding of a holds NaN"):
        focus.finalize(params, broken)
    with pytest.raises(ValueError, match="state is of another tree: it has a,"):
        focus.apply({"table": params["table"]}, state)
