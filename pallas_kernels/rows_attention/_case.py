"""What the kernels of `rows_attention` for Hopper are specialised for."""

from __future__ import annotations

import dataclasses
from typing import Any

WARPS = 4
LANES = 32 * WARPS
SPLITS = 64  # at most, of a cache
NONE = -1e30  # the logit of what is not seen


@dataclasses.dataclass(frozen=True)
class Case:
    """What the kernels are specialised for.

    Attributes:
      batch, tokens, heads, kv_heads, features, slots: B, T, H, Hkv, D and S.
      held: entries that go before the new ones, at most; 0 without.
      norms: whether there are scales of norms of queries and keys.
      eps: of those.
      runs: of 16 slots that a warp takes.
      tiles: of 16 queries that a thread block takes, at most.
    """

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    features: int
    slots: int
    held: int
    norms: bool
    eps: float
    runs: int
    tiles: int

    @property
    def group(self) -> int:
        """Query heads of a head of keys."""
        return self.heads // self.kv_heads

    @property
    def queries(self) -> int:
        """Of a head of keys."""
        return self.tokens * self.group

    @property
    def own(self) -> int:
        """Tiles of a thread block."""
        return min(self.tiles, -(-self.queries // 16))

    @property
    def shares(self) -> int:
        """Thread blocks that divide the queries."""
        return -(-self.queries // (16 * self.own))

    @property
    def rows(self) -> int:
        """Queries, with those that fill the last tiles."""
        return 16 * self.own * self.shares

    @property
    def part(self) -> int:
        """Slots of a thread block."""
        return 16 * WARPS * self.runs

    @property
    def splits(self) -> int:
        """Parts of the cache."""
        return -(-self.slots // self.part)

    @property
    def columns(self) -> int:
        """Of queries, keys and values."""
        return (self.heads + 2 * self.kv_heads) * self.features

    @property
    def grid(self) -> int:
        """Thread blocks of the attention."""
        return self.batch * self.kv_heads * self.shares * self.splits

    @property
    def stride(self) -> int:
        """Words of a query in shared memory."""
        return self.features + 4

    @property
    def smem_words(self) -> int:
        """Of results, maxima and sums."""
        return WARPS * 16 * self.own * (self.stride + 2)

    @property
    def gather_grid(self) -> int:
        """Thread blocks of `gather`."""
        return -(-self.batch * self.tokens * self.heads * self.features // (8 * LANES))


def capped(asm: Any, i: Any, count: int) -> Any:
    """`i`, or the last one."""
    return asm.select(i.less(count), i, asm.Int.of(count - 1))
