"""The block drafter and the MTP layer in decoding, and their files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from angeljax.speculative import (
    BlockConfig,
    BlockDrafter,
    BlockModel,
    MTPDrafter,
    MTPModel,
    Sampling,
    Target,
    load_block,
    load_mtp,
    prefill,
    save_block,
    save_mtp,
)
from angeljax.speculative._context_attention import attend
from angeljax.train import BlockTask, MTPTask
from angeljax.train.chunked import head_logits
from tests.models._random_params import random_params
from tests.speculative._cases import PROMPTS, tiny

NEW = 20


def block_drafter(block_size=4, num_tokens=None):
    model, _ = tiny()
    block = BlockModel(
        BlockConfig.of(
            model.config, num_layers=2, block_size=block_size, mask_token_id=31
        )
    )
    return BlockDrafter(block, random_params(block, std=0.3), num_tokens)


def mtp_drafter(num_tokens=3):
    mtp = MTPModel(tiny()[0].config)
    return MTPDrafter(mtp, random_params(mtp, seed=2, std=0.3), num_tokens)


def test_files_of_a_block_drafter(tmp_path):
    drafter = block_drafter()
    save_block(tmp_path, drafter.model, drafter.params, dtype=jnp.float32)
    model, params = load_block(tmp_path, dtype=jnp.float32)
    assert model == drafter.model
    jax.tree.map(np.testing.assert_array_equal, params, drafter.params)
    # Names and shapes of the published drafters, z-lab/Qwen3-8B-DFlash-b16 and others.
    tensors = load_file(tmp_path / "model.safetensors")
    parts = [
        *("input_layernorm", "post_attention_layernorm"),
        *(f"self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *("self_attn.q_norm", "self_attn.k_norm"),
        *(f"mlp.{x}" for x in ("gate_proj", "up_proj", "down_proj")),
    ]
    layers = {f"layers.{i}.{x}.weight" for i in range(2) for x in parts}
    assert set(tensors) == {"fc.weight", "hidden_norm.weight", "norm.weight", *layers}
    assert tensors["fc.weight"].shape == (16, 32)
    gate = drafter.params["layers"][1]["mlp"]["gate_proj"]["kernel"]
    np.testing.assert_array_equal(tensors["layers.1.mlp.gate_proj.weight"], gate.T)
    file = tmp_path / "config.json"
    data = json.loads(file.read_text())
    assert data["architectures"] == ["DFlashDraftModel"]
    assert data["model_type"] == "qwen3" and data["num_hidden_layers"] == 2
    assert data["block_size"] == 4 and data["num_target_layers"] == 2
    assert data["dflash_config"] == {"mask_token_id": 31, "target_layer_ids": [1, 1]}
    for change, message in [
        ({"dflash_config": None}, "no dflash_config"),
        ({"dflash_config": {"mask_token_id": 1}}, "no field 'target_layer_ids'"),
        ({"block_size": 1}, "block_size must be at least 2"),
        ({"intermediate_size": 48}, "the configuration says"),
    ]:
        file.write_text(json.dumps({**data, **change}))
        with pytest.raises(ValueError, match=message):
            load_block(tmp_path)


def test_files_of_an_mtp_layer(tmp_path):
    drafter, target = mtp_drafter(), tiny()[0].config
    save_mtp(tmp_path, drafter.model, drafter.params, dtype=jnp.float32)
    model, params = load_mtp(tmp_path, dtype=jnp.float32)
    assert model == drafter.model
    jax.tree.map(np.testing.assert_array_equal, params, drafter.params)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["model.layers.2.eh_proj.weight"].shape == (16, 32)
    around = {"enorm", "hnorm", "eh_proj", "shared_head.norm", "input_layernorm"}
    assert {f"model.layers.2.{x}.weight" for x in around} < set(tensors)
    # In the folder of a whole model, with copies of what is the target's.
    size = target.vocab_size
    others = ("model.layers.1.mlp.up_proj", "model.layers.2.embed_tokens", "lm_head")
    more = {f"{x}.weight": np.ones((size, 16), np.float32) for x in others}
    save_file({**tensors, **more}, tmp_path / "model.safetensors")
    again = load_mtp(tmp_path, dtype=jnp.float32)[1]
    jax.tree.map(np.testing.assert_array_equal, again, params)
    # As a whole model's configuration has it.
    file = tmp_path / "config.json"
    data = {k: v for k, v in json.loads(file.read_text()).items() if k != "angeljax"}
    file.write_text(json.dumps(data))
    assert load_mtp(tmp_path)[0].config == drafter.model.config
    file.write_text(json.dumps({**data, "num_attention_heads": 4}))
    with pytest.raises(ValueError, match="_proj.weight has shape"):
        load_mtp(tmp_path)
    file.write_text(json.dumps(data))
    del tensors["model.layers.2.hnorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no tensor for hnorm/scale"):
        load_mtp(tmp_path)
    file.write_text("{}")
    with pytest.raises(ValueError, match="it is no MTP layer"):
        load_mtp(tmp_path)


def test_training_computes_what_the_drafter_drafts():
    """Likeliest tokens of the packed forward at an anchor: the drafts there."""
    model, params = tiny()
    drafter = block_drafter()
    task = BlockTask(target=model, block=drafter.model, dtype="float32")
    row = np.asarray([PROMPTS[3] + [2, 9, 4, 1]], np.int32)
    anchors = jnp.asarray([[2, 7, 4]])
    x, _ = jax.jit(task.hidden)(drafter.params, params, jnp.asarray(row), anchors)
    want = jnp.argmax(head_logits(model.head_params(params), x), axis=-1)
    target = Target(model, params, Sampling().sampler(3))
    sizes = jnp.asarray(anchors[0] + 1)
    tokens = jnp.asarray(np.repeat(row, 3, axis=0))
    state = prefill(target, drafter, tokens, sizes, sizes + 1, slots=24)
    draft, _ = jax.jit(drafter.draft)(target, state.drafter, state.context)
    np.testing.assert_array_equal(draft.tokens, want[0])


def test_mtp_steps_of_training_are_those_of_drafting():
    """The likeliest tokens of the steps from a place: the drafts there."""
    model, params = tiny()
    drafter = mtp_drafter()
    task = MTPTask(
        target=model, mtp=drafter.model, steps=3, on_policy=True, dtype="float32"
    )
    row = np.asarray([PROMPTS[3] + [2, 9, 4, 1, 5, 5]], np.int32)
    x, _ = jax.jit(task.hidden)(drafter.params, params, jnp.asarray(row))
    want = jnp.argmax(head_logits(model.head_params(params), x), axis=-1)
    places = jnp.asarray([2, 7, 4])
    # The pair of place i ends with token i + 1: the draft begins at i + 2.
    target = Target(model, params, Sampling().sampler(3))
    sizes = places + 2
    tokens = jnp.asarray(np.repeat(row, 3, axis=0))
    state = prefill(target, drafter, tokens, sizes, sizes + 4, slots=24)
    draft, _ = jax.jit(drafter.draft)(target, state.drafter, state.context)
    np.testing.assert_array_equal(draft.tokens, want[0, places])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("own", [False, True])
def test_attention_of_runs_by_hand(dtype, own, rng):
    """Each query by itself; in 16 bits on a CPU too, with the gradient."""
    batch, runs, count, groups, size, dim, slots = 2, 3, 4, 2, 5, 8, 6

    def some(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    q = some(batch, runs, count, 2 * groups, dim)
    context = some(batch, groups, slots, dim), some(batch, groups, slots, dim)
    mine = some(batch, runs, size, groups, dim), some(batch, runs, size, groups, dim)
    seen = jnp.asarray(rng.random((batch, runs, slots)) < 0.6)

    def loss(q, context, mine):
        return attend(q, context, seen, mine if own else None)

    got = jax.jit(loss)(q, context, mine)
    assert got.dtype == q.dtype
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (q, context, mine))
    for b, a, j, h in np.ndindex(*q.shape[:4]):
        keys, values = (x[b, h // 2][seen[b, a]] for x in wide[1])
        if own:
            more = (x[b, a, :, h // 2] for x in wide[2])
            keys, values = map(np.concatenate, zip((keys, values), more, strict=True))
        elif not len(keys):
            continue
        scores = np.exp(keys @ wide[0][b, a, j, h] * dim**-0.5)
        want = scores / scores.sum() @ values
        error = 1e-5 if dtype == "float32" else 3e-2
        np.testing.assert_allclose(
            np.asarray(got[b, a, j, h], np.float64), want, atol=error
        )
    square = lambda *x: jnp.sum(loss(*x).astype(jnp.float32) ** 2)  # noqa: E731
    grads = jax.jit(jax.grad(square, argnums=(0, 1, 2)))(q, context, mine)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
