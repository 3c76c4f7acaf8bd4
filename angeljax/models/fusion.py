"""Between projections side by side in one kernel and projections of their own.

A fused layer has `attn/qkv_proj` for q, k and v and `mlp/gate_up_proj` for gate and up,
so that one product serves them. Outputs are joined along the last axis, biases too.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.formats import QTensor
from angeljax.formats._blocks import GRANULE_PLANES
from angeljax.models.config import DecoderConfig

# module: (fused name, its parts in order)
PROJECTIONS = {
    "attn": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "mlp": ("gate_up_proj", ("gate_proj", "up_proj")),
}
_LEAVES = {"kernel", "bias"}


def fuse_projections(params: dict[str, Any]) -> dict[str, Any]:
    """One kernel for q, k and v, and one for gate and up, in every layer.

    Pure: works under `jit` and `jax.eval_shape`, on numbered layers and on a stack.
    QTensors are joined packed, without a change of any value, where their specs differ
    in nothing but the number of outputs. Scales for a whole tensor become scales for
    each channel on the way. NVFP4 has a scale for the tensor beside those of its
    blocks, in which no two kernels agree: compress such a model after fusing it.

    Args:
      params: the tree of a model with `fused=False`, compressed or not.

    Returns:
      The tree for the same model with `fused=True`. Leaves that are not fused are those
      of `params`.

    Raises:
      ValueError: a projection is missing, or two of them cannot be joined; names them.

    Example:
      >>> import dataclasses, jax, jax.numpy as jnp
      >>> from angeljax.models import DecoderConfig, LanguageModel, fuse_projections
      >>> config = DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=2,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... )
      >>> model = LanguageModel(config)
      >>> params = fuse_projections(model.init(jax.random.key(0)))
      >>> params["layers"][0]["attn"]["qkv_proj"]["kernel"].shape
      (16, 32)
      >>> fused = dataclasses.replace(model, fused=True)
      >>> fused.logits(params, jnp.zeros((1, 4), jnp.int32)).shape
      (1, 4, 32)
    """

    def fuse(module: dict[str, Any], path: str, kind: str) -> dict[str, Any]:
        name, parts = PROJECTIONS[kind]
        missing = [part for part in parts if part not in module]
        if missing:
            why = "fused already" if name in module else "nothing to fuse"
            raise ValueError(f"no {path}/{missing[0]} in the params: {why}")
        for part in parts:
            _check_leaves(module[part], f"{path}/{part}")
            if set(module[part]) != set(module[parts[0]]):
                raise ValueError(f"only one of {path}/{part} and {parts[0]} has a bias")
        fused = {
            leaf: _join([module[p][leaf] for p in parts], _name(path, parts, leaf))
            for leaf in module[parts[0]]
        }
        rest = {key: value for key, value in module.items() if key not in parts}
        return {name: fused, **rest}

    return _map_modules(params, fuse)


def split_projections(params: dict[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """Inverse of `fuse_projections`.

    Of a QTensor each part gets its own outputs of every plane and a copy of the scales
    that all outputs share, so that no value changes. Scales that `fuse_projections` has
    spread over the channels stay spread.

    Args:
      params: the tree of a model with `fused=True`, compressed or not.
      config: of the model.

    Returns:
      The tree for the same model with `fused=False`.

    Raises:
      ValueError: a fused projection is missing, has another width than the
        configuration says, or has blocks of scales that reach over two parts.

    Example:
      >>> import jax
      >>> from angeljax.models import DecoderConfig, LanguageModel, split_projections
      >>> config = DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=2,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... )
      >>> params = LanguageModel(config, fused=True).init(jax.random.key(0))
      >>> params = split_projections(params, config)
      >>> params["layers"][1]["attn"]["v_proj"]["kernel"].shape
      (16, 8)
    """
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    widths = {"attn": (q, kv, kv), "mlp": (config.intermediate_size,) * 2}

    def split(module: dict[str, Any], path: str, kind: str) -> dict[str, Any]:
        name, parts = PROJECTIONS[kind]
        if name not in module:
            raise ValueError(f"no {path}/{name} in the params: nothing to split")
        _check_leaves(module[name], f"{path}/{name}")
        pieces = {
            leaf: _split(value, widths[kind], f"{path}/{name}/{leaf}")
            for leaf, value in module[name].items()
        }
        apart = {
            part: {leaf: pieces[leaf][i] for leaf in pieces}
            for i, part in enumerate(parts)
        }
        return {**apart, **{key: v for key, v in module.items() if key != name}}

    return _map_modules(params, split)


def _map_modules(
    params: dict[str, Any], function: Callable[[dict[str, Any], str, str], Any]
) -> dict[str, Any]:
    """Applies `function(module, path, kind)` to `attn` and `mlp` of every layer."""

    def layer(tree: dict[str, Any], path: str) -> dict[str, Any]:
        for kind in PROJECTIONS:
            if kind not in tree:
                raise ValueError(f"no {path}/{kind} in the params: not of this decoder")
        done = {k: function(tree[k], f"{path}/{k}", k) for k in PROJECTIONS}
        return {key: done.get(key, value) for key, value in tree.items()}

    if not isinstance(params.get("layers"), dict):
        raise ValueError("no layers in the params: not of this decoder")
    layers = params["layers"]
    if all(str(key).isdigit() for key in layers):
        layers = {i: layer(tree, f"layers/{i}") for i, tree in layers.items()}
    else:
        layers = layer(layers, "layers")
    return {**params, "layers": layers}


def _name(path: str, parts: Sequence[str], leaf: str) -> str:
    return f"{path}/{{{','.join(parts)}}}/{leaf}"


def _check_leaves(module: dict[str, Any], path: str) -> None:
    odd = set(module) - _LEAVES
    if odd:
        raise ValueError(f"{path}/{min(odd)}: only a kernel and a bias can be fused")


def _join(parts: list[Any], name: str) -> Any:
    packed = [isinstance(part, QTensor) for part in parts]
    if all(packed):
        return _join_packed(parts, name)
    if any(packed):
        raise ValueError(f"{name}: some are compressed and some are not")
    if len({jnp.dtype(part.dtype) for part in parts}) > 1:
        dtypes = ", ".join(str(part.dtype) for part in parts)
        raise ValueError(f"{name}: cannot join {dtypes}")
    return jnp.concatenate(parts, axis=-1)


def _join_packed(parts: list[QTensor], name: str) -> QTensor:
    for part in parts:
        _check_outputs_last(part, name)
    parts = [_per_channel(part) for part in parts]
    first = parts[0].spec
    shape = (*first.shape[:-1], sum(part.spec.shape[-1] for part in parts))
    spec = dataclasses.replace(first, shape=shape)
    for part in parts:
        outputs = (*part.spec.shape[:-1], shape[-1])
        if dataclasses.replace(part.spec, shape=outputs) != spec:
            one, other = first.label(), part.spec.label()
            how = f"{one} and {other}" if one != other else f"{one} of two kinds"
            raise ValueError(f"{name}: cannot join {how}; compress them alike")
    # The scale of the inputs, which are the same for all parts.
    scales = [p.planes["input_scale"] for p in parts if "input_scale" in p.planes]
    if len(scales) not in (0, len(parts)):
        raise ValueError(
            f"{name}: cannot join static and dynamic activations; compress them alike"
        )
    parts = [_without(part, "input_scale") for part in parts]
    for part in parts:
        shared = [n for n, p in part.planes.items() if _shared(n, p, part)]
        if shared:
            raise ValueError(
                f"{name}: {spec.format} has one {shared[0]} for each kernel; compress "
                "the fused kernel instead"
            )
    for part in parts[:-1]:
        _check_boundary(part.spec.shape[-1], spec.out_block, name)
    planes = {
        plane: jnp.concatenate([part.planes[plane] for part in parts], axis=-1)
        for plane in parts[0].planes
    }
    if scales:
        planes["input_scale"] = functools.reduce(jnp.maximum, scales)
    return QTensor(planes=planes, spec=spec)


def _split(value: Any, widths: Sequence[int], name: str) -> list[Any]:
    if value.shape[-1] != sum(widths):
        raise ValueError(
            f"{name} has {value.shape[-1]} outputs, the configuration says "
            f"{' + '.join(map(str, widths))}"
        )
    ends = list(itertools.accumulate(widths))
    if not isinstance(value, QTensor):
        return jnp.split(value, ends[:-1], axis=-1)
    _check_outputs_last(value, name)
    block = value.spec.out_block
    for end in ends[:-1]:
        _check_boundary(end, block, name)

    def piece(plane: str, array: jax.Array, start: int, end: int) -> jax.Array:
        if _shared(plane, array, value):
            return array
        if plane in GRANULE_PLANES and block > 1:
            return array[..., start // block : -(-end // block)]
        return array[..., start:end]

    pieces = []
    for start, end in zip([0, *ends], ends, strict=False):
        spec = dataclasses.replace(
            value.spec, shape=(*value.spec.shape[:-1], end - start)
        )
        planes = {n: piece(n, p, start, end) for n, p in value.planes.items()}
        pieces.append(QTensor(planes=planes, spec=spec))
    return pieces


def _check_outputs_last(part: QTensor, name: str) -> None:
    if part.spec.axis != (-2,):
        raise ValueError(
            f"{name}: packed along axis {part.spec.axis}; only kernels [in, out] "
            "packed along axis -2 can be fused or split"
        )


def _check_boundary(end: int, block: int, name: str) -> None:
    if block > 1 and end % block:
        raise ValueError(
            f"{name}: blocks of {block} outputs do not end at output {end}"
        )


def _shared(name: str, plane: jax.Array, part: QTensor) -> bool:
    """Whether a plane has one entry for all outputs."""
    if name not in GRANULE_PLANES:
        return False
    if name == "input_scale":
        return True
    return part.spec.out_block == 0 or (name == "scale2" and plane.shape[-1] == 1)


def _without(part: QTensor, plane: str) -> QTensor:
    planes = {n: p for n, p in part.planes.items() if n != plane}
    return QTensor(planes=planes, spec=part.spec)


def _per_channel(part: QTensor) -> QTensor:
    """The same values with scales for each channel instead of the whole tensor."""
    if part.spec.granularity != "tensor":
        return part
    codes = part.planes["codes"].shape
    planes = {
        name: jnp.broadcast_to(plane, (*codes[:-2], plane.shape[-2], codes[-1]))
        if name in GRANULE_PLANES and name != "input_scale"
        else plane
        for name, plane in part.planes.items()
    }
    spec = dataclasses.replace(part.spec, granularity="channel", out_block=1)
    return QTensor(planes=planes, spec=spec)
