"""LoRA on packed weights: nothing changes at first, and only the factors learn."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import angeljax as aj
from angeljax.models import DecoderConfig, LanguageModel
from angeljax.qat.lora import Lora, lora_apply, lora_init, lora_merge
from tests.models._random_params import random_params

MODEL = LanguageModel(
    DecoderConfig(
        model_type="llama",
        vocab_size=32,
        hidden_size=64,
        num_layers=2,
        intermediate_size=96,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
    ),
    scan_layers=True,
)
TOKENS = jnp.asarray([[5, 9, 1, 30, 2, 7]])
# One format that kernels read and one that is expanded.
RECIPE = aj.Recipe(
    rules=[
        aj.Rule(match=".*/up_proj/kernel", format="nf4", group_size=32),
        aj.Rule(match=".*/(q|k)_proj/kernel", format="int4", group_size=32),
    ]
)


def _close(a: Any, b: Any, **limits: float) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **limits), a, b)


def _normal(seed: int, *shape: int) -> jax.Array:
    # numpy's: compiling jax.random.normal for every shape takes most of the time.
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _filled(lora: Lora, seed: int) -> Lora:
    return jax.tree.map(lambda x: 0.1 * _normal(seed, *x.shape), lora)


@pytest.fixture(scope="module")
def cparams() -> Any:
    return aj.compress(random_params(MODEL), RECIPE)


def test_a_stack_of_layers_learns(cparams: Any) -> None:
    lora = lora_init(
        cparams, jax.random.key(1), rank=3, targets="layers/.*(q|up)_proj.*"
    )
    assert {k: [v.shape for v in f.values()] for k, f in lora.factors.items()} == {
        "layers/attn/q_proj/kernel": [(2, 64, 3), (2, 3, 64)],
        "layers/mlp/up_proj/kernel": [(2, 64, 3), (2, 3, 96)],
    }

    def loss(lora: Lora) -> Any:
        logits = MODEL.logits(lora_apply(cparams, lora), TOKENS)
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        nll = -jnp.take_along_axis(log_probs, TOKENS[:, 1:, None], -1)
        return nll.mean(), logits

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (first, logits), grads = step(lora)
    np.testing.assert_array_equal(logits, jax.jit(MODEL.logits)(cparams, TOKENS))
    for g in grads.factors.values():  # B is 0 at first, and A has no gradient then
        assert not np.any(g["a"]) and np.any(g["b"])
    for _ in range(4):
        lora = jax.tree.map(lambda p, g: p - 2.0 * g, lora, grads)
        (last, logits), grads = step(lora)
    assert last < first - 0.01
    assert all(np.any(g) for g in jax.tree.leaves(grads))
    # Merged weights are the same model.
    merged = lora_merge(cparams, lora)
    assert isinstance(merged["layers"]["attn"]["q_proj"]["kernel"], jax.Array)
    assert isinstance(merged["layers"]["attn"]["k_proj"]["kernel"], aj.QTensor)
    f, q = (
        lora.factors["layers/attn/q_proj/kernel"],
        cparams["layers"]["attn"]["q_proj"],
    )
    expected = q["kernel"].dequantize() + 2.0 * np.asarray(f["a"]) @ np.asarray(f["b"])
    _close(merged["layers"]["attn"]["q_proj"]["kernel"], expected, atol=1e-5)
    packed = lora_merge(cparams, lora, requantize=True)
    assert jax.tree.structure(packed) == jax.tree.structure(cparams)


def test_no_gradient_of_the_size_of_a_weight() -> None:
    for name in ("int4", "nf4"):
        q = aj.quantize(_normal(0, 96, 48), format=name)
        lora = lora_init({"w": q}, jax.random.key(1), rank=2)

        def loss(lora: Lora, x: Any, q: Any = q) -> Any:
            return jnp.square(aj.ops.dot(x, lora_apply({"w": q}, lora)["w"])).sum()

        jaxpr = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(lora, jnp.ones((5, 96))))
        made = [line for line in jaxpr.splitlines() if "dot_general" in line]
        assert made and not any("[96,48]" in line.split("=")[0] for line in made)


def test_every_product_and_its_gradient() -> None:
    """Axes that are merged, transposed or looked up, against the sum as an array."""
    x, ids = _normal(0, 3, 4, 32), jnp.asarray([3, 0, 9])
    merged = (((1, 2), (0, 1)), ((), ()))
    cases: list[Any] = [
        ((4, 32, 5), (-3, -2), lambda w: aj.ops.dot_general(x, w, merged)),
        ((32, 3, 5), -3, lambda w: aj.ops.einsum("btd,dnh->btnh", x, w)),
        ((10, 32), -1, lambda w: aj.ops.attend(x, w).sum() + aj.ops.embed(w, ids)),
        ((2, 32, 6), -2, lambda w: aj.ops.ragged_dot(x[0], w, jnp.asarray([1, 3]))),
        ((3, 32, 6), -2, lambda w: aj.ops.einsum("btd,bdn->btn", x, w)),
        ((3, 32, 6), -2, lambda w: x[0] @ w[1]),
    ]
    tree = {
        str(i): aj.quantize(_normal(i, *shape), format="float8_e4m3", axis=axis)
        for i, (shape, axis, _) in enumerate(cases)
    }
    lora = _filled(lora_init(tree, jax.random.key(0), rank=2, targets=".*"), 7)

    def total(lora: Lora, dense: bool) -> Any:
        outs = []
        for i, (_, _, f) in enumerate(cases):
            w: Any = lora_apply(tree, lora)[str(i)]
            outs.append(f(tree[str(i)].dequantize() + w.addition() if dense else w))
        return sum((y * jnp.cos(y)).sum() for y in outs), outs

    grad = jax.grad(total, has_aux=True)
    ours, dense = jax.jit(lambda lora: [grad(lora, False), grad(lora, True)])(lora)
    _close(ours, dense, rtol=1e-3, atol=1e-3)


def test_in_linen_and_nnx_and_prepared() -> None:
    x = _normal(0, 2, 64)
    recipe = aj.Recipe(rules=[aj.Rule(format="int4", group_size=32)])
    linen = nn.Dense(48)
    variables = aj.compress(linen.init(jax.random.key(1), x), recipe)
    lora = _filled(lora_init(variables, jax.random.key(2), rank=2), 3)
    expected = linen.apply(lora_merge(variables, lora), x)
    tree = lora_apply(variables, lora)
    limits = {"rtol": 1e-4, "atol": 1e-5}
    _close(jax.jit(aj.bind(linen))(tree, x), expected, **limits)
    _close(linen.apply(tree, x), expected, **limits)
    ready = lora_apply(aj.prepare(variables), lora)
    _close(jax.jit(aj.bind(linen))(ready, x), expected, **limits)
    module = nnx.Linear(64, 48, rngs=nnx.Rngs(0))
    kernel = {"kernel": tree["params"]["kernel"], "bias": tree["params"]["bias"]}
    _close(aj.bind(module, kernel)(x), expected, **limits)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank must be an integer >= 1"),
        ({"rank": 2, "alpha": 0}, "alpha must be > 0"),
        ({"rank": 2, "targets": "("}, r"targets '\('"),
        ({"rank": 2, "targets": "q_proj"}, "matches none of the packed layers/attn/"),
    ],
)
def test_refused(options: Any, message: str, cparams: Any) -> None:
    with pytest.raises(ValueError, match=message):
        lora_init(cparams, jax.random.key(0), **options)


def test_factors_of_another_tree(cparams: Any) -> None:
    with pytest.raises(ValueError, match="no packed weights"):
        lora_init({"w": jnp.ones((2, 2))}, jax.random.key(0), rank=1)
    q = aj.quantize(jnp.ones((64, 4)), format="int8")
    lora = lora_init({"w": q}, jax.random.key(0), rank=1)
    with pytest.raises(ValueError, match="factors for w, which is no packed"):
        lora_apply(cparams, lora)
    with pytest.raises(ValueError, match=r"w takes factors \(32, 1\)"):
        lora_apply({"w": aj.quantize(jnp.ones((32, 4)), format="int8")}, lora)
