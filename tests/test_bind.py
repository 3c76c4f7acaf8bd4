"""A compressed tree in unmodified linen and nnx models, with and without `bind`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import angeljax as aj

FORMATS = ("int8", "int4", "sherry", "nvfp4")
IDS = jnp.arange(10).reshape(2, 5)


def recipe(fmt):
    return aj.Recipe(
        rules=[
            aj.Rule(match=".*embedding", format="int8"),
            aj.Rule(
                match=".*(DenseGeneral_0|general)/kernel", axis=(-3, -2), format=fmt
            ),
            aj.Rule(match=".*(Einsum_0|einsum)/kernel", axis=-3, format=fmt),
            aj.Rule(format=fmt),
        ]
    )


class Block(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x, _):
        h = nn.Dense(64, dtype=self.dtype)(nn.LayerNorm()(x))
        h = nn.MultiHeadDotProductAttention(
            num_heads=4, qkv_features=64, out_features=32, dtype=self.dtype
        )(h)
        h = nn.Einsum((32, 4, 32), "btd,dnh->btnh", use_bias=False)(h)
        h = nn.DenseGeneral(32, axis=(-2, -1), dtype=self.dtype)(h)
        return x + h, None


class Linen(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(50, 32)
        layers = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )(self.dtype, name="layers")
        return embed.attend(layers(embed(ids), None)[0])


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(50, 32, rngs=rngs)
        self.linear = nnx.Linear(32, 64, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=4, in_features=64, out_features=32, decode=False, rngs=rngs
        )
        self.einsum = nnx.Einsum("btd,dnh->btnh", (32, 4, 32), rngs=rngs)
        self.general = nnx.LinearGeneral((4, 32), 32, axis=(-2, -1), rngs=rngs)

    def __call__(self, ids):
        x = self.attention(self.linear(self.embed(ids)))
        return self.embed.attend(self.general(self.einsum(x)))


def dequantized(tree):
    return jax.tree.map(
        lambda x: x.dequantize() if isinstance(x, aj.QTensor) else x,
        tree,
        is_leaf=lambda x: isinstance(x, aj.QTensor),
    )


@pytest.fixture(scope="module")
def linen():
    """A model, its variables, and what runs it on dense ones, compiled once."""
    model = Linen()
    return model, jax.jit(model.init)(jax.random.key(0), IDS), jax.jit(model.apply)


@pytest.mark.parametrize("fmt", FORMATS)
def test_linen_scan_remat_unchanged_and_bound(linen, fmt):
    model, variables, dense = linen
    c = aj.compress(variables, recipe(fmt))
    packed = sum(a.spec is not None for a in aj.plan(variables, recipe(fmt)))
    assert packed == 8  # embedding, dense, four of attention, einsum, general
    want = dense(dequantized(c), IDS)
    assert np.abs(want - dense(variables, IDS)).max() > 0
    np.testing.assert_allclose(jax.jit(model.apply)(c, IDS), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        jax.jit(aj.bind(model))(c, IDS), want, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("fmt", FORMATS)
def test_nnx_unchanged_and_bound(fmt):
    model = Nnx(nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    c = aj.compress(state, recipe(fmt))
    plain = nnx.clone(model)
    nnx.update(plain, jax.tree.map(lambda x: x, dequantized(nnx.to_pure_dict(c))))
    want = plain(IDS)
    bound = aj.bind(model, c)
    assert not isinstance(model.linear.kernel[...], aj.QTensor)
    unchanged = nnx.clone(model)
    nnx.update(unchanged, c)
    run = nnx.jit(lambda m, ids: m(ids))
    np.testing.assert_allclose(run(unchanged, IDS), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(bound, IDS), want, rtol=1e-5, atol=1e-5)


def test_bound_layers_call_ops(linen, monkeypatch):
    calls = []
    for name in ("dot", "dot_general", "einsum", "embed", "attend"):
        real = getattr(aj.ops, name)

        def spy(*args, _real=real, _name=name, **kwargs):
            calls.append(_name)
            return _real(*args, **kwargs)

        monkeypatch.setattr(aj.ops, name, spy)
    model, variables, _ = linen
    c = aj.compress(variables, recipe("int8"))
    jax.eval_shape(model.apply, c, IDS)  # traced, and no more
    assert calls == []
    jax.eval_shape(aj.bind(model), c, IDS)
    assert {"dot", "dot_general", "einsum", "embed", "attend"} <= set(calls)
    calls.clear()
    module = Nnx(nnx.Rngs(0))
    bound = aj.bind(module, aj.compress(nnx.state(module, nnx.Param), recipe("int8")))
    nnx.eval_shape(lambda m: m(IDS), bound)
    assert {"dot_general", "embed", "attend"} <= set(calls)


def test_nnx_scan_over_a_compressed_stack():
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return nnx.Linear(64, 64, rngs=rngs)

    layers = stack(nnx.Rngs(0).split(3))

    def run(layers, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def body(x, layer):
            return layer(x)

        return body(x, layers)

    x = jnp.ones((2, 64))
    want = run(layers, x)
    c = aj.compress(
        nnx.state(layers, nnx.Param), aj.Recipe(rules=[aj.Rule(format="int8")])
    )
    nnx.update(layers, c)
    assert layers.kernel[...].shape == (3, 64, 64)
    got = nnx.jit(run)(layers, x)
    np.testing.assert_allclose(got, want, atol=0.05 * float(jnp.abs(want).max()))
    bound = aj.bind(layers)
    np.testing.assert_allclose(nnx.jit(run)(bound, x), got, rtol=1e-5, atol=1e-6)


def test_plain_functions_and_einsum():
    w = jax.random.normal(jax.random.key(0), (64, 32))
    q = aj.compress({"w": w}, aj.Recipe(rules=[aj.Rule(format="int8")]))

    def f(p, x):
        return x @ p["w"], jnp.einsum("bk,kn->bn", x, p["w"])

    assert aj.bind(f) is f
    x = jnp.ones((2, 64))
    for y in jax.jit(f)(q, x):
        want = x @ q["w"].dequantize()
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_activations_and_unquantized_leaves():
    model = nn.Dense(32)
    x = jax.random.normal(jax.random.key(0), (4, 64))
    p = model.init(jax.random.key(1), x)["params"]
    c = aj.compress(p, aj.Recipe(rules=[aj.Rule(format="int4")]))

    def loss(bias, x, apply):
        return jnp.sum(apply({"params": {**c, "bias": bias}}, x) ** 2)

    dense = {**dequantized(c)}
    for apply in (model.apply, aj.bind(model)):
        got = jax.grad(loss, (0, 1))(c["bias"], x, apply)
        want = jax.grad(
            lambda b, x: jnp.sum(model.apply({"params": {**dense, "bias": b}}, x) ** 2),
            (0, 1),
        )(c["bias"], x)
        for g, t in zip(got, want, strict=True):
            np.testing.assert_allclose(g, t, rtol=1e-4, atol=1e-4)


def test_partition_gives_what_can_be_trained():
    p = {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)}
    c = aj.compress(p, aj.Recipe(rules=[aj.Rule(format="int4")]))
    train, frozen = aj.partition(c)
    assert train["kernel"] is None and frozen["bias"] is None

    def loss(train):
        p = aj.combine(train, frozen)
        return jnp.sum(jnp.ones((1, 64)) @ p["kernel"] + p["bias"])

    grads = jax.grad(loss)(train)
    assert grads["kernel"] is None
    np.testing.assert_array_equal(grads["bias"], 1.0)


def test_custom_layers_and_subclasses_are_left_alone():
    class Doubled(nn.Dense):
        @nn.compact
        def __call__(self, x):
            return 2 * nn.Dense(self.features, name="inner")(x)

    model = Doubled(32)
    x = jnp.ones((2, 64))
    v = model.init(jax.random.key(0), x)
    c = aj.compress(v, aj.Recipe(rules=[aj.Rule(format="int8")]))
    # One float32 rounding apart: the sums run in another order.
    np.testing.assert_allclose(
        aj.bind(model)(c, x), model.apply(c, x), rtol=1e-6, atol=1e-6
    )


def test_bf16_compute_dtype_is_kept():
    model = Linen(dtype=jnp.bfloat16)
    variables = jax.jit(model.init)(jax.random.key(0), IDS)
    c = aj.compress(variables, recipe("int8"))
    dense = nn.Dense(8, dtype=jnp.bfloat16)
    v = dense.init(jax.random.key(0), jnp.ones((2, 64)))
    q = aj.compress(v, aj.Recipe(rules=[aj.Rule(format="int8")]))
    assert aj.bind(dense)(q, jnp.ones((2, 64))).dtype == jnp.bfloat16
    got, want = jax.jit(aj.bind(model))(c, IDS), jax.jit(model.apply)(c, IDS)
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=0.1, atol=0.1)


def test_errors():
    with pytest.raises(TypeError, match="linen module, an nnx module or a function"):
        aj.bind(3)
    with pytest.raises(TypeError, match="params go with an nnx module only"):
        aj.bind(nn.Dense(3), {})
