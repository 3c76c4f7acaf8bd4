"""The Triton kernel of greedy selection. Needs triton: import it on use only.

`no_type_check` keeps run-time checkers from wrapping what Triton compiles.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def greedy_select(
    gram,
    first,
    base,
    limit,
    order,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """All choices of one row of the batch; see `_terms.mmr_start` for the inputs."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < N
    gram = gram + row * (N * N) + column
    score = tl.load(first + row * N + column, mask=inside, other=float("-inf"))
    own = tl.load(base + row * N + column, mask=inside, other=float("-inf"))
    count = tl.load(limit + row)
    order = order + row * SLOTS
    slot = tl.arange(0, BLOCK_SLOTS)
    tl.store(order + slot, N, mask=(slot >= count) & (slot < SLOTS))
    near = tl.full((WIDTH,), -3.4028234663852886e38, tl.float32)
    for t in range(0, count):
        # Integers that ascend as the scores do: warps reduce those by one instruction.
        bits = score.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        best = tl.min(tl.where(key == tl.max(key, 0), column, N - 1), 0)
        tl.store(order + t, best)
        similar = tl.load(gram + best.to(tl.int64) * N, mask=inside, other=0.0)
        own = tl.where(column == best, float("-inf"), own)
        near = tl.maximum(near, similar * FACTOR)
        score = own - near
