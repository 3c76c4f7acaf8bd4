"""Activations rounded on the fly: values, gradient, models, and what is stored."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import angeljax as aj
from angeljax.formats import Spec
from angeljax.qat import FakeTensor, fake_quantize_activation

FP8 = ml_dtypes.float8_e4m3fn
RECIPE = aj.Recipe(
    rules=[aj.Rule(match=".*kernel", format="int8", activation="int8")],
    arenas=aj.qat.Arenas(end=1),
)


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def oracle(x, kind):
    """One scale for each token, levels the same on both sides of 0; float64."""
    x = np.asarray(x, np.float64)
    top = {"int8": 127, "int4": 7, "float8_e4m3": 448}[kind]
    scale = np.abs(x).max(-1, keepdims=True) / top
    scale = np.where(scale == 0, 1, scale)
    if kind == "float8_e4m3":
        return (x / scale).astype(np.float32).astype(FP8).astype(np.float64) * scale
    return np.round(x / scale) * scale


@pytest.mark.parametrize("kind", ["int8", "int4", "float8_e4m3"])
def test_values_and_gradient(kind):
    x = normal((2, 5, 24)) * jnp.asarray([1e-3, 1, 5, 100, 0])[:, None]
    g = normal(x.shape, 1)

    @jax.jit
    def run(x):
        y, back = jax.vjp(lambda x: fake_quantize_activation(x, kind), x)
        return y, back(g)[0]

    y, dx = run(x)
    np.testing.assert_allclose(y, oracle(x, kind), rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(dx, g)
    assert not np.asarray(y)[:, 4].any()
    assert fake_quantize_activation(x.astype(jnp.bfloat16), kind).dtype == jnp.bfloat16


def test_blocks_stay_within_their_token():
    x = normal((3, 40))
    other = x.at[1:].set(100.0)
    for kind in ("mxfp8", "mxfp4"):
        run = jax.jit(fake_quantize_activation, static_argnames="kind")
        y, z = run(x, kind=kind), run(other, kind=kind)
        np.testing.assert_array_equal(y[0], z[0])
        assert 0 < np.abs(np.asarray(y - x)).max() < 0.6


def test_errors():
    with pytest.raises(ValueError, match="activation 'int7': use int8, int4"):
        fake_quantize_activation(jnp.ones((2, 4)), "int7")
    with pytest.raises(aj.RecipeError, match="activation='int7': use int8"):
        aj.Rule(format="int8", activation="int7")
    with pytest.raises(aj.RecipeError, match="activation needs a format"):
        aj.Rule(activation="int8")


def rounded_layer(x, packed, bias):
    w = np.asarray(packed.dequantize(), np.float64)
    return oracle(x, "int8") @ w + np.asarray(bias)


def test_linen():
    model, x, g = nn.Dense(6), normal((3, 64)), normal((3, 6), 1)
    params = jax.tree.map(lambda p: p + 0.1, model.init(jax.random.key(0), x))
    qat = aj.qat.make(RECIPE, total_steps=4)
    state, run = qat.init(params), aj.bind(model)

    @jax.jit
    def trained(params, x, step):
        y, back = jax.vjp(
            lambda p, x: run(qat.apply(p, state, step), x),
            params,
            x,
        )
        return y, *back(g)

    y, dw, dx = trained(params, x, 4)
    assert isinstance(qat.apply(params, state, 4)["params"]["kernel"], FakeTensor)
    packed = aj.qat.finalize(params, state)
    kernel = packed["params"]["kernel"]
    assert kernel.spec.activation == "int8" and not isinstance(kernel, FakeTensor)
    np.testing.assert_allclose(jax.jit(run)(packed, x), y, rtol=1e-6, atol=1e-6)
    bias = params["params"]["bias"]
    np.testing.assert_allclose(y, rounded_layer(x, kernel, bias), rtol=1e-4, atol=1e-5)
    # The weight sees the rounded activations, and these the rounded weight.
    want = oracle(x, "int8").T @ np.asarray(g)
    np.testing.assert_allclose(dw["params"]["kernel"], want, rtol=1e-4, atol=1e-5)
    want = np.asarray(g) @ np.asarray(kernel.dequantize()).T
    np.testing.assert_allclose(dx, want, rtol=1e-4, atol=1e-5)
    # With the residual it is another weight under the same activations.
    y = trained(params, x, 1)[0]
    w = np.asarray(qat.apply(params, state, 1)["params"]["kernel"].dequantize())
    want = oracle(x, "int8") @ w + np.asarray(bias)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)


def test_nnx():
    model, x = nnx.Linear(64, 6, rngs=nnx.Rngs(0)), normal((3, 64))
    params = nnx.state(model, nnx.Param)
    qat = aj.qat.make(RECIPE, total_steps=4)
    state = qat.init(params)

    @jax.jit
    def forward(params, x):
        return aj.bind(model, params)(x)

    y = jax.jit(lambda p, x: forward(qat.apply(p, state, 4), x))(params, x)
    packed = aj.qat.finalize(params, state)
    np.testing.assert_allclose(forward(packed, x), y, rtol=1e-6, atol=1e-6)
    want = rounded_layer(x, packed["kernel"][...], model.bias[...])
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    # Rounding is there at all.
    plain = np.asarray(x) @ np.asarray(packed["kernel"][...].dequantize())
    assert np.abs(plain - np.asarray(y)).max() > 1e-4


def test_what_is_stored(tmp_path):
    params = {"dense": {"kernel": normal((64, 6))}}
    packed = aj.compress(params, RECIPE)
    spec = packed["dense"]["kernel"].spec
    assert spec.activation == "int8"
    aj.save(tmp_path / "packed", packed, RECIPE)
    loaded, recipe = aj.load(tmp_path / "packed")
    assert recipe == RECIPE
    assert loaded["dense"]["kernel"].spec == spec
    assert Spec.from_dict(spec.to_dict()) == spec
    # What was written before activations were known has no such entry.
    old = spec.to_dict()
    del old["activation"]
    without = Spec.from_dict(old)
    assert without.activation is None and without.to_dict() == old
    with pytest.raises(ValueError, match="missing or unknown fields: activations"):
        Spec.from_dict({**old, "activations": "int8"})
