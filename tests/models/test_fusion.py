"""Fused projections: the same values under another name, and what cannot be joined."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax.models import (
    DecoderConfig,
    LanguageModel,
    fuse_projections,
    split_projections,
    stack_layers,
)
from tests.formats._cases import assert_trees_equal, normal

CONFIG = DecoderConfig(
    model_type="qwen2",
    vocab_size=32,
    hidden_size=128,
    num_layers=1,
    intermediate_size=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    attention_bias=True,
)
MODEL = LanguageModel(CONFIG)
TOKENS = jnp.asarray([[5, 9, 1, 30, 2]])


@pytest.fixture(scope="module")
def params() -> Any:
    return jax.jit(MODEL.init)(jax.random.key(0))


def _compress(params: Any, *rules: Any) -> Any:
    return aj.compress(params, aj.Recipe(rules=[aj.Rule(**r) for r in rules]))


def test_names_and_shapes(params: Any) -> None:
    fused = fuse_projections(params)
    attn, mlp = fused["layers"][0]["attn"], fused["layers"][0]["mlp"]
    assert set(attn) == {"qkv_proj", "o_proj"}
    assert set(mlp) == {"gate_up_proj", "down_proj"}
    assert attn["qkv_proj"]["kernel"].shape == (128, 512)
    assert attn["qkv_proj"]["bias"].shape == (512,)
    abstract = dataclasses.replace(MODEL, fused=True).abstract()
    assert jax.tree.structure(abstract) == jax.tree.structure(fused)
    assert fused["layers"][0]["attn"]["o_proj"] is params["layers"][0]["attn"]["o_proj"]


@pytest.mark.parametrize(
    "rule",
    [
        None,
        {"format": "t2"},
        {"format": "sherry", "granularity": "channel"},
        {"format": "int4", "group_size": 32, "symmetric": False},
        {"format": "float8_e4m3", "granularity": "block"},
        {"format": "mxfp4"},
    ],
    ids=lambda r: "dense" if r is None else r["format"],
)
def test_split_is_the_inverse_of_fuse(params: Any, rule: Any) -> None:
    tree = params if rule is None else _compress(params, rule)
    fused = jax.jit(fuse_projections)(tree)
    back = jax.jit(lambda p: split_projections(p, CONFIG))(fused)
    assert_trees_equal(back, tree)
    stacked = stack_layers(tree)
    fused = jax.jit(fuse_projections)(stacked)
    assert_trees_equal(jax.jit(lambda p: split_projections(p, CONFIG))(fused), stacked)


@pytest.mark.parametrize("rule", [{"format": "int8"}, {"format": "t2"}])
def test_the_logits_stay(params: Any, rule: Any) -> None:
    tree = _compress(params, rule)
    fused = dataclasses.replace(MODEL, fused=True)
    np.testing.assert_allclose(
        jax.jit(fused.logits)(fuse_projections(tree), TOKENS),
        jax.jit(MODEL.logits)(tree, TOKENS),
        rtol=1e-4,
        atol=1e-4,
    )


def test_scales_of_the_tensor_become_scales_of_channels(params: Any) -> None:
    tree = _compress(params, {"format": "int8", "granularity": "tensor"})
    fused = fuse_projections(tree)["layers"][0]["attn"]["qkv_proj"]["kernel"]
    assert fused.spec.granularity == "channel"
    attn = tree["layers"][0]["attn"]
    parts = [attn[f"{name}_proj"]["kernel"].dequantize() for name in "qkv"]
    np.testing.assert_array_equal(fused.dequantize(), jnp.concatenate(parts, -1))


def _edit(tree: Any, module: str, **changes: Any) -> Any:
    """A copy with a changed module of layer 0; None takes a part away."""
    layer = tree["layers"][0]
    parts = {k: v for k, v in {**layer[module], **changes}.items() if v is not None}
    layers = {**tree["layers"], 0: {**layer, module: parts}}
    return {**tree, "layers": layers}


def _q(fmt: str, n: int, axis: int = -2, **options: Any) -> Any:
    q = aj.quantize(normal((128, n)), format=fmt, axis=axis, **options)
    return {"kernel": q}


GATE, UP = "gate_proj", "up_proj"
REFUSED = [
    ({GATE: None}, "no layers/0/mlp/gate_proj in the params: nothing to fuse"),
    ({GATE: {"kernel": jnp.ones(1), "lora": 1}}, "lora: only a kernel and a bias can"),
    (
        {GATE: {"kernel": jnp.ones((128, 256)), "bias": jnp.ones(256)}},
        "only one of layers/0/mlp/up_proj and gate_proj has a bias",
    ),
    (
        {GATE: _q("int8", 256)},
        "layers/0/mlp/{gate_proj,up_proj}/kernel: some are compressed and some are not",
    ),
    (
        {GATE: {"kernel": jnp.ones((128, 256), jnp.bfloat16)}},
        "kernel: cannot join bfloat16, float32",
    ),
    (
        {GATE: _q("int8", 256), UP: _q("int4", 256)},
        "kernel: cannot join int8 channel and int4 g128; compress them alike",
    ),
    (
        {GATE: _q("nvfp4", 256), UP: _q("nvfp4", 256)},
        "nvfp4 has one scale2 for each kernel; compress the fused kernel instead",
    ),
    (
        {GATE: _q("int8", 256, -1), UP: _q("int8", 256, -1)},
        "packed along axis (-1,); only kernels [in, out] packed along axis -2 can be",
    ),
    (
        {
            GATE: _q("float8_e4m3", 192, granularity="block"),
            UP: _q("float8_e4m3", 192, granularity="block"),
        },
        "blocks of 128 outputs do not end at output 192",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_joined(params: Any, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        fuse_projections(_edit(params, "mlp", **changes))
    assert "\n" not in str(caught.value)


def test_trees_of_another_kind(params: Any) -> None:
    fused = fuse_projections(params)
    with pytest.raises(
        ValueError, match="no layers/0/attn/q_proj in the params: fused"
    ):
        fuse_projections(fused)
    with pytest.raises(
        ValueError, match="no layers/0/attn/qkv_proj in the params: not"
    ):
        split_projections(params, CONFIG)
    for function in (fuse_projections, lambda p: split_projections(p, CONFIG)):
        with pytest.raises(ValueError, match="no layers in the params: not of this de"):
            function({"a": 1})
        with pytest.raises(
            ValueError, match="no layers/0/attn in the params: not of t"
        ):
            function({"layers": {0: {"mlp": {}}}})
    other = dataclasses.replace(CONFIG, intermediate_size=200)
    message = "gate_up_proj/kernel has 512 outputs, the configuration says 200 + 200"
    with pytest.raises(ValueError, match=re.escape(message)):
        split_projections(fused, other)
    block = _edit(
        fused, "mlp", gate_up_proj=_q("float8_e4m3", 400, granularity="block")
    )
    with pytest.raises(
        ValueError, match="blocks of 128 outputs do not end at output 2"
    ):
        split_projections(block, other)


def test_models_name_the_way_out(params: Any) -> None:
    fused = dataclasses.replace(MODEL, fused=True)
    with pytest.raises(ValueError, match="the model is fused and they are not; use"):
        fused.logits(params, TOKENS)
    with pytest.raises(ValueError, match="they are fused and the model is not; use"):
        MODEL.logits(fuse_projections(params), TOKENS)
