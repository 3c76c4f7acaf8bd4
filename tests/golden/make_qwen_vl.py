"""Writes tests/golden/qwen_vl/*.npz with PyTorch `transformers`, the reference.

Needs an environment of its own (Python 3.11, no JAX):

    pip install torch==2.13.0 transformers==5.24.0 pillow
    python tests/golden/make_qwen_vl.py

Each family gets a tiny random model: its configuration and weights (values that float16
holds exactly). Row 0 of the prompt has two images of different grids and a video, row 1
an image and padding on the left. Stored are the tokens of the vision tower, positions,
logits and a greedy continuation; then the same of row 0 with vision tokens taken out,
once at the positions they had and once counted anew. `patches.npz` holds what the image
processor makes of two images.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
)

GOLDEN = Path(__file__).parent / "qwen_vl"
IMAGE, VIDEO, START, END = 60, 61, 58, 59
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
VISION = {
    "depth": 3,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}
FAMILIES = {
    "qwen2_5_vl": {
        "text_config": {
            **TEXT,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 2, 2],
            },
        },
        "vision_config": {
            **VISION,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        "tie_word_embeddings": False,
    },
    "qwen3_vl": {
        "text_config": {
            **TEXT,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            **VISION,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 2],
        },
        "tie_word_embeddings": True,
    },
}
IMAGES = [(1, 6, 10), (1, 4, 4), (1, 4, 8)]
VIDEO_GRID = (2, 4, 6)
SECONDS = 0.75


def prompt(kind):
    """int `[2, T]` tokens and their mask."""
    first = [3, 4, START, *[IMAGE] * 15, END, 5, START, *[IMAGE] * 4, END, 6, 7]
    if kind == "qwen2_5_vl":
        first += [START, *[VIDEO] * 12, END, 8, 9, 10]
    else:  # text tells the time of each frame
        first += [11, START, *[VIDEO] * 6, END, 12, START, *[VIDEO] * 6, END, 8, 9, 10]
    second = [13, START, *[IMAGE] * 8, END, 14, 15]
    pad = len(first) - len(second)
    mask = [[1] * len(first), [0] * pad + [1] * len(second)]
    return np.array([first, [0] * pad + second]), np.array(mask)


def patches_of(grids, rng):
    total = sum(t * h * w for t, h, w in grids)
    return rng.normal(size=(total, 96)).astype(np.float16)


def weights(model, rng):
    state = {}
    for key, value in model.state_dict().items():
        noise = rng.normal(size=value.shape) * 0.2
        norm = "norm" in key or "ln_q" in key
        base = 1.0 if norm and key.endswith("weight") else 0.0
        state[key] = (base + noise).astype(np.float16)
    return state


def family(kind):
    rng = np.random.default_rng(len(kind))
    config = transformers.AutoConfig.for_model(
        kind,
        **FAMILIES[kind],
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    model = transformers.AutoModelForImageTextToText.from_config(
        config, attn_implementation="eager"
    )
    model = model.float().eval()
    state = weights(model, rng)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    model.load_state_dict(
        {k: torch.tensor(v.astype(np.float32)) for k, v in state.items()}
    )
    model.tie_weights()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    tokens, mask = prompt(kind)
    pixels, video_pixels = patches_of(IMAGES, rng), patches_of([VIDEO_GRID], rng)
    ids = torch.tensor(tokens)
    types = torch.zeros_like(ids)
    types[ids == IMAGE], types[ids == VIDEO] = 1, 2
    seen = {
        "attention_mask": torch.tensor(mask),
        "mm_token_type_ids": types.int(),
        "pixel_values": torch.tensor(pixels.astype(np.float32)),
        "image_grid_thw": torch.tensor(IMAGES),
        "pixel_values_videos": torch.tensor(video_pixels.astype(np.float32)),
        "video_grid_thw": torch.tensor([VIDEO_GRID]),
    }
    if kind == "qwen2_5_vl":
        seen["second_per_grid_ts"] = torch.tensor([SECONDS])
    inner = model.model
    grids = {k: seen[k] for k in seen if k.endswith("grid_thw")}
    positions, _ = inner.get_rope_index(
        ids,
        seen["mm_token_type_ids"],
        attention_mask=seen["attention_mask"],
        second_per_grid_ts=seen.get("second_per_grid_ts"),
        **grids,
    )
    images = inner.get_image_features(
        seen["pixel_values"], seen["image_grid_thw"], return_dict=True
    )
    videos = inner.get_video_features(
        seen["pixel_values_videos"], seen["video_grid_thw"], return_dict=True
    )
    out = {
        "images": torch.cat(images.pooler_output),
        "videos": torch.cat(videos.pooler_output),
        "positions": positions.int(),
        "logits": model(ids, **seen).logits,
    }
    for name, found in (("images", images), ("videos", videos)):
        for i, plane in enumerate(getattr(found, "deepstack_features", None) or ()):
            out[f"{name}_plane{i}"] = torch.cat(plane)
    inner.rope_deltas = None
    made = model.generate(ids, **seen, max_new_tokens=5, do_sample=False)
    out["greedy"] = made[:, ids.shape[1] :].int()
    out |= pruned(model, ids, positions, out, rng)
    np.savez_compressed(
        GOLDEN / f"{kind}.npz",
        config=json.dumps({**config.to_dict(), "dtype": None}, default=str),
        tokens=tokens.astype(np.int32),
        mask=mask.astype(bool),
        grids=np.array(IMAGES),
        video_grids=np.array([VIDEO_GRID]),
        seconds=np.array([SECONDS]),
        pixels=pixels,
        video_pixels=video_pixels,
        **{k: v.numpy() for k, v in out.items()},
        **{f"w:{k}": v for k, v in state.items()},
    )


def pruned(model, ids, positions, found, rng):
    """Row 0 with some of its vision tokens, by gathering what the decoder is given."""
    ids, positions = ids[:1], positions[:, :1]
    is_image, is_video = ids[0] == IMAGE, ids[0] == VIDEO
    embeds = model.get_input_embeddings()(ids)[0].clone()
    count = int(is_image.sum())
    embeds[is_image], embeds[is_video] = found["images"][:count], found["videos"]
    planes = []
    while f"images_plane{len(planes)}" in found:
        plane = torch.zeros_like(embeds)
        plane[is_image] = found[f"images_plane{len(planes)}"][:count]
        plane[is_video] = found[f"videos_plane{len(planes)}"]
        planes.append(plane)
    vision = is_image | is_video
    keep = ~vision | torch.tensor(rng.random(len(vision)) < 0.4)
    where = torch.nonzero(keep)[:, 0]
    kept = positions[:, :, where]
    anew = torch.arange(len(where)).expand(3, 1, -1)
    out = {"keep": keep}
    ends = {"keep": int(positions.max()) + 1, "compact": len(where)}
    for name, at in (("keep", kept), ("compact", anew)):
        x, visual = embeds[where], vision[where]
        local = [plane[where] for plane in planes]
        made = []
        for step in range(5):
            extra = {}
            if planes:
                extra["visual_pos_masks"] = visual[None]
                extra["deepstack_visual_embeds"] = [p[visual] for p in local]
            hidden = model.model.language_model(
                inputs_embeds=x[None], position_ids=at, use_cache=False, **extra
            ).last_hidden_state
            logits = model.lm_head(hidden)
            if step == 0:
                out[f"{name}_logits"] = logits
            token = logits[0, -1].argmax()
            made.append(int(token))
            x = torch.cat([x, model.get_input_embeddings()(token)[None]])
            visual = torch.cat([visual, torch.tensor([False])])
            local = [torch.cat([p, torch.zeros_like(p[:1])]) for p in local]
            next_at = torch.full((3, 1, 1), ends[name] + step)
            at = torch.cat([at, next_at], dim=-1)
        out[f"{name}_greedy"] = torch.tensor(made, dtype=torch.int32)
    return out


def patches():
    """An image that stays, and one that is resized in both directions."""
    rng = np.random.default_rng(5)
    rows, columns = np.mgrid[:50, :90] / 9.0
    smooth = np.stack([np.sin(rows + i) * np.cos(columns - i) for i in range(3)], -1)
    out = {"exact": rng.integers(0, 256, (28, 56, 3), np.uint8)}
    out["resized"] = np.uint8(127 + 90 * smooth + rng.integers(-30, 30, smooth.shape))
    sizes = {"exact": (784, 10**6), "resized": (784, 2500)}
    for name, (least, most) in sizes.items():
        processor = Qwen2VLImageProcessorPil(
            size={"shortest_edge": least, "longest_edge": most}
        )
        made = processor(images=[out[name]], return_tensors="np")
        out[f"{name}_patches"] = made["pixel_values"].astype(np.float32)
        out[f"{name}_grid"] = made["image_grid_thw"]
    np.savez_compressed(GOLDEN / "patches.npz", **out)


if __name__ == "__main__":
    torch.manual_seed(0)
    GOLDEN.mkdir(exist_ok=True)
    with torch.no_grad():
        for kind in FAMILIES:
            family(kind)
    patches()
