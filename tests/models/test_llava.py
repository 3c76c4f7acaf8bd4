"""CLIP, SigLIP and LLaVA against PyTorch `transformers` (golden files)."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from angeljax.models import (
    LlavaConfig,
    ModelError,
    VisionTowerConfig,
    load_llava,
    load_vision_tower,
)
from angeljax.recipe import TokensOptions
from angeljax.tokens import fastv, hiprune, visionzip
from tests.models._files import GOLDEN

TOLERANCE = 2e-5


def golden(name):
    with np.load(GOLDEN / "vision" / f"{name}.npz") as data:
        return {k: data[k] for k in data.files}


def write(folder, arrays, rename=str):
    folder.mkdir()
    (folder / "config.json").write_text(str(arrays["config"]))
    weights = {k[2:]: v for k, v in arrays.items() if k.startswith("w:")}
    save_file(
        {rename(k): v.astype(np.float32) for k, v in weights.items()},
        folder / "model.safetensors",
    )
    return folder


def older(name):
    """Names of LLaVA's tensors in checkpoints from before version 5."""
    name = name.removeprefix("model.")
    for new, old in (
        ("vision_tower.", "vision_tower.vision_model."),
        ("language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def close(got, want):
    assert np.abs(np.asarray(got) - want).max() < TOLERANCE * np.abs(want).max()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    @functools.cache
    def load(name, rename=str):
        folder = tmp_path_factory.mktemp("models") / name
        return load_llava(write(folder, golden(name), rename), dtype=jnp.float32)

    return load


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_towers(tmp_path, name):
    want = golden(name)
    rename = "vision_model.{}".format if name == "siglip" else str
    tower = load_vision_tower(write(tmp_path / name, want, rename))
    first = tower.config.class_token
    pixels = jnp.asarray(want["pixels"])
    layers = (-2, -1, 0)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda x: [tower(x, layer=i, attention=(0,) if i else ())
                                 for i in layers])  # fmt: skip
        found = run(pixels)
        for i, features in zip(layers, found, strict=True):
            close(features.patches, want["hidden"][i][:, first:])
            if first:
                close(features.class_token, want["hidden"][i][:, 0])
        whole = found[1].patches
        if first:
            whole = jnp.concatenate([found[1].class_token[:, None], whole], axis=1)
        else:
            whole = tower.post_norm(whole)
        close(whole, want["last"])
    # The class token's attention to patches alone, and what every patch receives.
    weights = want["attentions"][0]
    if first:
        weights = weights[:, :, 0, 1:]
        weights = weights / weights.sum(-1, keepdims=True)
        attn = weights.mean(1)
    else:
        attn = weights.mean(1).sum(1)
    np.testing.assert_allclose(found[0].attn[0], attn, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "rename"),
    [("llava_clip", str), ("llava_clip", older), ("llava_siglip", str)],
)
def test_logits_and_greedy_continuation(loaded, name, rename):
    want = golden(name)
    x = loaded(name, rename)
    ids, pixels = jnp.asarray(want["ids"]), jnp.asarray(want["pixels"])
    mask = jnp.asarray(want["mask"])
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(x.model.logits)(x.params, ids, pixels, mask)
        real = want["mask"]
        close(np.asarray(logits)[real], want["logits"][real])
        images = x.model.encode_images(x.params, pixels)
        close(images.embeds, want["features"])
        if rename is older:
            return
        out = x.model.generate(
            x.params, ids, pixels, mask, max_new_tokens=6, eos_ids=()
        )
        np.testing.assert_array_equal(out.tokens, want["greedy"])


def test_keeping_all_tokens_changes_nothing(loaded):
    want = golden("llava_clip")
    x = loaded("llava_clip")
    given = [jnp.asarray(want[k]) for k in ("ids", "pixels", "mask")]
    run = functools.partial(x.model.generate, x.params, *given, eos_ids=())
    with jax.default_matmul_precision("highest"):
        for options in (
            {"prune": functools.partial(hiprune, keep=1.0)},
            {"prune": functools.partial(fastv, keep=9), "layer": 1},
        ):
            out = run(max_new_tokens=6, **options)
            np.testing.assert_array_equal(out.tokens, want["greedy"])
    with pytest.raises(ValueError, match="layer=1 needs a prune function"):
        run(max_new_tokens=1, layer=1)


def test_two_images_and_what_methods_are_given(loaded):
    """Row 0 has two images, row 1 one; both keep a third of each."""
    x = loaded("llava_clip")
    rng = np.random.default_rng(0)
    pixels = jnp.asarray(rng.normal(size=(2, 2, 3, 13, 13)), jnp.float32)
    ids = rng.integers(3, 40, (2, 22))
    ids[0, 1:10] = ids[0, 11:20] = ids[1, 10:19] = 46
    mask = np.ones((2, 22), bool)
    mask[1, :9] = False
    told = {}

    def note(embeds, **signals):
        told.update(signals, embeds=embeds)
        return visionzip(
            embeds, keep=1 / 3, quota="per_group",
            **{k: signals[k] for k in ("mask", "attn", "keys", "groups")},
        )  # fmt: skip

    @jax.jit
    def run(params, ids, pixels, mask):
        out = x.model.pruned_prompt(params, ids, pixels, mask, prune=note)
        arrays = {k: v for k, v in told.items() if k != "groups"}
        return out, arrays, x.model.prompt(params, ids, pixels).prompt.embeds

    out, given, whole = run(x.params, jnp.asarray(ids), pixels, jnp.asarray(mask))
    # Attention and keys belong to the image that stands there.
    tower = x.model.encode_images(x.params, pixels[:, 1], attention=True)
    np.testing.assert_allclose(given["attn"][0, 9:], tower.attn[0], rtol=1e-5)
    np.testing.assert_allclose(given["keys"][0, 9:], tower.keys[0], rtol=1e-4)
    np.testing.assert_allclose(given["embeds"][:, 9:], tower.embeds, atol=1e-4)
    assert given["mask"].tolist() == [[True] * 18, [True] * 9 + [False] * 9]
    assert told["groups"].tolist() == [[0] * 9 + [1] * 9] * 2
    text = np.asarray(given["text"])
    assert (text[0] != 0).any(-1).tolist() == [i not in (*range(1, 10), *range(11, 20))
                                               for i in range(22)]  # fmt: skip
    assert (text[1] != 0).any(-1).tolist() == [i > 18 or i == 9 for i in range(22)]
    # Three tokens of each image stay; merged rows stand where they stood.
    assert out.prompt.tokens[0].tolist() == [
        ids[0, 0], 46, 46, 46, ids[0, 10], 46, 46, 46, ids[0, 20], ids[0, 21],
    ]  # fmt: skip
    assert out.lengths.tolist() == [10, 7] and out.overflow.tolist() == [0, 0]
    assert out.prompt.tokens[1, 3:].tolist() == [ids[1, 9], 46, 46, 46, *ids[1, 19:]]
    kept = np.asarray(out.prompt.embeds[0])
    at = np.asarray(out.slots[0])
    merged = np.abs(kept - np.asarray(whole)[0, at]).max(-1) > 1e-4
    assert merged.sum() == 2 and set(np.flatnonzero(merged)) <= {1, 2, 3, 5, 6, 7}


def test_configurations(tmp_path):
    # Of LLaVA-1.5's own file much is left to the defaults of the families.
    config = LlavaConfig.from_hf(
        {
            "model_type": "llava",
            "image_token_index": 32000,
            "text_config": {"model_type": "llama", "vocab_size": 32064,
                            "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
            "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024,
                              "image_size": 336, "intermediate_size": 4096,
                              "num_attention_heads": 16, "num_hidden_layers": 24,
                              "patch_size": 14, "projection_dim": 768},
        }
    )  # fmt: skip
    assert (config.num_image_tokens, config.vision_layers) == (576, 23)
    assert config.text.intermediate_size == 11008 and config.text.eos_ids == (2,)
    assert config.vision.activation == "quick_gelu"
    base = json.loads(str(golden("llava_clip")["config"]))
    for change, message in (
        ({"vision_feature_layer": [-2, -5]}, "vision_feature_layer must be one number"),
        ({"vision_feature_layer": 7}, "vision_feature_layer: layer=7"),
        ({"vision_feature_select_strategy": "cls"}, "use default or full"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act 'relu'"),
        ({"vision_config": {"model_type": "pixtral"}}, "vision model_type 'pixtral'"),
        ({"model_type": "llava_next"}, "model_type 'llava_next' is not supported"),
    ):
        with pytest.raises(ModelError, match=message):
            LlavaConfig.from_hf({**base, **change})
    with pytest.raises(ModelError, match="does not divide hidden_size"):
        VisionTowerConfig.from_hf({**base["vision_config"], "num_attention_heads": 3})
    with pytest.raises(ModelError, match="no hub name"):
        load_llava("nothing/there/at/all")
    arrays = golden("llava_clip")
    arrays.pop("w:model.multi_modal_projector.linear_2.bias")
    with pytest.raises(ModelError, match="no tensor for projector/linear_2/bias"):
        load_llava(write(tmp_path / "cut", arrays))


def test_siglip_gives_received_attention(loaded):
    """SigLIP has no class token, and LLaVA reads all of its patches as "full"."""
    want = golden("llava_siglip")
    x = loaded("llava_siglip")
    given = [jnp.asarray(want[k]) for k in ("ids", "pixels", "mask")]
    fn = TokensOptions(method="vispruner", keep=4).prune_fn()
    run = jax.jit(functools.partial(x.model.pruned_prompt, prune=fn))
    short = run(x.params, *given)
    assert short.prompt.embeds.shape == (2, 16 - 5, 24)
    images = jax.jit(functools.partial(x.model.encode_images, attention=True))
    attn = images(x.params, given[1]).attn
    np.testing.assert_allclose(attn.sum(-1), 9, rtol=1e-5)  # one from each patch
    best = np.argsort(-np.asarray(attn), axis=1)[:, :2]
    first = np.argmax(want["ids"] == 46, axis=1)  # of each row's image
    kept = np.asarray(short.slots)
    for b in range(2):
        assert set(best[b] + first[b]) <= set(kept[b])


def test_layers_of_attention(loaded):
    x = loaded("llava_clip")  # two of three layers run
    pixels = jnp.asarray(golden("llava_clip")["pixels"])
    run = functools.partial(x.model.encode_images, x.params, attention=True)
    first = jax.jit(functools.partial(run, attn_layer=-3, object_layer=1))(pixels)
    usual = jax.jit(run)(pixels)
    np.testing.assert_allclose(first.object_attn, usual.attn, rtol=1e-5)
    np.testing.assert_allclose(first.attn, usual.object_attn, rtol=1e-5)
    with pytest.raises(ValueError, match="attention of layer -1: layers 0 to 1 of 3"):
        run(pixels, attn_layer=-1)
    fn = TokensOptions(method="fastv", keep=2, attn_layer=-1).prune_fn()
    with pytest.raises(ValueError, match="attention of layer -1"):
        x.model.pruned_prompt(x.params, jnp.zeros((2, 12), int), pixels, prune=fn)


def test_wrong_pixels(loaded):
    x = loaded("llava_clip")
    with pytest.raises(ValueError, match=r"pixels must be \[B, 3, 13, 13\]"):
        x.model.encode_images(x.params, jnp.zeros((1, 3, 14, 14)))
    with pytest.raises(ValueError, match=r"pixels must be \[B, 3, H, W\] or"):
        x.model.encode_images(x.params, jnp.zeros((3, 13, 13)))
    config = dataclasses.replace(x.model.config, select="full")
    full = dataclasses.replace(x.model, config=config)
    with pytest.raises(ValueError, match='needs select="default"'):
        full.encode_images(x.params, jnp.zeros((1, 3, 13, 13)), attention=True)
