"""What a decoder reads besides tokens: embeddings, rotary positions, planes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.attention.prefill import Packing
from angeljax.models import (
    DecoderConfig,
    LanguageModel,
    ModelError,
    generate,
    stack_layers,
)
from angeljax.models._entry import Reading
from angeljax.models.rope import cos_sin, frequencies
from tests.models._random_params import random_params

CONFIG = DecoderConfig(
    model_type="qwen3",
    vocab_size=48,
    hidden_size=32,
    num_layers=3,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    qk_norm=True,
    mrope_section=(4, 2, 2),
    mrope_interleaved=True,
)
LOOP = LanguageModel(CONFIG)
SCAN = dataclasses.replace(LOOP, scan_layers=True)
T = 10


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(0)
    steps = rng.integers(0, 4, (3, 2, T)).astype(np.int32)
    planes = [jnp.asarray(rng.normal(size=(2, T, 32)), jnp.float32) for _ in range(2)]
    mask = np.ones((2, T), bool)
    mask[1, :3] = False
    return {
        "params": random_params(LOOP, std=0.2),
        "tokens": jnp.asarray(rng.integers(0, 48, (2, T)), jnp.int32),
        "positions": jnp.asarray(np.cumsum(steps, axis=-1)),
        "deepstack": planes,
        "mask": jnp.asarray(mask),
    }


@functools.cache
def compiled(model):
    return jax.jit(lambda params, **inputs: model.apply(params, **inputs))


def close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("interleaved", [False, True])
def test_frequencies_turn_with_their_axis(interleaved):
    config = dataclasses.replace(CONFIG, mrope_interleaved=interleaved)
    positions = np.random.default_rng(1).integers(0, 4000, (3, 2, 5))
    cos, sin = cos_sin(config, jnp.asarray(positions))
    frequency = frequencies(config)[0]
    # Qwen2.5-VL: one run for each axis; Qwen3-VL: T H W T H W ..., the rest to T.
    of = "thwthwtt" if interleaved else "tttthhww"
    for j, axis in enumerate(of):
        angle = positions["thw".index(axis)] * frequency[j]
        np.testing.assert_allclose(cos[:, :, 0, 0, j], np.cos(angle), atol=2e-4)
        np.testing.assert_allclose(sin[:, :, 0, 1, j], np.sin(angle), atol=2e-4)


def test_embeddings_and_plain_positions_change_nothing(given):
    params, tokens = given["params"], given["tokens"]
    want = LOOP.logits(params, tokens)
    embeds = LOOP.embed(params, tokens)
    order = jnp.broadcast_to(jnp.arange(T), (2, T))
    for positions in (None, order, jnp.broadcast_to(order, (3, 2, T))):
        got, _ = compiled(LOOP)(params, embeds=embeds, positions=positions)
        close(got, want)


def full(given, tokens, positions):
    """Logits without a cache, of prompts longer than the planes."""
    more = tokens.shape[1] - T
    planes = [jnp.pad(p, ((0, 0), (0, more), (0, 0))) for p in given["deepstack"]]
    mask = jnp.pad(given["mask"], ((0, 0), (0, more)), constant_values=True)
    inputs = {"positions": positions, "deepstack": planes, "mask": mask}
    return compiled(LOOP)(given["params"], tokens=tokens, **inputs)[0]


def test_planes_are_added_after_the_first_layers(given):
    """Against a decoder that is run layer by layer."""
    params, inputs = given["params"], {k: given[k] for k in ("tokens", "positions")}
    module = LOOP.bind(params)
    rotation = cos_sin(CONFIG, given["positions"])
    x = LOOP.embed(params, given["tokens"])
    sees = jnp.tril(jnp.ones((T, T), bool))[None, None]
    for i, block in enumerate(module.layers):
        x, _ = block(x, rotation, sees, None, LOOP.attention_fn)
        if i < 2:
            x = x + given["deepstack"][i]
    got, _ = compiled(LOOP)(params, **inputs, deepstack=given["deepstack"])
    close(got, module.head(module.norm(x)))


@pytest.mark.parametrize("model", [LOOP, SCAN], ids=["loop", "scan"])
def test_generation_goes_on_after_the_largest_position(given, model):
    params = given["params"]
    inputs = {k: given[k] for k in ("positions", "deepstack", "mask")}
    inputs["embeds"] = LOOP.embed(params, given["tokens"])
    ours = stack_layers(params) if model.scan_layers else params
    got = generate(model, ours, **inputs, max_new_tokens=4).tokens
    tokens, positions = given["tokens"], given["positions"]
    real = np.where(given["mask"], positions, -1)
    after = real.max((0, 2)) + 1
    assert (after != np.sum(given["mask"], -1)).all()  # else the test shows nothing
    for i in range(4):
        logits = full(given, tokens, positions)
        token = jnp.argmax(logits[:, -1], -1).astype(jnp.int32)
        np.testing.assert_array_equal(got[:, i], token)
        tokens = jnp.concatenate([tokens, token[:, None]], axis=1)
        new = jnp.broadcast_to((after + i)[None, :, None], (3, 2, 1))
        positions = jnp.concatenate([positions, new], axis=-1)


@pytest.mark.parametrize("model", [LOOP, SCAN], ids=["loop", "scan"])
def test_a_prompt_in_chunks(given, model):
    """Every chunk at its positions, then one token at the position that follows."""
    params, positions, mask = given["params"], given["positions"], given["mask"]
    ours = stack_layers(params) if model.scan_layers else params
    cache = model.init_cache(2, T + 1)
    for part in (slice(0, 4), slice(4, T)):
        logits, cache = compiled(model)(
            ours,
            tokens=given["tokens"][:, part],
            positions=positions[..., part],
            deepstack=[p[:, part] for p in given["deepstack"]],
            mask=mask[:, part],
            cache=cache,
        )
    after = np.where(mask, positions, -1).max((0, 2)) + 1
    np.testing.assert_array_equal(cache.rope_delta, after - np.sum(mask, -1))
    token = jnp.asarray([[5], [7]], jnp.int32)
    last, cache = compiled(model)(ours, tokens=token, cache=cache)
    np.testing.assert_array_equal(cache.rope_delta, after - np.sum(mask, -1))
    tokens = jnp.concatenate([given["tokens"], token], axis=1)
    new = jnp.broadcast_to(after[None, :, None], (3, 2, 1))
    want = full(given, tokens, jnp.concatenate([positions, new], axis=-1))
    close(logits[:, -1], want[:, -2])
    close(last[:, 0], want[:, -1])


def test_a_position_to_go_on_at(given):
    """Also for a model whose positions have one axis."""
    plain = LanguageModel(dataclasses.replace(CONFIG, mrope_section=()))
    params, tokens = given["params"], given["tokens"]
    positions = given["positions"][0]
    at = jnp.asarray([40, 50], jnp.int32)
    inputs = {"tokens": tokens[:, :-1], "positions": positions[:, :-1]}
    _, cache = compiled(plain)(
        params, **inputs, cache=plain.init_cache(2, T), next_position=at
    )
    got, _ = compiled(plain)(params, tokens=tokens[:, -1:], cache=cache)
    positions = positions.at[:, -1].set(at)
    want, _ = compiled(plain)(params, tokens=tokens, positions=positions)
    close(got[:, 0], want[:, -1])


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({}, "give either tokens or embeds"),
        ({"tokens": (2, 4), "embeds": (2, 4, 32)}, "give either tokens or embeds"),
        ({"embeds": (2, 4, 31)}, "embeds must be .batch, length, 32., not"),
        ({"tokens": (2, 4), "positions": (3, 2, 5)}, "positions must be .* not"),
        ({"tokens": (2, 4), "mask": (2, 5)}, "mask has shape"),
        ({"tokens": (2, 4), "deepstack": [(2, 3, 32)]}, "each deepstack plane must be"),
        ({"tokens": (2, 4), "deepstack": [(2, 4, 32)] * 4}, "4 deepstack planes for 3"),
    ],
)
def test_shapes_that_do_not_fit(inputs, message):
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.int32),
        inputs,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p, kw: LOOP.apply(p, **kw), LOOP.abstract(), shapes)


def test_three_axes_need_a_section():
    plain = LanguageModel(dataclasses.replace(CONFIG, mrope_section=()))
    shapes = {
        "tokens": jax.ShapeDtypeStruct((2, 4), jnp.int32),
        "positions": jax.ShapeDtypeStruct((3, 2, 4), jnp.int32),
    }
    with pytest.raises(ValueError, match="the model has no mrope_section"):
        jax.eval_shape(lambda p, kw: plain.apply(p, **kw), plain.abstract(), shapes)
    with pytest.raises(ModelError, match="mrope_section must be three numbers"):
        dataclasses.replace(CONFIG, mrope_section=(4, 4, 4))
    assert DecoderConfig.from_dict(CONFIG.to_dict()) == CONFIG


def test_padding_moves_with_all_that_stands_beside_it(given):
    """What sparse attention reads: real tokens first, in their order."""
    mask = given["mask"]
    inputs = {k: given[k] for k in ("tokens", "positions", "deepstack")}
    read = Reading.of(CONFIG, embeds=None, mask=mask, **inputs)
    packed = read.pack(Packing.of(mask))
    np.testing.assert_array_equal(packed.mask[1], [True] * (T - 3) + [False] * 3)
    real = slice(3, None), slice(None, -3)
    for before, after in (
        (read.tokens[1], packed.tokens[1]),
        (read.positions[2, 1], packed.positions[2, 1]),
        (read.deepstack[1][1], packed.deepstack[1][1]),
    ):
        np.testing.assert_array_equal(after[real[1]], before[real[0]])
    np.testing.assert_array_equal(packed.positions[:, 0], read.positions[:, 0])
