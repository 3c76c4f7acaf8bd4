"""Sizes of `skinny_matmul`: data, so that measurements can replace them."""

from __future__ import annotations

import dataclasses

# Tokens of a thread block, at most, and what others pad to.
ROWS = 16


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the kernel divides its work.

    A result does not depend on how many rows there are, as nothing here does.

    Attributes:
      warps: of a thread block, 4 or 8: they share the inputs.
      tiles: of 16 rows of the weight that a thread block takes.
    """

    warps: int
    tiles: int


def blocks(k: int, n: int) -> Blocks:
    """For `k` inputs and `n` outputs."""
    return Blocks(4 if k <= 768 else 8, 1 if n <= 8192 else 2)
