"""EAGLE-3 heads on disk, under the names that serving engines load.

`model.safetensors` has `fc.weight`, `midlayer.*.weight`, `norm.weight`,
`lm_head.weight`, with matrices `[out, in]`, and `d2t`, `t2d` where the vocabulary is a
part of the target's. `config.json` names the layers of the target twice, because
engines count differently: `eagle_config` has the layers whose outputs are read, from 0
(SGLang), and `eagle_aux_hidden_state_layer_ids` those whose inputs they are (vLLM).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax._leaves import path_string
from angeljax.models import DecoderConfig
from angeljax.models.config import ModelError
from angeljax.models.hf import read_json, read_tensors
from angeljax.speculative._eagle_config import EagleConfig, default_layers
from angeljax.speculative._eagle_head import EXIT_SIGNALS, Params, eagle_ids, shapes

# Names of the same class: SGLang and vLLM know the first, AngelSlim writes the second.
ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")


def save_eagle(
    path: str | os.PathLike[str],
    config: EagleConfig,
    params: Params,
    *,
    scales: Any = None,
    dtype: Any = jnp.bfloat16,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a head as `model.safetensors` and `config.json`.

    Args:
      path: a folder, made if it is missing.
      config: of the head.
      params: its parameters, dense. Outputs for `SpecExit` become more rows of
        `fc.weight`, as AngelSlim has them; other engines load only heads without.
      scales: float `[3 * target_hidden_size]` that features are multiplied by before
        `fc`; they become part of it.
      dtype: of the floating-point tensors.
      notes: JSON values kept under `angeljax`, such as the tau that was measured.

    Returns:
      The folder.

    Raises:
      ValueError: parameters are missing or have other shapes than `config` says.

    Example:
      >>> import jax, tempfile
      >>> from angeljax.models import DecoderConfig
      >>> from angeljax.speculative import (
      ...     EagleConfig, init_eagle, load_eagle, save_eagle)
      >>> target = DecoderConfig(
      ...     model_type="llama", vocab_size=64, hidden_size=32, num_layers=8,
      ...     intermediate_size=64, num_heads=2, num_kv_heads=1, head_dim=16,
      ... )
      >>> config = EagleConfig.of(target)
      >>> folder = tempfile.mkdtemp()
      >>> head = init_eagle(config, jax.random.key(0))
      >>> load_eagle(save_eagle(folder, config, head), target)[0] == config
      True
    """
    from safetensors.flax import save_file

    _check_shapes(config, params)
    ids = eagle_ids(params)
    if scales is not None:
        kernel = jnp.asarray(scales, jnp.float32)[:, None] * params["fc"]["kernel"]
        params = {**params, "fc": {"kernel": kernel}}
    if (signals := params.get("exit")) is not None:
        kernel = jnp.asarray(signals["kernel"], jnp.float32)
        if scales is not None:
            kernel = jnp.asarray(scales, jnp.float32)[:, None] * kernel
        wide = jnp.concatenate([params["fc"]["kernel"], kernel], axis=1)
        params = {k: v for k, v in params.items() if k != "exit"}
        params["fc"] = {"kernel": wide}
    tensors: dict[str, jax.Array] = {}
    dense = {k: v for k, v in params.items() if k != "d2t"}
    for where, leaf in jax.tree_util.tree_leaves_with_path(dense):
        *names, last = path_string(where).split("/")
        leaf = jnp.asarray(leaf).astype(dtype)
        leaf = leaf.T if last == "kernel" else leaf
        tensors[".".join([*names, "weight"])] = jnp.asarray(leaf)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if ids is not None:
        arrays = _maps(config, np.asarray(ids))
        _save_numpy(path / "model.safetensors", tensors, arrays)
    else:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(_config_json(config, dtype, notes), indent=2) + "\n"
    (path / "config.json").write_text(text, encoding="utf-8")
    return path


def _save_numpy(file: Path, tensors: Any, maps: dict[str, np.ndarray]) -> None:
    # int64 is no array of JAX without a global switch.
    from safetensors.numpy import save_file

    host = {name: np.asarray(x) for name, x in tensors.items()}
    save_file({**host, **maps}, file, metadata={"format": "pt"})


def _maps(config: EagleConfig, ids: np.ndarray) -> dict[str, np.ndarray]:
    known = np.zeros(config.vocab_size, bool)
    known[ids] = True
    return {"d2t": (ids - np.arange(len(ids))).astype(np.int64), "t2d": known}


def _config_json(
    config: EagleConfig, dtype: Any, notes: Mapping[str, Any] | None
) -> dict[str, Any]:
    layers = list(config.target_layers)
    found: dict[str, Any] = {
        "architectures": [ARCHITECTURES[0]],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": dict(config.rope_scaling) or None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": jnp.dtype(dtype).name,
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": layers,
        },
        "eagle_aux_hidden_state_layer_ids": [i + 1 for i in layers],
    }
    own = dict(notes or {})
    if config.rope_factors:
        own["rope_factors"] = list(config.rope_factors)
    if own:
        found["angeljax"] = own
    return found


def load_eagle(
    path: str | os.PathLike[str],
    target: DecoderConfig,
    *,
    dtype: Any = jnp.float32,
    target_layers: tuple[int, ...] | None = None,
) -> tuple[EagleConfig, Params]:
    """Reads a head of SGLang, vLLM, SpecForge or AngelSlim.

    Args:
      path: a folder with `config.json` and safetensors files.
      target: configuration of the model that the head was trained for.
      dtype: of the parameters.
      target_layers: layers of the target, for a head whose file does not name them;
        default `default_layers(target.num_layers)`, which is what engines take.

    Returns:
      Configuration and parameters for an `EagleDrafter`. An embedding that the file
      holds is left out where the target's has the same width: it is a copy of it.

    Raises:
      ValueError: a file is missing or damaged, or the head belongs to another target;
        one line.
    """
    folder = Path(path)
    file = folder / "config.json"
    config = _read_config(file, target, target_layers)
    flat: dict[str, np.ndarray] = {}
    for where, _, read in read_tensors(folder, _place):
        # A file is closed when the next begins.
        flat[where[0]] = read()
    params: Params = {}
    for where, shape in jax.tree_util.tree_leaves_with_path(
        shapes(config), is_leaf=lambda x: isinstance(x, tuple)
    ):
        *names, last = path_string(where).split("/")
        key = ".".join([*names, "weight"])
        array = flat.get(key, flat.get(key.replace("midlayer.", "layers.0.")))
        if array is None:
            raise ModelError(f"{folder}: has no tensor {key}")
        array = array.T if last == "kernel" else array
        if names == ["fc"] and array.shape[1] == shape[1] + len(EXIT_SIGNALS):
            more = jnp.asarray(array[:, shape[1] :], dtype)
            params["exit"], array = {"kernel": more}, array[:, : shape[1]]
        if array.shape != shape:
            raise ModelError(
                f"{folder}: {key} has the shape {array.shape[::-1]} and "
                f"config.json says {shape[::-1]}"
            )
        at = params
        for name in names:
            at = at.setdefault(name, {})
        at[last] = jnp.asarray(array, dtype)
    own = flat.get("embed_tokens.weight")
    if config.hidden_size != target.hidden_size and own is not None:
        params["embed_tokens"] = {"embedding": jnp.asarray(own, dtype)}
    config.check_target(target, own_embedding="embed_tokens" in params)
    if (offsets := _offsets(folder)) is not None:
        ids = offsets + np.arange(len(offsets))
        small = offsets.shape == (config.draft_vocab_size,)
        if not small or ids.min() < 0 or ids.max() >= config.vocab_size:
            raise ModelError(
                f"{folder}: d2t must give {config.draft_vocab_size} tokens below "
                f"{config.vocab_size}"
            )
        params["d2t"] = jnp.asarray(offsets, jnp.int32)
    elif config.draft_vocab_size != config.vocab_size:
        raise ModelError(
            f"{folder}: draft_vocab_size={config.draft_vocab_size} of "
            f"{config.vocab_size} tokens needs a tensor d2t"
        )
    return config, params


def _place(name: str) -> tuple[str] | None:
    """Integers are read apart."""
    return None if name in ("d2t", "t2d") else (name,)


def _offsets(folder: Path) -> np.ndarray | None:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as f:
            if "d2t" in f.keys():  # noqa: SIM118 (no mapping)
                return f.get_tensor("d2t")
    return None


def _read_config(
    file: Path, target: DecoderConfig, given: tuple[int, ...] | None
) -> EagleConfig:
    data = read_json(file)
    kinds = data.get("architectures") or [ARCHITECTURES[0]]
    if not set(kinds) & set(ARCHITECTURES) or data.get("num_hidden_layers", 1) != 1:
        raise ModelError(
            f"{file}: {kinds} with {data.get('num_hidden_layers', 1)} layers is no "
            f"EAGLE-3 head of one Llama layer ({' or '.join(ARCHITECTURES)})"
        )
    if data.get("norm_before_residual"):
        raise ModelError(f"{file}: norm_before_residual is not supported")
    try:
        # Sizes that a file leaves out are derived as for any decoder.
        plain = DecoderConfig.from_hf({**data, "model_type": "llama"})
    except ModelError as e:
        raise ModelError(f"{file}: {e}") from None
    if plain.attention_bias or plain.output_bias or plain.mlp_bias:
        raise ModelError(f"{file}: a head with biases is not supported")
    extra = data.get("angeljax")
    extra = extra if isinstance(extra, dict) else {}
    return EagleConfig(
        hidden_size=plain.hidden_size,
        intermediate_size=plain.intermediate_size,
        num_heads=plain.num_heads,
        num_kv_heads=plain.num_kv_heads,
        head_dim=plain.head_dim,
        vocab_size=plain.vocab_size,
        draft_vocab_size=data.get("draft_vocab_size") or plain.vocab_size,
        target_hidden_size=data.get("target_hidden_size") or plain.hidden_size,
        target_layers=given or _layers(data) or default_layers(target.num_layers),
        norm_eps=plain.norm_eps,
        rope_theta=plain.rope_theta,
        rope_scaling=plain.rope_scaling,
        rope_factors=tuple(extra.get("rope_factors", ())),
        max_positions=plain.max_positions,
    )


def _layers(data: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Layers whose outputs are read; engines that count inputs are one ahead."""
    own = data.get("eagle_config")
    named = (
        own.get("eagle_aux_hidden_state_layer_ids") if isinstance(own, dict) else None
    )
    if named:
        return tuple(int(i) for i in named)
    inputs = data.get("eagle_aux_hidden_state_layer_ids")
    return tuple(int(i) - 1 for i in inputs) if inputs else None


def _check_shapes(config: EagleConfig, params: Params) -> None:
    for where, shape in jax.tree_util.tree_leaves_with_path(
        shapes(config), is_leaf=lambda x: isinstance(x, tuple)
    ):
        name = path_string(where)
        at: Any = params
        for part in name.split("/"):
            at = at.get(part) if isinstance(at, dict) else None
        if at is None or tuple(getattr(at, "shape", ())) != shape:
            raise ValueError(
                f"{name} must have the shape {shape}, not "
                f"{None if at is None else tuple(at.shape)}"
            )
