"""Tile sizes of `rows_attention`: data, so that measurements can replace them."""

from __future__ import annotations

import dataclasses

# Tokens of a tile, and the most that a row can bring.
TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What a step of a program takes, and how it is compiled.

    Attributes:
      keys: slots of a step, a power of two from 16 on.
      warps: of a program.
      stages: steps whose keys and values are on the way together.
    """

    keys: int
    warps: int
    stages: int


# Most features of a head: tiles. They follow neither the tokens nor the slots of the
# cache, so that no sum is taken in another order when those change.
TABLE = (
    (64, Blocks(128, 4, 2)),
    (128, Blocks(64, 4, 2)),
    (256, Blocks(32, 4, 2)),
)


def blocks(features: int, queries: int, itemsize: int) -> Blocks:
    """The tiles for heads of so many features of so many bytes.

    `queries` are those of a tile: the more, the more warps must hold what they give.
    """
    found = next(b for most, b in TABLE if features <= most)
    keys = found.keys if itemsize <= 2 else max(found.keys // 4, 16)
    warps = max(found.warps, queries // 16)
    return dataclasses.replace(found, keys=keys, warps=min(warps, 16))


def queries_of(heads: int, kv_heads: int) -> int:
    """Rows of a tile: 16 for each query head of a head of keys, up to a power of 2."""
    return TOKENS * (1 << (heads // kv_heads - 1).bit_length())
