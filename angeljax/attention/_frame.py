"""Where the blocks of one call stand in the prompt."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.attention import _words
from angeljax.attention._selector import Place
from pallas_kernels import BlockLists

# Query blocks that are scored at once; see `Frame.parts`.
_PART = 512


@dataclasses.dataclass(frozen=True)
class Frame:
    """The blocks of a call.

    Attributes:
      block: rows of a block.
      start: key block of the first query block; None where it is traced.
      rows: int32 `[1 or B, num_q]`, the key block of each query block; numpy where
        `start` is known.
      keys: real keys, those after the last query not counted: an integer or int32
        `[B]`.
      first: position of the first query: an integer or int32 `[B]`.
      num_q, num_k: blocks of the queries, and of the keys up to the last query.
      total: blocks of the whole prompt.
      heads, kv_heads: of q and of k.
      padded: whether rows of the batch may be shorter than the arrays.
    """

    block: int
    start: int | None
    rows: Any
    keys: Any
    first: Any
    num_q: int
    num_k: int
    total: int
    heads: int
    kv_heads: int
    padded: bool

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.kv_heads

    @property
    def num_words(self) -> int:
        return -(-self.num_k // _words.BITS)

    @property
    def cut(self) -> bool:
        """Whether arrays hold rows that are not real and not known while tracing."""
        return self.padded or self.start is None

    @property
    def padding(self) -> jax.Array:
        """bool `[B, 1, num_q]`: query blocks without a real query."""
        return (self.rows * self.block >= jnp.reshape(self.keys, (-1, 1)))[:, None]

    def of_prompt(self, table: np.ndarray) -> np.ndarray:
        """The part of a table over the blocks of the prompt that may be needed."""
        return table if self.start is None else table[self.rows[0]]

    def whole(self, tokens: Any) -> bool:
        """Whether a static number of rows fills its blocks."""
        return isinstance(tokens, int) and tokens % self.block == 0

    def at_rows(self, table: np.ndarray, layer: Any = None) -> Any:
        """Entries of the query blocks from a table over the blocks of the prompt.

        Args:
          table: `[total]`, or `[layers, total]` with a layer.
          layer: traced number of a row of the table.

        Returns:
          `[1 or B, 1, num_q]`, numpy where everything is known.
        """
        rows = self.rows
        if isinstance(rows, np.ndarray):
            table = table[..., rows]
            return (table if layer is None else jnp.asarray(table)[layer])[:, None]
        kept = jnp.asarray(table) if layer is None else jnp.asarray(table)[layer]
        return kept[jnp.minimum(rows, table.shape[-1] - 1)][:, None]

    def parts(self, least: int = 1) -> list[tuple[slice, int]]:
        """Query blocks in parts, each with the number of key blocks it may see.

        Scores are made part by part: they take a bounded memory, and where the first
        query is known most of the blocks past the diagonal are never scored.

        Args:
          least: number of parts, where there are so many blocks.
        """
        size = min(_PART, -(-self.num_q // least))
        parts = []
        for low in range(0, self.num_q, size):
            high = min(low + size, self.num_q)
            seen = self.num_k if self.start is None else self.start + high
            parts.append((slice(low, high), min(seen, self.num_k)))
        return parts

    def real_queries(self, q: jax.Array) -> jax.Array:
        """q with zeros in the rows that are not real."""
        if not self.padded:
            return q
        position = jnp.arange(q.shape[1]) + jnp.reshape(self.first, (-1, 1))
        real = position < jnp.reshape(self.keys, (-1, 1))
        return jnp.where(real[..., None, None], q, 0)

    def real_keys(self, x: jax.Array) -> jax.Array:
        """k or v up to the last query, with zeros in the rows that are not real."""
        if isinstance(self.keys, int):
            return x[:, : self.keys]
        x = x[:, : self.num_k * self.block]
        real = jnp.arange(x.shape[1]) < jnp.reshape(self.keys, (-1, 1))
        return jnp.where(real[..., None, None], x, 0)

    def rows_of(self, blocks: int, queries: bool) -> jax.Array | None:
        """Real rows of each block, float32 `[1 or B, blocks]`; None if all are full."""
        if not self.cut and self.whole(self.keys):
            return None
        origin = self.rows if queries else np.arange(blocks)[None]
        left = jnp.reshape(self.keys, (-1, 1)) - origin * self.block
        return jnp.clip(left, 0, self.block).astype(jnp.float32)

    def causal(self) -> jax.Array:
        """Words of the blocks up to the diagonal, `[1 or B, 1, num_q, words]`."""
        rows = jnp.asarray(self.rows)[:, None]
        return _words.span(0, rows + 1, self.num_words)

    def forced(self, sink: int, window: int) -> jax.Array:
        """Words of the first blocks and of those up to the diagonal, as `causal`."""
        rows = jnp.asarray(self.rows)[:, None]
        first = _words.span(0, jnp.minimum(sink, rows + 1), self.num_words)
        last = _words.span(rows + 1 - window, rows + 1, self.num_words)
        return first | last

    def lists(self, words: jax.Array, width: int) -> BlockLists:
        """Lists of the set bits; query blocks that are padding read their diagonal."""
        if self.padded:
            rows = jnp.asarray(self.rows)[:, None]
            own = _words.span(rows, rows + 1, self.num_words)
            words = jnp.where(self.padding[..., None], own, words)
        return _words.lists(words, max(1, min(width, self.num_k)), self.block)

    def every_block(self) -> BlockLists:
        """Lists with every block up to the diagonal, `[1 or B, 1, num_q, num_k]`."""
        rows = jnp.asarray(self.rows, jnp.int32)[:, None]
        counts, slots = rows + 1, jnp.arange(self.num_k, dtype=jnp.int32)
        indices = jnp.broadcast_to(slots, (*rows.shape, self.num_k))
        if self.padded:
            counts = jnp.where(self.padding, 1, counts)
            indices = jnp.where(self.padding[..., None], rows[..., None], indices)
        return BlockLists(indices, counts, self.block, self.block)


def make_frame(
    q: jax.Array, k: jax.Array, v: jax.Array, place: Place, block: int
) -> Frame:
    """The frame of a call.

    Raises:
      ValueError: arrays or a place that do not go together; one line.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, T, heads, D], not {list(x.shape)}")
    batch, t, heads, dim = q.shape
    size, kv_heads = k.shape[1:3]
    if (k.shape[0], k.shape[3]) != (batch, dim) or k.shape != v.shape:
        raise ValueError(
            f"k {list(k.shape)} and v {list(v.shape)} must be alike, with the batch "
            f"{batch} and the head size {dim} of q"
        )
    if heads % kv_heads:
        raise ValueError(
            f"{heads} query heads cannot share {kv_heads} key heads: the second number "
            "must divide the first"
        )
    total = size if place.total is None else place.total
    offset, lengths = place.q_offset, place.lengths
    num_q = -(-t // block)
    start: int | None
    first: Any
    keys: Any
    rows: Any
    if isinstance(offset, int | np.integer):
        offset = int(offset)
        if offset % block:
            raise ValueError(
                f"q_offset={offset} must be a multiple of the block size {block}"
            )
        if not 0 <= offset <= size - t:
            raise ValueError(
                f"q_offset={offset}: {t} queries in {size} keys start at 0 to "
                f"{size - t}"
            )
        if offset + t > total:
            raise ValueError(
                f"total={total} is less than the {offset + t} tokens up to the last "
                "query: it counts the whole prompt"
            )
        start, first, keys = offset // block, offset, offset + t
        rows = (start + np.arange(num_q, dtype=np.int32))[None]
        num_k = start + num_q
    else:
        start, first = None, jnp.asarray(offset, jnp.int32)
        keys, num_k = jnp.minimum(first + t, size), -(-size // block)
        rows = jnp.reshape(first, (-1, 1)) // block + jnp.arange(num_q, dtype=jnp.int32)
        rows = jnp.minimum(rows, num_k - 1)
    if lengths is not None:
        keys = jnp.minimum(jnp.asarray(lengths, jnp.int32), keys)
    return Frame(
        block=block,
        start=start,
        rows=rows,
        keys=keys,
        first=first,
        num_q=num_q,
        num_k=num_k,
        total=-(-total // block),
        heads=heads,
        kv_heads=kv_heads,
        padded=lengths is not None,
    )


def strided(x: jax.Array, block: int, stride: int) -> jax.Array:
    """`[B, T, ...]` as `[B, blocks, block // stride, stride, ...]`, filled with 0."""
    blocks = -(-x.shape[1] // block)
    pad = [(0, 0)] * x.ndim
    pad[1] = 0, blocks * block - x.shape[1]
    shape = x.shape[0], blocks, block // stride, stride, *x.shape[2:]
    return jnp.pad(x, pad).reshape(shape)
