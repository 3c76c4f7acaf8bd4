"""Qwen2-Audio against PyTorch `transformers` (a golden file), and shorter prompts."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import angeljax as aj
from angeljax.models import (
    ModelError,
    Qwen2AudioConfig,
    audio_lengths,
    generate,
    load_qwen2_audio,
)
from angeljax.tokens import apply_selection, pool_attention, samp
from tests.tokens import _audio_oracles as oracle

FILE = Path(__file__).parent / "golden_audio" / "qwen2_audio.npz"
TOLERANCE = 2e-5  # of the largest value


def close(got, want, tolerance=TOLERANCE):
    got, want = np.asarray(got), np.asarray(want)
    assert np.abs(got - want).max() < tolerance * np.abs(want).max()


def write(folder, golden, *, rename=lambda name: name, **changes):
    """A Hugging Face folder with the golden weights."""
    weights = {
        rename(k[2:]): v.astype(np.float32)
        for k, v in golden.items()
        if k.startswith("w:")
    }
    folder.mkdir()
    config = {**json.loads(str(golden["config"])), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def golden():
    with np.load(FILE) as data:
        return {k: data[k] for k in data.files}


@pytest.fixture(scope="module")
def loaded(golden, tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("audio") / "model", golden)
    return load_qwen2_audio(folder, dtype=jnp.float32)


@pytest.fixture(scope="module")
def audio(loaded, golden):
    """Compiled once: encoder, projector and the last layer's attention."""

    @jax.jit
    def run(params, mel, lengths):
        with jax.default_matmul_precision("highest"):
            return loaded.model.encode(params, mel, lengths=lengths, relevance="mean")

    return functools.partial(run, loaded.params)(golden["mel"], golden["lengths"])


@pytest.fixture(scope="module")
def logits(loaded):
    @jax.jit
    def run(embeds, mask):
        with jax.default_matmul_precision("highest"):
            return loaded.model.language_model.apply(
                loaded.params["language_model"], embeds=embeds, mask=mask
            )[0]

    return run


def test_tokens_and_lengths(golden, audio):
    assert audio.mask.sum(1).tolist() == [10, 7]
    for b, n in enumerate((10, 7)):
        close(audio.embeds[b, :n], golden["tokens"][b, :n])


def test_attention_of_the_last_layer(golden, audio):
    mask = np.asarray(audio.mask)
    want = pool_attention(golden["attention"], 2, mask=mask)
    for b, n in enumerate((10, 7)):
        received, itself = oracle.pool(golden["attention"][b], 2, n, "mean")
        # The odd last frame of the short clip is in no token; what it receives neither.
        close(want.received[b, :n], received[:n])
        close(audio.attention.received[b, :n], received[:n])
        close(audio.attention.diagonal[b, :n], itself[:n])


def test_logits_of_a_prompt_with_audio(golden, loaded, audio, logits):
    tokens, mask = jnp.asarray(golden["ids"]), golden["mask"]
    prompt = loaded.model.prompt(loaded.params, tokens, audio, mask=mask)
    got = np.asarray(logits(prompt.embeds, prompt.mask))
    close(got[mask], golden["logits"][mask])


def prune(model, params, tokens, mask, audio, keep):
    prompt = model.prompt(params, tokens, audio, mask=mask)
    chosen = samp(
        audio.embeds,
        keep=keep,
        attn=audio.attention,
        mask=audio.mask,
        threshold=0.85,
        least=2,
    )
    where = tokens == model.config.audio_token_id
    return chosen, apply_selection(
        chosen, prompt, where, position_policy="compact", padding_side="left"
    )


def test_pruning_nothing_changes_nothing(golden, loaded, audio, logits):
    tokens, mask = jnp.asarray(golden["ids"]), jnp.asarray(golden["mask"])
    _, short = prune(loaded.model, loaded.params, tokens, mask, audio, 1.0)
    assert short.dropped.tolist() == [0, 0]
    got = np.asarray(logits(short.prompt.embeds, short.prompt.mask))
    np.testing.assert_array_equal(short.prompt.mask, golden["mask"])
    close(got[golden["mask"]], golden["logits"][golden["mask"]])


def test_a_shorter_prompt_is_that_of_the_merged_tokens(golden, loaded, audio, logits):
    model, params = loaded.model, loaded.params
    tokens, mask = jnp.asarray(golden["ids"]), jnp.asarray(golden["mask"])
    chosen, short = jax.jit(prune, static_argnums=(0, 5))(
        model, params, tokens, mask, audio, 0.6
    )
    assert chosen.count.tolist() == [6, 4]
    assert short.lengths.tolist() == [15 - 4, 12 - 3]
    assert int(short.overflow.sum()) == 0
    got = np.asarray(logits(short.prompt.embeds, short.prompt.mask))
    # By hand: text before, merged tokens, text after, one after the other.
    holes = golden["ids"] == model.config.audio_token_id
    text = np.asarray(model.language_model.embed(params["language_model"], tokens))
    for b, n in enumerate((10, 7)):
        at = np.flatnonzero(holes[b])
        assert len(at) == n
        real = np.asarray(mask[b])
        before, after = text[b, : at[0]][real[: at[0]]], text[b, at[-1] + 1 :]
        merged = np.asarray(chosen.merged[b, : chosen.count[b]])
        whole = np.concatenate([before, merged, after])[None]
        width = short.prompt.embeds.shape[1]
        # Padding on the other side, so that one program serves.
        pad = width - whole.shape[1]
        whole = np.pad(whole, ((0, 0), (0, pad), (0, 0)))
        there = np.arange(width)[None] < width - pad
        twice = np.repeat(whole, 2, 0), np.repeat(there, 2, 0)
        close(
            got[b][short.prompt.mask[b]], np.asarray(logits(*twice))[0, : width - pad]
        )
    out = generate(
        model.language_model,
        params["language_model"],
        embeds=short.prompt.embeds,
        mask=short.prompt.mask,
        max_new_tokens=2,
        eos_ids=(),
    )
    np.testing.assert_array_equal(out.tokens[:, 0], got[:, -1].argmax(-1))


def test_a_compressed_tree_runs(loaded, golden, audio):
    recipe = aj.Recipe(rules=[aj.Rule(format="int8", match=".*layers/.*/kernel")])
    params = aj.compress(loaded.params, recipe)
    kernel = params["audio_tower"]["layers"][1]["self_attn"]["q_proj"]["kernel"]
    assert isinstance(kernel, aj.QTensor)
    got = loaded.model.encode(
        params, golden["mel"], lengths=golden["lengths"], relevance="mean"
    )
    close(got.embeds, audio.embeds, 0.05)
    close(got.attention.received, audio.attention.received, 0.05)


def test_both_layouts_of_names(golden, loaded, tmp_path):
    def old(name):  # as transformers 4 has it
        name = name.removeprefix("model.")
        if name.startswith("lm_head"):
            return f"language_model.{name}"
        return name.replace("language_model.", "language_model.model.", 1)

    other = load_qwen2_audio(
        write(tmp_path / "old", golden, rename=old), dtype=jnp.float32
    )
    jax.tree.map(np.testing.assert_array_equal, other.params, loaded.params)


def test_lengths_of_tokens():
    for frames in range(0, 3001, 7):
        first = (frames - 1) // 2 + 1
        assert audio_lengths(frames) == (first - 2) // 2 + 1
    assert audio_lengths(jnp.array([3000, 1])).tolist() == [750, 0]


def test_published_configuration_without_the_defaults():
    config = Qwen2AudioConfig.from_hf(
        {
            "model_type": "qwen2_audio",
            "audio_config": {"model_type": "qwen2_audio_encoder"},
            "text_config": {"intermediate_size": 11008, "vocab_size": 156032},
        }
    )
    assert (config.audio.hidden_size, config.audio.encoder_heads) == (1280, 20)
    assert (config.text.hidden_size, config.text.head_dim) == (4096, 128)
    assert config.text.attention_bias and not config.text.windows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2'"),
        ({"audio_config": {"d_model": 15}}, "encoder_attention_heads=20"),
        ({"audio_config": {"max_source_positions": 9}}, "max_source_positions=9"),
        ({"audio_config": {"activation_function": "relu"}}, "'relu'"),
        ({"audio_token_index": 10**6}, "audio_token_index 1000000"),
    ],
)
def test_refuses_configurations(golden, tmp_path, changes, message):
    with pytest.raises(ModelError, match=message):
        load_qwen2_audio(write(tmp_path / "bad", golden, **changes))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 9, 40), "8 bands"), ((2, 8, 38), "38 frames"), ((2, 8, 44), "44 frames")],
)
def test_refuses_spectrograms(loaded, shape, message):
    with pytest.raises(ValueError, match=message):
        loaded.model.encode(loaded.params, np.zeros(shape, np.float32))


def test_refuses_other_batches(loaded, audio):
    with pytest.raises(ValueError, match="tokens must be"):
        loaded.model.prompt(loaded.params, jnp.zeros((3, 4), jnp.int32), audio)
    with pytest.raises(ValueError, match="lengths must be"):
        loaded.model.encode(
            loaded.params, np.zeros((2, 8, 40)), lengths=np.zeros(3, np.int32)
        )
