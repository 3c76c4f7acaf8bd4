"""Greedy selection in one launch on NVIDIA GPUs, by Pallas' Triton backend.

A thread block takes one row of the batch. Scores stay in its registers for all of the
choices; a step is one argmax over the block and one row of the Gram matrix, which
mostly comes from the L2 cache. So a step costs its latency, not its bytes.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.greedy_select import _terms
from pallas_kernels.greedy_select._terms import Settings

_MOST = 32768  # tokens whose scores fit in the registers of a block


def unsupported(batch: int, n: int, settings: Settings) -> str | None:
    """Why this cannot run here, or None."""
    del batch
    return _terms.one_launch(n, settings, _MOST)


def select(
    gram: jax.Array,
    importance: jax.Array,
    valid: jax.Array,
    limit: jax.Array,
    settings: Settings,
    *,
    warps: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `_terms`; `warps` of a thread block is for tuning."""
    batch, n = importance.shape
    first, base, factor = _terms.mmr_start(importance, valid, settings)
    width = max(128, pl.next_power_of_2(n))
    body = functools.partial(_body, n, width, settings.num_select, factor)
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((batch, settings.num_select), jnp.int32),
        grid=(batch,),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 4,
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        compiler_params=plgpu.CompilerParams(
            num_warps=warps or _warps(width), num_stages=1
        ),
        interpret=interpret,
        name="greedy_select",
    )(gram, first, base, limit)


def _warps(width: int) -> int:
    """Eight scores of a thread, as long as that takes 4 to 16 warps."""
    return min(max(width // 256, 4), 16)


def _body(
    n: int,
    width: int,
    num_select: int,
    factor: float,
    gram: Any,
    first: Any,
    base: Any,
    limit: Any,
    order: Any,
) -> None:
    batch = pl.program_id(0)
    column = lax.broadcasted_iota(jnp.int32, (width,), 0)
    inside = column < n
    whole = pl.ds(0, width)

    def read(ref: Any, other: float) -> jax.Array:
        return plgpu.load(ref, mask=inside, other=other)

    count = limit[batch]

    def step(t: jax.Array, carry: Any) -> Any:
        score, near, base = carry
        # The lowest index where several are the largest.
        best = jnp.argmax(score, axis=0).astype(jnp.int32)
        order[batch, t] = best
        row = read(gram.at[batch, best, whole], 0.0)
        base = jnp.where(column == best, -jnp.inf, base)
        near = jnp.maximum(near, row * factor)
        return base - near, near, base

    near = jnp.full((width,), -_terms.LARGE, jnp.float32)
    score = read(first.at[batch, whole], -jnp.inf)
    carry = score, near, read(base.at[batch, whole], -jnp.inf)
    lax.fori_loop(0, count, step, carry)

    def unused(t: jax.Array, _: None) -> None:
        order[batch, t] = jnp.int32(n)

    lax.fori_loop(count, num_select, unused, None)
