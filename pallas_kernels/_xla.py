"""Packed products that XLA compiles by itself, for every format and device.

On a CPU the weight is expanded a block of rows at a time: the block stays in cache and
the dense weight never exists. Elsewhere XLA gets one product to fuse and schedule: of
integers or float8 where both sides are, else of the dtype of the activations.

Integer products on a CPU run in float32, whose sums of integers are exact below 2^24,
and are added up in int32: CPUs multiply floats many times faster.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _dense
from pallas_kernels._implementation import quantize_activation
from pallas_kernels._weights import Planes, WeightLayout, scales

ORDER = None
_HIGHEST = lax.Precision.HIGHEST
# Elements of a block of float32: it and its packed planes stay in a core's cache.
_BLOCK = 1 << 20
# Largest code of a format of integers, its zero subtracted.
_CODE_TOP = {"t2": 1, "sherry": 1, "int4": 15, "int8": 255}


def unsupported(x: Any, layout: WeightLayout, activation: str | None) -> str | None:
    """Nothing is."""
    del x, layout, activation
    return None


def matmul(
    x: jax.Array,
    planes: Planes,
    layout: WeightLayout,
    *,
    x_scale: jax.Array | None,
    bias: jax.Array | None,
    activation: str | None,
    out_dtype: Any,
) -> jax.Array:
    """`x [M, K]` times the weight `[K, N]`."""
    if activation == "int8" and x.dtype != jnp.int8:
        x, x_scale = quantize_activation(x)
    y = lax.platform_dependent(
        x,
        dict(planes),
        cpu=lambda x, planes: _by_blocks(x, planes, layout),
        default=lambda x, planes: _at_once(x, planes, layout),
    )
    if x_scale is not None:
        y = y * x_scale
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(out_dtype)


def _at_once(x: jax.Array, planes: Planes, layout: WeightLayout) -> jax.Array:
    """float32 `[M, N]` by one product."""
    scale = scales(planes, layout)
    if layout.groups == 1:
        codes = _dense.codes(planes, layout)
        stored = planes["codes"].dtype
        if x.dtype == jnp.int8 and codes.dtype == jnp.int8:
            return jnp.dot(x, codes, preferred_element_type=jnp.int32) * scale
        if x.dtype == stored:  # float8 by float8
            stored_codes = planes["codes"][: layout.k]
            y = jnp.dot(x, stored_codes, preferred_element_type=jnp.float32)
            return y * scale
        # Codes are exact in 16 bits: scales may come after the sum.
        return _dot(x, codes.astype(_compute_dtype(x))) * scale
    return _dot(x, _dense.dense(planes, layout, _compute_dtype(x)))


def _compute_dtype(x: jax.Array) -> Any:
    return x.dtype if x.dtype in (jnp.bfloat16, jnp.float16) else jnp.float32


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    exact = w.dtype == jnp.float32
    return jnp.dot(
        x.astype(w.dtype),
        w,
        precision=_HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def _by_blocks(x: jax.Array, planes: Planes, layout: WeightLayout) -> jax.Array:
    """float32 `[M, N]`, expanding some rows of the weight at a time."""
    rows, count = _rows(x, layout)
    integer = x.dtype == jnp.int8 and layout.format in _CODE_TOP and layout.groups == 1
    # Whatever the planes hold beyond K is multiplied by 0.
    x = jnp.pad(x, ((0, 0), (0, rows * count - layout.k)))
    piece = layout.replace(k=rows, group_size=min(layout.group_size, rows))
    cut = {name: _blocks(name, p, layout, rows, count) for name, p in planes.items()}
    fixed = {name: p for name, p in planes.items() if cut[name] is None}
    moving = {name: p for name, p in cut.items() if p is not None}

    def step(i: Any, y: jax.Array) -> jax.Array:
        here = fixed | {name: p[i] for name, p in moving.items()}
        part = lax.dynamic_slice_in_dim(x, i * rows, rows, 1).astype(jnp.float32)
        if layout.groups == 1:
            w = _dense.codes(here, piece).astype(jnp.float32)
        else:
            w = _dense.dense(here, piece)
        new = jnp.dot(part, w, precision=_HIGHEST)
        return y + (new.astype(jnp.int32) if integer else new)

    zero = jnp.zeros((x.shape[0], layout.n), jnp.int32 if integer else jnp.float32)
    y = lax.fori_loop(0, count, step, zero)
    return y * scales(planes, layout) if layout.groups == 1 else y


def _rows(x: jax.Array, layout: WeightLayout) -> tuple[int, int]:
    """Rows of a block and the number of blocks."""
    unit = {"t2": layout.run, "sherry": 32 if layout.group_stride == 1 else 64}.get(
        layout.format, layout.per_byte
    )
    if layout.groups > 1:
        unit = math.lcm(unit, layout.group_size)
    most = max(1, min(_BLOCK // max(layout.n, 1), -(-layout.k // 8)))
    rows = max(unit, most // unit * unit)
    if x.dtype == jnp.int8 and layout.format in _CODE_TOP:
        exact = (1 << 24) // (128 * _CODE_TOP[layout.format])
        rows = min(rows, max(unit, exact // unit * unit))
    return rows, -(-layout.k // rows)


def _blocks(
    name: str, plane: jax.Array, layout: WeightLayout, rows: int, count: int
) -> jax.Array | None:
    """A plane as `[count, rows of it, N]`; None if all blocks share it."""
    if name == "scale2" or (name in ("scale", "zero") and layout.groups == 1):
        return None
    if name in ("scale", "zero"):
        each = rows // layout.group_size
    else:
        each = rows // (32 if name == "high" else layout.per_byte)
    plane = plane[: count * each]
    short = count * each - plane.shape[0]
    return jnp.pad(plane, ((0, short), (0, 0))).reshape(count, each, -1)
