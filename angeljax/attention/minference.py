"""`MInference`: vertical columns and slashes of each head (arXiv 2407.02490)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.attention import _choose
from angeljax.attention._estimate import (
    along,
    distance,
    ends,
    last_queries,
    split_last,
    tail_mass,
)
from angeljax.attention._frame import make_frame
from angeljax.attention._patterns import (
    DEFAULT,
    KINDS,
    Pattern,
    check_pattern,
    read_patterns,
)
from angeljax.attention._selector import Place
from pallas_kernels import BlockLists

_QUERIES = 64
# Keys of the beginning and of the nearest distances that are always in.
_SINK, _LOCAL = 30, 100
_LEAST = (30, 50)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MInference:
    """Vertical-slash attention with budgets searched for each head, in blocks.

    From the softmax of the last 64 queries: the mass on each key, and on each distance
    of key and query (arXiv 2407.02490, section 3.2 and algorithm 2). A head with the
    pattern ("vertical_and_slash", v, s) reads the keys with the most mass and the
    distances with the most mass. Rounded to blocks of B rows:

    - columns: the mass of a block is that of its keys; the ceil(v / B) heaviest blocks
      are read by every query, the blocks of the first 30 keys before any other;
    - slashes: of B queries in a block, the keys at distance s lie in the block diagonal
      s // B for B - s % B and in the next one for the others, and the mass of s is
      split in this proportion; the ceil(s / B) heaviest block diagonals are read, those
      of the distances below 100 before any other and in any case.

    So the budget in tokens is that of the original (v at least 30, s at least 50,
    neither more than the prompt), but lone columns that are spread over more than
    ceil(v / B) blocks are not all read, while the neighbours of the others are.

    A head with ("stream_llm", n, w) reads the blocks of the first n keys and of the w
    nearest ones (A-shape). Lists are per query head. Chunks of a prompt are selected by
    their own last queries and not by those of the prompt, so they differ from one
    piece.

    Attributes:
      patterns: for each layer, for each query head (kind, size, size); () gives every
        head `pattern`. A shard of the heads needs `Place.first_head`.
      pattern: of every head if there is no table.
      block_size: rows of a block.
      keep_ratio: keep this share of the causal blocks of each row in place of the
        budgets, by the sum of column and slash mass; stream heads the first n keys,
        then the nearest.
      max_blocks: most blocks of a row, by the same scores; the width of the lists. With
        either of the two, stream heads too read the first and nearest blocks that other
        heads always do.

    Example:
      >>> import jax
      >>> from angeljax.attention import MInference, Place
      >>> q = jax.random.normal(jax.random.key(0), (1, 512, 2, 16))
      >>> heads = (("stream_llm", 64, 1), ("vertical_and_slash", 512, 512))
      >>> selector = MInference(patterns=(heads,), block_size=64)
      >>> lists = jax.jit(lambda q, k: selector.select(q, k, k, Place()))(q, q)
      >>> lists.counts[0].tolist()
      [[1, 2, 2, 2, 2, 2, 2, 2], [1, 2, 3, 4, 5, 6, 7, 8]]
    """

    patterns: tuple[tuple[Pattern, ...], ...] = ()
    pattern: Pattern = DEFAULT
    block_size: int = 128
    keep_ratio: float | None = None
    max_blocks: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", check_pattern(self.pattern, "pattern"))
        rows = tuple(
            tuple(
                check_pattern(x, f"patterns, layer {i}, head {h}")
                for h, x in enumerate(row)
            )
            for i, row in enumerate(self.patterns)
        )
        object.__setattr__(self, "patterns", rows)
        if len({len(row) for row in rows}) > 1 or (rows and not rows[0]):
            raise ValueError(
                "patterns must have the same number of heads in each layer"
            )
        _choose.check(self, lambda: self._forced)

    @classmethod
    def from_json(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Any],
        *,
        model: Any = None,
        **options: Any,
    ) -> MInference:
        """Reads a table of patterns.

        Args:
          source: a JSON file, or what is in one: a list with `{"head": [kind, size,
            size, ...]}` for each layer, as microsoft/MInference publishes them; or
            `{"schema_version": 1, "model_fingerprint": {...}, "best_pattern": {"layer":
            {"head": [...]}}}`. Layers and heads that are left out get the default of
            the original, `("vertical_and_slash", 1000, 6096)`.
          model: configuration (`DecoderConfig`, one of transformers or a mapping) that
            the fingerprint and the number of layers and heads must fit.
          **options: other attributes.

        Returns:
          The selector.

        Raises:
          ValueError: a table that is not of this form, has kinds of patterns other than
            these two, or is for another model.
        """
        return cls(patterns=read_patterns(source, model), **options)

    def select(
        self, q: jax.Array, k: jax.Array, v: jax.Array, place: Place
    ) -> BlockLists:
        """See `Selector.select`."""
        block = self.block_size
        frame = make_frame(q, k, v, place, block)
        stream, first_size, near_size = self._heads(q.shape[2], place)
        k, keys = frame.real_keys(k), ends(frame, q.shape[0])[:, None]
        tail, *where = last_queries(frame, q, _QUERIES)
        column, diagonal = tail_mass(tail, k, *where)
        blocks, back = jnp.arange(frame.num_k), distance(frame)

        # What is always in: of stream heads that is the whole pattern.
        first, near = map(jnp.asarray, self._forced)
        first = jnp.where(stream, -(-first_size // block), first)
        near = jnp.where(stream, (near_size + block - 2) // block + 1, near)
        sink, local = (blocks < n[:, None] for n in (first, near))  # [H, num_k]
        vertical = jnp.where(
            stream[:, None], 2.0 * sink, split_last(column, block).sum(-1)
        )
        slash = jnp.where(
            stream[:, None], 1 / (1.0 + blocks), _shares(split_last(diagonal, block))
        )

        def heaviest(
            mass: jax.Array, always: jax.Array, size: jax.Array, least: int
        ) -> jax.Array:
            size = jnp.minimum(jnp.maximum(size, least), keys)
            budget = jnp.where(stream, 0, -(-size // block))  # [B, H]
            return always | _choose.best(jnp.where(always, jnp.inf, mass), budget)

        columns = heaviest(vertical, sink, first_size, _LEAST[0])
        diagonals = heaviest(slash, local, near_size, _LEAST[1])
        score = vertical[:, :, None] + along(slash, back)
        wanted = columns[:, :, None] | along(diagonals, back)
        if self.keep_ratio is None and self.max_blocks is None:
            # Stream heads may be narrower than what others always read.
            return _choose.choose(self, frame, score, wanted, (0, 1))
        return _choose.choose(self, frame, score, wanted, self._forced)

    def density(self, total: int, **place: Any) -> float | None:
        """See `Selector.density`."""
        return _choose.ratio_density(self, total, self._forced)

    @property
    def _forced(self) -> tuple[int, int]:
        """First and last blocks with the first 30 keys and the nearest 100."""
        return -(-_SINK // self.block_size), -(-(_LOCAL - 1) // self.block_size) + 1

    def _heads(self, heads: int, place: Place) -> tuple[jax.Array, ...]:
        """Of each query head, int32 `[H]`: is it a stream head, and its two sizes."""
        rows = self.patterns or ((self.pattern,) * heads,)
        table = np.asarray(
            [[(KINDS.index(kind), a, b) for kind, a, b in row] for row in rows],
            np.int32,
        )
        layer = place.layer if self.patterns else 0
        if isinstance(layer, int) and not 0 <= layer < len(table):
            raise ValueError(f"layer={layer}: patterns have {len(table)} layers")
        first, there = place.first_head if self.patterns else 0, table.shape[1]
        if there % heads or (isinstance(first, int) and first + heads > there):
            raise ValueError(
                f"patterns have {there} heads and q has {heads} from {first} on: use "
                "the table of this model, and Place.first_head where heads are split"
            )
        row = jax.lax.dynamic_slice_in_dim(jnp.asarray(table)[layer], first, heads)
        return row[:, 0] == 1, row[:, 1], row[:, 2]


def _shares(mass: jax.Array) -> jax.Array:
    """Mass of distances `[..., n, block]` as that of block diagonals `[..., n]`."""
    part = jnp.arange(mass.shape[-1]) / mass.shape[-1]
    here, beyond = (mass * (1 - part)).sum(-1), (mass * part).sum(-1)
    return here.at[..., 1:].add(beyond[..., :-1])
