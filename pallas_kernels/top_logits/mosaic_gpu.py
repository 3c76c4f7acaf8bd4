"""`top_logits` as two launches of `_warps`, for Hopper."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _ptx as asm
from pallas_kernels._hopper_lanes import kernel
from pallas_kernels.top_logits._warps import MOST_LOADS, WARPS, Case, emit, stages


def refused(count: int, k: int) -> str | None:
    """One clause if rows of `count` cannot be selected from here."""
    if k > 32:
        return f"it takes k up to 32, not {k}"
    if count % 4:
        return f"it takes rows of a multiple of 4, not of {count}"
    if stages(1, count, k)[1].loads > MOST_LOADS:
        return f"it takes shorter rows than {count} for k={k}"
    return None


def select(
    x: jax.Array, k: int, log_probs: bool, offset: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Values and ids of `x [R, N]`; see `api.top_logits`."""
    (rows, count), more = x.shape, [] if offset is None else [offset]
    cases = stages(rows, count, k, log_probs=log_probs, offset=bool(more))
    first, second = map(_build, cases)
    return second(*first(x), *more)


@functools.cache
def _build(c: Case) -> Callable[..., Any]:
    shape = jax.ShapeDtypeStruct
    places = c.rows, c.blocks * c.k
    outputs = [shape(places, jnp.float32), shape(places, jnp.int32)]
    if c.first and c.log_probs:
        outputs += [shape((c.rows, c.blocks), jnp.float32)] * 2
    return kernel(
        functools.partial(emit, asm, c),
        tuple(outputs),
        grid=c.rows * c.blocks,
        warps=WARPS,
        words=c.smem_words,
        name="top_logits" if c.first else "top_logits_of_parts",
    )
