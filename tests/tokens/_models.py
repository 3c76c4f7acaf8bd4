"""A tiny decoder with M-RoPE, and its layers run one by one over whole sequences."""

import functools

import jax
import numpy as np

from angeljax.models import DecoderConfig, LanguageModel
from tests.models._random_params import random_params

CONFIG = DecoderConfig(
    model_type="qwen2",
    vocab_size=24,
    hidden_size=16,
    num_layers=3,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mrope_section=(2, 1, 1),
    attention_bias=True,
)
MODEL = LanguageModel(CONFIG)


@functools.cache
def params():
    return random_params(MODEL, 3, 0.4)


def dense(embeds, positions, seen, planes=()):
    """Logits, and for each layer what it read and its queries and keys; numpy alone.

    Args:
      embeds: [B, T, D].
      positions: for each layer [3, B, T].
      seen: for each layer bool [B, T], the tokens that are there in it.
      planes: [B, T, D] each, added behind the first layers.
    """
    tree = jax.tree.map(np.asarray, params())
    x, inside = np.asarray(embeds), []
    batch, length, _ = x.shape
    causal = np.tril(np.ones((length, length), bool))
    for i in range(CONFIG.num_layers):
        layer = tree["layers"][i]
        attn, mlp = layer["attn"], layer["mlp"]
        y = norm(x, layer["attn_norm"])
        q, k, v = (
            linear(y, attn[f"{n}_proj"]).reshape(batch, length, -1, 8) for n in "qkv"
        )
        q, k = turn(q, positions[i]), turn(k, positions[i])
        inside.append((x, q, k))
        mask = causal & np.asarray(seen[i])[:, None, :]
        heads = []
        for h in range(4):
            scores = q[:, :, h] @ np.swapaxes(k[:, :, h // 2], 1, 2) / np.sqrt(8)
            scores = np.where(mask, scores, -1e30)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights = weights / weights.sum(-1, keepdims=True)
            heads.append(weights @ v[:, :, h // 2])
        x = x + linear(np.concatenate(heads, axis=-1), attn["o_proj"])
        y = norm(x, layer["mlp_norm"])
        gate = linear(y, mlp["gate_proj"])
        inner = gate / (1 + np.exp(-gate)) * linear(y, mlp["up_proj"])
        x = x + linear(inner, mlp["down_proj"])
        x = x + planes[i] if i < len(planes) else x
    return linear(norm(x, tree["norm"]), tree["lm_head"]), inside


def norm(x, part):
    mean = np.mean(np.square(x), axis=-1, keepdims=True)
    return x / np.sqrt(mean + CONFIG.norm_eps) * part["scale"]


def linear(x, part):
    return x @ part["kernel"] + part.get("bias", 0)


def turn(x, positions):
    """M-RoPE: the first two frequencies turn with time, then height, then width."""
    frequency = CONFIG.rope_theta ** -(np.arange(4) / 4)
    where = np.stack([np.asarray(positions)[axis] for axis in (0, 0, 1, 2)], axis=-1)
    angles = (where * frequency)[:, :, None]
    a, b = x[..., :4], x[..., 4:]
    sin, cos = np.sin(angles), np.cos(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
