"""One implementation with its rules for gradients and `vmap`.

Each module (`reference`, `xla`, `mosaic_gpu`, `triton`, `tpu`) has

  unsupported(q, k, v, lists) -> str | None
      one clause saying why it cannot run this, None if it can; the arguments have
      shapes and dtypes only
  attention(q, k, v, lists, *, scale, q_offset, soft_cap) -> (y, lse)
      q [B, T, H, D], k and v [B, S, Hkv, D]; lists with B or 1 rows and H, Hkv or 1
      heads, possibly with counts of 0; q_offset int32 [B]; gives y [B, T, H, D] in the
      dtype of q and lse float32 [B, H, T]. T and S are as they come. A query that sees
      no key gives 0 and -inf. Within `jax.shard_map` all vary over the same axes.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from pallas_kernels._implementation import implementation
from pallas_kernels._weights import KernelError
from pallas_kernels.block_sparse_attention import _backward, _float8
from pallas_kernels.block_sparse_attention._float8 import Float8KV
from pallas_kernels.block_sparse_attention._lists import BlockLists

_PACKAGE = "pallas_kernels.block_sparse_attention"


@functools.lru_cache(maxsize=256)
def function(name: str, scale: float, soft_cap: float | None) -> Any:
    """`(q, k, v, lists, q_offset) -> (y, lse)`; made once for each setting."""
    module = implementation(_PACKAGE, name)

    @custom_vmap
    def forward(q: Any, k: Any, v: Any, lists: Any, q_offset: Any) -> Any:
        return module.attention(
            q, k, v, lists, scale=scale, q_offset=q_offset, soft_cap=soft_cap
        )

    @forward.def_vmap
    def _(size: int, batched: Any, *args: Any) -> Any:
        results = forward(*_joined(size, batched, args))
        return _parted(size, results), (True, True)

    @jax.custom_vjp
    def run(q: Any, k: Any, v: Any, lists: Any, q_offset: Any) -> Any:
        return forward(q, k, v, lists, q_offset)

    def fwd(*args: Any) -> Any:
        y, lse = forward(*args)
        return (y, lse), (*args, y, lse)

    @custom_vmap
    def backward(*args: Any) -> Any:
        *tensors, lists, q_offset = args
        q, k, v, *results = tensors
        return _backward.gradients(
            q, k, v, lists, *results, scale=scale, q_offset=q_offset, soft_cap=soft_cap
        )

    @backward.def_vmap
    def _(size: int, batched: Any, *args: Any) -> Any:
        gradients = backward(*_joined(size, batched, args))
        return _parted(size, gradients), (True, True, True)

    def bwd(saved: Any, cotangents: Any) -> Any:
        q, k, v, lists, q_offset, y, lse = saved
        gradients = backward(q, k, v, y, lse, *cotangents, lists, q_offset)
        none = jax.tree.map(
            lambda x: np.zeros(x.shape, jax.dtypes.float0), (lists, q_offset)
        )
        return *gradients, *none

    run.defvjp(fwd, bwd)

    # Outside of a `jit`, one program instead of many small ones.
    @jax.jit
    def call(*args: Any) -> Any:
        return run(*_vary_alike(args))

    return call


@functools.lru_cache(maxsize=256)
def float8_function(name: str, scale: float, soft_cap: float | None) -> Any:
    """`(q, kv, lists, q_offset) -> (y, lse)`; made once for each setting."""

    @custom_vmap
    def forward(q: Any, *args: Any) -> Any:
        *leaves, lists, q_offset = args
        kv = Float8KV(*leaves, *[None] * (5 - len(leaves)))
        return _float8_attention(
            name, q, kv, lists, scale=scale, q_offset=q_offset, soft_cap=soft_cap
        )

    @forward.def_vmap
    def _(size: int, batched: Any, *args: Any) -> Any:
        results = forward(*_joined(size, batched, args))
        return _parted(size, results), (True, True)

    @jax.custom_vjp
    def run(*args: Any) -> Any:
        return forward(*args)

    def fwd(*args: Any) -> Any:
        raise KernelError(
            "attention with float8_e4m3fn keys and values has no gradient: "
            "differentiate it with kv_dtype=None"
        )

    run.defvjp(fwd, fwd)

    @jax.jit
    def call(q: Any, kv: Float8KV, lists: Any, q_offset: Any) -> Any:
        args = _vary_alike((q, *jax.tree.leaves(kv), lists, q_offset))
        y, lse = run(*args)
        if kv.k_mean is not None:  # which softmax does not see, but its sum does
            lse = lse + _float8.log_shift(q, kv.k_mean, scale)
        return y, lse

    return call


def float8_unsupported(name: str, q: Any, kv: Float8KV, lists: Any) -> str | None:
    """Why an implementation cannot run with a `Float8KV`, or None."""
    if _multiplies_float8(name, q, kv, lists):
        return None
    keys = jax.ShapeDtypeStruct(kv.k.shape, q.dtype)
    return implementation(_PACKAGE, name).unsupported(q, keys, keys, lists)


def _multiplies_float8(name: str, q: Any, kv: Float8KV, lists: Any) -> bool:
    if name != "mosaic_gpu":
        return False
    from pallas_kernels.block_sparse_attention import mosaic_gpu_fp8

    return mosaic_gpu_fp8.unsupported(q, kv, lists) is None


def _float8_attention(
    name: str, q: Any, kv: Float8KV, lists: Any, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """`attention` of an implementation; lse is that of keys without their mean."""
    if _multiplies_float8(name, q, kv, lists):
        from pallas_kernels.block_sparse_attention import mosaic_gpu_fp8

        return mosaic_gpu_fp8.attention(q, kv, lists, **options)
    # What the numbers stand for: exact in 16 bits, as scales are powers of two.
    rows, scales = _float8.quantize_rows(q)
    rows = (rows.astype(jnp.float32) * scales[..., None]).astype(q.dtype)
    k, v = kv.centred_keys(q.dtype), kv.values(q.dtype)
    return implementation(_PACKAGE, name).attention(rows, k, v, lists, **options)


def _vary_alike(args: Any) -> Any:
    """Arguments that vary over the same axes of a `jax.shard_map`.

    Key heads that every device holds whole then get a gradient summed over devices.
    """

    def axes(x: jax.Array) -> frozenset[str]:
        return jax.typeof(x).manual_axis_type.varying

    every = frozenset().union(*map(axes, jax.tree.leaves(args)))
    return jax.tree.map(
        lambda x: jax.lax.pcast(x, tuple(every - axes(x)), to="varying"), args
    )


def _parted(size: int, results: Any) -> Any:
    return tuple(x.reshape(size, -1, *x.shape[1:]) for x in results)


def _joined(size: int, batched: Any, args: Any) -> Any:
    """Arguments of a mapped call as those of one call with a larger batch."""
    q_b, *_ = batched
    batch = args[0].shape[1 if q_b else 0]

    def join(x: jax.Array, mapped: bool, whole: bool) -> jax.Array:
        if not mapped and not whole:
            return x  # lists of one row serve any batch
        if not mapped:
            x = jnp.broadcast_to(x, (size, *x.shape))
        if x.shape[1] != batch:
            x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
        return x.reshape(size * batch, *x.shape[2:])

    *tensors, lists, q_offset = args
    *tensors_b, lists_b, offset_b = batched
    plain = [join(x, b, True) for x, b in zip(tensors, tensors_b, strict=True)]
    flags = lists_b.indices, lists_b.counts
    rows = lists.indices.shape[1 if flags[0] else 0]
    whole = any(flags) or rows > 1
    joined = BlockLists(
        join(lists.indices, flags[0], whole),
        join(lists.counts, flags[1], whole),
        lists.block_q,
        lists.block_k,
    )
    return *plain, joined, join(q_offset, offset_b, True)
