"""Qwen2.5-VL and Qwen3-VL from Hugging Face folders."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from angeljax.models import hf, hub
from angeljax.models._assemble import Architecture, Shardings, Tensor, assemble
from angeljax.models._names import hf_path
from angeljax.models._qwen_vl_config import QwenVLConfig
from angeljax.models._qwen_vl_model import QwenVL
from angeljax.models.config import ModelError
from angeljax.models.tokenizer import Tokenizer

_BLOCK = {
    "norm1": "attn_norm",
    "norm2": "mlp_norm",
    "attn.qkv": "attn.qkv_proj",
    "attn.proj": "attn.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
    "mlp.linear_fc1": "mlp.up_proj",
    "mlp.linear_fc2": "mlp.down_proj",
}
_MERGER = {
    "ln_q": "norm",
    "norm": "norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
    "linear_fc1": "fc1",
    "linear_fc2": "fc2",
}
# (pattern of a module below the tower, place in the tree, names below it)
_TOWER: tuple[tuple[str, str, dict[str, str]], ...] = (
    (r"blocks\.(\d+)\.(.+)", "blocks", _BLOCK),
    (r"deepstack_merger_list\.(\d+)\.(.+)", "deepstack", _MERGER),
    (r"merger\.()(.+)", "merger", _MERGER),
)


def read_qwen_config(folder: Path) -> QwenVLConfig:
    """`config.json` of a folder.

    Raises:
      ModelError: missing, not JSON, or not supported.
    """
    file = folder / "config.json"
    try:
        return QwenVLConfig.from_hf(hf.read_json(file))
    except ModelError as e:
        raise ModelError(f"{file}: {e}") from None


def language_path(name: str) -> tuple[Any, ...] | None:
    """Place of a tensor in the decoder's tree, by either of the names it has had."""
    return hf_path(re.sub(r"^model\.language_model\.", "model.", name))


def vision_path(name: str) -> tuple[Any, ...] | None:
    """Place of a tensor in the tower's tree."""
    match = re.fullmatch(r"(?:model\.)?visual\.(.+)\.(weight|bias)", name)
    if match is None:
        return None
    module, kind = match.groups()
    if module == "patch_embed.proj":
        return ("patch_embed", "kernel" if kind == "weight" else "bias")
    if module == "pos_embed":
        return ("pos_embed", "embedding")
    for pattern, place, names in _TOWER:
        found = re.fullmatch(pattern, module)
        if found and found[2] in names:
            layer = (int(found[1]),) if found[1] else ()
            path = (place, *layer, *names[found[2]].split("."))
            if kind == "bias":
                return (*path, "bias")
            return (*path, "scale" if "norm" in path[-1] else "kernel")
    return None


def read_qwen_params(
    folder: Path,
    vision: Architecture,
    language: Any,
    *,
    dtype: Any,
    shardings: Shardings | None,
) -> dict[str, Any]:
    """The tree with `vision` and `language` from a folder's safetensors files.

    Raises:
      ModelError: a file is missing, damaged, or does not fit the configuration.
    """

    def part(name: str, model: Architecture, tensors: Iterator[Tensor]) -> Any:
        place = None
        if shardings is not None:

            def place(path: str, shape: tuple[int, ...]) -> Any:
                return shardings(f"{name}/{path}", shape)

        return assemble(model, tensors, dtype=dtype, shardings=place, file=folder)

    text = (
        tensor
        for tensor in hf.read_tensors(folder, language_path)
        # Checkpoints with tied embeddings may carry the head as well.
        if not (language.config.tied and tensor[0][0] == "lm_head")
    )
    sight = (
        (path, name, _flat(read) if path == ("patch_embed", "kernel") else read)
        for path, name, read in hf.read_tensors(folder, vision_path)
    )
    return {
        "vision": part("vision", vision, sight),
        "language": part("language", language, text),
    }


def _flat(read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    """A convolution whose windows do not overlap is a product with flat patches."""

    def flat() -> np.ndarray:
        value = read()
        return value.reshape(len(value), -1)

    return flat


@dataclasses.dataclass(frozen=True)
class LoadedQwenVL:
    """A model, its parameters and its tokenizer.

    Attributes:
      model: the architecture, a pure function of the parameters.
      params: `{"vision": ..., "language": ...}`.
      tokenizer: None if the source has none.
      source: where it was loaded from.
    """

    model: QwenVL
    params: dict[str, Any]
    tokenizer: Tokenizer | None
    source: str


def load_qwen_vl(
    source: str | os.PathLike[str],
    *,
    dtype: Any = jnp.bfloat16,
    compute_dtype: Any = None,
    scan_layers: bool = False,
    shardings: Shardings | None = None,
) -> LoadedQwenVL:
    """Loads Qwen2.5-VL or Qwen3-VL.

    Args:
      source: a Hugging Face folder, or a hub name `org/name`.
      dtype: of the parameters.
      compute_dtype: of the activations; default `dtype`.
      scan_layers: stack the layers of the decoder; see `Decoder`.
      shardings: `(path, shape) -> sharding or None`; each array is put straight onto
        its devices.

    Returns:
      A `LoadedQwenVL`.

    Raises:
      ModelError: one line that names the file and what would work.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if not path.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            raise ModelError(f"{name!r} is no folder and no hub name (org/name)")
        path = hub.fetch_from_hub(name)
    compute = jnp.dtype(dtype if compute_dtype is None else compute_dtype)
    model = QwenVL(read_qwen_config(path), compute, scan_layers)
    params = read_qwen_params(
        path, model.tower, model.language, dtype=dtype, shardings=shardings
    )
    tokenizer = None
    if (path / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_folder(path)
    return LoadedQwenVL(model, params, tokenizer, name)
