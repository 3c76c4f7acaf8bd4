"""The Triton kernel of block-sparse attention. Needs triton: import it on use only.

One program takes a tile of queries of one head and walks its list in steps of BN keys,
first those that all of its rows see whole, then the few that need a mask. Logits are in
units of log2. `no_type_check` keeps run-time checkers from wrapping what Triton
compiles.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _walk(
    begin,
    end,
    q_tile,
    k_rows,
    v_rows,
    entries,
    position,
    S,
    last_entry,
    peak,
    total,
    acc,
    KEY_STRIDE: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Steps `begin` to `end` of one list; gives the running maximum, sum and output."""
    STEPS: tl.constexpr = BLOCK_K // BN
    LOG2E: tl.constexpr = 1.4426950408889634
    rn = tl.arange(0, BN)
    inside = (tl.arange(0, BD) < D)[None, :]
    # The number of a block is read one step ahead of the keys that it leads to.
    block = tl.load(entries + tl.minimum(begin // STEPS, last_entry))
    for step in range(begin, end):
        key = block * BLOCK_K + (step % STEPS) * BN
        block = tl.load(entries + tl.minimum((step + 1) // STEPS, last_entry))
        # Wrong lists read wrong keys, but never beyond k.
        key = tl.maximum(tl.minimum(key, S - 1 if MASKED else S - BN), 0)
        shift = key.to(tl.int64) * KEY_STRIDE
        if MASKED:
            real = ((key + rn) < S)[:, None] & inside
            k_tile = tl.load(k_rows + shift, mask=real, other=0.0)
            v_tile = tl.load(v_rows + shift, mask=real, other=0.0)
        elif BD == D:
            k_tile = tl.load(k_rows + shift)
            v_tile = tl.load(v_rows + shift)
        else:
            k_tile = tl.load(k_rows + shift, mask=inside, other=0.0)
            v_tile = tl.load(v_rows + shift, mask=inside, other=0.0)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        if SOFT_CAP > 0:
            # tanh by what no argument can overflow.
            e = tl.exp2(logits * (-2.0 * LOG2E * SCALE / SOFT_CAP))
            logits = (2.0 / (1.0 + e) - 1.0) * (SOFT_CAP * LOG2E)
        else:
            logits = logits * (SCALE * LOG2E)
        if MASKED:
            seen = (key + rn)[None, :] <= position[:, None]
            logits = tl.where(seen, logits, float("-inf"))
        new = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.exp2(logits - new[:, None])
        fade = tl.exp2(peak - new)
        total = total * fade + tl.sum(weights, 1)
        acc = acc * fade[:, None]
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
        peak = new
    return peak, total, acc


@triton.jit
@no_type_check
def block_sparse_attention(
    q,
    k,
    v,
    indices,
    whole,
    total,
    q_offset,
    T,
    S,
    NUM_LISTS,
    WIDTH,
    y,
    lse,
    LIST_ROWS: tl.constexpr,
    LIST_HEADS: tl.constexpr,
    H: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile [BM, D] of y, and its part of lse. See `_steps` for whole and total."""
    head = tl.program_id(0)
    # The last queries see most: they start first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    batch = tl.program_id(2)
    rm = tile * BM + tl.arange(0, BM)
    rd = tl.arange(0, BD)
    inside = (rm < T)[:, None] & (rd < D)[None, :]
    first_row = (batch.to(tl.int64) * T + tile * BM) * H + head
    mine = first_row * D + tl.arange(0, BM)[:, None] * (H * D) + rd[None, :]
    q_tile = tl.load(q + mine, mask=inside, other=0.0)
    kv_head = head // (H // HKV)
    kv = (batch.to(tl.int64) * S * HKV + kv_head) * D
    kv = kv + tl.arange(0, BN)[:, None] * (HKV * D) + rd[None, :]
    list_head = head * LIST_HEADS // H
    at = (batch * LIST_HEADS + list_head) * tl.num_programs(1) + tile
    split = tl.load(whole + at)
    end = tl.load(total + at)
    row = batch * LIST_HEADS if LIST_ROWS > 1 else 0
    row = (row + list_head) * NUM_LISTS + tile // (BLOCK_Q // BM)
    entries = indices + row.to(tl.int64) * WIDTH
    position = rm + tl.load(q_offset + batch)
    # Finite, so that a row that sees nothing needs no case of its own.
    peak = tl.full((BM,), -1e30, tl.float32)
    sums = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    for masked in tl.static_range(2):
        peak, sums, acc = _walk(
            split if masked else 0,
            end if masked else split,
            q_tile,
            k + kv,
            v + kv,
            entries,
            position,
            S,
            WIDTH - 1,
            peak,
            sums,
            acc,
            HKV * D,
            D,
            BD,
            BN,
            BLOCK_K,
            SCALE,
            SOFT_CAP,
            PRECISION,
            masked == 1,
        )
    some = sums > 0
    sums = tl.where(some, sums, 1.0)
    out = acc / sums[:, None]
    tl.store(y + mine, out.to(y.dtype.element_ty), mask=inside)
    value = peak * 0.6931471805599453 + tl.log(sums)
    value = tl.where(some, value, float("-inf"))
    out_lse = lse + (batch.to(tl.int64) * H + head) * T + rm
    tl.store(out_lse, value, mask=rm < T)
