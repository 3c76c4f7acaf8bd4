"""What a selector is: a rule that names the key blocks each query block reads."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax

from pallas_kernels import BlockLists


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where queries stand in the prompt and in the model.

    Attributes:
      layer: number of the layer from 0; may be traced (scanned layers).
      num_layers: of the model; static.
      q_offset: position of the first query among the keys, a multiple of the block size
        of the selector: an integer, or int32 `[B]`.
      total: tokens of the whole prompt, static; default the rows of k. Budgets follow
        it, so that the chunks of a prompt select what the prompt would in one piece.
      lengths: int32 `[B]`, real keys of each row of the batch; None if all are.
      first_head: number of the first query head given, where heads are split over
        devices; may be traced. Options that differ between heads follow it.
      among: the layers that a traced `layer` may be; static, default all. Lists are as
        wide as the widest of these layers needs.
    """

    layer: int | jax.Array = 0
    num_layers: int = 1
    q_offset: int | jax.Array = 0
    total: int | None = None
    lengths: jax.Array | None = None
    first_head: int | jax.Array = 0
    among: tuple[int, ...] | None = None


@runtime_checkable
class Selector(Protocol):
    """A frozen, hashable dataclass of options, so that `jit` may close over it.

    Attributes:
      block_size: rows of a query block and of a key block.
    """

    @property
    def block_size(self) -> int: ...

    def select(
        self, q: jax.Array, k: jax.Array, v: jax.Array, place: Place
    ) -> BlockLists:
        """Lists for queries `[B, T, H, D]` of keys and values `[B, S, Hkv, D]`.

        Pure, static shapes, no host synchronisation. Each head is selected by itself:
        a shard of the heads selects what all of them would. Every list holds the block
        of its own queries (the diagonal).
        """
        ...

    def density(self, total: int, **place: Any) -> float | None:
        """Share of the causal blocks that a prompt of `total` tokens will read.

        None where it depends on the tokens. `layer` and `num_layers` may be given.
        """
        ...
