"""A tiny decoder with M-RoPE, and its layers run one by one over whole sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.models import DecoderConfig, LanguageModel
from angeljax.models.rope import cos_sin
from tests.models._random import random_params

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
    """Logits, and for each layer what it read and its queries and keys.

    Args:
      embeds: [B, T, D].
      positions: for each layer [3, B, T].
      seen: for each layer bool [B, T], the tokens that are there in it.
      planes: [B, T, D] each, added behind the first layers.
    """
    x, inside = jnp.asarray(embeds), []
    causal = np.tril(np.ones((x.shape[1],) * 2, bool))
    for i in range(CONFIG.num_layers):
        block = MODEL.bind_block(params()["layers"][i])
        rotation = cos_sin(CONFIG, jnp.asarray(positions[i]))
        q, k, v = block.attn.project(x, rotation, block.attn_norm)
        inside.append((x, q, k))
        k, v = (jnp.repeat(t, 2, axis=2) for t in (k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(8)
        mask = causal & np.asarray(seen[i])[:, None, None, :]
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        x = x + y.reshape(*x.shape[:2], -1) @ block.attn.o_proj.kernel[...]
        x = block.mlp(x, block.mlp_norm)
        x = x + planes[i] if i < len(planes) else x
    decoder = MODEL.bind(params())
    return np.asarray(decoder.head(decoder.norm(x))), inside
