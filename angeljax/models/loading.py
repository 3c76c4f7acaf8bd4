"""`load_model`: from a name, a folder or a file to a model with parameters."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from angeljax.models import gguf, hf, hub
from angeljax.models._assemble import Shardings
from angeljax.models.config import DecoderConfig, ModelError
from angeljax.models.language_model import LanguageModel
from angeljax.models.tokenizer import Tokenizer, files_from_gguf


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model, its parameters and its tokenizer.

    Attributes:
      model: the architecture, a pure function of the parameters.
      params: nested dict of arrays.
      tokenizer: None if the source has none.
      source: the name it was loaded by.
    """

    model: LanguageModel
    params: dict[str, Any]
    tokenizer: Tokenizer | None
    source: str


def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: Any = jnp.bfloat16,
    compute_dtype: Any = None,
    scan_layers: bool = False,
    shardings: Shardings | None = None,
) -> LoadedModel:
    """Loads a decoder-only language model.

    Args:
      source: `smollm2`, a Hugging Face folder, a `.gguf` file or a folder with one, or
        a hub name `org/name`.
      dtype: of the parameters.
      compute_dtype: of the activations; default `dtype`.
      scan_layers: stack the layers; see `Decoder`.
      shardings: `(path, shape) -> sharding or None`; each array is put straight onto
        its devices.

    Returns:
      A `LoadedModel`.

    Raises:
      ModelError: one line that names the file and what would work.

    Example:
      >>> from angeljax.models import load_model          # doctest: +SKIP
      >>> load_model("smollm2").model.config.num_layers   # doctest: +SKIP
      30
    """
    path = _locate(os.fspath(source))
    compute = dtype if compute_dtype is None else compute_dtype
    if path.is_file():
        file = gguf.GGUFFile(path)
        config = file.config()
    else:
        file = None
        config = hf.read_config(path)
    model = LanguageModel(config, jnp.dtype(compute), scan_layers)
    if file is not None:
        params = gguf.read_params(file, model, dtype=dtype, shardings=shardings)
    else:
        params = hf.read_params(path, model, dtype=dtype, shardings=shardings)
    return LoadedModel(model, params, _tokenizer(path, file), os.fspath(source))


def load_config(source: str | os.PathLike[str]) -> DecoderConfig:
    """The configuration of what `load_model` would load, without its weights.

    Args:
      source: as in `load_model`.

    Returns:
      The configuration.

    Raises:
      ModelError: as `load_model`.
    """
    path = _locate(os.fspath(source))
    return gguf.GGUFFile(path).config() if path.is_file() else hf.read_config(path)


def _locate(source: str) -> Path:
    """The folder of a Hugging Face checkpoint, or a GGUF file."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is no .gguf file: name its folder instead")
        return path
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        # An index counts as well: what it names may be missing.
        weights = any(path.glob("*.safetensors*"))
        if weights and ((path / "config.json").is_file() or not files):
            return path
        if len(files) == 1:
            return files[0]
        what = "several .gguf files: name one" if files else "no model in it"
        raise ModelError(
            f"{path} has {what} (a model is config.json with .safetensors, or a .gguf)"
        )
    if source.lower() in hub.ALIASES:
        return hub.fetch_smollm2()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith("."):
        return hub.fetch_from_hub(source)
    raise ModelError(
        f"{source!r} is no file or folder, no hub name (org/name) and not 'smollm2'"
    )


def _tokenizer(path: Path, file: gguf.GGUFFile | None) -> Tokenizer | None:
    folder = path.parent if path.is_file() else path
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_folder(folder)
    if file is not None and "tokenizer.ggml.model" in file.metadata:
        return Tokenizer(files_from_gguf(file.metadata))
    return None
