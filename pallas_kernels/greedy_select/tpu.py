"""Greedy selection in one kernel on TPUs, in Pallas.

A program takes one row of the batch and keeps its scores in vector memory for all of
the choices. The Gram matrix is copied there too where it fits; else the eight rows
around each choice, a tile of the memory, come from HBM.

On anything but a TPU the same kernel runs in Pallas' interpret mode. The compiler takes
it for TPU v5e, v6e and v7x; it has not been run on one.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.greedy_select import _terms
from pallas_kernels.greedy_select._terms import Settings

_VMEM = 12 * 2**20  # of the 16 MiB that a kernel may use; the rest is the compiler's
_MOST = 65536  # tokens
_LANES, _SUBLANES = 128, 8


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
    resident: bool | None = None,
) -> jax.Array:
    """See `_terms`; `resident` keeps the whole matrix in vector memory."""
    batch, n = importance.shape
    first, base = _terms.mmr_start(importance, valid, settings)
    rest = -n % _LANES
    if rest:
        gram = jnp.pad(gram, ((0, 0), (0, rest), (0, rest)))
        first, base = (
            jnp.pad(x, ((0, 0), (0, rest)), constant_values=-jnp.inf)
            for x in (first, base)
        )
    size = n + rest
    if resident is None:
        resident = 4 * size * size <= _VMEM
    # Vectors have a row each; the last two axes of a block are those of the array.
    args = limit, gram, first[:, None], base[:, None]
    slots = settings.num_select
    body = functools.partial(_body, n, _terms.mmr_factor(settings), resident)

    def call(*args: jax.Array, interpret: bool) -> jax.Array:
        vector = pl.BlockSpec((1, 1, size), lambda b, *_: (b, 0, 0))
        return pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(batch,),
                in_specs=[pl.BlockSpec(memory_space=pl.ANY), vector, vector],
                out_specs=pl.BlockSpec(
                    (1, 1, slots), lambda b, *_: (b, 0, 0), memory_space=pltpu.SMEM
                ),
                scratch_shapes=[
                    pltpu.VMEM((size if resident else _SUBLANES, size), jnp.float32),
                    pltpu.SemaphoreType.DMA(()),
                ],
            ),
            out_shape=jax.ShapeDtypeStruct((batch, 1, slots), jnp.int32),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
            name="greedy_select",
            interpret=interpret,
        )(*args)

    order = lax.platform_dependent(
        *args,
        tpu=functools.partial(call, interpret=False),
        default=functools.partial(call, interpret=True),
    )
    return order[:, 0]


def _body(
    n: int,
    factor: float,
    resident: bool,
    limit: Any,
    gram: Any,
    first: Any,
    base: Any,
    order: Any,
    rows: Any,
    arrived: Any,
) -> None:
    batch = pl.program_id(0)
    count = limit[batch]
    column = lax.broadcasted_iota(jnp.int32, (1, first.shape[-1]), 1)

    def bring(source: Any) -> None:
        copy = pltpu.make_async_copy(source, rows, arrived)
        copy.start()
        copy.wait()

    if resident:
        bring(gram.at[batch])

    def similar(token: jax.Array) -> jax.Array:
        if resident:
            return rows[pl.ds(token, 1), :]
        inside = token & (_SUBLANES - 1)
        start = pl.multiple_of(token - inside, _SUBLANES)
        bring(gram.at[batch, pl.ds(start, _SUBLANES), :])
        return rows[pl.ds(inside, 1), :]

    def step(t: jax.Array, carry: Any) -> Any:
        score, near, base = carry
        top = jnp.max(score)
        # The lowest index where several are the largest.
        best = jnp.min(jnp.where(score == top, column, n - 1))
        order[0, 0, t] = best
        near = jnp.maximum(near, similar(best) * factor)
        base = jnp.where(column == best, -jnp.inf, base)
        return base - near, near, base

    near = jnp.full(column.shape, -_terms.LARGE, jnp.float32)
    lax.fori_loop(0, count, step, (first[0], near, base[0]))

    def unused(t: jax.Array, _: Any) -> None:
        order[0, 0, t] = n

    lax.fori_loop(count, order.shape[-1], unused, None)
