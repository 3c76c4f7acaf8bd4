"""Block drafters on disk: `config.json` and `model.safetensors`, as DFlash has them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from angeljax.models._assemble import assemble
from angeljax.models._names import hf_path
from angeljax.models.config import DecoderConfig, ModelError
from angeljax.models.hf import read_json, read_tensors
from angeljax.speculative._decoder_files import (
    layer_name,
    rope_factors,
    save,
    tensors_of,
)
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
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a block drafter; embedding and head are the target's and stay out.

    Args:
      path: a folder, made if it is missing.
      model: the network.
      params: its params, dense.
      dtype: of the tensors.
      notes: JSON values kept under `angeljax`, such as the tau that was measured.

    Returns:
      The folder.

    Example:
      >>> import jax, tempfile
      >>> from angeljax.models import DecoderConfig
      >>> from angeljax.speculative import (
      ...     BlockConfig, BlockModel, load_block, save_block)
      >>> target = DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=2,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... )
      >>> model = BlockModel(BlockConfig.of(target, num_layers=1, mask_token_id=31))
      >>> folder = save_block(
      ...     tempfile.mkdtemp(), model, model.init(jax.random.key(0)))
      >>> load_block(folder)[0] == model
      True
    """
    names = {path: name for name, path in _TOP.items()}

    def named(key: tuple[Any, ...]) -> str:
        return names.get(key) or f"layers.{key[1]}.{layer_name(key[2:])}"

    tensors = tensors_of(params, named, dtype)
    config, path = model.config, Path(path)
    more = {
        "architectures": ["DFlashDraftModel"],
        "block_size": config.block_size,
        "num_target_layers": config.num_target_layers,
        "dflash_config": {
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": list(config.target_layers),
        },
    }
    save(path, tensors, config.decoder, more, notes)
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
        decoder = DecoderConfig.from_hf(data)
        config = BlockConfig(
            decoder=dataclasses.replace(decoder, rope_factors=rope_factors(data)),
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
