"""Writes tests/models/golden/whisper/tiny.npz with PyTorch `transformers`.

Needs an environment of its own (Python 3.11, no JAX):

    pip install torch==2.13.0 transformers
    python tests/models/make_whisper_goldens.py

A tiny random Whisper that reads one second: its configuration, its weights (values that
float16 holds exactly), two clips, and what transformers makes of them: the log-mel
spectrograms, encoder outputs, the attention of the last encoder layer, logits of two
texts on all and on some encoder tokens, and the texts of greedy and beam search.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

GOLDEN = Path(__file__).parent / "golden" / "whisper"
VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_layers": 3,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 40,
    "num_mel_bins": 80,
    "max_source_positions": 50,
    "max_target_positions": 24,
    "decoder_start_token_id": 57,
    "bos_token_id": 56,
    "eos_token_id": 56,
    "pad_token_id": 56,
}
GENERATION = {
    "decoder_start_token_id": 57,
    "bos_token_id": 56,
    "eos_token_id": 56,
    "pad_token_id": 56,
    "no_timestamps_token_id": 62,
    "suppress_tokens": [3, 5, 40, 57],
    "begin_suppress_tokens": [8, 9, 56],
    "forced_decoder_ids": None,
    "is_multilingual": False,
    "return_timestamps": False,
    "max_length": 24,
}
BEAMS = ((2, 1.0), (3, 1.0), (4, 0.0), (3, 2.0), (5, -1.0))  # beams, length penalty
END = np.float16(1.2)  # how much the end of a text is favoured
KEPT = [0, 1, 4, 9, 10, 11, 17, 22, 30, 31, 49]


def clips(rng):
    """Two sounds with a rising pitch, noise and silence; 16-bit values."""
    out = []
    for samples, pitch in ((16000, 180.0), (8731, 410.0)):
        t = np.arange(samples) / 16000
        tone = sum(
            np.sin(2 * np.pi * h * (pitch * t + 90 * t**2)) / h for h in (1, 2, 3, 7)
        )
        loud = np.clip(np.sin(9 * t), 0, None)
        x = 0.2 * tone * loud + 0.003 * rng.normal(size=samples)
        out.append(np.round(x * 32767).astype(np.int16))
    return out


def weights(model, rng):
    """Random values that float16 holds, large enough for decided predictions."""
    state = {}
    for key, value in model.state_dict().items():
        if key == "proj_out.weight":
            continue
        if key == "model.encoder.embed_positions.weight":
            state[key] = value.numpy().astype(np.float16)
            continue
        scale = 0.3 if "decoder" in key else 0.15
        # The head is the embedding: large rows would repeat the token just read.
        scale = {"embed_tokens": 0.25, "embed_positions": 1.0}.get(
            key.split(".")[-2], scale
        )
        base = 1.0 if "norm.weight" in key else 0.0
        state[key] = (base + rng.normal(size=value.shape) * scale).astype(np.float16)
    # Texts that end, at different places.
    end = state["model.decoder.embed_tokens.weight"][SIZES["eos_token_id"]]
    state["model.decoder.layer_norm.bias"] += END * end
    return state


def main():
    """Writes the file."""
    rng = np.random.default_rng(17)
    config = transformers.WhisperConfig(**SIZES)
    config._attn_implementation = "eager"
    model = transformers.WhisperForConditionalGeneration(config).float().eval()
    state = weights(model, rng)
    model.load_state_dict(
        {k: torch.tensor(v.astype(np.float32)) for k, v in state.items()}, strict=False
    )
    model.tie_weights()
    model.generation_config = transformers.GenerationConfig(**GENERATION)

    sounds = clips(rng)
    audio = [x.astype(np.float32) / 32768 for x in sounds]
    mel = {}
    for bands in (80, 128):
        extract = transformers.WhisperFeatureExtractor(feature_size=bands)
        mel[bands] = extract(
            audio, sampling_rate=16000, max_length=16000, return_tensors="np"
        ).input_features
    # A second filled up to thirty, as the real models read it.
    whole = extract(audio[:1], sampling_rate=16000, return_tensors="np").input_features

    features = torch.tensor(mel[80])
    encoded = model.model.encoder(
        features, output_hidden_states=True, output_attentions=True
    )
    tokens = rng.integers(0, 56, (2, 9))
    tokens[:, :2] = (57, 62)
    ids = torch.tensor(tokens)

    def logits(states):
        return model(encoder_outputs=(states,), decoder_input_ids=ids).logits.numpy()

    final = encoded.last_hidden_state
    out = {
        "config": json.dumps({**config.to_dict(), "dtype": None}),
        "generation": json.dumps(GENERATION),
        "audio0": sounds[0],
        "audio1": sounds[1],
        "mel80": mel[80],
        "mel128": mel[128].astype(np.float32)[:, ::16],
        "mel_whole": whole[0][::9, ::7],
        "layer0": encoded.hidden_states[1].numpy(),
        "encoded": final.numpy(),
        "attention": encoded.attentions[-1][:1].numpy().astype(np.float16),
        "tokens": tokens.astype(np.int32),
        "logits": logits(final),
        "kept": np.array(KEPT, np.int32),
        "logits_kept": logits(final[:, KEPT]),
        "beams": np.array(BEAMS),
    }
    text = model.generate(features, return_timestamps=False)
    out["greedy"] = text.numpy().astype(np.int32)
    for i, (beams, penalty) in enumerate(BEAMS):
        text = model.generate(
            features,
            num_beams=beams,
            length_penalty=penalty,
            early_stopping=False,
            return_timestamps=False,
        )
        out[f"beam{i}"] = text.numpy().astype(np.int32)
    GOLDEN.mkdir(exist_ok=True)
    np.savez_compressed(
        GOLDEN / "tiny.npz", **out, **{f"w:{k}": v for k, v in state.items()}
    )
    for key in ("greedy", *(f"beam{i}" for i in range(len(BEAMS)))):
        print(key, out[key].tolist())


if __name__ == "__main__":
    with torch.no_grad():
        main()
