"""Writes tests/models/golden/vision/*.npz with PyTorch `transformers`, the reference.

Needs an environment of its own (Python 3.11, no JAX):

    pip install torch==2.13.0 transformers accelerate
    python tests/models/make_vision_goldens.py

Tiny random models: their configuration, their weights (values that float16 holds
exactly), an input and what comes out, float32. LLaVA once with CLIP and once with
SigLIP; both towers also alone.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

GOLDEN = Path(__file__).parent / "golden" / "vision"
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 13,  # the last row and column of pixels are no whole patch
    "patch_size": 4,
}
TEXT = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "eos_token_id": 47,
}


def randomise(model, seed):
    """Weights that float16 holds; returns them by name."""
    rng, state = np.random.default_rng(seed), {}
    for key, value in model.state_dict().items():
        norm = "norm" in key and key.endswith("weight")
        noise = rng.normal(size=value.shape) * 0.25
        state[key] = (float(norm) + noise).astype(np.float16)
    model.load_state_dict(
        {k: torch.tensor(v.astype(np.float32)) for k, v in state.items()}
    )
    return state


def save(name, config, state, **arrays):
    """One file."""
    kept = {f"w:{k}": v for k, v in state.items() if not k.startswith("head.")}
    text = json.dumps({**config.to_dict(), "dtype": None})
    np.savez_compressed(GOLDEN / f"{name}.npz", config=text, **kept, **arrays)


def tower(name, kind, config):
    """A tower alone: all hidden states, and attention of two layers."""
    config._attn_implementation = "eager"
    model = kind(config).float().eval()
    state = randomise(model, len(name))
    pixels = np.random.default_rng(1).normal(size=(2, 3, 13, 13)).astype(np.float32)
    out = model(torch.tensor(pixels), output_hidden_states=True, output_attentions=True)
    save(
        name,
        config,
        state,
        pixels=pixels,
        last=out.last_hidden_state.numpy(),
        hidden=np.stack([h.numpy() for h in out.hidden_states]),
        attentions=np.stack([a.numpy() for a in out.attentions]),
    )


def llava(name, vision, **extra):
    """Logits and a greedy continuation of two prompts, one of them padded."""
    config = transformers.LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=dict(TEXT),
        image_token_id=46,
        **extra,
    )
    config._attn_implementation = "eager"
    model = transformers.LlavaForConditionalGeneration(config).float().eval()
    state = randomise(model, len(name))
    rng = np.random.default_rng(2)
    pixels = rng.normal(size=(2, 3, 13, 13)).astype(np.float32)
    ids = rng.integers(3, 40, (2, 16)).astype(np.int32)
    ids[0, 2:11] = ids[1, 4:13] = 46
    mask = np.ones((2, 16), bool)
    mask[1, :2] = False
    given = {
        "pixel_values": torch.tensor(pixels),
        "attention_mask": torch.tensor(mask.astype(np.int64)),
    }
    logits = model(input_ids=torch.tensor(ids).long(), **given, use_cache=False).logits
    out = model.generate(
        input_ids=torch.tensor(ids).long(),
        **given,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    features = model.get_image_features(pixel_values=torch.tensor(pixels))
    features = getattr(features, "pooler_output", features)
    save(
        name,
        config,
        state,
        pixels=pixels,
        ids=ids,
        mask=mask,
        logits=logits.numpy(),
        greedy=out[:, 16:].numpy().astype(np.int32),
        features=np.stack([f.numpy() for f in features]),
    )


def main():
    """Writes all files."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    clip = transformers.CLIPVisionConfig(**VISION)
    siglip = transformers.SiglipVisionConfig(**VISION)
    with torch.no_grad():
        tower("clip", transformers.CLIPVisionModel, clip)
        tower("siglip", transformers.SiglipVisionModel, siglip)
        llava("llava_clip", clip)
        llava(
            "llava_siglip",
            siglip,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            projector_hidden_act="gelu_pytorch_tanh",
        )


if __name__ == "__main__":
    main()
