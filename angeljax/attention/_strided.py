"""Softmax over strided scores, a few query blocks at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from angeljax.attention import _budgets, _options, _words
from angeljax.attention._frame import Frame, strided
from pallas_kernels import BlockLists

# Most bytes of scores that are alive at once, or those of one query block if more.
_BYTES = 2**28
# Parts of the prompt, each scored up to its own last block.
_PARTS = 4


class Chunk(NamedTuple):
    """Scores of some query blocks.

    Attributes:
      scores: float32 `[B, H, n, cells, blocks, cells]`, the scores of the cells of n
        query blocks for those of all key blocks; -inf past the diagonal.
      real: bool `[1 or B, 1, n, cells, 1]`, which query cells hold a real query.
      rows: int32 `[1 or B, 1, n, 1]`, the key block of each query block.
      number: int32 `[n]`, of the query blocks in the call.
    """

    scores: jax.Array
    real: jax.Array
    rows: jax.Array
    number: jax.Array


def chunk_blocks(frame: Frame, batch: int, cells: int) -> int:
    """Query blocks that are scored at once."""
    each = 4 * batch * frame.heads * cells * frame.num_k * cells
    return max(1, min(frame.num_q, _BYTES // each))


def map_chunks(
    frame: Frame,
    q: jax.Array,
    k: jax.Array,
    stride: int,
    choose: Callable[[Chunk], jax.Array],
) -> jax.Array:
    """Chooses blocks from the strided scores of all queries.

    A cell is `stride` rows. The score of a query cell a and a key cell c is the sum of
    the anti-diagonal products of their rows over `stride * sqrt(D)`,

        A[a, c] = sum_t q[a stride + stride - 1 - t] k[c stride + t].

    Chunks of query blocks are scored one after the other (`lax.map`): 256 MiB of scores
    at once, or those of one query block if that is more.

    Args:
      frame: of the call.
      q, k: as the selector has them.
      stride: rows of a cell; divides the block size.
      choose: from a chunk to words `[B, H, n, words]` of its blocks.

    Returns:
      uint32 `[B, H, num_q, words]`.
    """
    batch, cells = q.shape[0], frame.block // stride
    q = strided(frame.real_queries(q), frame.block, stride)  # [B, n, cells, stride, ..]
    q = q.reshape(*q.shape[:4], frame.kv_heads, frame.group, q.shape[-1])
    k = strided(frame.real_keys(k), frame.block, stride)[:, :, :, ::-1]
    k = k.transpose(0, 4, 1, 2, 3, 5)
    k = k.reshape(*k.shape[:4], -1)  # [B, Hkv, num_k, cells, stride * D]
    keys = jnp.reshape(jnp.asarray(frame.keys), (-1, 1, 1, 1, 1))
    all_rows = jnp.asarray(frame.rows)[:, None, :, None]
    size = chunk_blocks(frame, batch, cells)

    def chunk(first: Any, count: int, seen: int) -> jax.Array:
        part = lax.dynamic_slice_in_dim(q, first, count, 1)
        part = part.transpose(0, 4, 5, 1, 2, 3, 6)
        part = part.reshape(*part.shape[:5], -1)  # [B, Hkv, G, n, cells, stride * D]
        scores = jnp.einsum(
            "bhgnax,bhmcx->bhgnamc",
            part,
            k[:, :, :seen],
            precision="highest" if q.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
        scores = scores.reshape(batch, frame.heads, *scores.shape[3:])
        scores = scores * (1 / (stride * math.sqrt(q.shape[-1])))
        rows = lax.dynamic_slice_in_dim(all_rows, first, count, 2)
        cell = rows[..., None] * cells + jnp.arange(cells)[:, None]
        columns = np.arange(seen * cells).reshape(seen, cells)
        scores = jnp.where(columns <= cell[..., None], scores, -jnp.inf)
        numbers = first + jnp.arange(count)
        words = choose(Chunk(scores, cell * stride < keys, rows, numbers))
        return _words.widen(words, frame.num_words)

    found = []
    for low, high in _parts(frame.num_q, size):
        seen = frame.num_k
        if frame.start is not None:
            seen = min(seen, frame.start + high)
        # Whole chunks, and what is left.
        whole = (high - low) // size
        if whole:
            starts = low + jnp.arange(whole) * size
            words = lax.map(lambda first, n=seen: chunk(first, size, n), starts)
            words = jnp.moveaxis(words, 0, 2)
            found.append(words.reshape(*words.shape[:2], -1, words.shape[-1]))
        if rest := (high - low) % size:
            found.append(chunk(high - rest, rest, seen))
    return jnp.concatenate(found, axis=2)


def _parts(num_q: int, size: int) -> list[tuple[int, int]]:
    """Query blocks in parts of whole chunks."""
    step = max(1, -(-num_q // (size * _PARTS))) * size
    return [(low, min(low + step, num_q)) for low in range(0, num_q, step)]


class Choice(NamedTuple):
    """How the blocks of a row are chosen from ordered masses.

    Attributes:
      frame: of the call.
      keep_ratio: each row keeps this share of the blocks it sees; None goes by mass.
      max_blocks: most blocks of a row, the forced ones included.
    """

    frame: Frame
    keep_ratio: float | None
    max_blocks: int | None

    @property
    def width(self) -> int:
        """Most blocks of a row."""
        if self.keep_ratio is not None:
            # Prompts of which this is a chunk may be longer; their rows are not here.
            budgets = _shares(self.frame.num_k, self.keep_ratio, self.max_blocks)
            return int(budgets.max())
        return min(self.max_blocks or self.frame.num_k, self.frame.num_k)

    def choose(
        self, chunk: Chunk, mass: jax.Array, first: jax.Array | None, share: Any
    ) -> jax.Array:
        """Words of the chosen blocks.

        The first block and the diagonal are always in. Then come those of `first`, then
        the others, either by falling mass, until the mass of a row is enough.

        Args:
          chunk: of which.
          mass: float32 `[B, H, n, blocks]`, not negative.
          first: bool of that shape; None for no block.
          share: of the mass of a row that is enough, `[...]` that broadcasts to
            `[B, H, n]`; from 1 on every block is taken.

        Returns:
          uint32 `[B, H, n, words]`.
        """
        columns = np.arange(mass.shape[-1])
        forced = (columns == 0) | (columns == chunk.rows)
        # From 1 on, so that a block of no mass is a candidate still.
        key = _words.order32(mass) + 1
        if first is not None:
            key = key | jnp.where(first, jnp.uint32(1 << 31), jnp.uint32(0))
        open_ = (columns < chunk.rows) & ~forced
        key = jnp.where(open_, key, 0)
        held = jnp.minimum(chunk.rows[..., 0] + 1, 2)
        budget = None
        if self.keep_ratio is not None:
            table = _shares(self.frame.num_k, self.keep_ratio, self.max_blocks)
            budget = jnp.asarray(table)[chunk.rows[..., 0]]
            words = _words.best(key, budget - held)
        else:
            total = jnp.sum(mass, -1)
            before = jnp.sum(jnp.where(forced, mass, 0), -1)
            needed = jnp.where(jnp.asarray(share) >= 1, jnp.inf, total * share)
            weights = jnp.where(open_, mass, 0)
            words = _words.until(key, weights, before, needed)
            if self.max_blocks is not None and self.max_blocks < self.frame.num_k:
                words = words & _words.best(key, self.max_blocks - held)
        return (words & _words.pack(open_)) | _words.pack(forced)

    def lists(self, words: jax.Array) -> BlockLists:
        return self.frame.lists(words, self.width)


def _shares(blocks: int, ratio: float, most: int | None) -> np.ndarray:
    least = _budgets.forced(blocks, 1, 1)
    return np.minimum(_budgets.shares(blocks, ratio, least), most or blocks)


def ratio_density(selector: Any, total: int) -> float | None:
    """Share of the causal blocks that are read; None where it depends on the tokens."""
    if selector.keep_ratio is None:
        return None
    blocks = -(-total // selector.block_size)
    read = _shares(blocks, selector.keep_ratio, selector.max_blocks)
    return float(read.sum() / _budgets.seen(blocks).sum())


def check(selector: Any, share: str) -> None:
    """Checks the options that the selectors of strided scores have in common.

    Raises:
      ValueError: one line that names the field.
    """
    _options.integer(selector, "block_size", 1)
    _options.integer(selector, "stride", 1)
    if selector.block_size % selector.stride:
        raise ValueError(
            f"stride={selector.stride} must divide block_size={selector.block_size}"
        )
    _options.number(selector, share, 0, 1, depth=2)
    if selector.keep_ratio is not None:
        _options.number(selector, "keep_ratio", 0, 1)
    if selector.max_blocks is not None:
        _options.integer(selector, "max_blocks", 2)


def shares_of_heads(name: str, value: Any, place: Any, heads: int) -> jax.Array:
    """A share for each query head, float32 `[heads or 1, 1]`.

    Args:
      name: of the option.
      value: a number, or one for each layer, or for each layer one for each head.
      place: of the call.
      heads: query heads of the call.

    Raises:
      ValueError: too few or too many entries.
    """

    def entries(layer: int) -> tuple[float, ...]:
        entry = _options.per_layer(name, value, layer, place.num_layers)
        return entry if isinstance(entry, tuple) else (entry,)

    rows, layer = _options.for_layers(
        place.layer, place.num_layers, place.among, entries
    )
    longest = max(map(len, rows))
    if 1 < longest < heads:
        raise ValueError(f"{name} has {longest} heads and q has {heads}")
    table = np.asarray([row * longest if len(row) == 1 else row for row in rows])
    row = jnp.asarray(table, jnp.float32)[0 if layer is None else layer]
    if longest > 1:
        row = lax.dynamic_slice_in_dim(row, jnp.asarray(place.first_head), heads)
    return row[:, None]
