"""Static scales of a KV cache, against numpy on what attention sees."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.kv_cache import (
    KVCacheOptions,
    attach_kv_scales,
    calibrate_kv,
    kv_statistics,
)
from angeljax.models import (
    DecoderConfig,
    LanguageModel,
    fuse_projections,
    stack_layers,
)
from tests.kv_cache._oracle import stored
from tests.models._random_params import random_params

MODEL = LanguageModel(
    DecoderConfig(
        model_type="qwen3", vocab_size=48, hidden_size=32, num_layers=2,
        intermediate_size=32, num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=True,
    )
)  # fmt: skip
TOKENS = np.random.default_rng(3).integers(0, 48, (2, 6))
MASK = np.ones((2, 6), bool)
MASK[0, :2] = False
BATCHES = [{"tokens": TOKENS[:, ::-1], "mask": MASK}, {"tokens": TOKENS}]


@functools.cache
def _params() -> Any:
    return random_params(MODEL, std=0.3)


@functools.cache
def _seen() -> Any:
    """Keys and values `[layers, tokens, heads, head_dim]` of all real tokens."""
    found: list[list[Any]] = [[], []]
    for batch in BATCHES:
        mask = batch.get("mask", np.ones((2, 6), bool))
        apply = jax.jit(lambda p, t, m: MODEL.features(p, t, mask=m, relations=(0, 1)))
        qkv = apply(_params(), jnp.asarray(batch["tokens"]), jnp.asarray(mask)).qkv
        for n in (1, 2):
            found[n - 1].append(np.stack([np.asarray(x[n])[mask] for x in qkv]))
    return [np.concatenate(x, axis=1) for x in found]


@functools.cache
def _statistics() -> Any:
    return kv_statistics(MODEL, _params(), BATCHES, histogram=True)


def _options(**fields: Any) -> KVCacheOptions:
    return KVCacheOptions(format="int8", granularity="tensor", keys={"granularity": "head"}, **fields)  # fmt: skip  # noqa: E501


def test_maxima_of_keys_after_rotation_and_of_values() -> None:
    k, v = _seen()
    scales = calibrate_kv(MODEL, _params(), BATCHES, _options())
    np.testing.assert_allclose(scales["k"], np.abs(k).max((1, 3)) / 448, rtol=1e-5)
    np.testing.assert_allclose(scales["v"], np.abs(v).max((1, 2, 3)) / 127, rtol=1e-5)
    mixed = _options(values={"format": "int4"})
    assert set(calibrate_kv(MODEL, _params(), BATCHES[1:], mixed)) == {"k"}


def test_percentiles_are_within_a_bin_and_statistics_merge() -> None:
    k, v = _seen()
    options = _options(scale_method="percentile", percentile=90)
    stats = _statistics()
    scales = calibrate_kv(MODEL, {}, [], options, statistics=stats)
    for found, x, axes in ((scales["k"] * 448, k, (1, 3)), (scales["v"] * 127, v, (1, 2, 3))):  # fmt: skip  # noqa: E501
        want = np.percentile(np.abs(x), 90, axis=axes, method="inverted_cdf")
        ratio = np.asarray(found) / want
        assert (ratio > 1 - 1e-5).all() and (ratio < 2 ** (1 / 64) + 1e-5).all()
    assert stats.histogram["k"].sum() == k.size
    merged = stats.merge(stats)
    assert merged.histogram["v"].sum() == 2 * v.size
    np.testing.assert_array_equal(merged.amax["v"], stats.amax["v"])


def test_the_search_takes_the_scale_with_the_least_error() -> None:
    seen = dict(zip("kv", _seen(), strict=True))
    options = _options(scale_method="mse")
    scales = calibrate_kv(MODEL, _params(), BATCHES, options, statistics=_statistics())
    layer = 1
    for side, head in (("k", 1), ("v", None)):
        x = seen[side][layer] if head is None else seen[side][layer][:, head]
        fmt = options.of(side)
        fp8 = fmt.format == "float8_e4m3"
        base = np.abs(x).max() / (448 if fp8 else 127)
        tried = base * np.geomspace(*((0.8, 16) if fp8 else (0.2, 1)), 50)
        errors = [
            np.square(stored(x, fmt, np.full((1,) * x.ndim, s, np.float32)) - x).sum()
            for s in tried[::7]
        ]
        found = np.asarray(
            scales[side][layer] if head is None else scales[side][layer, head]
        )
        own = np.square(stored(x, fmt, np.full((1,) * x.ndim, found)) - x).sum()
        assert own <= min(errors) * (1 + 1e-4)
        assert np.abs(tried / found - 1).min() < 1e-4


def test_scales_travel_in_the_tree() -> None:
    options = _options()
    scales = {"k": jnp.asarray([[1.0, 2], [3, 4]]), "v": jnp.asarray([5.0, 6])}
    params = attach_kv_scales(_params(), scales)
    model = dataclasses.replace(MODEL, kv_cache=options)
    cache = jax.eval_shape(lambda: model.init_cache(2, 8, params))
    assert cache.k[0].scale.shape == (1, 2, 1, 1)
    assert cache.v[0].scale.shape == (1, 1, 1, 1)
    assert model.init_cache(1, 4, params).k[1].scale.ravel().tolist() == [3, 4]
    stacked = dataclasses.replace(model, scan_layers=True)
    for tree in (
        stack_layers(params),
        attach_kv_scales(stack_layers(_params()), scales),
        stack_layers(fuse_projections(params)),
    ):
        cache = stacked.init_cache(1, 4, tree)
        assert cache.k.scale.ravel().tolist() == [1, 2, 3, 4]
        assert cache.v.scale.ravel().tolist() == [5, 6]
        assert cache.v.codes.shape == (2, 1, 2, 4, 16)
    with pytest.raises(ValueError, match="not of 2 layers"):
        attach_kv_scales(_params(), {"k": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"init_cache\(batch, slots, params\)"):
        model.init_cache(1, 4)
    with pytest.raises(ValueError, match="layers/<i>/attn/k_cache/scale"):
        model.init_cache(1, 4, _params())
    with pytest.raises(ValueError, match="calibrate for this granularity"):
        swapped = dataclasses.replace(
            MODEL, kv_cache=KVCacheOptions(granularity="head")
        )
        swapped.init_cache(1, 4, params)


def test_what_cannot_be_calibrated_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to calibrate"):
        calibrate_kv(MODEL, _params(), BATCHES, KVCacheOptions())
    with pytest.raises(ValueError, match="no batches"):
        calibrate_kv(MODEL, _params(), [], _options())
    with pytest.raises(ValueError, match=r"must be \[batch, length\]"):
        calibrate_kv(MODEL, _params(), [TOKENS[0]], _options())
    bad = jax.tree.map(lambda x: x, _params())
    bad["layers"][1]["attn"]["v_proj"]["kernel"] = jnp.full((32, 32), jnp.nan)
    with pytest.raises(ValueError, match="values of layer 1 hold NaN"):
        kv_statistics(MODEL, bad, BATCHES[1:], histogram=True)
