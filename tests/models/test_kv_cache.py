"""A decoder with a quantized cache: against numpy, in every form, in place."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.attention import Quest, SparseAttention, selector
from angeljax.kv_cache import (
    KVCacheOptions,
    KVFormat,
    attach_kv_scales,
    quantize_kv,
)
from angeljax.models import (
    DecoderConfig,
    KVCache,
    LanguageModel,
    decode_step,
    dense_attention,
    generate,
    init_cache,
    prepare_decoder,
    stack_layers,
)
from angeljax.tokens._cache import prune_cache
from tests.kv_cache._oracle import stored
from tests.models._random_params import random_params

MODEL = LanguageModel(
    DecoderConfig(
        model_type="llama", vocab_size=48, hidden_size=32, num_layers=2,
        intermediate_size=32, num_heads=4, num_kv_heads=2, head_dim=32,
    )
)  # fmt: skip
T = 9
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 48, (2, T)))
STATIC = KVCacheOptions(granularity="head", values={"granularity": "tensor"})
FOUR = {"format": "int4", "symmetric": False, "group_size": 16}
MIXED = KVCacheOptions(format="int8", values=FOUR)
# Both kinds of scales, and bytes in which two codes lie.
BOTH = KVCacheOptions(granularity="head", values=FOUR)
SKIP = KVCacheOptions(format="int4", keys="none", skip_layers=[-1])


@functools.cache
def _params() -> Any:
    params = random_params(MODEL, std=0.3)
    # Small enough that some keys and values are cut off.
    scales = {
        "k": jnp.asarray([[0.002, 0.001], [0.002, 0.003]]),
        "v": jnp.full(2, 0.01),
    }
    return attach_kv_scales(params, scales)


def _with(options: Any, **fields: Any) -> LanguageModel:
    return dataclasses.replace(MODEL, kv_cache=options, **fields)


def _numpy_logits(options: KVCacheOptions) -> np.ndarray:
    """One pass without a cache, whose attention rounds keys and values in numpy."""
    layer = iter(range(2))

    def attend(q: Any, k: Any, v: Any, mask: Any) -> Any:
        i = next(layer)
        attn = _params()["layers"][i]["attn"]

        def rounded(side: str, x: np.ndarray) -> np.ndarray:
            if i in options.skips(2):
                return x
            scale = np.reshape(attn[f"{side}_cache"]["scale"], (-1, 1))
            return stored(x, options.of(side), scale)

        both = [
            jax.pure_callback(functools.partial(rounded, side), x, x)
            for side, x in (("k", k), ("v", v))
        ]
        return dense_attention(q, *both, mask)

    model = dataclasses.replace(MODEL, attention_fn=attend)
    return np.asarray(jax.jit(model.logits)(_params(), TOKENS))


@pytest.mark.parametrize(
    "options", [STATIC, MIXED, SKIP], ids=["static", "mixed", "skip"]
)
def test_what_is_read_is_what_the_cache_holds(options: KVCacheOptions) -> None:
    """At once, in chunks and token by token, and as numpy rounds it."""
    model = _with(options)
    want = _numpy_logits(options)
    once = jax.jit(model.logits)(_params(), TOKENS)
    np.testing.assert_allclose(once, want, rtol=2e-4, atol=2e-4)
    plain = jax.jit(MODEL.logits)(_params(), TOKENS)
    assert np.abs(plain - want).max() > 0.01
    read = jax.jit(lambda p, t, c: model.apply(p, t, cache=c))
    cache, parts = model.init_cache(2, T, _params()), []
    for part in (TOKENS[:, :7], TOKENS[:, 7:8], TOKENS[:, 8:9]):
        logits, cache = read(_params(), part, cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), want, rtol=2e-4, atol=2e-4)
    assert int(cache.length) == T


def test_layers_in_a_stack_and_rows_with_padding_do_the_same() -> None:
    model, params = _with(BOTH, scan_layers=True), stack_layers(_params())
    plain = _with(BOTH)
    mask = jnp.ones((2, T), bool).at[0, :3].set(False)
    read = jax.jit(
        lambda m, p, c: m.apply(p, TOKENS, mask=mask, cache=c), static_argnums=0
    )
    want, one = read(plain, _params(), plain.init_cache(2, T + 2, _params()))
    got, two = read(model, params, model.init_cache(2, T + 2, params))
    np.testing.assert_allclose(got[mask], want[mask], rtol=2e-4, atol=2e-4)
    assert two.v.codes.shape == (2, *one.v[0].codes.shape)
    alone = jax.jit(plain.logits)(_params(), TOKENS[:1, 3:])
    np.testing.assert_allclose(want[:1, 3:], alone, rtol=2e-4, atol=2e-4)
    # Greedy generation takes what the logits over the cache say.
    out = generate(model, params, TOKENS, mask, max_new_tokens=3, eos_ids=()).tokens
    whole = jnp.concatenate([TOKENS, out], 1)[:1, 3:]
    logits = jax.jit(plain.logits)(_params(), whole)
    assert logits[:, T - 4 : -1].argmax(-1).tolist() == out[:1].tolist()


def test_prepared_models_keep_their_cache() -> None:
    model = _with(STATIC)
    ready, params = prepare_decoder(model, _params())
    assert ready.kv_cache == STATIC and ready.fused
    got = jax.jit(ready.logits)(params, TOKENS)
    np.testing.assert_allclose(got, _numpy_logits(STATIC), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("scan", [False, True], ids=["apart", "stacked"])
def test_a_step_writes_codes_in_place(scan: bool) -> None:
    """Of the whole cache no copy is made, and none in full precision."""
    layers, slots = 4, 4096
    config = dataclasses.replace(MODEL.config, num_layers=layers)
    model = _with(BOTH, config=config, dtype=jnp.bfloat16, scan_layers=scan)
    params = attach_kv_scales(model.abstract(), {"k": jnp.ones((layers, 2))})
    cache = jax.eval_shape(lambda: model.init_cache(1, slots, params))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.k, cache.v)))
    values = layers * 2 * slots * 32  # of keys, and as many of values
    # Bytes of a key; of a value half a byte, and scale and offset for each 16.
    assert held == values + values * (0.5 + 4 / 16) + layers * 2 * 4
    token = jax.ShapeDtypeStruct((1,), jnp.int32)
    step = jax.jit(decode_step, static_argnums=0, donate_argnums=2)
    memory = step.lower(model, params, cache, token).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= held
    # float32 copies of the keys and values of one layer, and not of all four.
    assert memory.temp_size_in_bytes < 2 * values * 4 / 2


def test_what_does_not_go_together_is_refused() -> None:
    sparse = SparseAttention(
        selector=selector("a_shape"), decode=Quest(keep_pages=1, page_size=16)
    )
    with pytest.raises(ValueError, match="leave out the decode option"):
        _with(MIXED, attention_fn=sparse).init_cache(1, 64)
    with pytest.raises(ValueError, match="layers of their own"):
        _with(SKIP, scan_layers=True).init_cache(1, 8)
    with pytest.raises(ValueError, match="group_size=20 does not divide head_dim=32"):
        _with(KVCacheOptions(format="int4", group_size=20)).init_cache(1, 8)
    with pytest.raises(ValueError, match=r"needs scales\['k'\]"):
        init_cache(MODEL.config, 1, 8, kv_cache=STATIC)


def test_sparse_prefill_reads_what_the_cache_holds() -> None:
    sparse = SparseAttention(
        selector=selector("a_shape", block_size=16, sink_tokens=16, window_tokens=64),
        dense_below=0,
        dense_above=1.0,
    )
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 48, (1, 48)))
    want = jax.jit(_with(MIXED).logits)(_params(), tokens)
    got = jax.jit(_with(MIXED, attention_fn=sparse).logits)(_params(), tokens)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_slots_of_a_quantized_cache_are_pruned() -> None:
    """Codes, scales and offsets go with their slots, static scales stay."""
    k = jnp.asarray(
        np.random.default_rng(4).standard_normal((2, 2, 6, 32)), jnp.float32
    )
    cache = KVCache(
        k=(quantize_kv(k, KVFormat(granularity="head"), head_axis=1),),
        v=(quantize_kv(k, KVFormat(**FOUR)),),
        positions=jnp.broadcast_to(jnp.arange(6), (2, 6)),
        length=jnp.asarray(6),
    )
    slots = jnp.asarray([[0, 2, 3, 5], [1, 2, 4, 5]])
    short = prune_cache(cache, slots, 6)
    for before, after in ((cache.k, short.k), (cache.v, short.v)):
        want = np.stack([before[0].dequantize()[b][:, slots[b]] for b in range(2)])
        np.testing.assert_array_equal(after[0].dequantize(), want)
