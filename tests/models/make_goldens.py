"""Writes tests/models/golden/*.npz with PyTorch `transformers`, the reference.

Needs an environment of its own (Python 3.11, no JAX):

    pip install torch==2.13.0 transformers accelerate gguf
    python tests/models/make_goldens.py [--smollm2 FILE.gguf]

Each family gets a tiny random model: its configuration, its weights (values that
float16 holds exactly), the float32 logits of two sequences and a greedy continuation.
SmolLM2 is too large to store: there the file has token ids, logits at chosen places and
a greedy continuation of three prompts.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

GOLDEN = Path(__file__).parent / "golden"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": 63,
    "pad_token_id": 62,
    "bos_token_id": 61,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
MSCALE = {
    **YARN,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "truncate": False,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
FAMILIES = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama_linear": ("llama", {"rope_parameters": LINEAR}),
    "llama_yarn": ("llama", {"rope_parameters": YARN}),
    "smollm": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2_window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "llama_bias": (
        "llama",
        {"attention_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "llama_mscale": ("llama", {"rope_parameters": MSCALE, "hidden_act": "gelu"}),
    "qwen2_layers": (
        "qwen2",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3_window": (
        "qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
    ),
}
ROPES = (  # head_dim, max_position_embeddings, rope_parameters
    (64, 8192, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}),
    (
        128,
        131072,
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    (
        128,
        131072,
        {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    ),
    (
        64,
        16384,
        {**MSCALE, "factor": 32.0, "original_max_position_embeddings": 512},
    ),
    (
        64,
        16384,
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "attention_factor": 1.25,
            "original_max_position_embeddings": 1024,
        },
    ),
)
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n <= 1:\n        return n\n",
    "Count: 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 2026",
)


def greedy(model, ids, steps):
    """Greedy tokens, by full forward passes."""
    ids = torch.tensor(ids)
    for _ in range(steps):
        logits = model(ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[:, -steps:].numpy().astype(np.int32)


def tiny(name, kind, extra):
    """One family."""
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **extra})
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    rng = np.random.default_rng(len(name))
    state = {}
    for key, value in model.state_dict().items():
        noise = rng.normal(size=value.shape) * 0.2
        base = 1.0 if key.endswith("norm.weight") else 0.0
        state[key] = (base + noise).astype(np.float16)
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    model.load_state_dict(
        {k: torch.tensor(v.astype(np.float32)) for k, v in state.items()},
        strict=not config.tie_word_embeddings,
    )
    model.tie_weights()
    ids = rng.integers(0, 60, (2, 20)).astype(np.int32)
    logits = model(torch.tensor(ids), use_cache=False).logits.numpy()
    np.savez_compressed(
        GOLDEN / f"{name}.npz",
        config=json.dumps({**config.to_dict(), "dtype": None}),
        ids=ids,
        logits=logits,
        greedy=greedy(model, ids, 8),
        **{f"w:{k}": v for k, v in state.items()},
    )


def rope():
    """Frequencies and factors at the sizes of real models."""
    out = {"settings": json.dumps(ROPES)}
    for i, (head_dim, positions, parameters) in enumerate(ROPES):
        config = transformers.LlamaConfig(
            head_dim=head_dim,
            max_position_embeddings=positions,
            rope_parameters=dict(parameters),
        )
        compute = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
        frequencies, factor = compute(config, torch.device("cpu"))
        out[f"frequencies{i}"] = frequencies.numpy()
        out[f"factor{i}"] = np.float32(factor)
    np.savez_compressed(GOLDEN / "rope.npz", **out)


def smollm2(file):
    """The real model, its q and k matrices brought back from llama.cpp's order."""
    import gguf
    from tokenizers import Tokenizer

    reader = gguf.GGUFReader(file)
    meta = {k: f.contents() for k, f in reader.fields.items()}
    heads = meta["llama.attention.head_count"]
    kv_heads = meta["llama.attention.head_count_kv"]
    hidden, layers = meta["llama.embedding_length"], meta["llama.block_count"]
    head = hidden // heads
    config = transformers.LlamaConfig(
        vocab_size=len(meta["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-5,
        rope_theta=float(meta["llama.rope.freq_base"]),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(meta["llama.rope.freq_base"]),
        },
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).float().eval()
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
    }
    state = {}
    for t in reader.tensors:
        w = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
        *prefix, short, _ = t.name.split(".")
        n = {"attn_q": heads, "attn_k": kv_heads}.get(short)
        if n:  # row 2 i + s of a head there is row i + s head / 2 here
            out = np.empty_like(w)
            for h in range(n):
                for i in range(head // 2):
                    for s in range(2):
                        out[h * head + i + s * head // 2] = w[h * head + 2 * i + s]
            w = out
        path = f"model.layers.{prefix[1]}." if prefix else ""
        state[f"{path}{names[short]}.weight"] = torch.tensor(w)
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    # The vocabulary and merges of the file; digits are split first, as llama.cpp does
    # for the pre-tokenizer "smollm". Our tokenizer must give the same ids.
    vocab = {t: i for i, t in enumerate(meta["tokenizer.ggml.tokens"])}
    merges = [tuple(m.split(" ", 1)) for m in meta["tokenizer.ggml.merges"]]
    from tokenizers import models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    out = {"prompts": np.array(PROMPTS)}
    for i, prompt in enumerate(PROMPTS):
        ids = np.array([tokenizer.encode(prompt).ids], np.int32)
        logits = model(torch.tensor(ids), use_cache=False).logits[0].numpy()
        top = np.argsort(-logits[-1])[:64].astype(np.int32)
        out[f"ids{i}"] = ids[0]
        out[f"top{i}"] = top
        out[f"top_logits{i}"] = logits[-1, top]
        out[f"sample{i}"] = logits[:, ::997]
        out[f"max{i}"] = np.abs(logits).max()
        out[f"greedy{i}"] = greedy(model, ids, 24)[0]
    np.savez_compressed(GOLDEN / "smollm2.npz", **out)


def main():
    """Writes all files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", help="SmolLM2-135M-Instruct.Q4_1.gguf")
    args = parser.parse_args()
    GOLDEN.mkdir(exist_ok=True)
    with torch.no_grad():
        for name, (kind, extra) in FAMILIES.items():
            tiny(name, kind, extra)
        rope()
        if args.smollm2:
            smollm2(args.smollm2)


if __name__ == "__main__":
    main()
