"""CoSA: blocks by the exponentials of their highest strided scores."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from angeljax.attention import _choice
from angeljax.attention._choice import Measure
from angeljax.attention._selector import Place
from angeljax.attention._strided import Scores
from pallas_kernels import BlockLists

# A block whose exponential is this near to 1 holds the maximum of a row.
_MAXIMUM = 1 - 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoSA:
    """The blocks that hold the maxima of rows, then those with the highest scores.

    Strided scores as in `XAttention`; the score of a block is the sum over its rows of
    the exponential of its highest score below the row's maximum. Each row of blocks
    takes the first block and the diagonal, then the blocks that hold the maximum of one
    of their rows, then the others, each by falling score, as long as what it has is
    less than `top_p` of the sum of scores.

    Only the proxy is here. In the paper the kernel visits blocks in this order and
    skips the softmax and the second product of blocks that cannot matter any more
    (online softmax skipping). Lists ascend here, so nothing is skipped that was
    selected: what is read is the same, and the time that skipping would save is lost.

    Scores are made as for `XAttention`, at the same cost and in the same memory.

    Source: CoSA (arXiv 2607.25291), key-block-aware proxy and row-maximum flags.

    Attributes:
      block_size: rows of a query block and of a key block.
      stride: rows of an anti-diagonal; divides `block_size`.
      top_p: share of the scores; a tuple has one for each layer, and each of those may
        be a tuple with one for each query head of the model. 1 takes every block.
      keep_ratio: instead of `top_p`, each row keeps this share of the blocks it sees,
        rounded, in the same order.
      max_blocks: most blocks of a row. It is the width of the lists, by default all key
        blocks.

    Raises:
      ValueError: an option that cannot be, in one line.

    Example:
      >>> import jax
      >>> from angeljax.attention import CoSA, Place
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 1024, 2, 16))
      >>> cosa = CoSA(block_size=64, keep_ratio=0.5)
      >>> lists = jax.jit(cosa.select, static_argnums=3)(q, k, v, Place())
      >>> lists.indices.shape, round(cosa.density(1024), 3)
      ((1, 2, 16, 8), 0.537)
    """

    block_size: int = 128
    stride: int = 8
    top_p: float | tuple[Any, ...] = 0.95
    keep_ratio: float | None = None
    max_blocks: int | None = None

    def __post_init__(self) -> None:
        _choice.check(self, "top_p")

    def density(self, total: int, **place: Any) -> float | None:
        """Share of the causal blocks that are read, with `keep_ratio`; else None."""
        return _choice.ratio_density(self, total)

    def select(
        self, q: jax.Array, k: jax.Array, v: jax.Array, place: Place
    ) -> BlockLists:
        """Lists of the blocks that each query block reads; see `Selector`."""
        return _choice.select(self, "top_p", _highest, q, k, v, place)


def _highest(scores: Scores) -> Measure:
    """Sums of the exponentials of the highest scores, and who holds a maximum."""
    highest = jnp.max(scores.values, -1)  # [B, H, n, cells, blocks]
    highest = lax.optimization_barrier(highest)  # Else scores are read three times.
    e = jnp.exp(highest - jnp.max(highest, -1, keepdims=True))
    e = jnp.where(scores.real, e, 0)
    return Measure(jnp.sum(e, 3), jnp.any(e >= _MAXIMUM, 3))
