"""Packed products that XLA compiles by itself, for every format and device.

On a CPU the weight is expanded a block of rows at a time: the block stays in cache and
the dense weight never exists; only small weights are expanded at once for many tokens,
which is faster and compiles much faster. Elsewhere XLA gets one product to fuse and
schedule: of integers or float8 where both sides are, else of the dtype of the
activations.

Integer products on a CPU run in float32, whose sums of integers are exact below 2^24,
and are added up in int32: CPUs multiply floats many times faster.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _dense
from pallas_kernels._implementation import quantize_activation
from pallas_kernels._weights import Planes, WeightLayout, scales

ORDER = None
_HIGHEST = lax.Precision.HIGHEST
# Elements of a block of float32: it and its packed planes stay in a core's cache.
_BLOCK = 1 << 18
# Parts of the rows that a mesh may split; see `_Cut`.
_PARTS = 8
# Largest integer up to which float32 has all; and largest code of a format of integers,
# its zero subtracted.
_EXACT = 1 << 24
_CODE_TOP = {"t2": 1, "sherry": 1, "int4": 15, "int8": 255}

# Weights and tokens for which a CPU expands a weight at once.
_SMALL, _MANY = 1 << 22, 256


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
    # A small weight and many tokens: one product, and much less to compile.
    small = layout.k * layout.n < _SMALL and x.shape[0] >= _MANY
    on_cpu = _at_once if small and x.dtype != jnp.int8 else _by_blocks
    y = lax.platform_dependent(
        x,
        dict(planes),
        cpu=lambda x, planes: on_cpu(x, planes, layout),
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
    # Sums of integers that float32 may not hold.
    most = layout.k * 128 * _CODE_TOP.get(layout.format, 0)
    integer = x.dtype == jnp.int8 and layout.groups == 1 and most > _EXACT
    planes = {name: _bits(plane) for name, plane in planes.items()}
    if layout.format == "t2":
        x, layout = _by_bytes(x, layout)
    planes, layout = _short_groups(planes, layout)
    cut = _cut(x, layout)
    piece = layout.replace(k=cut.rows, group_size=min(layout.group_size, cut.rows))
    blocks = {name: _blocks(name, p, layout, cut) for name, p in planes.items()}
    fixed = {name: p for name, p in planes.items() if blocks[name] is None}
    moving = {name: p for name, p in blocks.items() if p is not None}
    # Whatever the planes hold beyond K is multiplied by 0.
    x = _split(x, 1, layout, cut, 1)
    y = jnp.zeros((x.shape[0], layout.n), jnp.int32 if integer else jnp.float32)

    def step(i: Any, y: jax.Array) -> jax.Array:
        at = {
            name: lax.dynamic_index_in_dim(p, i, 1, keepdims=False)
            for name, p in moving.items()
        }
        here = {name: p.reshape(-1, layout.n) for name, p in at.items()}
        w = _expand(fixed | here, piece)
        if layout.groups > 1:
            w = w * jnp.repeat(_scales(fixed | here, piece), piece.group_size, axis=0)
        part = lax.dynamic_index_in_dim(x, i, 2, keepdims=False)
        part = part.reshape(-1, cut.rows).astype(jnp.float32)
        new = jnp.dot(part, w, precision=_HIGHEST)
        return y + (new.astype(jnp.int32) if integer else new)

    y = lax.fori_loop(0, cut.blocks, step, y)
    return y * _scales(planes, layout) if layout.groups == 1 else y


class _Cut(NamedTuple):
    """The rows of a weight as `[parts, blocks, size]`; a block is `[:, i]`.

    A weight that is sharded along its inputs is sharded over the parts: every device
    then has a share of every block, and none needs the rows of another.
    """

    parts: int
    blocks: int
    size: int

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return self.parts * self.size


def _cut(x: jax.Array, layout: WeightLayout) -> _Cut:
    unit = _unit(layout)
    units = -(-layout.k // unit)
    parts = math.gcd(units, _PARTS)
    each = units // parts
    # Every block adds to all sums: with many of them, blocks are larger.
    few = x.shape[0] <= 64
    elements = _BLOCK if few else 8 * _BLOCK
    rows = min(elements // max(layout.n, 1), layout.k // (8 if few else 4))
    if x.dtype == jnp.int8 and layout.format in _CODE_TOP:
        rows = min(rows, _EXACT // (128 * _CODE_TOP[layout.format]))
    most = max(1, rows // (unit * parts))
    # Rather a smaller block than a padded copy of the planes.
    size = next((s for s in range(most, most // 2, -1) if each % s == 0), most)
    return _Cut(parts, -(-each // size), size * unit)


def _smallest(layout: WeightLayout) -> int:
    """Rows that the packing of the codes keeps together."""
    return 64 if layout.format == "sherry" and layout.group_stride > 1 else 32


def _unit(layout: WeightLayout) -> int:
    """Rows that stay together: whole units of codes and whole groups."""
    unit = _smallest(layout)
    return unit if layout.groups == 1 else math.lcm(unit, layout.group_size)


def _by_bytes(x: jax.Array, layout: WeightLayout) -> tuple[jax.Array, WeightLayout]:
    """Activations of t2 in the order of its bytes, so that they can be cut anywhere."""
    runs = -(-layout.k // layout.run)
    k = runs * layout.run
    x = jnp.pad(x, ((0, 0), (0, k - layout.k)))
    m = x.shape[0]
    x = x.reshape(m, runs, 4, layout.run // 4).swapaxes(2, 3).reshape(m, k)
    group = k if layout.groups == 1 else layout.group_size
    return x, layout.replace(k=k, group_size=group)


def _short_groups(
    planes: dict[str, jax.Array], layout: WeightLayout
) -> tuple[dict[str, jax.Array], WeightLayout]:
    """Long groups as several shorter ones with the same scale."""
    unit = _smallest(layout)
    group = math.gcd(layout.group_size, unit)
    if layout.groups == 1 or layout.group_size == group or group < unit // 2:
        return planes, layout
    times = layout.group_size // group
    layout = layout.replace(group_size=group)
    for name in planes.keys() & {"scale", "zero"}:
        longer = jnp.repeat(planes[name], times, axis=0)
        planes = {**planes, name: longer[: layout.groups]}
    return planes, layout


def _blocks(
    name: str, plane: jax.Array, layout: WeightLayout, cut: _Cut
) -> jax.Array | None:
    """A plane as `[parts, blocks, rows of it, N]`; None if all blocks share it."""
    if name == "scale2" or (name in ("scale", "zero") and layout.groups == 1):
        return None
    if name in ("scale", "zero"):
        each = layout.group_size
    else:
        each = 32 if name == "high" else layout.per_byte
    return _split(plane, 0, layout, cut, each)


def _split(
    p: jax.Array, axis: int, layout: WeightLayout, cut: _Cut, each: int
) -> jax.Array:
    """An axis with an entry for `each` rows as three, `[parts, blocks, size]`."""
    whole = -(-layout.k // _unit(layout)) * _unit(layout)
    # Entries beyond K mean nothing; those of float8 may be NaN.
    kept = layout.k if each == 1 else whole // each
    p = lax.slice_in_dim(p, 0, min(p.shape[axis], kept), axis=axis)
    p = _pad(p, axis, -(-whole // each))
    shape, rest = p.shape[:axis], p.shape[axis + 1 :]
    p = p.reshape(*shape, cut.parts, whole // each // cut.parts, *rest)
    size = cut.size // each
    p = _pad(p, axis + 1, cut.blocks * size)
    return p.reshape(*shape, cut.parts, cut.blocks, size, *rest)


def _pad(p: jax.Array, axis: int, size: int) -> jax.Array:
    short = [(0, 0)] * p.ndim
    short[axis] = (0, size - p.shape[axis])
    return p if size == p.shape[axis] else jnp.pad(p, short)


def _bits(plane: jax.Array) -> jax.Array:
    """Float8 as bytes: XLA widens what it slices of them, all of it for each block."""
    if plane.dtype.itemsize > 1 or not jnp.issubdtype(plane.dtype, jnp.floating):
        return plane
    return lax.bitcast_convert_type(plane, jnp.uint8)


def _expand(planes: Planes, layout: WeightLayout) -> jax.Array:
    """Codes as float32 `[K, N]`, zero subtracted; float8 comes as bytes."""
    stored = planes["codes"]
    if layout.format == "t2":
        shift = jnp.arange(0, 8, 2, dtype=jnp.uint8)[:, None]
        values = ((stored[:, None] >> shift) & 3).astype(jnp.int8) - 1
        return values.reshape(-1, layout.n).astype(jnp.float32)
    if layout.format in ("nvfp4", "mxfp4"):
        pair = jnp.stack([stored & 15, stored >> 4], axis=1)
        return _e2m1(pair.reshape(-1, layout.n))
    if layout.format == "float8_e5m2":
        return _e5m2(stored)
    if layout.format in ("float8_e4m3", "mxfp8"):
        return _e4m3(stored)
    return _dense.codes(planes, layout).astype(jnp.float32)


def _scales(planes: Planes, layout: WeightLayout) -> jax.Array:
    if layout.format == "nvfp4":
        return _e4m3(planes["scale"]) * planes["scale2"]
    return scales(planes, layout)


# Float8 and float4 as float16 with the same bits at its top end: that conversion is one
# instruction, denormals included.


def _half(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


def _e5m2(b: jax.Array) -> jax.Array:
    return _half(b.astype(jnp.uint16) << 8)


def _e4m3(b: jax.Array) -> jax.Array:
    wide = b.astype(jnp.uint16)
    value = _half((wide & 0x80) << 8 | (wide & 0x7F) << 7) * 256.0
    return jnp.where(wide & 0x7F == 0x7F, jnp.nan, value)


def _e2m1(b: jax.Array) -> jax.Array:
    wide = b.astype(jnp.uint16)
    return _half((wide & 8) << 12 | (wide & 7) << 9) * 16384.0
