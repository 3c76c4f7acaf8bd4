"""The kernel of `skinny_matmul`, in Pallas for Triton.

One program makes 16 rows of BN output columns. It walks the inputs in steps of BK, and
sums the squares of its rows beside the products, so that a norm costs no other pass:
the mean square divides afterwards.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.skinny_matmul._blocks import ROWS, Blocks


@dataclasses.dataclass(frozen=True)
class Case:
    """What a kernel is specialised for.

    Attributes:
      m, k, n: rows, inputs and output columns.
      blocks: tiles.
      transposed: the weight is stored `[N, K]`.
      norm, swiglu, bias, residual: which of these there are.
      eps: of the norm.
    """

    m: int
    k: int
    n: int
    blocks: Blocks
    transposed: bool
    norm: bool
    swiglu: bool
    bias: bool
    residual: bool
    eps: float


def kernel(case: Case, *refs: Any) -> None:
    """`refs`: x, w, then norm, bias, residual where they are, then y."""
    x, w, *rest, y = refs
    norm = rest.pop(0) if case.norm else None
    bias = rest.pop(0) if case.bias else None
    residual = rest.pop(0) if case.residual else None
    size = case.blocks
    rows = pl.program_id(1) * ROWS + jnp.arange(ROWS)
    cols = pl.program_id(0) * size.n + jnp.arange(size.n)
    real, inside = rows[:, None] < case.m, cols < case.n

    def tile(at: jax.Array, good: jax.Array, shift: int) -> jax.Array:
        """A step of the weight, `[BN, BK]` or `[BK, BN]` as it is stored."""
        if case.transposed:
            where = w.at[(cols + shift)[:, None], at[None, :]]
            mask = inside[:, None] & good[None, :]
        else:
            where = w.at[at[:, None], (cols + shift)[None, :]]
            mask = good[:, None] & inside[None, :]
        return plt.load(where, mask=mask, other=0.0)

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        exact = a.dtype == jnp.float32
        return jax.lax.dot_general(
            a,
            b,
            (((1,), (1 if case.transposed else 0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST if exact else None,
            preferred_element_type=jnp.float32,
        )

    def step(i: jax.Array, carry: Any) -> Any:
        squares, *sums = carry
        at = i * size.k + jnp.arange(size.k)
        good = at < case.k
        part = plt.load(
            x.at[rows[:, None], at[None, :]], mask=real & good[None, :], other=0.0
        )
        tiles = [tile(at, good, j * case.n) for j in range(len(sums))]
        if norm is not None:
            wide = part.astype(jnp.float32)
            squares += jnp.sum(wide * wide, axis=1)
            scale = plt.load(norm.at[at], mask=good, other=0.0).astype(jnp.float32)
            part = (wide * scale[None, :]).astype(part.dtype)
        return squares, *(s + dot(part, t) for s, t in zip(sums, tiles, strict=True))

    zero = jnp.zeros((ROWS, size.n), jnp.float32)
    start = (jnp.zeros((ROWS,), jnp.float32), *[zero] * (1 + case.swiglu))
    squares, *sums = jax.lax.fori_loop(0, pl.cdiv(case.k, size.k), step, start)
    if norm is not None:
        factor = jax.lax.rsqrt(squares / case.k + case.eps)[:, None]
        sums = [s * factor for s in sums]
    if bias is not None:
        for j in range(len(sums)):
            more = plt.load(bias.at[cols + j * case.n], mask=inside, other=0.0)
            sums[j] += more.astype(jnp.float32)[None, :]
    out = sums[0]
    if case.swiglu:
        out = out * jax.nn.sigmoid(out) * sums[1]
    goal, mask = (rows[:, None], cols[None, :]), real & inside[None, :]
    if residual is not None:
        more = plt.load(residual.at[goal], mask=mask, other=0.0)
        out = out + more.astype(jnp.float32)
    plt.store(y.at[goal], out.astype(y.dtype), mask=mask)
