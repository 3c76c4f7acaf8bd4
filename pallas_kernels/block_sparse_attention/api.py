"""`block_sparse_attention`: causal attention on lists of key blocks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._devices import elsewhere, implementation_for
from pallas_kernels._implementation import implementation as module_of
from pallas_kernels._weights import KernelError
from pallas_kernels.block_sparse_attention import _call, _check
from pallas_kernels.block_sparse_attention._float8 import (
    FLOAT8,
    Float8KV,
    quantize_kv,
)
from pallas_kernels.block_sparse_attention._lists import BlockLists

PACKAGE = "pallas_kernels.block_sparse_attention"


def block_sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lists: BlockLists,
    *,
    scale: float | None = None,
    q_offset: int | jax.Array = 0,
    lengths: int | jax.Array | None = None,
    return_lse: bool = False,
    soft_cap: float | None = None,
    kv_dtype: str | None = None,
    implementation: str | None = None,
) -> Any:
    """Causal attention in which each query block reads the key blocks of its list.

    A query at position p sees the keys up to p, its own included, that lie in a listed
    block. A list may name every block (attention without sparsity) or a few; blocks
    past the diagonal add nothing.

    Args:
      q: `[B, T, H, D]`, bfloat16, float16 or float32.
      k, v: `[B, S, Hkv, D]`, dtype of q; Hkv divides H, query head h reads the key head
        `h // (H // Hkv)`.
      lists: of the query blocks; see `BlockLists`.
      scale: of the logits, default `D ** -0.5`.
      q_offset: position of the first query among the keys, an integer or int32 `[B]`.
        For chunked prefill it is the number of keys that were there before; it need be
        no multiple of a block.
      lengths: real keys of each row of the batch, 0 to S, an integer or int32 `[B]`;
        default S. Queries at positions past them give zeros. Padding stands on the
        right.
      return_lse: also return the logarithm of the sum of exponentials.
      soft_cap: logits become `soft_cap * tanh(logits / soft_cap)`.
      kv_dtype: "float8_e4m3fn" rounds q, k and v to 8 bits and multiplies these; see
        `block_sparse_attention_fp8`. Not differentiable.
      implementation: "mosaic_gpu", "triton", "tpu", "xla" or "reference"; None takes
        the one for the device, or "xla" where that one cannot run this.

    Returns:
      `[B, T, H, D]` in the dtype of q, zeros where a query sees no key; with
      `return_lse` also float32 `[B, H, T]`, -inf there. Softmax is in float32.
      Differentiable in q, k and v, through the second output too; the backward pass
      reads the same lists and stores no weights `[T, S]`. Under `jax.vmap` the mapped
      axis joins the batch. Not partitioned by GSPMD: split heads or batch with
      `jax.shard_map`.

    Raises:
      KernelError: shapes, dtypes or lists that do not go together, or an implementation
        that cannot run here. Values (lists out of range, not ascending, or empty for a
        query block that is not past `lengths`; `q_offset` or `lengths` out of range;
        NaN in k) are checked where all are concrete: that reads k and the lists once
        and waits for the answer. Inside `jit` the same checks are
        `jax.experimental.checkify.debug_check`s, nothing unless `checkify` turns them
        on.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from pallas_kernels import BlockLists, block_sparse_attention
      >>> x = jax.random.normal(jax.random.key(0), (1, 256, 2, 64))
      >>> mask = jnp.tril(jnp.ones((1, 1, 4, 4), bool))
      >>> lists = BlockLists.from_mask(mask, block_q=64, block_k=64)
      >>> y = block_sparse_attention(x, x, x, lists)
      >>> dense = jax.nn.dot_product_attention(x, x, x, is_causal=True)
      >>> bool(jnp.abs(y - dense).max() < 1e-5)
      True
    """
    _check.shapes(q, k, v, lists, q_offset, lengths, soft_cap)
    if kv_dtype not in (None, FLOAT8.name):
        raise KernelError(f"kv_dtype must be None or {FLOAT8.name!r}, not {kv_dtype!r}")
    tensors: tuple[Any, ...] = q, k, v
    if kv_dtype is not None:
        tensors = q, quantize_kv(k, v, lengths=lengths, smooth=soft_cap is None)
    return _run(
        tensors,
        k,
        lists,
        scale,
        q_offset,
        lengths,
        return_lse,
        soft_cap,
        implementation,
    )


def block_sparse_attention_fp8(
    q: jax.Array,
    kv: Float8KV,
    lists: BlockLists,
    *,
    scale: float | None = None,
    q_offset: int | jax.Array = 0,
    lengths: int | jax.Array | None = None,
    return_lse: bool = False,
    soft_cap: float | None = None,
    implementation: str | None = None,
) -> Any:
    """`block_sparse_attention` with keys and values that are in 8 bits already.

    Queries are rounded to float8_e4m3fn too, with a scale for each row. Hopper GPUs
    multiply these numbers at twice the rate of bfloat16, weights of the softmax rounded
    likewise; other implementations multiply what they stand for. The relative error of
    a result is some 5 %, against 0.3 % in bfloat16.

    Args:
      q: `[B, T, H, D]`, bfloat16, float16 or float32.
      kv: from `quantize_kv`, keys `[B, S, Hkv, D]`; without a mean for a `soft_cap`.
      lists, scale, q_offset, lengths, return_lse, soft_cap, implementation: see
        `block_sparse_attention`. Products are in 8 bits on "mosaic_gpu" with 16-bit
        queries, head sizes D that are multiples of 32 up to 256, and blocks of
        multiples of 128 queries and 64 keys.

    Returns:
      `[B, T, H, D]` in the dtype of q; with `return_lse` also float32 `[B, H, T]`.

    Raises:
      KernelError: as `block_sparse_attention`, and under differentiation.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from pallas_kernels import BlockLists, quantize_kv
      >>> from pallas_kernels import block_sparse_attention_fp8
      >>> x = jax.random.normal(jax.random.key(0), (1, 256, 2, 64))
      >>> mask = jnp.tril(jnp.ones((1, 1, 4, 4), bool))
      >>> lists = BlockLists.from_mask(mask, block_q=64, block_k=64)
      >>> y = block_sparse_attention_fp8(x, quantize_kv(x, x), lists)
      >>> dense = jax.nn.dot_product_attention(x, x, x, is_causal=True)
      >>> float(jnp.linalg.norm(y - dense) / jnp.linalg.norm(dense)) < 0.06
      True
    """
    _check.float8_shapes(q, kv, lists, q_offset, lengths, soft_cap)
    return _run(
        (q, kv),
        kv.k,
        lists,
        scale,
        q_offset,
        lengths,
        return_lse,
        soft_cap,
        implementation,
    )


def _run(
    tensors: tuple[Any, ...],
    k: jax.Array,
    lists: BlockLists,
    scale: float | None,
    q_offset: int | jax.Array,
    lengths: int | jax.Array | None,
    return_lse: bool,
    soft_cap: float | None,
    implementation: str | None,
) -> Any:
    """Attention of `(q, k, v)` or `(q, Float8KV)`, whose shapes were checked.

    `k` is looked at for NaN.
    """
    q = tensors[0]
    offset = _each_row(q_offset, q.shape[0])
    if lengths is not None:
        lengths = _each_row(lengths, q.shape[0])
    name = implementation or choose(*tensors, lists)
    if implementation is not None:
        why = None if name == "tpu" else elsewhere(name)
        why = why or _unsupported(name, *tensors, lists)
        if why is not None:
            raise KernelError(
                f"implementation {name!r} cannot run this: {why}; "
                f"use {' or '.join(alternatives(*tensors, lists))}"
            )
    if not q.size:
        y, lse = jnp.zeros_like(q), jnp.zeros(_lse_shape(q), jnp.float32)
        return (y, lse) if return_lse else y
    _check.values(k, lists, q, offset, lengths)
    if lengths is not None:
        lists = _stop(lists, q.shape[0], offset, lengths)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    make = _call.function if len(tensors) == 3 else _call.float8_function
    run = make(name, scale, None if soft_cap is None else float(soft_cap))
    y, lse = run(*tensors, lists, offset)
    if lengths is not None:  # the end of the last block that is not all padding
        position = jnp.arange(q.shape[1]) + offset[:, None]
        real = position < lengths[:, None]  # [B, T]
        y = jnp.where(real[..., None, None], y, 0)
        lse = jnp.where(real[:, None], lse, -jnp.inf)
    return (y, lse) if return_lse else y


def choose(*args: Any) -> str:
    """Name of the implementation for the current device, or "xla".

    Args:
      *args: `q, k, v, lists` or `q, Float8KV, lists`.
    """
    name = implementation_for()
    try:
        can = _unsupported(name, *args) is None
    except KernelError:  # not installed
        can = False
    return name if can else "xla"


def alternatives(*args: Any) -> list[str]:
    """Implementations that would run here."""
    names = [choose(*args), "xla", "reference"]
    return [f"implementation={name!r}" for name in dict.fromkeys(names)]


def _unsupported(name: str, q: Any, *args: Any) -> str | None:
    """Why an implementation cannot run this, or None."""
    module = module_of(PACKAGE, name)
    if len(args) == 3:
        return module.unsupported(q, *args)
    return _call.float8_unsupported(name, q, *args)


def _each_row(x: int | jax.Array, batch: int) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(x, jnp.int32), (batch,))


def _stop(
    lists: BlockLists, batch: int, offset: jax.Array, lengths: jax.Array
) -> BlockLists:
    """Lists without those of query blocks that are padding."""
    start = jnp.arange(lists.counts.shape[-1]) * lists.block_q + offset[:, None]
    real = (start < lengths[:, None])[:, None]  # [B, 1, num_q_blocks]
    shape = (batch, *lists.counts.shape[1:])
    counts = jnp.where(real, jnp.broadcast_to(lists.counts, shape), 0)
    indices = jnp.broadcast_to(lists.indices, (*shape, lists.width))
    return BlockLists(indices, counts, lists.block_q, lists.block_k)


def _lse_shape(q: jax.Array) -> tuple[int, ...]:
    return (q.shape[0], q.shape[2], q.shape[1])
