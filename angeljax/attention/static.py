"""Selectors that look at positions only."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.attention import _options, _words
from angeljax.attention._frame import make_frame
from angeljax.attention._selector import Place
from pallas_kernels import BlockLists


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Static:
    """Base of the selectors of this module: one list for all heads.

    Attributes:
      block_size: rows of a query block and of a key block.
    """

    block_size: int = 128

    def __post_init__(self) -> None:
        _options.integer(self, "block_size", 1)

    def keep(self, i: Any, j: Any, tokens: Any) -> Any:
        """Whether query block i of a prompt of so many tokens reads key block j <= i.

        All arguments may be arrays, of numpy or of JAX.
        """
        raise NotImplementedError

    def select(
        self, q: jax.Array, k: jax.Array, v: jax.Array, place: Place
    ) -> BlockLists:
        """Lists `[1 or B, 1, num_q, width]`; see `Selector`."""
        frame = make_frame(q, k, v, place, self.block_size)
        total = k.shape[1] if place.total is None else place.total
        tokens: Any = total
        if frame.padded:
            tokens = jnp.reshape(jnp.asarray(place.lengths), (-1, 1, 1, 1))
            # Rows of the batch may end anywhere, and TriShape's end is dense.
            width = frame.num_k
        else:
            width = int(frame.of_prompt(self._counts(total)).max())
        i = jnp.asarray(frame.rows)[:, None, :, None]
        j = np.arange(frame.num_k)
        mask = (self.keep(i, j, tokens) | (i == j)) & (j <= i)
        return frame.lists(_words.pack(mask), width)

    def density(self, total: int, **place: Any) -> float:
        """Share of the causal blocks that are read; see `Selector`."""
        counts = self._counts(total)
        return float(counts.sum() / (len(counts) * (len(counts) + 1) // 2))

    def _counts(self, total: int) -> np.ndarray:
        """Blocks of each row of a prompt."""
        blocks = -(-total // self.block_size)
        i, j = np.arange(blocks)[:, None], np.arange(blocks)
        return ((self.keep(i, j, total) | (i == j)) & (j <= i)).sum(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(_Static):
    """Every block up to the diagonal: attention without sparsity.

    Attributes:
      block_size: rows of a query block and of a key block.

    Example:
      >>> from angeljax.attention import Dense
      >>> Dense().density(4096)
      1.0
    """

    def keep(self, i: Any, j: Any, tokens: Any) -> Any:
        """See `_Static`."""
        return j <= i

    def select(
        self, q: jax.Array, k: jax.Array, v: jax.Array, place: Place
    ) -> BlockLists:
        """Lists `[1 or B, 1, num_q, num_k]`; see `Selector`."""
        return make_frame(q, k, v, place, self.block_size).every_block()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AShape(_Static):
    """The first keys and the nearest ones (StreamingLLM, arXiv 2309.17453).

    A query at t is meant to read the keys below `sink_tokens` and those above
    `t - window_tokens`. A block that holds one such pair of query and key is read
    whole: each row reads `ceil(sink_tokens / block_size)` first blocks and
    `1 + ceil((window_tokens - 1) / block_size)` last ones, so never less than meant.

    Attributes:
      block_size: rows of a query block and of a key block.
      sink_tokens: first keys.
      window_tokens: nearest keys, the query's own included.

    Example:
      >>> from angeljax.attention import AShape
      >>> round(AShape(sink_tokens=128, window_tokens=1024).density(16384), 3)
      0.15
    """

    sink_tokens: int = 128
    window_tokens: int = 3968

    def __post_init__(self) -> None:
        super().__post_init__()
        _options.integer(self, "sink_tokens", 0)
        _options.integer(self, "window_tokens", 1)

    def keep(self, i: Any, j: Any, tokens: Any) -> Any:
        """See `_Static`."""
        sink = -(-self.sink_tokens // self.block_size)
        window = 1 + -(-(self.window_tokens - 1) // self.block_size)
        return (j < sink) | (j > i - window)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TriShape(AShape):
    """`AShape`, and the last queries of the prompt read everything (arXiv 2412.10319).

    A block that holds one of the last queries reads all blocks. Which ones they are
    follows `Place.total`, and `Place.lengths` where rows of the batch are shorter.

    Attributes:
      block_size, sink_tokens, window_tokens: as for `AShape`.
      last_tokens: last queries; at most all but the first one.

    Example:
      >>> from angeljax.attention import AShape, TriShape
      >>> TriShape().density(16384) > AShape().density(16384)
      True
    """

    last_tokens: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        _options.integer(self, "last_tokens", 0)

    def keep(self, i: Any, j: Any, tokens: Any) -> Any:
        """See `_Static`."""
        numpy = np if isinstance(tokens, int) else jnp
        last = numpy.minimum(self.last_tokens, tokens - 1)
        return super().keep(i, j, tokens) | ((i + 1) * self.block_size > tokens - last)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dilated(_Static):
    """Every so many-th block of a window, from the diagonal backwards.

    Row i reads block j where `i - j < window_blocks` and `i - j` is a multiple of
    `dilation`: the dilated window of Longformer (arXiv 2004.05150) over blocks.

    Attributes:
      block_size: rows of a query block and of a key block.
      dilation: steps between the blocks; 1 for all.
      window_blocks: how far back, in blocks, the diagonal included; None for the whole
        prompt.

    Example:
      >>> from angeljax.attention import Dilated
      >>> round(Dilated(dilation=4).density(16384), 3)
      0.256
    """

    dilation: int = 2
    window_blocks: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _options.integer(self, "dilation", 1)
        if self.window_blocks is not None:
            _options.integer(self, "window_blocks", 1)

    def keep(self, i: Any, j: Any, tokens: Any) -> Any:
        """See `_Static`."""
        kept = (i - j) % self.dilation == 0
        if self.window_blocks is None:
            return kept
        return kept & (j > i - self.window_blocks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strided(_Static):
    """The nearest blocks, and the last ones of every stride (arXiv 1904.10509).

    Row i reads block j where `i - j < stride_blocks` or where `j % stride_blocks` is
    one of the last `summary_blocks` numbers: the fixed pattern of the Sparse
    Transformer over blocks.

    Attributes:
      block_size: rows of a query block and of a key block.
      stride_blocks: l, blocks of a stride and of the window.
      summary_blocks: c, blocks at the end of each stride that all later rows read.

    Example:
      >>> from angeljax.attention import Strided
      >>> round(Strided(stride_blocks=8).density(16384), 3)
      0.224
    """

    stride_blocks: int = 16
    summary_blocks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _options.integer(self, "stride_blocks", 1)
        _options.integer(self, "summary_blocks", 0)
        if self.summary_blocks > self.stride_blocks:
            raise ValueError(
                f"summary_blocks={self.summary_blocks} must be at most "
                f"stride_blocks={self.stride_blocks}"
            )

    def keep(self, i: Any, j: Any, tokens: Any) -> Any:
        """See `_Static`."""
        size = self.stride_blocks
        return (j > i - size) | (j % size >= size - self.summary_blocks)
