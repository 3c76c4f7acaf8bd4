"""`prepare_decoder`: the logits stay, generation runs, a step decodes in place."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax._transposed import TransposedTensor
from angeljax.models import (
    DecoderConfig,
    LanguageModel,
    decode_step,
    generate,
    prepare_decoder,
    stack_layers,
)
from angeljax.models.attention import dense_attention, token_attention
from angeljax.prepare import PreparedTensor
from pallas_kernels import KernelError

MODEL = LanguageModel(
    DecoderConfig(
        model_type="llama",
        vocab_size=64,
        hidden_size=128,
        num_layers=1,
        intermediate_size=192,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
    )
)
TOKENS = jnp.asarray([[5, 9, 1, 30, 2], [7, 7, 8, 63, 0]])


@functools.cache
def _params(layers: int) -> Any:
    config = dataclasses.replace(MODEL.config, num_layers=layers)
    return jax.jit(LanguageModel(config).init)(jax.random.key(0))


def _compressed(fmt: str, layers: int = 1, **options: Any) -> Any:
    recipe = aj.Recipe(rules=[aj.Rule(format=fmt, **options)])
    return jax.jit(lambda p: aj.compress(p, recipe))(_params(layers))


def _prepared(params: Any) -> set[str]:
    is_q = lambda x: isinstance(x, aj.QTensor)  # noqa: E731
    found = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_q)[0]
    return {
        str(getattr(path[-2], "key", path[-2]))
        for path, leaf in found
        if isinstance(leaf, PreparedTensor)
    }


FUSED = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("fmt", "options"),
    [("t2", {}), ("sherry", {"group_size": 64}), ("int4", {"group_size": 32})],
)
def test_the_logits_stay(fmt: str, options: Any) -> None:
    params = _compressed(fmt, **options)
    model, ready = prepare_decoder(MODEL, params)
    assert model == dataclasses.replace(MODEL, fused=True)
    assert _prepared(ready) == FUSED
    want = np.asarray(jax.jit(MODEL.logits)(params, TOKENS))
    got = jax.jit(model.logits)(ready, TOKENS)
    # Sums in another order.
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    if fmt != "t2":
        return
    model, ready = prepare_decoder(MODEL, params, activation="int8")
    got = jax.jit(model.logits)(ready, TOKENS)
    # Four products in a row, each with activations to half of 1/127 of the largest.
    error = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
    assert 0 < error < 0.05


def test_what_cannot_be_fused_stays_apart() -> None:
    params = _compressed("nvfp4")
    model, ready = prepare_decoder(MODEL, params)
    assert not model.fused
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    assert _prepared(ready) == names | {"down_proj"}
    want = MODEL.logits(params, TOKENS)
    np.testing.assert_allclose(model.logits(ready, TOKENS), want, rtol=1e-4, atol=1e-4)


def test_uncompressed_models_are_fused_only() -> None:
    params = _params(1)
    model, ready = prepare_decoder(MODEL, params)
    assert model.fused and not _prepared(ready)
    again, same = prepare_decoder(model, ready)
    assert again == model and jax.tree.structure(same) == jax.tree.structure(ready)
    np.testing.assert_allclose(
        model.logits(ready, TOKENS), MODEL.logits(params, TOKENS), rtol=1e-4, atol=1e-5
    )


def test_preparing_twice_is_refused() -> None:
    model, ready = prepare_decoder(MODEL, _compressed("int8"))
    with pytest.raises(KernelError, match="is prepared already: restore it"):
        prepare_decoder(model, ready)


def test_stacked_layers() -> None:
    config = dataclasses.replace(MODEL.config, num_layers=2)
    plain = LanguageModel(config)
    params = _compressed("int8", layers=2)
    stacked = dataclasses.replace(plain, scan_layers=True)
    model, ready = prepare_decoder(stacked, stack_layers(params))
    assert model.fused and model.scan_layers and _prepared(ready) == FUSED
    np.testing.assert_allclose(
        jax.jit(model.logits)(ready, TOKENS),
        jax.jit(plain.logits)(params, TOKENS),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("activation", [None, "int8"])
def test_generation_and_single_steps_agree(activation: str | None) -> None:
    model, ready = prepare_decoder(
        MODEL, _compressed("t2", granularity="channel"), activation=activation
    )
    out = generate(model, ready, TOKENS, max_new_tokens=4, eos_ids=())
    assert out.tokens.shape == (2, 4) and out.lengths.tolist() == [4, 4]
    step = jax.jit(decode_step, static_argnums=0, donate_argnums=2)
    logits, cache = jax.jit(
        lambda p, c: model.apply(p, TOKENS, cache=c, last_only=True)
    )(ready, model.init_cache(2, 9))
    token = jnp.argmax(logits[:, -1], -1).astype(jnp.int32)
    found = [token]
    for _ in range(3):
        token, cache = step(model, ready, cache, token)
        found.append(token)
    assert jnp.stack(found, 1).tolist() == out.tokens.tolist()
    assert int(cache.length) == 8
    if activation is None:
        params = _compressed("t2", granularity="channel")
        plain = generate(MODEL, params, TOKENS, max_new_tokens=4, eos_ids=())
        assert plain.tokens.tolist() == out.tokens.tolist()


def test_a_step_updates_its_cache_in_place() -> None:
    model, ready = prepare_decoder(MODEL, _compressed("int8"))
    cache = jax.eval_shape(lambda: model.init_cache(1, 4096))
    token = jax.ShapeDtypeStruct((1,), jnp.int32)
    step = jax.jit(decode_step, static_argnums=0, donate_argnums=2)
    memory = step.lower(model, ready, cache, token).compile().memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.k, cache.v)))
    assert memory.alias_size_in_bytes >= held


def test_dense_matrices_are_transposed(tmp_path: Any) -> None:
    params = MODEL.init(jax.random.key(0))
    fused, plain = prepare_decoder(MODEL, params, transpose=False)
    model, ready = prepare_decoder(MODEL, params, transpose=True)
    turned = ready["layers"][0]["attn"]["qkv_proj"]["kernel"]
    assert isinstance(turned, TransposedTensor) and model == fused
    assert turned.shape == (128, 256) and turned.array.shape == (256, 128)
    assert turned.dtype == jnp.float32 and turned.ndim == 2
    assert turned.size == 128 * 256 and turned.nbytes == 4 * turned.size
    assert turned[:3].shape == (3, 256) and turned.astype(jnp.bfloat16).shape[0] == 128
    table = ready["embed_tokens"]["embedding"]
    assert table is params["embed_tokens"]["embedding"], "its inputs are last already"
    want = fused.logits(plain, TOKENS)
    np.testing.assert_allclose(model.logits(ready, TOKENS), want, rtol=1e-5, atol=1e-5)
    # A single row multiplies and sums, the norm included.
    out = [
        generate(m, p, TOKENS[:1], max_new_tokens=5, eos_ids=()).tokens.tolist()
        for m, p in ((fused, plain), (model, ready))
    ]
    assert out[0] == out[1]
    # Checkpoints and `restore` know nothing of it, and once is enough.
    aj.save(tmp_path / "c", ready, None)
    for back in (aj.restore(ready), aj.load(tmp_path / "c")[0]):
        assert jax.tree.structure(back) == jax.tree.structure(plain)
        assert jax.tree.all(jax.tree.map(np.array_equal, back, plain))
    again = prepare_decoder(model, ready, transpose=True)[1]
    assert jax.tree.structure(again) == jax.tree.structure(ready)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_of_one_token(dtype: Any) -> None:
    keys = jax.random.split(jax.random.key(1), 4)
    x = (3 * jax.random.normal(keys[0], (1, 1, 96))).astype(dtype)
    w = jax.random.normal(keys[1], (96, 40), dtype)
    norm = jax.random.normal(keys[2], (96,), dtype)
    rest = jax.random.normal(keys[3], (1, 1, 40), dtype)
    both = jnp.concatenate([x, x[..., ::-1]], axis=-1)
    turned = TransposedTensor(w.T)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for a, options in (
        (x, {}),
        (x, {"norm": norm, "norm_eps": 0.1}),
        (x, {"norm": norm, "residual": rest, "bias": rest[0, 0]}),
        (both, {"gate": "silu", "residual": rest}),
        (x, {"preferred_element_type": jnp.float32}),
    ):
        want = aj.ops.dot(a, w, **options)
        got = jax.jit(lambda a, w, o=options: aj.ops.dot(a, w, **o))(a, turned)
        assert got.shape == want.shape and got.dtype == want.dtype
        want = np.asarray(want, np.float32)
        bound = tolerance * np.abs(want).max()
        np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=bound)
    np.testing.assert_array_equal(jnp.asarray(turned), w)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_of_one_token(dtype: Any) -> None:
    keys = jax.random.split(jax.random.key(2), 3)
    q = jax.random.normal(keys[0], (2, 1, 6, 16), dtype)
    k, v = (jax.random.normal(key, (2, 12, 2, 16), dtype) for key in keys[1:])
    # The second row sees nothing, as padding does.
    mask = (jnp.arange(12) < jnp.asarray([[7], [0]]))[:, None, None]
    want = np.asarray(dense_attention(q, k, v, mask), np.float32)
    got = token_attention(q, k, v, mask)
    assert got.shape == q.shape and got.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=tolerance)
