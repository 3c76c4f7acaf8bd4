"""Block-sparse attention as a Triton kernel, through jax-triton: for NVIDIA GPUs from
Ampere on. Nothing of Triton is imported before a call.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _triton
from pallas_kernels._devices import current_device
from pallas_kernels.block_sparse_attention._lists import BlockLists
from pallas_kernels.block_sparse_attention._steps import steps

_DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Queries of a program, keys of a step, warps and pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


def unsupported(q: Any, k: Any, v: Any, lists: BlockLists) -> str | None:
    """One clause if this cannot run; see `_call`."""
    del k, v
    for name in ("block_q", "block_k"):
        size = getattr(lists, name)
        if size % 16:
            return f"lists.{name} is {size} (it takes multiples of 16)"
    if q.shape[-1] > 256:
        return f"heads of {q.shape[-1]} channels (it takes up to 256)"
    if q.dtype not in _DTYPES:
        return f"q is {q.dtype} (it takes {', '.join(_DTYPES)})"
    found = getattr(current_device(), "compute_capability", None)
    if found is not None and float(found) < 8:
        return f"compute capability {found} (it takes 8.0 and later)"
    return _triton.missing()


def tiles(q: Any, lists: BlockLists, capability: int) -> Tiles:
    """Tile sizes by shape, dtype and GPU.

    Shared memory binds: 99 KiB on consumer GPUs (8.6, 8.9, 12.0), 163 and more on those
    of data centres. So do registers, where the output of a tile stands.
    """
    wide = q.shape[-1] > 128
    if jnp.dtype(q.dtype).itemsize == 4:
        most, stages = (16, 1) if wide else (32, 2)
        return Tiles(_part(lists.block_q, most), _part(lists.block_k, most), 4, stages)
    queries = _part(lists.block_q, 64 if wide else 128)
    keys = _part(lists.block_k, 32 if wide else 64)
    warps = 8 if queries == 128 or (wide and queries == 64) else 4
    small = capability in (86, 89) or capability >= 120
    return Tiles(queries, keys, warps, 2 if small else 3)


def _part(block: int, most: int) -> int:
    """The largest power of two up to `most` that divides a block."""
    return min(block & -block, most)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lists: BlockLists,
    *,
    scale: float,
    q_offset: jax.Array,
    soft_cap: float | None,
    capability: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `_call`.

    Args:
      q, k, v, lists, scale, q_offset, soft_cap: as there.
      capability: of the GPU to compile for, such as 80; default that of the device.
    """
    if capability is None:
        major, minor = str(jax.devices()[0].compute_capability).split(".")
        capability = 10 * int(major) + int(minor)
    tile = tiles(q, lists, capability)
    batch, t, heads, _ = q.shape
    whole, total = steps(
        lists, t, k.shape[1], q_offset, rows=tile.queries, keys=tile.keys
    )
    from pallas_kernels.block_sparse_attention import _triton_kernel

    y, lse = _triton.library().triton_call(
        q, k, v, lists.indices, whole, total, q_offset,
        t, k.shape[1], lists.counts.shape[2], lists.width,
        kernel=_triton_kernel.block_sparse_attention,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, t), jnp.float32),
        ),
        grid=(heads, whole.shape[2], batch),
        name="block_sparse_attention",
        num_warps=tile.warps,
        num_stages=tile.stages,
        compute_capability=capability,
        **constants(q, k, lists, tile, scale, soft_cap),
    )  # fmt: skip
    return y, lse


def constants(
    q: Any,
    k: Any,
    lists: BlockLists,
    tile: Tiles,
    scale: float,
    soft_cap: float | None,
) -> dict[str, Any]:
    """What `_triton_kernel.block_sparse_attention` is specialized for."""
    rows, list_heads = lists.counts.shape[:2]
    dim = q.shape[-1]
    return dict(
        LIST_ROWS=rows,
        LIST_HEADS=list_heads,
        H=q.shape[2],
        HKV=k.shape[2],
        D=dim,
        BD=max(16, 1 << (dim - 1).bit_length()),
        BLOCK_Q=lists.block_q,
        BLOCK_K=lists.block_k,
        BM=tile.queries,
        BN=tile.keys,
        SCALE=scale,
        SOFT_CAP=soft_cap or 0.0,
        # Three products of tensor cores that together are as good as float32.
        PRECISION="tf32x3" if q.dtype == jnp.float32 else None,
    )
