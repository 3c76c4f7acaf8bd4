"""XAttention: blocks by the softmax mass of their anti-diagonals."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from angeljax.attention import _choice
from angeljax.attention._choice import Measure
from angeljax.attention._selector import Place
from angeljax.attention._strided import Scores, mass
from pallas_kernels import BlockLists


@dataclasses.dataclass(frozen=True, kw_only=True)
class XAttention:
    """The blocks with the most softmax mass, until a share of it is reached.

    Sums over anti-diagonals of `stride` rows and keys stand for scores; their softmax
    over the keys, summed over a block, is its mass. Each row takes the first block and
    the diagonal, then others by falling mass, as long as what it has is less than
    `threshold` of the whole.

    The softmax cannot be factored: scores take `2 n^2 D / stride` operations for each
    head and n tokens, a part of `1 / stride` of dense causal attention. They are made
    for a few query blocks at a time: at most 256 MiB of them at once, or those of one
    query block if that is more; beside a copy of q and k in another order.

    Source: XAttention (arXiv 2503.16428), section 2.

    Attributes:
      block_size: rows of a query block and of a key block.
      stride: rows of an anti-diagonal; divides `block_size`.
      threshold: share of the mass; a tuple has one for each layer, and each of those
        may be a tuple with one for each query head of the model. 1 takes every block.
      keep_ratio: instead of the threshold, each row keeps this share of the blocks it
        sees, rounded, by mass.
      max_blocks: most blocks of a row. It is the width of the lists, by default all key
        blocks.

    Raises:
      ValueError: an option that cannot be, in one line.

    Example:
      >>> import jax
      >>> from angeljax.attention import Place, XAttention
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 1024, 2, 16))
      >>> xattention = XAttention(block_size=64, max_blocks=8)
      >>> lists = jax.jit(xattention.select, static_argnums=3)(q, k, v, Place())
      >>> lists.indices.shape
      (1, 2, 16, 8)
    """

    block_size: int = 128
    stride: int = 8
    threshold: float | tuple[Any, ...] = 0.9
    keep_ratio: float | None = None
    max_blocks: int | None = None

    def __post_init__(self) -> None:
        _choice.check(self, "threshold")

    def density(self, total: int, **place: Any) -> float | None:
        """Share of the causal blocks that are read, with `keep_ratio`; else None."""
        return _choice.ratio_density(self, total)

    def select(
        self, q: jax.Array, k: jax.Array, v: jax.Array, place: Place
    ) -> BlockLists:
        """Lists of the blocks that each query block reads; see `Selector`."""
        return _choice.select(self, "threshold", _mass, q, k, v, place)


def _mass(scores: Scores) -> Measure:
    return Measure(mass(scores))
