"""Inputs rotated on the way into a product (rules with `rotation`), in every place."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import angeljax as aj
from angeljax.formats import format_names
from angeljax.formats._rotation import rotate
from angeljax.models import stack_layers
from tests.transforms._models import SCANNED, logits, make_params

K, N = 96, 16
FULL = aj.Recipe(rules=[aj.Rule(format="int8", rotation="full")])


def close(got, want) -> None:
    scale = float(jnp.max(jnp.abs(want)))
    np.testing.assert_allclose(got / scale, want / scale, atol=1e-5)


def test_every_format_and_prepared() -> None:
    """The product with a rotated weight is that with the array that it stands for."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_t(3, size=(K, N)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(5, K)), jnp.float32)

    @jax.jit
    def products(x, w):
        qs = {
            f"{name} {size}": aj.quantize(w, format=name, rotation=size)
            for name, size in zip(
                format_names(), itertools.cycle([96, 8, 48]), strict=False
            )
        }
        return {
            name: (
                aj.ops.dot(x, q), aj.ops.dot(x, aj.prepare(q)),
                jnp.matmul(x, q.dequantize(), precision="highest"),
                jnp.matmul(rotate(x, q.spec.rotation), rotate(w.T, q.spec.rotation).T,
                           precision="highest"),
            )
            for name, q in qs.items()
        }  # fmt: skip

    for name, (plain, prepared, dense, exact) in products(x, w).items():
        close(plain, dense)
        close(prepared, dense)
        np.testing.assert_allclose(exact, x @ w, atol=1e-4, err_msg=name)
        error = jnp.std(plain - exact) / jnp.std(exact)
        assert error < (0.02 if name.startswith("int8") else 1.0), name


def test_outlier_is_spread() -> None:
    """What it is for: one large feature, rounded to 8 bits by one scale."""
    x = jax.random.normal(jax.random.key(0), (64, K)).at[:, 3].mul(200)
    w = jax.random.normal(jax.random.key(1), (K, N))
    errors = []
    for size in (None, "full"):
        rule = aj.Rule(format="int8", activation="int8", rotation=size)
        q = aj.compress({"w": w}, aj.Recipe(rules=[rule]))["w"]
        errors.append(float(jnp.std(aj.ops.dot(x, q) - x @ w)))
    assert errors[1] < 0.6 * errors[0]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(N, name="b")(jnp.tanh(nn.Dense(K, name="a")(x)))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(K, N, rngs=rngs)

    def __call__(self, x):
        return self.a(x)


def test_linen_nnx_saved_and_trained(tmp_path) -> None:
    x = jax.random.normal(jax.random.key(0), (4, K))
    model = Net()
    variables = model.init(jax.random.key(1), x)
    q = aj.compress(variables, FULL)
    assert q["params"]["a"]["kernel"].spec.rotation == 96
    dense = jax.tree.map(
        lambda w: w.dequantize() if isinstance(w, aj.QTensor) else w, q,
        is_leaf=lambda w: isinstance(w, aj.QTensor),
    )  # fmt: skip
    want = model.apply(dense, x)
    close(aj.bind(model)(q, x), want)
    aj.save(tmp_path / "saved", q, recipe=FULL)
    again, _ = aj.load(tmp_path / "saved")
    assert again["params"]["a"]["kernel"].spec == q["params"]["a"]["kernel"].spec
    close(aj.bind(model)(again, x), want)

    # In training the weight is rounded as it will be stored.
    qat = aj.qat.make(FULL, total_steps=2)
    state = qat.init(variables)
    close(aj.bind(model)(qat.apply(variables, state, 0), x), want)

    def loss(v):
        return jnp.sum(jnp.square(aj.bind(model)(qat.apply(v, state, 0), x)))

    grads = jax.grad(loss)(variables)
    exact = jax.grad(lambda v: jnp.sum(jnp.square(model.apply(v, x))))(dense)
    close(grads["params"]["a"]["kernel"], exact["params"]["a"]["kernel"])

    module = NNXNet(nnx.Rngs(0))
    state = aj.compress(nnx.state(module, nnx.Param), FULL)
    kernel = state["a"]["kernel"].get_value()
    want = x @ kernel.dequantize() + module.a.bias[...]
    close(aj.bind(module, state)(x), want)


def test_stacked_decoder() -> None:
    params = stack_layers(make_params())
    q = aj.compress(params, FULL)
    assert q["layers"]["mlp"]["down_proj"]["kernel"].spec.rotation == 48
    dense = jax.tree.map(
        lambda w: w.dequantize() if isinstance(w, aj.QTensor) else w, q,
        is_leaf=lambda w: isinstance(w, aj.QTensor),
    )  # fmt: skip
    want = logits(SCANNED, dense)
    np.testing.assert_allclose(logits(SCANNED, q), want, atol=1e-4)
    exact = logits(SCANNED, params)
    assert float(jnp.std(want - exact) / jnp.std(exact)) < 0.05
