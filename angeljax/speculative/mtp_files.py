"""MTP layers on disk, under the names of DeepSeek-V3.

The layer stands behind those of the target, as `model.layers.L` for a target with L
layers: `enorm`, `hnorm` and `eh_proj` before an ordinary decoder layer, and
`shared_head.norm` after it. So it can be read from the folder of a model that has one,
or from a folder of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from angeljax.models._assemble import assemble
from angeljax.models._names import hf_path
from angeljax.models.config import DecoderConfig, ModelError
from angeljax.models.hf import read_json, read_tensors
from angeljax.speculative._decoder_files import layer_name, save, tensors_of
from angeljax.speculative.mtp import MTPModel

_AROUND = {
    "enorm.weight": ("enorm", "scale"),
    "hnorm.weight": ("hnorm", "scale"),
    "eh_proj.weight": ("eh_proj", "kernel"),
    "shared_head.norm.weight": ("norm", "scale"),
}


def save_mtp(
    path: str | os.PathLike[str],
    model: MTPModel,
    params: Any,
    *,
    dtype: Any = jnp.bfloat16,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes an MTP layer; embedding and head are the target's and stay out.

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
      >>> from angeljax.speculative import MTPModel, load_mtp, save_mtp
      >>> target = DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=2,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... )
      >>> model = MTPModel(target)
      >>> folder = save_mtp(tempfile.mkdtemp(), model, model.init(jax.random.key(0)))
      >>> load_mtp(folder)[0] == model
      True
    """
    names = {place: name for name, place in _AROUND.items()}
    start = f"model.layers.{model.target.num_layers}"

    def named(key: tuple[Any, ...]) -> str:
        return f"{start}.{names.get(key) or layer_name(key[1:])}"

    tensors = tensors_of(params, named, dtype)
    path = Path(path)
    # Hugging Face has no fields for all that a configuration can say.
    own = {**(notes or {}), "target": model.target.to_dict()}
    save(path, tensors, model.target, {"num_nextn_predict_layers": 1}, own)
    return path


def load_mtp(
    path: str | os.PathLike[str], *, dtype: Any = jnp.bfloat16
) -> tuple[MTPModel, Any]:
    """Reads an MTP layer, the first if there are more.

    Args:
      path: a folder with `config.json` and safetensors: of the layer alone, or of a
        whole model that has one.
      dtype: of the params.

    Returns:
      The network and its params. Copies of the target's embedding and head are left
      out.

    Raises:
      ModelError: a file or field is missing, or a tensor is missing or does not fit.
    """
    folder = Path(path)
    file = folder / "config.json"
    data = read_json(file)
    if not data.get("num_nextn_predict_layers"):
        raise ModelError(f"{file} has no num_nextn_predict_layers: it is no MTP layer")
    own = data.get("angeljax")
    try:
        if isinstance(own, dict) and "target" in own:
            target = DecoderConfig.from_dict(own["target"])
        else:
            target = DecoderConfig.from_hf(data)
    except (ValueError, TypeError) as e:
        raise ModelError(f"{file}: {e}") from None
    start = f"model.layers.{target.num_layers}."

    def place(name: str) -> tuple[Any, ...] | None:
        if not name.startswith(start):
            return None
        rest = name.removeprefix(start)
        if rest in _AROUND:
            return _AROUND[rest]
        found = hf_path(f"model.layers.0.{rest}")
        return None if found is None else ("layer", *found[2:])

    model, tensors = MTPModel(target), read_tensors(folder, place)
    params = assemble(model, tensors, dtype=dtype, shardings=None, file=folder)
    return model, params
