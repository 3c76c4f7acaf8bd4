"""An EAGLE-3 head that reads few tokens in few kernels; see `FusedRows`.

The arithmetic is that of `_eagle_head`. Queries, keys and values are one product of two
inputs, each with its own norm, so that nothing is joined beforehand.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from angeljax.models._fused_rows import FusedRows, _refused, _stored
from angeljax.models.rope import frequencies
from angeljax.speculative._eagle_config import EagleConfig
from pallas_kernels import rows_attention, skinny_matmul

Params = dict[str, Any]


def serves(config: EagleConfig, params: Params, dtype: Any) -> bool:
    """Whether the kernels take this head: dense, of the target's dtype.

    Args:
      config, params: of the head, as it was loaded.
      dtype: of the target.
    """
    dim, layer = config.head_dim, params["midlayer"]
    linears = params["fc"], params["lm_head"], *layer["self_attn"].values()
    linears = *linears, *layer["mlp"].values()
    dense = not any(_refused(linear["kernel"], dtype) for linear in linears)
    return dense and not dim & (dim - 1) and 32 <= dim <= 256


def joined(config: EagleConfig, params: Params) -> Params:
    """The parameters with matrices of one input beside each other, and `rope`."""
    layer = dict(params["midlayer"])
    attn, mlp = layer["self_attn"], layer["mlp"]
    each = [attn[f"{name}_proj"]["kernel"] for name in "qkv"]
    qkv = {"kernel": jnp.concatenate(each, axis=1)}
    layer["self_attn"] = {"qkv_proj": qkv, "o_proj": attn["o_proj"]}
    norms = [layer[name]["scale"] for name in ("input_layernorm", "hidden_norm")]
    layer["qkv_norm"] = {"scale": jnp.concatenate(norms)}
    both = [mlp[f"{name}_proj"]["kernel"] for name in ("gate", "up")]
    gate_up = {"kernel": jnp.concatenate(both, axis=1)}
    layer["mlp"] = {"gate_up_proj": gate_up, "down_proj": mlp["down_proj"]}
    # As an argument: XLA for GPUs joins what shares an array, and not what shares a
    # constant or a number, so that sines and cosines of several steps are one kernel.
    rope = jnp.asarray(frequencies(config.decoder)[0])
    return {**params, "midlayer": layer, "rope": rope}


def turns(
    config: EagleConfig, params: Params, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 `[B, T, head_dim / 2]`, of int positions `[B, T]`."""
    factor = frequencies(config.decoder)[1]
    angles = positions.astype(jnp.float32)[..., None] * params["rope"]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def read_fused(
    config: EagleConfig,
    params: Params,
    embeds: jax.Array,
    features: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    slots: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    rows: FusedRows,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`read_step` for up to 16 tokens of each row, with the cache.

    Args:
      config: of the head.
      params: of `joined`.
      embeds, features, positions: as in `read_step`.
      mask: bool `[B, 1, T, S]`.
      slots: int32 `[B]`, where keys and values go.
      k, v: `[B, num_kv_heads, S, head_dim]`.
      rows: which kernels.

    Returns:
      h' `[B, T, D]`, and the cache.
    """
    layer, how = params["midlayer"], rows.implementation
    attn, mlp = layer["self_attn"], layer["mlp"]

    def product(x: jax.Array, linear: Any, **around: Any) -> jax.Array:
        around |= _stored(linear["kernel"])
        return skinny_matmul(x, implementation=how, **around)

    def norm(name: str) -> dict[str, Any]:
        return {"norm": layer[name]["scale"], "norm_eps": config.norm_eps}

    embeds = embeds.astype(features.dtype)
    qkv = product(embeds, attn["qkv_proj"], second=features, **norm("qkv_norm"))
    cos, sin = turns(config, params, positions)
    y, k, v = rows_attention(qkv, cos, sin, mask, slots, k, v, implementation=how)
    h = product(y, attn["o_proj"], residual=features)
    around = norm("post_attention_layernorm")
    y = product(h, mlp["gate_up_proj"], swiglu=True, **around)
    return product(y, mlp["down_proj"], residual=h), k, v


def features_fused(params: Params, features: Any, *, rows: FusedRows) -> jax.Array:
    """`fused_features` of up to 16 tokens."""
    x, how = jnp.concatenate(features, axis=-1), rows.implementation
    return skinny_matmul(x, **_stored(params["fc"]["kernel"]), implementation=how)


def logits_fused(
    config: EagleConfig, params: Params, hidden: jax.Array, *, rows: FusedRows
) -> jax.Array:
    """`draft_logits` of up to 16 tokens."""
    return skinny_matmul(
        hidden,
        **_stored(params["lm_head"]["kernel"]),
        norm=params["norm"]["scale"],
        norm_eps=config.norm_eps,
        out_dtype=jnp.float32,
        implementation=rows.implementation,
    )
