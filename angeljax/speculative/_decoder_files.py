"""Decoder layers of drafters on disk: names of tensors and fields of `config.json`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.models.config import DecoderConfig

_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def layer_name(path: tuple[Any, ...]) -> str:
    """Of a leaf of a layer, such as `self_attn.q_proj.weight`."""
    part, *rest = path
    kind = "bias" if rest[-1] == "bias" else "weight"
    if part in _NORMS:
        return f"{_NORMS[part]}.{kind}"
    return f"{'self_attn' if part == 'attn' else part}.{rest[0]}.{kind}"


def tensors_of(
    params: Any, named: Callable[[tuple[Any, ...]], str], dtype: Any
) -> dict[str, jax.Array]:
    """Leaves by the names that files have for them, matrices as `[out, in]`."""
    found = {}
    for where, leaf in jax.tree_util.tree_leaves_with_path(params):
        key = tuple(k.key for k in where)
        value = jnp.asarray(leaf, dtype)
        found[named(key)] = value.T if key[-1] == "kernel" else value
    return found


def save(
    path: Path,
    tensors: Mapping[str, jax.Array],
    config: DecoderConfig,
    more: Mapping[str, Any],
    notes: Mapping[str, Any] | None,
) -> None:
    """Writes `model.safetensors` and `config.json`; `more` are fields of the second."""
    from safetensors.flax import save_file

    path.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
    dtype = next(iter(tensors.values())).dtype
    data = {**fields(config), "dtype": jnp.dtype(dtype).name, **more}
    own = dict(notes or {})
    if config.rope_factors:
        own["rope_factors"] = list(config.rope_factors)
    if own:
        data["angeljax"] = own
    text = json.dumps(data, indent=2) + "\n"
    (path / "config.json").write_text(text, encoding="utf-8")


def fields(c: DecoderConfig) -> dict[str, Any]:
    """As Hugging Face names them."""
    return {
        "model_type": c.model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.norm_eps,
        "hidden_act": c.activation,
        "rope_theta": c.rope_theta,
        "rope_scaling": dict(c.rope_scaling) or None,
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
        "tie_word_embeddings": c.tied,
        "eos_token_id": list(c.eos_ids),
        "pad_token_id": c.pad_id,
        "bos_token_id": c.bos_id,
    }


def rope_factors(data: Mapping[str, Any]) -> tuple[float, ...]:
    """Of a `config.json` that `save` wrote."""
    own = data.get("angeljax")
    return tuple(own.get("rope_factors", ())) if isinstance(own, dict) else ()
