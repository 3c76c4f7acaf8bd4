"""`load_qwen2_audio`: from a folder or a hub name to a Qwen2-Audio model."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from angeljax.models import hf, hub
from angeljax.models._assemble import Shardings, assemble
from angeljax.models._names import hf_path
from angeljax.models._qwen2_audio_config import Qwen2AudioConfig
from angeljax.models._whisper_loading import whisper_path
from angeljax.models.config import ModelError
from angeljax.models.qwen2_audio import Qwen2AudioModel
from angeljax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class LoadedQwen2Audio:
    """A Qwen2-Audio model, its parameters and its tokenizer.

    Attributes:
      model: the architecture, a pure function of the parameters.
      params: nested dict of arrays.
      tokenizer: None if the folder has none.
      source: the name it was loaded by.
    """

    model: Qwen2AudioModel
    params: dict[str, Any]
    tokenizer: Tokenizer | None
    source: str


def load_qwen2_audio(
    source: str | os.PathLike[str],
    *,
    dtype: Any = jnp.bfloat16,
    compute_dtype: Any = None,
    shardings: Shardings | None = None,
) -> LoadedQwen2Audio:
    """Loads a Qwen2-Audio model.

    Args:
      source: a folder with `config.json` and `.safetensors` files, or a hub name such
        as `Qwen/Qwen2-Audio-7B-Instruct`.
      dtype: of the parameters.
      compute_dtype: of the activations; default `dtype`.
      shardings: `(path, shape) -> sharding or None`; each array is put straight onto
        its devices.

    Returns:
      A `LoadedQwen2Audio`.

    Raises:
      ModelError: one line that names the file and what would work.

    Example:
      >>> from angeljax.models import load_qwen2_audio               # doctest: +SKIP
      >>> loaded = load_qwen2_audio("Qwen/Qwen2-Audio-7B-Instruct")  # doctest: +SKIP
    """
    name = os.fspath(source)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            raise ModelError(
                f"{name!r} is no folder and no hub name such as "
                "Qwen/Qwen2-Audio-7B-Instruct"
            )
        folder = hub.fetch_from_hub(name)
    file = folder / "config.json"
    data = hf.read_json(file)
    try:
        config = Qwen2AudioConfig.from_hf(data)
    except ModelError as e:
        raise ModelError(f"{file}: {e}") from None
    compute = dtype if compute_dtype is None else compute_dtype
    model = Qwen2AudioModel(config, jnp.dtype(compute))
    tensors = hf.read_tensors(folder, qwen2_audio_path)
    params = assemble(model, tensors, dtype=dtype, shardings=shardings, file=folder)
    has = (folder / "tokenizer.json").is_file()
    tokenizer = Tokenizer.from_folder(folder) if has else None
    return LoadedQwen2Audio(model, params, tokenizer, name)


def qwen2_audio_path(name: str) -> tuple[Any, ...] | None:
    """Path of a Hugging Face tensor, in the layout of transformers 4 or 5."""
    part, _, rest = name.removeprefix("model.").partition(".")
    if part == "audio_tower":
        path = whisper_path(f"encoder.{rest}")
        return None if path is None else ("audio_tower", *path[1:])
    if part == "multi_modal_projector":
        leaf = {"linear.weight": "kernel", "linear.bias": "bias"}.get(rest)
        return None if leaf is None else ("projector", leaf)
    text = name if part == "lm_head" else rest
    if part == "language_model" and not text.startswith(("model.", "lm_head.")):
        text = f"model.{text}"
    path = hf_path(text) if part in ("language_model", "lm_head") else None
    return None if path is None else ("language_model", *path)
