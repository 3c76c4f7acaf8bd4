"""`load_llava`: from a folder or a hub name to a LLaVA model with parameters."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from angeljax.models import hf, hub
from angeljax.models._assemble import Shardings, assemble
from angeljax.models._llava_config import LlavaConfig
from angeljax.models._names import hf_path
from angeljax.models.config import ModelError
from angeljax.models.language_model import bind_params
from angeljax.models.llava import LlavaModel
from angeljax.models.tokenizer import Tokenizer
from angeljax.models.vision_tower import VisionTower, VisionTowerConfig

_EMBED = {
    "embeddings.class_embedding": "class_token",
    "embeddings.patch_embedding.weight": "kernel",
    "embeddings.patch_embedding.bias": "bias",
    "embeddings.position_embedding.weight": "embedding",
}
_MODULES = {
    "pre_layrnorm": ("pre_norm",),
    "post_layernorm": ("post_norm",),
    "layer_norm1": ("attn_norm",),
    "layer_norm2": ("mlp_norm",),
    "mlp.fc1": ("mlp", "fc1"),
    "mlp.fc2": ("mlp", "fc2"),
    **{f"self_attn.{p}_proj": ("attn", f"{p}_proj") for p in ("q", "k", "v", "out")},
}


@dataclasses.dataclass(frozen=True)
class LoadedLlava:
    """A LLaVA model, its parameters and its tokenizer.

    Attributes:
      model: the architecture, a pure function of the parameters.
      params: nested dict of arrays.
      tokenizer: None if the source has none.
      source: the name it was loaded by.
    """

    model: LlavaModel
    params: dict[str, Any]
    tokenizer: Tokenizer | None
    source: str


def load_llava(
    source: str | os.PathLike[str],
    *,
    dtype: Any = jnp.bfloat16,
    compute_dtype: Any = None,
    shardings: Shardings | None = None,
) -> LoadedLlava:
    """Loads a LLaVA model: LLaVA-1.5, or any with a CLIP or SigLIP tower.

    Args:
      source: a Hugging Face folder, or a hub name such as `llava-hf/llava-1.5-7b-hf`.
      dtype: of the parameters.
      compute_dtype: of the activations; default `dtype`.
      shardings: `(path, shape) -> sharding or None`; each array is put straight onto
        its devices.

    Returns:
      A `LoadedLlava`. Layers of the tower that are not read are not loaded.

    Raises:
      ModelError: one line that names the file and what would work.

    Example:
      >>> from angeljax.models import load_llava              # doctest: +SKIP
      >>> loaded = load_llava("llava-hf/llava-1.5-7b-hf")     # doctest: +SKIP
    """
    name = os.fspath(source)
    folder = _folder(name)
    file = folder / "config.json"
    try:
        config = LlavaConfig.from_hf(hf.read_json(file))
    except ModelError as e:
        raise ModelError(f"{file}: {e}") from None
    compute = dtype if compute_dtype is None else compute_dtype
    model = LlavaModel(config, jnp.dtype(compute))

    def path_of(tensor: str) -> tuple[Any, ...] | None:
        path = llava_path(tensor)
        if path is None or (config.text.tied and path == ("text", "lm_head", "kernel")):
            return None
        return path if _read(path, config.vision_layers, config.vision) else None

    params = assemble(
        model,
        hf.read_tensors(folder, path_of),
        dtype=dtype,
        shardings=shardings,
        file=folder,
    )
    has = (folder / "tokenizer.json").is_file()
    tokenizer = Tokenizer.from_folder(folder) if has else None
    return LoadedLlava(model, params, tokenizer, name)


def load_vision_tower(
    source: str | os.PathLike[str],
    *,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
) -> VisionTower:
    """Loads the vision tower of a CLIP or SigLIP checkpoint.

    Args:
      source: a Hugging Face folder, or a hub name such as
        `openai/clip-vit-large-patch14-336`. Of a model with a text tower, only the
        vision tower is read; the pooling head of SigLIP is not.
      dtype: of the parameters.
      compute_dtype: of the activations; default `dtype`.

    Returns:
      The module with its parameters.

    Raises:
      ModelError: one line that names the file and what would work.

    Example:
      >>> from angeljax.models import load_vision_tower   # doctest: +SKIP
      >>> name = "google/siglip-so400m-patch14-384"
      >>> tower = load_vision_tower(name)                 # doctest: +SKIP
    """
    folder = _folder(os.fspath(source))
    file = folder / "config.json"
    try:
        config = VisionTowerConfig.from_hf(hf.read_json(file))
    except ModelError as e:
        raise ModelError(f"{file}: {e}") from None
    compute = dtype if compute_dtype is None else compute_dtype
    tower = _Tower(config, jnp.dtype(compute))
    params = assemble(
        tower, hf.read_tensors(folder, tower_path), dtype=dtype, shardings=None,
        file=folder,
    )  # fmt: skip
    bare, state = nnx.split(nnx.eval_shape(lambda: tower.module(nnx.Rngs(0))))
    return bind_params((bare, nnx.filter_state(state, nnx.Param)), params)


@dataclasses.dataclass(frozen=True)
class _Tower:
    """What `assemble` asks for the places of parameters."""

    config: VisionTowerConfig
    dtype: Any

    def module(self, rngs: nnx.Rngs, param_dtype: Any = jnp.float32) -> VisionTower:
        return VisionTower(
            self.config, rngs=rngs, dtype=self.dtype, param_dtype=param_dtype
        )

    def abstract(self, param_dtype: Any) -> dict[str, Any]:
        def params() -> dict[str, Any]:
            module = self.module(nnx.Rngs(0), param_dtype)
            return nnx.to_pure_dict(nnx.state(module, nnx.Param))

        return jax.eval_shape(params)


def _folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise ModelError(
            f"{name!r} is no folder and no hub name such as llava-hf/llava-1.5-7b-hf"
        )
    return hub.fetch_from_hub(name)


def _read(path: tuple[Any, ...], layers: int, vision: VisionTowerConfig) -> bool:
    """Whether a parameter is one of those that the model has."""
    if path[:2] == ("vision", "layers"):
        return path[2] < layers
    return path[:2] != ("vision", "post_norm") or layers == vision.num_layers


def tower_path(name: str) -> tuple[Any, ...] | None:
    """Path of a Hugging Face tensor in a `VisionTower`; None if it has no place."""
    match = re.fullmatch(r"(?:vision_model\.)?(.+)", name)
    assert match is not None, "anything matches"
    rest = match[1]
    if rest in _EMBED:
        return ("embed", _EMBED[rest])
    match = re.fullmatch(r"(?:encoder\.layers\.(\d+)\.)?(.+)\.(weight|bias)", rest)
    if match is None or match[2] not in _MODULES:
        return None
    module = _MODULES[match[2]]
    norm = module[-1].endswith("norm")
    leaf = "bias" if match[3] == "bias" else "scale" if norm else "kernel"
    layer = () if match[1] is None else ("layers", int(match[1]))
    return (*layer, *module, leaf)


def llava_path(name: str) -> tuple[Any, ...] | None:
    """Path of a Hugging Face tensor, as saved before and since version 5; or None."""
    name = re.sub(r"^(model\.)?language_model\.lm_head\.", "lm_head.", name)
    if name == "lm_head.weight":
        return ("text", "lm_head", "kernel")
    for pattern, root in (
        (r"(?:model\.)?vision_tower\.(.+)", "vision"),
        (r"(?:model\.)?language_model\.(?:model\.)?(.+)", "text"),
        (r"(?:model\.)?multi_modal_projector\.(.+)", "projector"),
    ):
        match = re.fullmatch(pattern, name)
        if match is None:
            continue
        if root == "projector":
            module, _, kind = match[1].partition(".")
            return (root, module, "bias" if kind == "bias" else "kernel")
        path = (
            tower_path(match[1]) if root == "vision" else hf_path(f"model.{match[1]}")
        )
        return None if path is None else (root, *path)
    return None
