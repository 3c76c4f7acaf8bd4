"""Qwen2.5-VL and Qwen3-VL against PyTorch; the files say what they hold."""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import angeljax as aj
from angeljax.models import ModelError, stack_layers
from angeljax.models.qwen_vl import (
    QwenVL,
    QwenVLConfig,
    VisionTokens,
    image_patches,
    load_qwen_vl,
    rope_index,
    smart_resize,
    video_patches,
)
from angeljax.tokens import Prompt, Selection, apply_selection

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen_vl"
KINDS = ["qwen2_5_vl", "qwen3_vl"]


@functools.cache
def golden(kind):
    with np.load(GOLDEN / f"{kind}.npz") as data:
        return {k: data[k] for k in data.files}


def write_folder(folder, kind, rename=lambda name: name, config=None):
    data = golden(kind)
    config = json.loads(str(data["config"])) if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        rename(k[2:]): v.astype(np.float32)
        for k, v in data.items()
        if k.startswith("w:")
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@functools.cache
def read(kind):
    """(model, params, golden arrays, prompt)."""
    with tempfile.TemporaryDirectory() as folder:
        got = load_qwen_vl(write_folder(Path(folder), kind), dtype=jnp.float32)
    data = golden(kind)
    prompt = got.model.prompt(
        got.params,
        data["tokens"],
        pixels=data["pixels"].astype(np.float32),
        grids=data["grids"],
        video_pixels=data["video_pixels"].astype(np.float32),
        video_grids=data["video_grids"],
        seconds_per_grid=data["seconds"],
        mask=data["mask"],
    )
    return got.model, got.params, data, prompt


@pytest.fixture(params=KINDS)
def case(request):
    return read(request.param)


@functools.cache
def compiled(model):
    return jax.jit(model.logits)


def close(got, want):
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


def row(prompt, mask=None):
    """Row 0 of a prompt, which has no padding."""
    return Prompt(
        embeds=prompt.embeds[:1],
        positions=prompt.positions[:, :1],
        tokens=prompt.tokens[:1],
        deepstack=tuple(plane[:1] for plane in prompt.deepstack),
        mask=mask,
    )


def test_vision_tokens(case):
    model, params, data, _ = case
    vision = jax.jit(model.vision, static_argnums=2)
    grids = tuple(map(tuple, data["grids"].tolist()))
    # The second image once more: images of one grid are read together.
    first, end = (int(np.prod(data["grids"][:i], -1).sum()) for i in (1, 2))
    twice = np.concatenate([data["pixels"], data["pixels"][first:end]])
    tokens = [slice(None), slice(first // 4, end // 4)]
    for name, pixels, of, rows in (
        ("images", twice, (*grids, grids[1]), tokens),
        ("videos", data["video_pixels"], ((2, 4, 6),), [slice(None)]),
    ):
        got = vision(params, jnp.float32(pixels), of)
        planes = [data[k] for k in sorted(data) if k.startswith(f"{name}_plane")]
        assert len(got.deepstack) == len(planes)
        wanted = [data[name], *planes]
        for plane, want in zip([got.embeds, *got.deepstack], wanted, strict=True):
            close(plane, np.concatenate([want[at] for at in rows]))


def test_positions_and_logits(case):
    model, params, data, prompt = case
    np.testing.assert_array_equal(prompt.positions, data["positions"])
    got = compiled(model)(params, prompt)
    close(got[data["mask"]], data["logits"][data["mask"]])


def test_generation(case):
    model, params, data, prompt = case
    got = model.generate(params, prompt, max_new_tokens=5)
    np.testing.assert_array_equal(got.tokens, data["greedy"])


def test_scanned_layers(case):
    model, params, data, prompt = case
    scanned = dataclasses.replace(model, scan_layers=True)
    params = {**params, "language": stack_layers(params["language"])}
    got = scanned.generate(params, prompt, max_new_tokens=5)
    np.testing.assert_array_equal(got.tokens, data["greedy"])


def select(model, prompt, keep):
    """The selection of a keep mask over the whole prompt, bool `[1, T]`."""
    where = model.is_vision(prompt.tokens)
    chosen = np.flatnonzero(np.asarray(keep)[np.asarray(where[0])])
    order = jnp.asarray(chosen[None], jnp.int32)
    return Selection.of(order, num_tokens=int(where.sum())), where


@pytest.mark.parametrize("policy", ["keep", "compact"])
def test_pruned_prompt(case, policy):
    """Against a PyTorch decoder that is given what is left."""
    model, params, data, prompt = case
    prompt = row(prompt)
    chosen, where = select(model, prompt, data["keep"])
    short = apply_selection(chosen, prompt, where, position_policy=policy)
    assert short.prompt.length == data["keep"].sum() < prompt.length
    close(compiled(model)(params, short), data[f"{policy}_logits"])
    got = model.generate(params, short, max_new_tokens=5)
    np.testing.assert_array_equal(got.tokens[0], data[f"{policy}_greedy"])


def test_keeping_all_changes_nothing(case):
    model, params, data, prompt = case
    prompt = row(prompt)
    chosen, where = select(model, prompt, np.ones(prompt.length, bool))
    short = apply_selection(chosen, prompt, where)
    close(compiled(model)(params, short), data["logits"][:1])


def test_pruning_what_is_masked_changes_nothing(case):
    """At a masked token nothing looks; without it the rest stands where it stood."""
    model, params, data, prompt = case
    keep = jnp.asarray(data["keep"])
    masked = row(prompt, mask=keep[None])
    want = compiled(model)(params, masked)[0][keep]
    chosen, where = select(model, masked, data["keep"])
    got = compiled(model)(params, apply_selection(chosen, row(prompt), where))
    close(got[0], want)


def test_a_compressed_model():
    """All products run from packed planes, those of the vision tower as well."""
    model, params, data, prompt = read("qwen3_vl")
    recipe = aj.Recipe(rules=[aj.Rule(format="int8")])
    packed = aj.compress(params, recipe)
    leaves = jax.tree.leaves(packed, is_leaf=lambda x: isinstance(x, aj.QTensor))
    assert sum(isinstance(leaf, aj.QTensor) for leaf in leaves) > 20
    pixels, grids = jnp.float32(data["pixels"]), tuple(map(tuple, data["grids"]))
    vision = jax.jit(model.vision, static_argnums=2)
    got = vision(packed, pixels, grids).embeds
    error = np.linalg.norm(got - data["images"]) / np.linalg.norm(data["images"])
    assert 0 < error < 0.05
    got = compiled(model)(packed, prompt)[data["mask"]]
    want = data["logits"][data["mask"]]
    assert 0 < np.linalg.norm(got - want) / np.linalg.norm(want) < 0.1


def config_of(kind):
    return QwenVLConfig.from_hf(json.loads(str(golden(kind)["config"])))


def test_text_after_a_long_video():
    """As published with transformers 5.2: huggingface/transformers, issue 45381."""
    config = config_of("qwen2_5_vl")
    tokens = [[3] * 15 + [config.video_token_id] * 16128 + [3] * 10]
    positions = rope_index(
        config, tokens, videos=[(84, 24, 32)], seconds_per_grid=[2.0]
    )
    video = positions[:, 0, 15 : 15 + 16128]
    np.testing.assert_array_equal(video.min(1), [15, 15, 15])
    np.testing.assert_array_equal(video.max(1), [347, 26, 30])
    np.testing.assert_array_equal(positions[:, 0, -10:], [np.arange(348, 358)] * 3)


def test_half_seconds_add_up():
    config = config_of("qwen2_5_vl")
    tokens = [[config.video_token_id] * 4]
    inputs = {"videos": [(4, 2, 2)], "seconds_per_grid": [0.75]}
    time = rope_index(config, tokens, **inputs)[0, 0]
    np.testing.assert_array_equal(time, [0, 1, 3, 4])  # 1.5 positions each


@pytest.mark.parametrize(
    "tokens, inputs, message",
    [
        ([1, 60], {}, "row 0: more image placeholders than grids"),
        ([60] * 3, {"images": [(1, 4, 4)]}, "row 0: 3 image placeholders for the 4"),
        ([60] * 4, {"images": [(1, 4, 4)] * 2}, "no placeholders for 1 image grids"),
        ([61] * 4, {"videos": [(1, 3, 4)]}, "videos must be .t, h, w. .* multiples of"),
        ([61], {"seconds_per_grid": [1]}, "seconds_per_grid has 1 entries for 0"),
        ([60], {"mask": [[True, True]]}, "mask has shape"),
    ],
)
def test_placeholders_that_do_not_fit(tokens, inputs, message):
    with pytest.raises(ValueError, match=message):
        rope_index(config_of("qwen2_5_vl"), [tokens], **inputs)


def test_inputs_that_do_not_fit():
    model = QwenVL(config_of("qwen3_vl"))
    params, tokens = model.abstract(), jnp.array([[60]])
    with pytest.raises(ValueError, match="pixels must be .4, 96. for the grids"):
        jax.eval_shape(
            lambda p: model.vision(p, jnp.ones((5, 96)), [(1, 2, 2)]), params
        )
    with pytest.raises(ValueError, match="pixels and grids of images go together"):
        model.prompt(params, tokens, grids=[(1, 2, 2)])
    with pytest.raises(ValueError, match="0 planes of DeepStack, the model 2"):
        images = VisionTokens(jnp.ones((1, 32)))
        jax.eval_shape(lambda p: model.merge(p, tokens, images=images), params)
    masked = Prompt(embeds=jnp.ones((1, 1, 32)), attention_mask=jnp.ones((1, 1, 1, 1)))
    with pytest.raises(ValueError, match="Prompt.attention_mask: a decoder is"):
        model.logits(params, masked)


def test_names_and_fields_of_older_checkpoints(tmp_path):
    """Of Qwen2.5-VL there are files with the fields of the decoder at the top."""
    data = golden("qwen2_5_vl")
    config = json.loads(str(data["config"]))
    text = config.pop("text_config")
    text["rope_scaling"] = {**text.pop("rope_parameters"), "type": "mrope"}
    text["rope_scaling"].pop("rope_type")
    text["rope_theta"] = text["rope_scaling"].pop("rope_theta")
    config = {**text, **config}

    def rename(name):
        name = name.replace("model.language_model.", "model.")
        return name.replace("model.visual.", "visual.")

    folder = write_folder(tmp_path, "qwen2_5_vl", rename, config)
    got = load_qwen_vl(folder, dtype=jnp.float32, scan_layers=True)
    assert got.model.config == config_of("qwen2_5_vl")
    kernel = got.params["vision"]["patch_embed"]["kernel"]
    want = data["w:model.visual.patch_embed.proj.weight"]
    np.testing.assert_array_equal(kernel, want.reshape(24, -1).T)
    kernel = got.params["language"]["layers"]["attn"]["q_proj"]["kernel"][1]
    want = data["w:model.language_model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(kernel, want.T)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "qwen2_vl"}, "model_type 'qwen2_vl' is not supported"),
        ({"vision_config": None}, "has no object 'vision_config'"),
        ({"vision_config": {"depth": 1}}, "vision_config has no field 'hidden_size'"),
    ],
)
def test_configurations_that_are_refused(tmp_path, change, message):
    config = {**json.loads(str(golden("qwen2_5_vl")["config"])), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"config.json: .*{message}"):
        load_qwen_vl(tmp_path)


def patch_config(kind="qwen2_5_vl", patch=14):
    vision = config_of(kind).vision
    return dataclasses.replace(vision, patch_size=patch, window_size=0)


def test_patches_of_images():
    """Against the processor of transformers, which resizes with Pillow."""
    config = patch_config()
    with np.load(GOLDEN / "patches.npz") as data:
        got, grid = image_patches(config, data["exact"], min_pixels=784)
        assert grid == tuple(data["exact_grid"][0])
        np.testing.assert_allclose(got, data["exact_patches"], atol=1e-5)
        limits = {"min_pixels": 784, "max_pixels": 2500}
        got, grid = image_patches(config, data["resized"], **limits)
        assert grid == tuple(data["resized_grid"][0])
        step = 1 / 255 / 0.26  # one of the 256 values of a pixel
        error = np.abs(got - data["resized_patches"])
        assert error.max() < 1.1 * step and (error > step / 2).mean() < 0.01


def test_patches_of_videos():
    config = patch_config("qwen3_vl", 4)
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 16, 3), np.uint8)
    got, grid = video_patches(config, frames, size=(8, 16))
    assert grid == (2, 2, 4) and got.shape == (16, 96)
    # Patch 6 of a frame is the third of the token in columns 8 to 15: row 1, column 2.
    patch = got[8 + 6].reshape(3, 2, 4, 4)
    for t in range(2):  # the last frame is there twice
        want = frames[2, 4:8, 8:12] / 127.5 - 1
        np.testing.assert_allclose(patch[:, t], want.transpose(2, 0, 1), atol=1e-6)


@pytest.mark.parametrize(
    "height, width, limits, want",
    [
        (1080, 1920, (3136, 12845056), (1092, 1932)),
        (1080, 1920, (3136, 1003520), (728, 1316)),
        (20, 30, (3136, 12845056), (56, 84)),
        (70, 98, (3136, 12845056), (56, 112)),  # halves to even: 2.5 to 2, 3.5 to 4
    ],
)
def test_sizes(height, width, limits, want):
    """Values of `smart_resize` of transformers 5.24."""
    least, most = limits
    inputs = {"factor": 28, "min_pixels": least, "max_pixels": most}
    assert smart_resize(height, width, **inputs) == want


def test_images_that_are_refused():
    config = patch_config()
    with pytest.raises(ValueError, match="must be uint8 .H, W, 3., not float32"):
        image_patches(config, np.ones((8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="size=.28, 30. must be multiples of 28"):
        image_patches(config, np.ones((8, 8, 3), np.uint8), size=(28, 30))
    with pytest.raises(ValueError, match="at most 200 times the shorter"):
        image_patches(config, np.ones((1, 201, 3), np.uint8))


def test_pruning_on_the_way(case):
    """What a method is given, and that `generate` prunes as `prune` does."""
    model, params, data, _ = case
    grids = data["grids"].tolist()
    prompt = model.prompt(
        params,
        data["tokens"],
        pixels=jnp.float32(data["pixels"]),
        grids=grids,
        video_pixels=jnp.float32(data["video_pixels"]),
        video_grids=data["video_grids"],
        seconds_per_grid=data["seconds"],
        mask=data["mask"],
        attention=True,
    )
    seen = {}

    def loudest(embeds, *, mask, attn, keys, groups, text):
        given = {"mask": mask, "attn": attn, "keys": keys, "groups": groups}
        jax.debug.callback(lambda **values: seen.update(values), **given)
        assert text.shape == (*prompt.tokens.shape, 32)
        score = jnp.where(mask, attn, -1)
        order = jax.lax.top_k(score, 10)[1]
        count = jnp.sum(mask, -1, keepdims=True)
        return Selection.of(jnp.where(jnp.arange(10) < count, order, 31), 31)

    short = model.prune(prompt, loudest)
    jax.effects_barrier()
    images = [15, 4, 12] if len(prompt.deepstack) == 0 else [15, 4, 6, 6]
    want = np.repeat(np.arange(len(images)), images)
    np.testing.assert_array_equal(seen["groups"][0], want)
    np.testing.assert_array_equal(seen["mask"].sum(-1), [31, 8])
    # What all patches of a frame receive is as much as they give: 1 each.
    patches = np.multiply([15, 4, 12] if len(images) == 3 else images, 4)
    received = np.bincount(want, seen["attn"][0])
    np.testing.assert_allclose(received, patches, rtol=1e-5)
    assert seen["keys"].shape == (2, 31, 12)
    np.testing.assert_array_equal(short.dropped, [21, 0])
    got = model.generate(params, prompt, prune=loudest, max_new_tokens=2)
    again = model.generate(params, short, max_new_tokens=2)
    np.testing.assert_array_equal(got.tokens, again.tokens)


def test_pruning_behind_a_layer(case):
    """All tokens kept change nothing. What goes is tested in test_staged.py."""
    model, params, data, prompt = case
    seen = {}

    def all_of_them(hidden, *, mask, attn, groups):
        seen.update(attn=attn, groups=groups, mask=mask)
        # Those that are no tokens come last.
        return Selection.of(jnp.where(mask, jnp.arange(31), 31), 31)

    got = model.generate(params, prompt, prune=all_of_them, max_new_tokens=5, layer=1)
    np.testing.assert_array_equal(got.tokens, data["greedy"])
    assert seen["attn"].shape == seen["groups"].shape == (2, 31)
    with pytest.raises(ValueError, match="layer=1 needs a prune function"):
        model.generate(params, prompt, max_new_tokens=1, layer=1)
