"""Writes tests/models/golden_audio/qwen2_audio.npz with PyTorch `transformers`.

Needs an environment of its own (Python 3.11, no JAX):

    pip install torch==2.13.0 transformers==5.24.0
    python tests/models/make_golden_audio.py

A tiny random Qwen2-Audio: its configuration, its weights (values that float16 holds
exactly), and for two clips, one of them shorter, the encoder's output, the last layer's
attention, the projected tokens and the logits of two prompts padded on the left.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

GOLDEN = Path(__file__).parent / "golden_audio"
AUDIO, PAD = 9, 0  # token ids
CONFIG = {
    "audio_token_index": AUDIO,
    "audio_config": {
        "model_type": "qwen2_audio_encoder",
        "d_model": 16,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "num_mel_bins": 8,
        "max_source_positions": 20,
    },
    "text_config": {
        "model_type": "qwen2",
        "vocab_size": 32,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
    },
}


def main():
    """Writes the file."""
    config = transformers.Qwen2AudioConfig(**CONFIG)
    model = transformers.Qwen2AudioForConditionalGeneration(config).float().eval()
    model.set_attn_implementation("eager")
    rng = np.random.default_rng(0)
    state = {}
    for key, value in model.state_dict().items():
        noise = rng.normal(size=value.shape) * 0.3
        base = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        state[key] = (base + noise).astype(np.float16)
    model.load_state_dict(
        {k: torch.tensor(v.astype(np.float32)) for k, v in state.items()}
    )
    mel = rng.normal(size=(2, 8, 40)).astype(np.float32)
    lengths = np.array([40, 27], np.int32)  # 10 and 7 tokens
    ids = rng.integers(10, 32, (2, 15)).astype(np.int32)
    ids[0, 2:12] = ids[1, 5:12] = AUDIO
    mask = np.ones_like(ids)
    mask[1, :3], ids[1, :3] = 0, PAD
    seen = (np.arange(40) < lengths[:, None]).astype(np.int64)
    caught = {}

    def catch(name, part):
        def hook(module, args, out):
            caught[name] = part(out).numpy()

        return hook

    inner = model.model
    last = inner.audio_tower.layers[-1].self_attn
    last.register_forward_hook(catch("attention", lambda out: out[1]))
    inner.audio_tower.register_forward_hook(
        catch("encoded", lambda out: out.last_hidden_state)
    )
    inner.multi_modal_projector.register_forward_hook(catch("tokens", lambda x: x))
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            input_features=torch.tensor(mel),
            feature_attention_mask=torch.tensor(seen),
            position_ids=torch.tensor(np.maximum(mask.cumsum(1) - 1, 0)),
        )
    GOLDEN.mkdir(exist_ok=True)
    np.savez_compressed(
        GOLDEN / "qwen2_audio.npz",
        config=json.dumps({"model_type": "qwen2_audio", **CONFIG}),
        mel=mel,
        lengths=lengths,
        ids=ids,
        mask=mask.astype(bool),
        logits=out.logits.numpy(),
        **caught,
        **{f"w:{k}": v for k, v in state.items()},
    )


if __name__ == "__main__":
    main()
