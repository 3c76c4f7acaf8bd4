"""From the options of a rule and the shape of a leaf to a `Spec`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from angeljax.formats._registry import Format, get_format
from angeljax.formats._rotation import resolve_rotation
from angeljax.formats._spec import Spec

SCALE_DTYPES = ("float32", "bfloat16", "float16")
GRANULARITIES = ("tensor", "channel", "group", "block")
BLOCK = 128


def check_options(
    fmt: Format,
    *,
    granularity: str | None,
    group_size: int | None,
    scale_dtype: str | None,
    options: Mapping[str, Any],
) -> tuple[str, int]:
    """Validates options that need no array; returns (granularity, group size).

    Raises:
      ValueError: names the option and what the format takes.
    """
    for name, value in options.items():
        if name not in fmt.options:
            known = ", ".join(fmt.options) or "none"
            raise ValueError(f"format {fmt.name} has no option {name!r} (has: {known})")
        allowed = fmt.options[name]
        if value not in allowed or type(value) is not type(allowed[0]):
            raise ValueError(
                f"option {name}={value!r} of format {fmt.name}: use "
                f"{' or '.join(map(repr, allowed))}"
            )
    if granularity is None:
        granularity = "group" if group_size is not None else fmt.granularities[0]
    if granularity not in fmt.granularities:
        raise ValueError(
            f"format {fmt.name} has no granularity {granularity!r}: "
            f"it takes {', '.join(fmt.granularities)}"
        )
    if group_size is not None and granularity != "group":
        raise ValueError(
            f"group_size={group_size} goes with granularity 'group', "
            f"not {granularity!r}"
        )
    size = fmt.group_size if group_size is None else group_size
    if granularity == "group":
        if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
            raise ValueError(f"group_size must be a positive integer, not {size!r}")
        if fmt.fixed_group and size != fmt.group_size:
            raise ValueError(
                f"format {fmt.name} has groups of {fmt.group_size} by definition, "
                f"group_size={size} does not exist"
            )
        unit = unit_of(fmt, options)
        if size % unit:
            raise ValueError(
                f"format {fmt.name} packs {unit} weights together: "
                f"group_size={size} is not a multiple of {unit}"
            )
    if scale_dtype is not None:
        if fmt.fixed_scale_dtype and scale_dtype != fmt.fixed_scale_dtype:
            raise ValueError(
                f"format {fmt.name} defines its scales as {fmt.fixed_scale_dtype}, "
                f"scale_dtype={scale_dtype!r} does not exist"
            )
        if not fmt.fixed_scale_dtype and scale_dtype not in SCALE_DTYPES:
            raise ValueError(
                f"unknown scale_dtype {scale_dtype!r}: use {', '.join(SCALE_DTYPES)}"
            )
    return granularity, size


def unit_of(fmt: Format, options: Mapping[str, Any]) -> int:
    """Weights in one packed unit; stride-16 groups of Sherry fill 64."""
    return 64 if options.get("group_stride") == 16 else fmt.unit


def resolve_axis(axis: int | tuple[int, ...] | None, ndim: int) -> tuple[int, ...]:
    """Contraction axes as negative, ascending, adjacent indices.

    Raises:
      ValueError: out of range, repeated, or not adjacent.
    """
    axes = (-2,) if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    if not axes or any(not -ndim <= a < ndim for a in axes):
        raise ValueError(f"axis {axis} is out of range for an array of {ndim} axes")
    negative = tuple(sorted(a - ndim if a >= 0 else a for a in axes))
    if negative != tuple(range(negative[0], negative[0] + len(negative))):
        raise ValueError(f"contraction axes {axis} must be distinct and adjacent")
    return negative


def make_spec(
    shape: tuple[int, ...],
    dtype: Any,
    *,
    format: str,
    granularity: str | None = None,
    group_size: int | None = None,
    axis: int | tuple[int, ...] | None = None,
    batch_axes: int | None = None,
    scale_dtype: str | None = None,
    pad: bool = True,
    activation: str | None = None,
    rotation: int | str | None = None,
    **options: Any,
) -> Spec:
    """Resolves options against an array's shape. Touches no data.

    Args:
      shape: the whole shape, batch axes included.
      dtype: float dtype of the array.
      format: a name from `format_names()`.
      granularity: "tensor", "channel", "group" or "block"; default by format.
      group_size: weights along K that share a scale; implies "group".
      axis: contraction axis or adjacent axes; default -2, as in a Flax kernel.
      batch_axes: leading axes with parameters of their own (layers, experts). Default:
        all before the contraction axes, but at least two core axes remain.
      scale_dtype: default bfloat16 for groups, else float32.
      pad: whether a last short group may be padded inside.
      activation: what products quantize their other operand to.
      rotation: size of the blocks in which a Hadamard matrix mixes the inputs, or
        "full" for the largest that there is.
      **options: of the format.

    Returns:
      The spec, with every default filled in.

    Raises:
      ValueError: one line that names what is wrong and what would work.
    """
    fmt = get_format(format)
    granularity, size = check_options(
        fmt,
        granularity=granularity,
        group_size=group_size,
        scale_dtype=scale_dtype,
        options=options,
    )
    dt = jnp.dtype(dtype)
    if not jnp.issubdtype(dt, jnp.floating):
        raise ValueError(
            f"is {dt}: only floating-point weights can be quantized; cast it or skip it"
        )
    if len(shape) < 2:
        raise ValueError(
            f"has shape {tuple(shape)}: a weight needs at least 2 axes; "
            "skip it with a rule `format: none`"
        )
    axes = resolve_axis(axis, len(shape))
    if batch_axes is None:
        batch_axes = max(0, min(len(shape) + axes[0], len(shape) - 2))
    if not 0 <= batch_axes <= len(shape) + axes[0]:
        raise ValueError(
            f"batch_axes={batch_axes} reaches into the contraction axes {axes} "
            f"of shape {tuple(shape)}"
        )
    core = tuple(int(n) for n in shape[batch_axes:])
    if math.prod(shape) == 0:
        raise ValueError(f"has shape {tuple(shape)}: it is empty")
    k = math.prod(core[a] for a in axes)
    unit = unit_of(fmt, options)
    if granularity == "block":
        size = BLOCK
    if granularity in ("group", "block"):
        if k % size and not pad:
            fixed = fmt.fixed_group or granularity == "block"
            other = "" if fixed else f"use a divisor of {k} or "
            raise ValueError(
                f"has {k} weights along the contraction, which group_size={size} does "
                f"not divide: {other}allow padding (pad: true)"
            )
        size = min(size, -(-k // unit) * unit)
    else:
        size = -(-k // unit) * unit
    if len(core) == len(axes) and granularity == "block":
        raise ValueError("granularity 'block' needs an output axis")
    if scale_dtype is None:
        scale_dtype = fmt.fixed_scale_dtype or (
            "bfloat16" if granularity == "group" else "float32"
        )
    full = {name: allowed[0] for name, allowed in fmt.options.items()} | dict(options)
    return Spec(
        format=fmt.name,
        shape=core,
        dtype=dt.name,
        axis=axes,
        granularity=granularity,  # type: ignore[arg-type]
        group_size=size,
        out_block={"tensor": 0, "block": BLOCK}.get(granularity, 1),
        scale_dtype=scale_dtype,
        options=tuple(sorted(full.items())),
        activation=activation,
        rotation=resolve_rotation(rotation, k),
    )
