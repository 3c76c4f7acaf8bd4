"""Sizes of `rows_attention`: data, so that measurements can replace them."""

from __future__ import annotations

import dataclasses

# Tokens that a row can bring.
TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the kernel divides its work.

    Attributes:
      runs: of 16 slots that a warp takes; 4 warps are a thread block.
      tiles: of 16 queries that a thread block takes, at most.
    """

    runs: int
    tiles: int


def blocks(slots: int) -> Blocks:
    """For a cache of so many slots: nothing of it changes from round to round.

    Where a round takes no sum in another order, it gives the same bits. More tiles of
    queries would read keys less often, and fewer thread blocks would run.
    """
    return Blocks(1 if slots <= 1024 else 2, 1)
