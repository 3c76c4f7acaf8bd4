"""The dead-zone bias in a layer: its value, its gradient, and where it ends up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import angeljax as aj

FACTOR = 1e-2
RULE = aj.Rule(format="t2", group_size=32, qat={"tequila": FACTOR})


class Layers(nn.Module):
    """Two scanned layers with one in front."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32, bias_init=nn.initializers.normal())(x)
        stack = nn.scan(
            lambda module, x, _: (nn.tanh(module(x)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        return stack(nn.Dense(32, name="stack"), x, None)[0]


def normal(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_a_dense_layer():
    model, x, g = nn.Dense(6), normal((5, 64), 0), normal((5, 6), 1)
    params = {"params": {"kernel": normal((64, 6), 2), "bias": normal((6,), 3)}}
    qat = aj.qat.make(aj.Recipe(rules=[RULE]), total_steps=4)
    state = qat.init(params)

    @jax.jit
    def run(params):
        def forward(params):
            return model.apply(qat.apply(params, state, 4), x)

        y, back = jax.vjp(forward, params)
        return y, back(g)[0], qat.apply(params, state, 4)

    y, grads, trained = run(params)
    w, b = (np.asarray(params["params"][k]) for k in ("kernel", "bias"))
    packed = aj.qat.finalize(params, state)
    q = np.asarray(packed["params"]["kernel"].dequantize())
    dead = q == 0
    assert 0.1 < dead.mean() < 0.6
    merged = b + FACTOR * np.where(dead, w, 0).sum(0)
    np.testing.assert_allclose(y, np.asarray(x) @ q + merged, rtol=1e-4, atol=1e-4)

    # What is trained is what is packed, and its bias is an ordinary array.
    np.testing.assert_array_equal(trained["params"]["kernel"], q)
    np.testing.assert_array_equal(trained["params"]["bias"], packed["params"]["bias"])
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(apply(packed, x), y, rtol=1e-5, atol=1e-5)
    whole = {"params": {**packed["params"], "kernel": jnp.asarray(q)}}
    np.testing.assert_array_equal(apply(whole, x), apply(trained, x))

    got = grads["params"]
    through = np.asarray(x.T @ g)
    extra = np.where(dead, FACTOR * np.asarray(g).sum(0), 0)
    np.testing.assert_allclose(got["kernel"], through + extra, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["bias"], np.asarray(g).sum(0), rtol=1e-5)
    assert np.abs(extra).max() > 1e-3


def test_a_stack_of_layers_and_learned_scales():
    model, x = Layers(), normal((3, 32), 0)
    params = jax.jit(model.init)(jax.random.key(0), x)
    qat_options = {"tequila": 0.5, "scale": "learned"}
    rule = aj.Rule(format="t1_6", group_size=32, qat=qat_options)
    qat = aj.qat.make(aj.Recipe(rules=[rule]), total_steps=4)
    state = qat.init(params)
    trained = jax.jit(qat.apply)(params, state, 4)
    packed = aj.qat.finalize(params, state)
    y = jax.jit(model.apply)(trained, x)
    np.testing.assert_allclose(jax.jit(model.apply)(packed, x), y, atol=1e-6)
    stack = packed["params"]["stack"]
    w = np.asarray(params["params"]["stack"]["kernel"])
    dead = np.asarray(stack["kernel"].dequantize()) == 0
    want = 0.5 * np.where(dead, w, 0).sum(1)
    assert want.shape == (2, 32)
    np.testing.assert_allclose(stack["bias"], want, rtol=1e-5, atol=1e-6)


def test_two_weights_feed_one_bias():
    layer = {"a": normal((32, 4), 0), "b": normal((32, 4), 1), "bias": jnp.ones(4)}
    rules = [
        aj.Rule(match="layer/[ab]", format="t2", group_size=32, qat={"tequila": 0.1}),
    ]
    qat = aj.qat.make(aj.Recipe(rules=rules), total_steps=1)
    state = qat.init({"layer": layer})
    found = jax.jit(qat.apply)({"layer": layer}, state, 1)["layer"]
    want = np.ones(4)
    for k in "ab":
        want = want + 0.1 * np.where(found[k] == 0, layer[k], 0).sum(0)
    np.testing.assert_allclose(found["bias"], want, rtol=1e-6)
    packed = aj.qat.finalize({"layer": layer}, state)["layer"]
    np.testing.assert_allclose(packed["bias"], want, rtol=1e-6)


def test_errors():
    recipe = aj.Recipe(rules=[RULE])
    qat = aj.qat.make(recipe, total_steps=4)
    kernel = normal((64, 6), 0)
    with pytest.raises(aj.RecipeError, match="^up/kernel: .*which has none.*zeros"):
        qat.init({"up": {"kernel": kernel}})
    with pytest.raises(aj.RecipeError, match=r"^up/kernel: .*\[6\].*up/bias has \[5\]"):
        qat.init({"up": {"kernel": kernel, "bias": jnp.zeros(5)}})
    with pytest.raises(aj.RecipeError, match="formats t2 and t1_6, not int4"):
        aj.Rule(format="int4", qat={"tequila": 1e-3})
    with pytest.raises(aj.RecipeError, match="with shift none does"):
        aj.Rule(format="t2", shift=True, qat={"tequila": 1e-3})
    with pytest.raises(aj.RecipeError, match="qat.tequila must be a number >= 0"):
        aj.Rule(format="t2", qat={"tequila": -1})
