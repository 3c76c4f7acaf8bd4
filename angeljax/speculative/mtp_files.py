"""MTP layers on disk: `config.json` and `model.safetensors`, named as DeepSeek-V3 does.

The layer stands behind the target's last one (arXiv 2412.19437, section 2.2), so that
for a target of N layers its tensors are `model.layers.N.enorm.weight`, `hnorm`,
`eh_proj`, `shared_head.norm` and those of any layer. A folder with a whole model that
has such a layer can be read as well.
"""

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
from angeljax.speculative.mtp import MTPModel

_TOP = {
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
) -> Path:
    """Writes an MTP layer; embedding and head are the target's and stay out.

    Args:
      path: a folder, made if it is missing.
      model: the network.
      params: its params, dense.
      dtype: of the tensors.

    Returns:
      The folder.
    """
    from safetensors.flax import save_file

    names = _names(model)
    tensors = {}
    for where, leaf in jax.tree_util.tree_leaves_with_path(params):
        key = tuple(k.key for k in where)
        value = jnp.asarray(leaf, dtype)
        tensors[names[key]] = value.T if key[-1] == "kernel" else value
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    target = model.target
    document = {
        "model_type": target.model_type,
        "dtype": jnp.dtype(dtype).name,
        "hidden_size": target.hidden_size,
        "num_hidden_layers": target.num_layers,
        "vocab_size": target.vocab_size,
        "num_nextn_predict_layers": 1,
        "angeljax": {"target": target.to_dict()},
    }
    text = json.dumps(document, indent=2) + "\n"
    (path / "config.json").write_text(text, encoding="utf-8")
    return path


def load_mtp(
    path: str | os.PathLike[str], *, dtype: Any = jnp.bfloat16
) -> tuple[MTPModel, Any]:
    """Reads an MTP layer, or the first one of a whole model.

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
    model = MTPModel(target)
    paths = {name: path for path, name in _names(model).items()}
    tensors = read_tensors(folder, paths.get)
    return model, assemble(model, tensors, dtype=dtype, shardings=None, file=folder)


def _names(model: MTPModel) -> dict[tuple[Any, ...], str]:
    """The name in a file of each parameter."""
    first = f"model.layers.{model.target.num_layers}."
    found = {path: first + name for name, path in _TOP.items()}
    leaves = jax.tree_util.tree_leaves_with_path(model.abstract())
    for where, _ in leaves:
        key = tuple(k.key for k in where)
        if key not in found:
            found[key] = first + _layer_name(key[1:])
    return found


def _layer_name(path: tuple[Any, ...]) -> str:
    """The name of a decoder layer's parameter, which `hf_path` undoes."""
    part, *rest = path
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if part in norms:
        name = f"{norms[part]}.weight"
    else:
        part = "self_attn" if part == "attn" else part
        last = "bias" if rest[1] == "bias" else "weight"
        name = f"{part}.{rest[0]}.{last}"
    assert hf_path(f"model.layers.0.{name}") == ("layers", 0, *path), name
    return name
