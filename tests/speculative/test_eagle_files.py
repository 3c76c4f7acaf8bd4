"""EAGLE-3 heads of other programs: their arithmetic, and their files bit for bit."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from angeljax.models import DecoderConfig
from angeljax.speculative import (
    Context,
    EagleConfig,
    EagleDrafter,
    Prompt,
    Sampling,
    Target,
    init_eagle,
    load_eagle,
    save_eagle,
)
from angeljax.speculative._eagle_head import draft_logits, fused_features, read_step

GOLDEN = Path(__file__).parent.parent / "golden" / "eagle3" / "head.npz"
TARGET = DecoderConfig(
    model_type="llama",
    vocab_size=40,
    hidden_size=16,
    num_layers=8,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)


@functools.cache
def golden():
    with np.load(GOLDEN) as data:
        return {name: data[name] for name in data.files}


@pytest.fixture
def folder(tmp_path):
    arrays = golden()
    tensors = {k[2:]: v for k, v in arrays.items() if k.startswith("w:")}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(str(arrays["config"]))
    return tmp_path


def test_logits_and_drafts_are_those_of_pytorch(folder):
    arrays = golden()
    config, head = load_eagle(folder, TARGET)
    tokens, count = arrays["tokens"][None], len(arrays["features"])
    parts = tuple(jnp.asarray(x[None]) for x in np.split(arrays["features"], 3, axis=1))

    def attend(q, key, value):
        key, value = (jnp.repeat(x, 2, axis=2) for x in (key, value))
        s = jnp.einsum("bthd,bshd->bhts", q, key, precision="highest") * 8**-0.5
        w = jax.nn.softmax(jnp.where(jnp.tri(count, dtype=bool), s, -jnp.inf))
        return jnp.einsum("bhts,bshd->bthd", w, value, precision="highest")

    @jax.jit
    def logits_of(head, embeds, parts):
        at = jnp.arange(count)[None]
        own = fused_features(head, parts)
        hidden = read_step(config, head, embeds, own, at, attend)
        return draft_logits(config, head, hidden)[0]

    embeds = jnp.asarray(arrays["table"])[tokens[:, 1:]]
    got = logits_of(head, embeds, parts)
    np.testing.assert_allclose(got, arrays["logits"][:count], rtol=1e-4, atol=1e-4)

    # Through the drafter: prompt, cache, map of the vocabulary, its own features.
    model = SimpleNamespace(
        config=TARGET, dtype=jnp.dtype("float32"), embed=lambda table, ids: table[ids]
    )
    target = Target(model, jnp.asarray(arrays["table"]), Sampling().sampler(1))
    drafter = EagleDrafter(config, head, len(arrays["drafts"]))
    lengths, cache = jnp.asarray([count + 1]), None
    # Features of the last token are not known yet.
    hidden = tuple(jnp.pad(x, [(0, 0), (0, 1), (0, 0)]) for x in parts)
    prompt = Prompt(jnp.asarray(tokens), lengths, hidden[0], hidden, cache)
    state = drafter.init(target, 1, 16)
    state = drafter.prefill(target, state, prompt)
    room = jnp.pad(jnp.asarray(tokens), [(0, 0), (0, 8)])
    context = Context(room, lengths, cache, jnp.ones(1, bool))
    draft, _ = drafter.draft(target, state, context)
    assert draft.tokens[0].tolist() == arrays["drafts"].tolist()


def test_files_come_back_bit_for_bit(folder, tmp_path):
    first = load_file(folder / "model.safetensors")
    config, head = load_eagle(folder, TARGET)
    save_eagle(tmp_path / "again", config, head, dtype=jnp.float32)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert set(again) == set(first)
    for name, want in first.items():
        assert again[name].dtype == want.dtype, name
        np.testing.assert_array_equal(again[name], want)
    data = json.loads((tmp_path / "again" / "config.json").read_text())
    given = json.loads(str(golden()["config"]))
    assert {k: data[k] for k in given} == given
    # bfloat16 is written once and then stays.
    save_eagle(tmp_path / "b", config, head)
    save_eagle(tmp_path / "c", *load_eagle(tmp_path / "b", TARGET))
    names = "config.json", "model.safetensors"
    for name in names:
        assert (tmp_path / "b" / name).read_bytes() == (
            tmp_path / "c" / name
        ).read_bytes()


def test_outputs_for_spec_exit_are_rows_of_fc(tmp_path):
    config = EagleConfig.of(TARGET)
    head = init_eagle(config, jax.random.key(0), exit=True)
    kernel = jax.random.normal(jax.random.key(1), (48, 3))
    head["exit"] = {"kernel": kernel}
    scales = np.linspace(0.5, 2, 48, dtype=np.float32)
    save_eagle(tmp_path, config, head, scales=scales, dtype=jnp.float32)
    weight = load_file(tmp_path / "model.safetensors")["fc.weight"]
    assert weight.shape == (16 + 3, 48)
    wide = np.concatenate([head["fc"]["kernel"], kernel], axis=1)
    np.testing.assert_array_equal(weight, (scales[:, None] * wide).T)
    _, loaded = load_eagle(tmp_path, TARGET)
    np.testing.assert_array_equal(loaded["exit"]["kernel"], weight[16:].T)
    np.testing.assert_array_equal(loaded["fc"]["kernel"], weight[:16].T)
