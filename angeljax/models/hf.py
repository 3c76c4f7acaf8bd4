"""Hugging Face folders: `config.json` and one or many safetensors files."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from angeljax.models._assemble import Shardings, Tensor, assemble
from angeljax.models._names import hf_path
from angeljax.models.config import DecoderConfig, ModelError
from angeljax.models.language_model import LanguageModel


def read_config(folder: Path) -> DecoderConfig:
    """`config.json` of a folder.

    Raises:
      ModelError: missing, not JSON, or not supported.
    """
    file = folder / "config.json"
    data = read_json(file)
    try:
        return DecoderConfig.from_hf(data)
    except ModelError as e:
        raise ModelError(f"{file}: {e}") from None


def read_params(
    folder: Path,
    model: LanguageModel,
    *,
    dtype: Any,
    shardings: Shardings | None = None,
) -> dict[str, Any]:
    """The param tree of `model` from the safetensors files of a folder.

    Raises:
      ModelError: a file is missing, damaged, or does not fit the configuration.
    """
    tensors = (
        (path, name, read)
        for path, name, read in read_tensors(folder, hf_path)
        # Checkpoints with tied embeddings may carry the head as well.
        if not (model.config.tied and path[0] == "lm_head")
    )
    return assemble(model, tensors, dtype=dtype, shardings=shardings, file=folder)


def read_tensors(
    folder: Path, path_of: Callable[[str], tuple[Any, ...] | None]
) -> Iterator[Tensor]:
    """Tensors of a folder's safetensors files for which `path_of` has a place.

    Raises:
      ModelError: a file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    for file in _files(folder):
        try:
            with safe_open(file, framework="np") as f:
                for name in f.keys():  # noqa: SIM118 (no mapping)
                    path = path_of(name)
                    if path is not None:
                        yield path, name, functools.partial(_read, f, name, file)
        except SafetensorError as e:
            raise ModelError(
                f"{file}: unreadable or truncated safetensors file ({_first_line(e)}): "
                "fetch it again"
            ) from None
        except OSError as e:
            raise ModelError(f"{file}: {_first_line(e)}") from None


def _read(f: Any, name: str, file: Path) -> np.ndarray:
    kind = f.get_slice(name).get_dtype()
    # Other types belong to formats of their own, with scales in further tensors.
    if kind not in ("F64", "F32", "F16", "BF16"):
        raise ModelError(
            f"{file}: {name} has the type {kind}: load an unquantized checkpoint"
        )
    return f.get_tensor(name)


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{index}: has no weight_map")
        files = [folder / str(name) for name in sorted(set(weight_map.values()))]
        for file in files:
            if file.parent != folder:
                raise ModelError(f"{index}: names a file outside of the folder: {file}")
            if not file.is_file():
                raise ModelError(f"{file} is missing, though {index.name} names it")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} has no .safetensors file")
    return files


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ModelError: missing or not a JSON object.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file} is missing") from None
    except (OSError, ValueError) as e:
        raise ModelError(f"{file}: not readable as JSON: {_first_line(e)}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{file}: not a JSON object")
    return data


def _first_line(e: BaseException) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]
