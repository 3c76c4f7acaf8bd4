"""What the Triton implementations share: plane order, block sizes and the call.

Order "triton" of a weight [K, N]: `codes` uint8 [N, bytes] (sherry: [N, 4, bytes], a
plane of signs for each lane, and `high` [N, bytes]), K-contiguous and padded to whole
runs. A run of `fields * width` weights is `width` bytes: byte r holds in field f, from
the low bits up, the weight r + f * width. Fields: one byte (int8, float8), two nibbles
(int4, FP4, NF4), four two's complement values of 2 bits (t2), eight groups of four
weights (sherry, one bit a plane). Scales and zeros stay [G, N], float8 ones as bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _dense
from pallas_kernels._implementation import quantize_activation
from pallas_kernels._weights import CANONICAL, Planes, WeightLayout

ORDER = "triton"
# Weights of a field in one byte, and fields of a byte.
_UNIT = {"sherry": 4}
_FIELDS = {"t2": 4, "sherry": 8, "int4": 2, "nvfp4": 2, "mxfp4": 2, "nf4": 2}
_FLOAT8 = {
    "float8_e4m3": jnp.float8_e4m3fn,
    "mxfp8": jnp.float8_e4m3fn,
    "float8_e5m2": jnp.float8_e5m2,
}
# The kernel's name of a format, and what its decoded values must be multiplied by.
_KERNEL_FORMAT = {
    "t2": ("t2", 1 / 64),
    "sherry": ("sherry", 1 / 64),
    "int8": ("int8", 1.0),
    "int4": ("int4", 1 / 16),
    "float8_e4m3": ("e4m3", 1.0),
    "mxfp8": ("e4m3", 1.0),
    "float8_e5m2": ("e5m2", 1.0),
    "nvfp4": ("fp4", 0.5),
    "mxfp4": ("fp4", 0.5),
    "nf4": ("nf4", 1.0),
}
_SCALE_KIND = {"mxfp4": "e8m0", "mxfp8": "e8m0", "nvfp4": "e4m3"}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes of one launch, warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    unroll: bool


def width(layout: WeightLayout) -> int | None:
    """Bytes in a run; None if scale groups are too short or ragged for any.

    A tile of k must lie in one scale group. Wider runs mean longer loads, but never
    more padding than the narrowest fit has.
    """
    unit = _UNIT.get(layout.format, 1)
    fits = [
        w
        for w in (32, 64, 128, 16)
        if layout.groups == 1 or layout.group_size % (unit * w) == 0
    ]
    if not fits:
        return None
    return max(w for w in fits if _rows(layout, w) <= _rows(layout, fits[0]))


def _rows(layout: WeightLayout, width: int) -> int:
    """Bytes along K of the prepared codes."""
    tile = _UNIT.get(layout.format, 1) * _FIELDS.get(layout.format, 1) * width
    return -(-layout.k // tile) * width


@functools.cache
def library() -> Any:
    """The module `jax_triton`, imported on use.

    Raises:
      ImportError: it is not installed.
    """
    # jax-triton 0.4 takes two names of triton 3.7 to mean that there is a CUDA backend.
    # They only matter for tensor descriptors, which nothing here uses.
    import triton.backends.nvidia.driver as driver

    for name, value in (("TMA_TF32", 0), ("TMA_DTYPE_DEVICE_TO_HOST", {})):
        if not hasattr(driver, name):
            setattr(driver, name, value)
    import jax_triton

    return jax_triton


def missing() -> str | None:
    """One clause if this process cannot run Triton kernels."""
    if importlib.util.find_spec("jax_triton") is None:
        return "jax-triton is not installed (pip install jax-triton)"
    if jax.default_backend() != "gpu":
        return "there is no GPU here"
    return None


def unsupported(x: Any, layout: WeightLayout, activation: str | None) -> str | None:
    """One clause if this product is left out; see `_implementation`."""
    if width(layout) is None:
        least = 16 * _UNIT.get(layout.format, 1)
        return (
            f"scale groups of {layout.group_size} weights are no multiple of {least}, "
            f"as {layout.format} needs here"
        )
    if layout.k > 131072:
        return "K is over 131072, where int32 sums may overflow"
    if x is None:
        return None
    dtype = jnp.dtype(x.dtype)
    if activation is None and dtype not in (jnp.bfloat16, jnp.float16, jnp.int8):
        return f"{dtype} activations (it takes bfloat16, float16 and int8)"
    if not x.shape[0] or not layout.n or not layout.k:
        return "an empty product"
    return missing()


def blocks(
    m: int, n: int, layout: WeightLayout, itemsize: int, capability: int
) -> Blocks:
    """Tile sizes by shape, format, size of the multiplied elements, and GPU.

    Shared memory binds on Ada: 99 KiB. Registers bind everywhere, above all with scale
    groups, which need a second accumulator.
    """
    wide = width(layout)
    assert wide is not None
    sherry = layout.format == "sherry"
    if capability < 80:
        return Blocks(1, 16, min(wide, 64), 4, 1, True)
    if m <= 16:
        # Latency of the loads binds: small tiles, so that every processor has some.
        k = min(wide, 32 if sherry else 128)
        return Blocks(16, 64 if n >= 8192 else 32, k, 4, 3, True)
    if sherry:
        return Blocks(32 if m <= 32 else 64, 64, min(wide, 32), 4, 2, False)
    k = min(wide, 64)
    if m <= 64:
        return Blocks(32 if m <= 32 else 64, 64, k, 4, 3, False)
    return Blocks(64 if m <= 128 else 128, 128, k, 8, 3, False)


def prepare(planes: Planes, layout: WeightLayout) -> tuple[Planes, WeightLayout]:
    """Canonical planes into the order "triton". Stored padding is kept within runs."""
    run = width(layout)
    assert run is not None
    out = dict(planes)
    codes = planes["codes"]
    if layout.format == "sherry":
        bits = _bits(codes).reshape(-1, 4, 8, layout.n).transpose(1, 0, 2, 3)
        lanes = [_pack(b.reshape(-1, layout.n), layout, run) for b in bits]
        out["codes"] = jnp.stack(lanes, axis=1)
        high = _bits(planes["high"]).reshape(-1, layout.n)
        out["high"] = _pack(high, layout, run)
    else:
        if layout.format == "t2":
            rows = layout.run // 4
            shift = jnp.arange(0, 8, 2, dtype=jnp.uint8)[:, None, None]
            fields = (codes.reshape(-1, 1, rows, layout.n) >> shift) & 3
            codes = (fields.reshape(-1, layout.n) - jnp.uint8(1)) & 3
        elif layout.per_byte == 2:
            codes = jnp.stack([codes & 15, codes >> 4], 1).reshape(-1, layout.n)
        out["codes"] = _pack(_bytes(codes), layout, run)
    out["scale"] = _bytes(planes["scale"]) if layout.format == "nvfp4" else out["scale"]
    return out, layout.replace(order=ORDER)


def restore(planes: Planes, layout: WeightLayout) -> tuple[Planes, WeightLayout]:
    """Planes of the order "triton" as they were before `prepare`."""
    run = width(layout)
    assert run is not None
    out = dict(planes)
    if layout.format == "sherry":
        words = -(-layout.k // 32)
        if layout.group_stride == 16:
            words = -(-layout.k // 64) * 2
        lanes = [_unpack(planes["codes"][:, p], layout, run) for p in range(4)]
        bits = jnp.stack(lanes)[:, : words * 8].reshape(4, words, 8, layout.n)
        out["codes"] = _unbits(bits.transpose(1, 0, 2, 3).reshape(-1, 8, layout.n))
        high = _unpack(planes["high"], layout, run)[: words * 8]
        out["high"] = _unbits(high.reshape(words, 8, layout.n))
    else:
        values = _unpack(planes["codes"], layout, run)
        if layout.format == "t2":
            stored = (values[: -(-layout.k // layout.run) * layout.run] + 1) & 3
            fields = stored.reshape(-1, 4, layout.run // 4, layout.n)
            shift = jnp.arange(0, 8, 2, dtype=jnp.uint8)[:, None, None]
            shifted = (fields << shift).sum(1, dtype=jnp.uint8)
            out["codes"] = shifted.reshape(-1, layout.n)
        elif layout.per_byte == 2:
            pairs = values[: -(-layout.k // 2) * 2].reshape(-1, 2, layout.n)
            out["codes"] = pairs[:, 0] | (pairs[:, 1] << 4)
        else:
            dtype = _FLOAT8.get(
                layout.format, jnp.int8 if layout.symmetric else jnp.uint8
            )
            out["codes"] = jax.lax.bitcast_convert_type(values[: layout.k], dtype)
    if layout.format == "nvfp4":
        out["scale"] = jax.lax.bitcast_convert_type(planes["scale"], jnp.float8_e4m3fn)
    return out, layout.replace(order=CANONICAL)


def _bytes(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint8)


def _bits(stored: jax.Array) -> jax.Array:
    """Bits of bytes `[B, N]`, low bit first: `[B, 8, N]`."""
    return (stored[:, None] >> jnp.arange(8, dtype=jnp.uint8)[:, None]) & 1


def _unbits(bits: jax.Array) -> jax.Array:
    shifted = bits << jnp.arange(8, dtype=jnp.uint8)[:, None]
    return shifted.sum(-2, dtype=jnp.uint8)


def _pack(values: jax.Array, layout: WeightLayout, run: int) -> jax.Array:
    """Small numbers `[items, N]` into the bytes `[N, rows]` of padded runs."""
    fields = _FIELDS.get(layout.format, 1)
    items = _rows(layout, run) * fields
    values = jnp.pad(values[:items], ((0, max(items - values.shape[0], 0)), (0, 0)))
    values = values.reshape(-1, fields, run, layout.n)
    shift = jnp.arange(0, 8, 8 // fields, dtype=jnp.uint8)[:, None, None]
    packed = (values << shift).sum(1, dtype=jnp.uint8)
    return packed.reshape(-1, layout.n).T


def _unpack(stored: jax.Array, layout: WeightLayout, run: int) -> jax.Array:
    fields = _FIELDS.get(layout.format, 1)
    shift = jnp.arange(0, 8, 8 // fields, dtype=jnp.uint8)[:, None, None]
    rows = stored.T.reshape(-1, 1, run, layout.n)
    values = (rows >> shift) & jnp.uint8(2 ** (8 // fields) - 1)
    return values.reshape(-1, layout.n)


def matmul(
    x: jax.Array,
    planes: Planes,
    layout: WeightLayout,
    *,
    x_scale: jax.Array | None,
    bias: jax.Array | None,
    activation: str | None,
    out_dtype: Any,
    capability: int | None = None,
) -> jax.Array:
    """`x [M, K]` times prepared planes.

    Args:
      x: bfloat16, float16 or int8.
      planes: of the order "triton".
      layout: theirs.
      x_scale: float32 [M, 1] for int8 `x`.
      bias: [N].
      activation: "int8" quantizes float `x` first.
      out_dtype: of the result.
      capability: of the GPU to compile for, such as 80; default that of the device.

    Returns:
      [M, N].
    """
    if activation == "int8" and x.dtype != jnp.int8:
        x, x_scale = quantize_activation(x)
    if capability is None:
        major, minor = str(jax.devices()[0].compute_capability).split(".")
        capability = 10 * int(major) + int(minor)
    if layout.format == "sherry":
        x = _by_lanes(x, layout)
    options, tile = plan(x, layout, capability)
    full = dict(planes, x=x, x_scale=x_scale, bias=bias)
    full["levels"] = (
        jnp.asarray(_dense.NF4_LEVELS, jnp.float32) if layout.format == "nf4" else None
    )
    names = (
        "x",
        "codes",
        "high",
        "scale",
        "scale2",
        "zero",
        "levels",
        "x_scale",
        "bias",
    )
    # Arrays that are not there are not read; the kernel needs a pointer all the same.
    arrays = [planes["scale"] if full.get(n) is None else full[n] for n in names]
    from pallas_kernels import _triton_kernel

    return library().triton_call(
        *arrays,
        x.shape[0],
        kernel=_triton_kernel.packed_matmul,
        out_type=jax.ShapeDtypeStruct((x.shape[0], layout.n), out_dtype),
        grid=(-(-x.shape[0] // tile.m) * -(-layout.n // tile.n),),
        name=f"{layout.format}_matmul",
        num_warps=tile.warps,
        num_stages=tile.stages,
        compute_capability=capability,
        **dict(
            options,
            HAS_SCALE2="scale2" in planes,
            HAS_X_SCALE=x_scale is not None,
            HAS_BIAS=bias is not None,
        ),
    )


def _by_lanes(x: jax.Array, layout: WeightLayout) -> jax.Array:
    """`x [M, K]` padded to whole runs, in each the first weights of all groups, then
    the second ones, ...: what the planes of lanes meet."""
    run = width(layout)
    assert run is not None
    m = x.shape[0]
    x = jnp.pad(x, ((0, 0), (0, _rows(layout, run) * 32 - x.shape[1])))
    if layout.group_stride == 1:
        return x.reshape(m, -1, 8 * run, 4).swapaxes(2, 3).reshape(m, -1)
    return x.reshape(m, -1, run // 2, 4, 16).swapaxes(2, 3).reshape(m, -1)


def plan(
    x: Any, layout: WeightLayout, capability: int
) -> tuple[dict[str, Any], Blocks]:
    """Constants (but for what arrays there are) and tiles of one launch.

    Args:
      x: the activations as the kernel gets them; only shape and dtype matter.
      layout: of prepared planes.
      capability: of the GPU.

    Returns:
      Constants of `_triton_kernel.packed_matmul`, and tile sizes.
    """
    import triton.language as tl

    run = width(layout)
    assert run is not None
    fmt, factor = _KERNEL_FORMAT[layout.format]
    if not layout.symmetric:
        fmt, factor = {"int4": "uint4", "int8": "uint8"}[fmt], 1.0
    sherry = fmt == "sherry"
    grouped = layout.groups > 1
    dtype = {jnp.bfloat16: tl.bfloat16, jnp.float16: tl.float16}.get(
        jnp.dtype(x.dtype).type, tl.int8
    )
    if dtype == tl.int8 and (run < 32 or fmt in ("e4m3", "e5m2", "nf4")):
        # Integers up to 127 are exact in float16 too.
        dtype = tl.float16
    if fmt == "e4m3" and dtype == tl.float16 and capability >= 80:
        factor = 256.0
    itemsize = 1 if dtype == tl.int8 else 2
    tile = blocks(x.shape[0], layout.n, layout, itemsize, capability)
    fields = 4 if sherry else _FIELDS.get(layout.format, 1)
    rows = _rows(layout, run)
    options = dict(
        N=layout.n,
        ROW_BYTES=rows,
        X_STRIDE=x.shape[1],
        GROUP=layout.group_size,
        GROUPS=layout.groups,
        FORMAT=fmt,
        DTYPE=dtype,
        SCALE_KIND=_SCALE_KIND.get(layout.format, "float"),
        FACTOR=factor,
        FIELDS=fields,
        WIDTH=run,
        GROUPED=grouped,
        EVEN_K=sherry or rows * fields == layout.k,
        UNROLL=tile.unroll,
        DOT=capability >= 80,
        BM=tile.m,
        BN=tile.n,
        BK=tile.k,
    )
    return options, tile
