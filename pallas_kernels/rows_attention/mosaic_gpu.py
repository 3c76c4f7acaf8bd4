"""`rows_attention` as two launches, for Hopper and bfloat16."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _ptx as asm
from pallas_kernels._hopper_lanes import kernel
from pallas_kernels.rows_attention._blocks import Blocks, blocks
from pallas_kernels.rows_attention._case import SPLITS, WARPS, Case
from pallas_kernels.rows_attention._gather import gather
from pallas_kernels.rows_attention._warps import attend_part


def refused(qkv: Any, k: Any) -> str | None:
    """One clause if these cannot be attended to here."""
    slots, features = k.shape[2:]
    if qkv.dtype != jnp.bfloat16 or k.dtype != jnp.bfloat16:
        return f"it takes bfloat16, not {qkv.dtype} and {k.dtype}"
    if features not in (64, 128):
        return f"it takes heads of 64 or 128 features, not {features}"
    most = SPLITS * 16 * WARPS * blocks(slots).runs
    return f"it takes up to {most} slots, not {slots}" if slots > most else None


def attend(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    mask: jax.Array,
    slots: jax.Array,
    k: jax.Array,
    v: jax.Array,
    held: tuple[jax.Array, ...],
    norms: tuple[jax.Array, ...],
    *,
    eps: float,
    tiles: Blocks | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(y, k, v)`; see `api.rows_attention`. The mask is int8 `[B, T, S]`."""
    batch, tokens, columns = qkv.shape
    _, kv_heads, size, features = k.shape
    how = tiles or blocks(size)
    case = Case(
        *(batch, tokens, columns // features - 2 * kv_heads, kv_heads, features, size),
        held=held[0].shape[2] if held else 0,
        norms=bool(norms),
        eps=eps,
        runs=how.runs,
        tiles=how.tiles,
    )
    first, second = _build(case)
    # Written in place, where nothing else needs what was there.
    keys, values = jax.new_ref(k), jax.new_ref(v)
    parts, stats = first(qkv, cos, sin, mask, slots, keys, values, *held, *norms)
    return second(parts, stats, slots), keys[...], values[...]


@functools.cache
def _build(c: Case) -> tuple[Callable[..., Any], Callable[..., jax.Array]]:
    place = c.batch * c.kv_heads * c.splits * c.rows
    shape = jax.ShapeDtypeStruct
    attention = kernel(
        functools.partial(attend_part, asm, c),
        (shape((place, c.features), jnp.float32), shape((place, 2), jnp.float32)),
        grid=c.grid,
        warps=WARPS,
        words=c.smem_words,
        name="rows_attention",
    )
    y = shape((c.batch, c.tokens, c.heads * c.features), jnp.bfloat16)
    sums = kernel(
        functools.partial(gather, asm, c),
        (y,),
        grid=c.gather_grid,
        warps=WARPS,
        words=0,
        name="rows_attention_sum",
    )
    return attention, lambda *args: sums(*args)[0]
