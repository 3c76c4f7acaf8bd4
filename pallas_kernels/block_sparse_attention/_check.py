"""What `block_sparse_attention` refuses, before any work."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from pallas_kernels._weights import KernelError
from pallas_kernels.block_sparse_attention._float8 import FLOAT8, Float8KV, padded
from pallas_kernels.block_sparse_attention._lists import BlockLists

_DTYPES = ("bfloat16", "float16", "float32")


def shapes(
    q: Any,
    k: Any,
    v: Any,
    lists: Any,
    q_offset: Any,
    lengths: Any,
    soft_cap: float | None,
) -> None:
    """Everything that is known while tracing.

    Raises:
      KernelError: one line that names the argument.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise KernelError(f"{name} must be [B, T, heads, D], not {list(x.shape)}")
        if str(x.dtype) not in _DTYPES or x.dtype != q.dtype:
            raise KernelError(
                f"{name} is {x.dtype}: q, k and v must all be one of "
                f"{', '.join(_DTYPES)}"
            )
    if k.shape != v.shape:
        raise KernelError(f"k {list(k.shape)} and v {list(v.shape)} must be alike")
    _rest(q, k, lists, q_offset, lengths, soft_cap)


def float8_shapes(
    q: Any,
    kv: Any,
    lists: Any,
    q_offset: Any,
    lengths: Any,
    soft_cap: float | None,
) -> None:
    """The same for keys and values in 8 bits.

    Raises:
      KernelError: one line that names the argument.
    """
    if not isinstance(kv, Float8KV):
        raise KernelError(f"kv must be a Float8KV, not {type(kv).__name__}")
    if q.ndim != 4 or str(q.dtype) not in _DTYPES:
        raise KernelError(
            f"q must be [B, T, heads, D] in {', '.join(_DTYPES)}, not "
            f"{q.dtype}{list(q.shape)}"
        )
    if kv.k.ndim != 4:
        raise KernelError(f"kv.k must be [B, S, heads, D], not {list(kv.k.shape)}")
    batch, s, kv_heads, dim = kv.k.shape
    heads = batch, kv_heads
    wanted = {
        "k": (kv.k.shape, FLOAT8),
        "v": ((*heads, dim, padded(s)), FLOAT8),
        "k_scale": (heads, jnp.dtype(jnp.float32)),
        "v_scale": (heads, jnp.dtype(jnp.float32)),
        "k_mean": ((*heads, dim), jnp.dtype(jnp.float32)),
    }
    for name, (shape, dtype) in wanted.items():
        x = getattr(kv, name)
        if x is None and name == "k_mean":
            continue
        if x.shape != shape or x.dtype != dtype:
            raise KernelError(
                f"kv.{name} must be {dtype}{list(shape)}, not {x.dtype}{list(x.shape)}"
            )
    if soft_cap is not None and kv.k_mean is not None:
        raise KernelError(
            "soft_cap needs keys with their mean: use quantize_kv(..., smooth=False)"
        )
    _rest(q, kv.k, lists, q_offset, lengths, soft_cap)


def _rest(
    q: Any, k: Any, lists: Any, q_offset: Any, lengths: Any, soft_cap: float | None
) -> None:
    batch, t, heads, dim = q.shape
    if k.shape[0] != batch or k.shape[3] != dim:
        raise KernelError(
            f"k {list(k.shape)} must have the batch {batch} and the head size {dim} of "
            f"q {list(q.shape)}"
        )
    if not k.shape[2] or heads % k.shape[2]:
        raise KernelError(
            f"{heads} query heads cannot share {k.shape[2]} key heads: the second "
            "number must divide the first"
        )
    if t > k.shape[1]:
        raise KernelError(
            f"q has {t} rows and k {k.shape[1]}: queries are the last of the keys, so "
            "k cannot be shorter"
        )
    if isinstance(q_offset, int | np.integer) and not 0 <= q_offset <= k.shape[1] - t:
        raise KernelError(
            f"q_offset={q_offset}: {t} queries in {k.shape[1]} keys start at 0 to "
            f"{k.shape[1] - t}"
        )
    for name, x in (("q_offset", q_offset), ("lengths", lengths)):
        if x is None:
            continue
        if not jnp.issubdtype(jnp.result_type(x), jnp.integer):
            raise KernelError(f"{name} is {jnp.result_type(x)}: use integers")
        if jnp.shape(x) not in ((), (batch,)):
            raise KernelError(
                f"{name} has shape {list(jnp.shape(x))}: use one integer or [{batch}]"
            )
    if soft_cap is not None and not soft_cap > 0:
        raise KernelError(f"soft_cap must be positive, not {soft_cap}")
    _lists_fit(q, k, lists)


def _lists_fit(q: Any, k: Any, lists: Any) -> None:
    if not isinstance(lists, BlockLists):
        raise KernelError(f"lists must be BlockLists, not {type(lists).__name__}")
    batch, t, heads, _ = q.shape
    for name in ("block_q", "block_k"):
        size = getattr(lists, name)
        if type(size) is not int or size < 1:
            raise KernelError(f"lists.{name} must be a positive integer, not {size!r}")
    if lists.indices.ndim != 4 or lists.counts.shape != lists.indices.shape[:3]:
        raise KernelError(
            "lists must have indices [B, heads, num_q_blocks, width] and counts [B, "
            f"heads, num_q_blocks], not {list(lists.indices.shape)} and "
            f"{list(lists.counts.shape)}"
        )
    rows, list_heads, blocks, width = lists.indices.shape
    if rows not in (1, batch):
        raise KernelError(f"lists are for {rows} rows, q has {batch}: use that or 1")
    if list_heads not in (1, k.shape[2], heads):
        raise KernelError(
            f"lists are for {list_heads} heads: use {heads} (query heads), "
            f"{k.shape[2]} (key heads) or 1"
        )
    if blocks != -(-t // lists.block_q):
        raise KernelError(
            f"lists are for {blocks} query blocks: {t} rows of {lists.block_q} make "
            f"{-(-t // lists.block_q)}"
        )
    if not width:
        raise KernelError("lists have no width: each needs room for one block")
    for name, x in (("indices", lists.indices), ("counts", lists.counts)):
        if x.dtype != jnp.int32:
            raise KernelError(f"lists.{name} must be int32, not {x.dtype}")


def values(
    k: jax.Array,
    lists: BlockLists,
    q: jax.Array,
    q_offset: jax.Array,
    lengths: jax.Array | None,
) -> None:
    """What only the numbers tell; see `block_sparse_attention`, Raises.

    Outside of `jit` one compiled function looks at everything and is waited for: it
    reads k and the lists once, a small part of what attention reads, but the call is no
    longer asynchronous. While tracing, the same becomes `debug_check`s: nothing at all
    unless `checkify` turns them on. Arrays that live on other hosts too are not looked
    at.

    Raises:
      KernelError: one line that says what is wrong and where it is first.
    """
    args = (k, lists, q_offset, lengths)
    leaves = jax.tree.leaves(args)
    messages = _messages(k, lists, q.shape[1])
    if any(isinstance(x, jax.core.Tracer) for x in leaves):
        for message, wrong in zip(messages, _wrong(*args, t=q.shape[1]), strict=True):
            where = jnp.stack(jnp.unravel_index(jnp.argmax(wrong), wrong.shape))
            checkify.debug_check(~jnp.any(wrong), message, where=where)
    elif all(getattr(x, "is_fully_addressable", True) for x in leaves):
        flags, places = _look(*args, t=q.shape[1])
        flags = np.asarray(flags)
        if flags.any():
            number = int(flags.argmax())
            where = np.argwhere(np.asarray(places[number]))[0]
            raise KernelError(messages[number].format(where=where))


def _messages(k: Any, lists: BlockLists, t: int) -> list[str]:
    """What to say where `_wrong` applies, in its order."""
    s, last = k.shape[1], -(-k.shape[1] // lists.block_k) - 1
    line = "of row, head and query block {where}"
    return [
        f"lists.counts {line} is not in 0..{lists.width}",
        f"lists.indices {line} names a block that is not in 0..{last}",
        f"lists.indices {line} does not ascend strictly",
        f"lists.counts {line} is 0: give each query block a key block, except past "
        "lengths",
        f"q_offset of row {{where}} is not in 0..{s - t}, where {t} queries end within "
        f"{s} keys",
        f"lengths of row {{where}} is not in 0..{s}",
        "k is NaN at row, position and head {where}",
    ]


def _wrong(
    k: jax.Array,
    lists: BlockLists,
    q_offset: jax.Array,
    lengths: jax.Array | None,
    *,
    t: int,
) -> list[jax.Array]:
    """For each of `_messages`, bool over the axes that it names."""
    batch, s = k.shape[:2]
    indices, counts = lists.indices, lists.counts
    slots = jnp.arange(lists.width)
    real = slots < counts[..., None]
    outside = (indices < 0) | (indices >= -(-s // lists.block_k))
    falling = (jnp.diff(indices, axis=-1, prepend=0) <= 0) & (slots > 0)
    first = jnp.arange(counts.shape[2]) * lists.block_q + q_offset[:, None]
    ends = jnp.full(batch, s) if lengths is None else lengths
    return [
        (counts < 0) | (counts > lists.width),
        jnp.any(outside & real, axis=-1),
        jnp.any(falling & real, axis=-1),
        (counts == 0) & (first < ends[:, None])[:, None],
        (q_offset < 0) | (q_offset + t > s),
        (ends < 0) | (ends > s),
        jnp.any(jnp.isnan(k), axis=-1),
    ]


@functools.partial(jax.jit, static_argnames="t")
def _look(*args: Any, t: int) -> tuple[jax.Array, list[jax.Array]]:
    """Which of `_wrong` apply anywhere, as one small array, and where."""
    wrong = _wrong(*args, t=t)
    return jnp.stack([jnp.any(x) for x in wrong]), wrong
