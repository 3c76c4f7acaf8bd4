"""Block-sparse attention on TPUs, in Pallas.

Two kernels. `_tpu_gather` copies several listed blocks at a time into one tile of keys,
up to 1024 of them, as the matrix unit wants them and as the cost of a step demands;
where one block fills a tile, and all lists fit in scalar memory, `_tpu_blocks` takes
one block a step. Query heads that share lists are stacked into one tile of queries:
lists for each key head (as many as `k` has) read K and V once for all of its query
heads, lists for each query head once for each.

On anything but a TPU the same kernels run in Pallas' interpret mode. The compiler takes
them for TPU v4, v5e, v5p, v6e and v7x; they have not been run on one. By its schedule a
tile of 4 x 128 queries and 1024 keys of 128 channels takes 2535 cycles on v5e, where
the matrix units alone need 2048, and 1816 on v6e for 1536.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import _tpu_blocks, _tpu_gather
from pallas_kernels.block_sparse_attention import _tpu_step as step
from pallas_kernels.block_sparse_attention._lists import BlockLists
from pallas_kernels.block_sparse_attention._steps import steps

_VMEM = 12 * 2**20  # of the 16 MiB that a kernel may use; the rest is the compiler's
_SMEM = 2**19  # of 1 MiB
_KEYS = 1024
_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Plan:
    """Heads of a tile of queries, key blocks of a tile of keys, which kernel."""

    heads: int
    gather: int
    by_blocks: bool


def unsupported(q: Any, k: Any, v: Any, lists: BlockLists) -> str | None:
    """One clause if this cannot run; see `_call`."""
    del v
    for name in ("block_q", "block_k"):
        size = getattr(lists, name)
        if size % 16:
            return f"lists.{name} is {size} (it takes multiples of 16)"
    need = _vmem(q, lists, 1, 1)
    if need > _VMEM:
        return (
            f"blocks of {lists.block_q} x {lists.block_k} with heads of {q.shape[-1]} "
            f"channels take {need / 2**20:.0f} MiB of vector memory (it has "
            f"{_VMEM >> 20})"
        )
    return None


def plan(q: Any, k: Any, lists: BlockLists) -> Plan:
    """How to run shapes that `unsupported` lets pass."""
    group = q.shape[2] // k.shape[2]
    if lists.counts.shape[1] > k.shape[2]:
        group = 1  # each query head has lists of its own
    # The largest tile of logits; of two alike, that which reads K and V less often.
    _, heads, gather = max(
        (heads * gather, heads, gather)
        for heads in range(1, group + 1)
        if group % heads == 0 and (heads == 1 or heads * lists.block_q <= _ROWS)
        for gather in _gathers(lists)
        if heads == gather == 1 or _vmem(q, lists, heads, gather) <= _VMEM
    )
    rows = q.shape[0] * lists.counts.shape[1] * lists.counts.shape[2]
    scalars = 4 * (rows * (lists.width + 2) + q.shape[0])
    return Plan(heads, gather, gather == 1 and scalars <= _SMEM)


def _gathers(lists: BlockLists) -> list[int]:
    """Numbers of blocks of a tile: powers of two, one of them enough for any list."""
    most = min(_KEYS // lists.block_k, 2 * lists.width - 1)
    return [1 << i for i in range(max(most, 1).bit_length())]


def _vmem(q: Any, lists: BlockLists, heads: int, gather: int) -> int:
    """Bytes of one step, with what the compiler has to keep between its parts."""
    item = _kernel_dtype(q).itemsize
    rows, keys, dim = heads * lists.block_q, gather * lists.block_k, _padded(q)
    queries = 5 * rows * dim * item + 2 * rows * 8 * 4  # q twice, y, lse, q stacked
    kept = rows * (2 * step.LANES + 2 * dim) * 4
    return queries + kept + 4 * keys * dim * item + rows * keys * (8 + item)


def _padded(q: Any) -> int:
    return -(-q.shape[-1] // step.LANES) * step.LANES


def _kernel_dtype(q: Any) -> Any:
    # Mosaic has no float16.
    return jnp.dtype(jnp.float32 if q.dtype == jnp.float16 else q.dtype)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lists: BlockLists,
    *,
    scale: float,
    q_offset: jax.Array,
    soft_cap: float | None,
    interpret: Any = True,
) -> tuple[jax.Array, jax.Array]:
    """See `_call`.

    Args:
      q, k, v, lists, scale, q_offset, soft_cap: as there.
      interpret: what `pl.pallas_call` is told where there is no TPU.
    """
    batch, t, heads, dim = q.shape
    chosen = plan(q, k, lists)
    groups, width = heads // chosen.heads, lists.width
    whole, total = steps(
        lists, t, k.shape[1], q_offset, rows=lists.block_q, keys=lists.block_k
    )
    # Wrong lists read wrong keys, but never beyond k.
    last = -(-k.shape[1] // lists.block_k) - 1
    indices = jnp.broadcast_to(jnp.clip(lists.indices, 0, last), (*whole.shape, width))
    dtype = _kernel_dtype(q)

    def major(x: jax.Array, multiple: int, least: int = 0) -> jax.Array:
        """[B, T, H, D] as [B, H, T, D] with whole lanes, T and D padded."""
        rows = max(-(-x.shape[1] // multiple) * multiple, least)
        x = jnp.swapaxes(x.astype(dtype), 1, 2)
        widths = (0, rows - x.shape[2]), (0, _padded(x) - dim)
        return jnp.pad(x, ((0, 0), (0, 0), *widths))

    keys, values = (major(x, lists.block_k) for x in (k, v))
    # The last block of queries may be short, but not the only one.
    queries = major(q, 1, lists.block_q)
    queries = queries.reshape(batch, groups, chosen.heads, *queries.shape[2:])
    softmax = step.Softmax(
        scale, soft_cap, chosen.heads * lists.block_q, queries.shape[-1]
    )
    sizes: dict[str, Any] = dict(
        softmax=softmax, block_q=lists.block_q, block_k=lists.block_k
    )
    if chosen.by_blocks:
        call: Any = functools.partial(_tpu_blocks.call, **sizes)
        args: Any = (queries, keys, values, indices, whole, total, q_offset)
    else:
        call = functools.partial(_tpu_gather.call, gather=chosen.gather, **sizes)
        args = (queries, keys, values, _rows(whole, total, q_offset, indices, chosen))
    y, lse = jax.lax.platform_dependent(
        *args,
        tpu=functools.partial(call, interpret=False),
        default=functools.partial(call, interpret=interpret),
    )
    y = y.reshape(batch, heads, -1, y.shape[-1])[:, :, :t, :dim]
    lse = lse.reshape(batch, groups, -1, chosen.heads, lists.block_q)
    lse = jnp.swapaxes(lse, 2, 3).reshape(batch, heads, -1)[..., :t]
    return jnp.swapaxes(y, 1, 2).astype(q.dtype), lse


def _rows(
    whole: jax.Array,
    total: jax.Array,
    q_offset: jax.Array,
    indices: jax.Array,
    chosen: Plan,
) -> jax.Array:
    """Lists as the kernel reads them, of a whole number of lanes."""
    offset = jnp.broadcast_to(q_offset[:, None, None], whole.shape)
    head = jnp.stack([whole, total, offset], axis=-1)
    rows = jnp.concatenate([head, indices], axis=-1)
    # The last tile of a list is looked up whole.
    need = rows.shape[-1] + chosen.gather - 1
    padding = -(-need // step.LANES) * step.LANES - rows.shape[-1]
    return jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, padding)))[..., None, :]
