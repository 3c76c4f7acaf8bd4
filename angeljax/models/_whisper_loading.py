"""`load_whisper`: from a folder or a hub name to a Whisper model with parameters."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from angeljax.models import hf, hub
from angeljax.models._assemble import Shardings, assemble
from angeljax.models._whisper_config import WhisperConfig
from angeljax.models.config import ModelError
from angeljax.models.tokenizer import Tokenizer
from angeljax.models.whisper import WhisperModel

_NORMS = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")


@dataclasses.dataclass(frozen=True)
class LoadedWhisper:
    """A Whisper model, its parameters and its tokenizer.

    Attributes:
      model: the architecture, a pure function of the parameters.
      params: nested dict of arrays.
      tokenizer: turns ids into text.
      source: the name it was loaded by.
    """

    model: WhisperModel
    params: dict[str, Any]
    tokenizer: Tokenizer
    source: str


def load_whisper(
    source: str | os.PathLike[str],
    *,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    shardings: Shardings | None = None,
) -> LoadedWhisper:
    """Loads a Whisper model.

    Args:
      source: a folder with `config.json`, `model.safetensors`, `tokenizer.json` and, if
        there is one, `generation_config.json`, or a hub name such as
        `openai/whisper-tiny.en`.
      dtype: of the parameters.
      compute_dtype: of the activations; default `dtype`.
      shardings: `(path, shape) -> sharding or None`; each array is put straight onto
        its devices.

    Returns:
      A `LoadedWhisper`.

    Raises:
      ModelError: one line that names the file and what would work.

    Example:
      >>> from angeljax.models import load_whisper          # doctest: +SKIP
      >>> loaded = load_whisper("openai/whisper-tiny.en")   # doctest: +SKIP
    """
    name = os.fspath(source)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            raise ModelError(
                f"{name!r} is no folder and no hub name such as openai/whisper-tiny.en"
            )
        folder = hub.fetch_from_hub(name)
    config = read_whisper_config(folder)
    model = WhisperModel(
        config, jnp.dtype(dtype if compute_dtype is None else compute_dtype)
    )
    params = assemble(
        model,
        hf.read_tensors(folder, whisper_path),
        dtype=dtype,
        shardings=shardings,
        file=folder,
    )
    return LoadedWhisper(model, params, Tokenizer.from_folder(folder), name)


def read_whisper_config(folder: Path) -> WhisperConfig:
    """`config.json` of a folder, with `generation_config.json` over it.

    Raises:
      ModelError: missing, not JSON, or not supported.
    """
    file, extra = folder / "config.json", folder / "generation_config.json"
    data = hf.read_json(file)
    generation = hf.read_json(extra) if extra.is_file() else None
    try:
        return WhisperConfig.from_hf(data, generation)
    except ModelError as e:
        raise ModelError(f"{file}: {e}") from None


def whisper_path(name: str) -> tuple[Any, ...] | None:
    """Path of a Hugging Face tensor; None for the head, which is the embedding."""
    match = re.fullmatch(r"(?:model\.)?(encoder|decoder)\.(.+)\.(weight|bias)", name)
    if match is None:
        return None
    side, middle, kind = match.groups()
    parts: tuple[Any, ...] = tuple(middle.split("."))
    leaf = "bias" if kind == "bias" else _kind(parts[-1])
    if parts[0] in ("conv1", "conv2"):
        return (side, "embed", parts[0], leaf)
    if parts[0] == "layers":
        inner = parts[2:]
        if inner[0] in ("fc1", "fc2"):
            inner = ("mlp", *inner)
        return (side, "layers", int(parts[1]), *inner, leaf)
    return (side, *parts, leaf)


def _kind(module: str) -> str:
    if module in (*_NORMS, "layer_norm"):
        return "scale"
    return "embedding" if module.startswith("embed_") else "kernel"
