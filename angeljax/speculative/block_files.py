"""Block drafters on disk: `config.json` and `model.safetensors`, as DFlash has them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.models._assemble import assemble
from angeljax.models._names import hf_path
from angeljax.models.config import DecoderConfig, ModelError
from angeljax.models.hf import read_json, read_tensors
from angeljax.speculative.block_model import BlockConfig, BlockModel

_TOP = {
    "fc.weight": ("fc", "kernel"),
    "hidden_norm.weight": ("hidden_norm", "scale"),
    "norm.weight": ("norm", "scale"),
}


def save_block(
    path: str | os.PathLike[str],
    model: BlockModel,
    params: Any,
    *,
    dtype: Any = jnp.bfloat16,
) -> Path:
    """Writes a block drafter; embedding and head are the target's and stay out.

    Args:
      path: a folder, made if it is missing.
      model: the network.
      params: its params, dense.
      dtype: of the tensors.

    Returns:
      The folder.
    """
    from safetensors.flax import save_file

    names = {path: name for name, path in _TOP.items()}
    tensors = {}
    for where, leaf in jax.tree_util.tree_leaves_with_path(params):
        key = tuple(k.key for k in where)
        name = names.get(key) or _layer_name(key)
        value = jnp.asarray(leaf, dtype)
        tensors[name] = value.T if key[-1] == "kernel" else value
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(_config_json(model.config, dtype), indent=2) + "\n"
    (path / "config.json").write_text(text, encoding="utf-8")
    return path


def load_block(
    path: str | os.PathLike[str], *, dtype: Any = jnp.bfloat16
) -> tuple[BlockModel, Any]:
    """Reads a block drafter.

    Args:
      path: a folder with `config.json` and safetensors.
      dtype: of the params.

    Returns:
      The network and its params.

    Raises:
      ModelError: a file or field is missing, or a tensor does not fit.
    """
    folder = Path(path)
    file = folder / "config.json"
    data = read_json(file)
    inner = data.get("dflash_config")
    if not isinstance(inner, dict):
        raise ModelError(f"{file} has no dflash_config: it is no block drafter")
    fields = {**data, **inner}
    wanted = ("mask_token_id", "target_layer_ids", "block_size", "num_target_layers")
    for name in wanted:
        if name not in fields:
            raise ModelError(f"{file} has no field {name!r}")
    try:
        config = BlockConfig(
            decoder=DecoderConfig.from_hf(data),
            block_size=fields["block_size"],
            mask_token_id=fields["mask_token_id"],
            target_layers=tuple(fields["target_layer_ids"]),
            num_target_layers=fields["num_target_layers"],
        )
    except (ValueError, TypeError) as e:
        raise ModelError(f"{file}: {e}") from None
    model = BlockModel(config)
    tensors = read_tensors(folder, _path_of)
    params = assemble(model, tensors, dtype=dtype, shardings=None, file=folder)
    return model, params


def _path_of(name: str) -> Any:
    return _TOP.get(name) or hf_path(f"model.{name}")


def _layer_name(key: tuple[Any, ...]) -> str:
    _, layer, part, *rest = key
    if part == "attn_norm":
        return f"layers.{layer}.input_layernorm.weight"
    if part == "mlp_norm":
        return f"layers.{layer}.post_attention_layernorm.weight"
    part = "self_attn" if part == "attn" else part
    return f"layers.{layer}.{part}.{rest[0]}.weight"


def _config_json(config: BlockConfig, dtype: Any) -> dict[str, Any]:
    c = config.decoder
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "dtype": jnp.dtype(dtype).name,
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
        "tie_word_embeddings": c.tied,
        "eos_token_id": list(c.eos_ids),
        "pad_token_id": c.pad_id,
        "bos_token_id": c.bos_id,
        "block_size": config.block_size,
        "num_target_layers": config.num_target_layers,
        "dflash_config": {
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": list(config.target_layers),
        },
    }
