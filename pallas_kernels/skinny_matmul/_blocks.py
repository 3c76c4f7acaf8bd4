"""Tile sizes of `skinny_matmul`: data, so that measurements can replace them."""

from __future__ import annotations

import dataclasses

# Rows of a tile: those of one instruction of the tensor cores.
ROWS = 16


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What one program takes, and how it is compiled.

    A result does not depend on how many rows there are, as nothing here does.

    Attributes:
      n: output columns, a power of two from 8 on.
      k: inputs of a step, a power of two from 16 on.
      warps: of a program.
      stages: steps whose weights are on the way together.
    """

    n: int
    k: int
    warps: int
    stages: int


# Most columns of the output: tiles. One token waits for memory, so that there should be
# about as many programs as processors (132), each with some 16 KiB on the way.
TABLE = (
    (1024, Blocks(8, 256, 4, 4)),
    (4096, Blocks(16, 256, 4, 4)),
    (16384, Blocks(32, 128, 4, 4)),
    (1 << 62, Blocks(64, 128, 4, 4)),
)


def blocks(n: int, itemsize: int, transposed: bool) -> Blocks:
    """The tiles for `n` output columns of weights with so many bytes each.

    Where columns are neighbours in memory, fewer than 16 are less than it gives.
    """
    found = next(b for most, b in TABLE if n <= most)
    wide = found.n if transposed else max(found.n, 16)
    deep = found.k if itemsize <= 2 else 64
    return dataclasses.replace(found, n=wide, k=deep)
