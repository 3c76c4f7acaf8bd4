"""Rounds of decoding in few kernels, against the layers that they stand for."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax.models import (
    DecoderConfig,
    FusedRows,
    LanguageModel,
    prepare_decoder,
    stack_layers,
)
from angeljax.models._fused_rows import quickest_rows
from angeljax.speculative import PromptLookup, autoregressive, generate
from benchmarks.decode_round import loop_of
from benchmarks.decode_step import MODELS, count_kernels
from pallas_kernels._devices import elsewhere
from tests.kernels._h100 import compile_for_h100, has_plugin
from tests.models._random_params import random_params

CONFIG = DecoderConfig(
    model_type="qwen3",
    vocab_size=40,
    hidden_size=48,
    num_layers=2,
    intermediate_size=72,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    qk_norm=True,
    attention_bias=True,
    windows=(0, 6),
)
XLA = FusedRows("xla")


@functools.cache
def pair(rows: FusedRows, dtype: Any, **changes: Any) -> tuple[Any, Any, Any]:
    """A model with `rows` and the same without, and their params."""
    config = dataclasses.replace(CONFIG, **changes)
    model = LanguageModel(config, dtype)
    params = jax.tree.map(lambda x: x.astype(dtype), random_params(model, std=0.3))
    ready, params = prepare_decoder(model, params, rows=rows, transpose=True)
    return ready, dataclasses.replace(ready, rows=None), params


@functools.partial(jax.jit, static_argnames=("model", "width"))
def read(model: Any, params: Any, tokens: jax.Array, width: int) -> Any:
    """Logits of tokens that are read in groups, outputs of layer 0, and the cache."""
    start = jnp.asarray([0, 3], jnp.int32)

    def group(cache: Any, given: Any) -> Any:
        at, some = given
        positions = (start + at)[:, None] + jnp.arange(width)
        mask = jnp.arange(24) <= positions[:, :, None]
        mask &= jnp.arange(24) >= start[:, None, None]
        rows = model.read_rows(
            params,
            cache,
            some,
            positions=positions,
            slots=start + at,
            mask=mask[:, None],
            hidden=(0,),
        )
        logits = model.head_rows(params, rows.final)
        return rows.cache, (logits, rows.hidden[0])

    batch, total = tokens.shape
    groups = jnp.swapaxes(tokens.reshape(batch, -1, width), 0, 1)
    given = jnp.arange(0, total, width), groups
    cache, found = jax.lax.scan(group, model.init_rows(batch, 24), given)
    joined = (jnp.swapaxes(x, 0, 1).reshape(batch, total, -1) for x in found)
    return *joined, cache


def bits(tree: Any) -> list[np.ndarray]:
    return [np.asarray(x, np.float32) for x in jax.tree.leaves(tree)]


def test_it_computes_what_the_layers_compute() -> None:
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 40)
    fused, plain, params = pair(XLA, jnp.float32)
    got, want = (read(m, params, tokens, 3) for m in (fused, plain))
    for a, b in zip(bits(got), bits(want), strict=True):
        assert np.abs(a - b).max() < 1e-4 * max(1.0, np.abs(b).max())


def test_a_token_does_not_depend_on_what_is_read_with_it() -> None:
    fused, _, params = pair(XLA, jnp.bfloat16)
    tokens = jax.random.randint(jax.random.key(2), (2, 6), 0, 40)
    one, six = (read(fused, params, tokens, width) for width in (1, 6))
    for a, b in zip(bits(one), bits(six), strict=True):
        assert np.array_equal(a, b)


def test_text_is_that_of_plain_decoding() -> None:
    fused, _, params = pair(XLA, jnp.bfloat16, num_layers=1, windows=(), tied=True)
    prompts = [[1, 2, 3, 1, 2], [5, 6, 7, 8, 5, 6]]
    drafter = PromptLookup(3)
    plain = autoregressive(fused, params, prompts, max_new_tokens=16)
    drafted = generate(fused, params, prompts, drafter=drafter, max_new_tokens=16)
    assert drafted.tau > 1
    for a, b in zip(plain.tokens, drafted.tokens, strict=True):
        assert np.array_equal(a, b)


def test_what_it_cannot_serve_is_refused() -> None:
    fused, _, params = pair(XLA, jnp.float32)
    small = dataclasses.replace(CONFIG, head_dim=8)
    gelu = dataclasses.replace(CONFIG, activation="gelu")
    model = LanguageModel(CONFIG)
    recipe = aj.Recipe(rules=[aj.Rule(match=".*qkv_proj/kernel", format="int8")])
    cases: list[tuple[Any, Any, str]] = [
        (dataclasses.replace(fused, fused=False), None, "not fused"),
        (dataclasses.replace(fused, scan_layers=True), None, "one stack"),
        (dataclasses.replace(fused, config=gelu), None, "'gelu'"),
        (dataclasses.replace(fused, config=small), None, "heads of 8"),
        (dataclasses.replace(fused, attention_fn=lambda *a: a[0]), None, "of its own"),
        (dataclasses.replace(fused, dtype=jnp.bfloat16), params, "float32 and the"),
        (fused, aj.compress(params, recipe), "qkv_proj of layer 0 is not dense"),
    ]
    for other, tree, words in cases:
        with pytest.raises(ValueError, match=words):
            XLA.check(other, tree)
    # Before anything is compiled, whoever asks.
    stacked = dataclasses.replace(model, scan_layers=True)
    with pytest.raises(ValueError, match="one stack"):
        prepare_decoder(stacked, stack_layers(random_params(model)), rows=XLA)
    with pytest.raises(ValueError, match="not fused"):
        loose = dataclasses.replace(model, rows=XLA)
        autoregressive(loose, random_params(model), [[1, 2]], max_new_tokens=2)


def test_where_the_kernels_are_quickest() -> None:
    config = dataclasses.replace(CONFIG, hidden_size=64, intermediate_size=64)
    config = dataclasses.replace(config, head_dim=64)
    model = LanguageModel(config, jnp.bfloat16)

    def cast(model: LanguageModel) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(model))

    ready = prepare_decoder(model, cast(model), transpose=True)
    plain = prepare_decoder(model, cast(model), transpose=False)
    other = LanguageModel(config), *ready[1:]
    h100 = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda"
    )
    mesh = jax.sharding.AbstractMesh(
        (1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=h100
    )
    assert quickest_rows(*ready) is None
    with jax.sharding.use_abstract_mesh(mesh):
        assert quickest_rows(*ready) == FusedRows()
        # Not stored for them, of another dtype, with heads that are too small.
        assert quickest_rows(*plain) is None
        assert quickest_rows(*other) is None
        small = LanguageModel(CONFIG, jnp.bfloat16)
        small, params = prepare_decoder(small, cast(small), transpose=True)
        assert quickest_rows(small, params) is None
        odd = LanguageModel(dataclasses.replace(config, vocab_size=41), jnp.bfloat16)
        assert quickest_rows(*prepare_decoder(odd, cast(odd), transpose=True)) is None


def test_a_long_cache_is_read_the_usual_way() -> None:
    shape = jax.ShapeDtypeStruct
    assert FusedRows.reads(shape((1, 1, 16, 8192), bool))
    assert not FusedRows.reads(shape((1, 1, 17, 64), bool))
    assert not FusedRows.reads(shape((1, 1, 1, 8256), bool))


@pytest.mark.gpu_compile
@pytest.mark.skipif(not has_plugin(), reason="needs jax[cuda13]")
def test_a_round_on_an_h100_is_six_kernels_a_layer_at_any_width() -> None:
    config = dataclasses.replace(MODELS["smollm2"], num_layers=2)
    model = LanguageModel(config, jnp.bfloat16)
    fused = dataclasses.replace(model, fused=True, rows=FusedRows())
    params = jax.eval_shape(
        lambda p: prepare_decoder(model, p, transpose=True)[1],
        model.abstract(jnp.bfloat16),
    )
    number, counts = jax.ShapeDtypeStruct((), jnp.int32), []
    for width in (1, 8):
        run = loop_of(fused, width, 256)
        compiled = compile_for_h100(run, params, number, number)
        counts.append(count_kernels(compiled.as_text()))
        # Six times two layers, and the head. Nothing is copied.
        assert counts[-1]["custom-call"] == 6 * 2 + 1
        assert set(counts[-1]) == {"custom-call", "fusion"}
    assert counts[0] == counts[1] and counts[0]["fusion"] <= 8


@pytest.mark.gpu
def test_a_gpu_computes_it_and_a_token_does_not_depend_on_others() -> None:
    if why := elsewhere("mosaic_gpu"):
        pytest.skip(why)
    sizes = dict(hidden_size=64, intermediate_size=96, head_dim=64, tied=True)
    fused, plain, params = pair(FusedRows("mosaic_gpu"), jnp.bfloat16, **sizes)
    tokens = jax.random.randint(jax.random.key(2), (2, 6), 0, 40)
    one, six = (read(fused, params, tokens, width) for width in (1, 6))
    for a, b in zip(bits(one), bits(six), strict=True):
        assert np.array_equal(a, b)
    for a, b in zip(bits(six), bits(read(plain, params, tokens, 6)), strict=True):
        assert np.abs(a - b).max() < 3e-2 * max(1.0, np.abs(b).max())
