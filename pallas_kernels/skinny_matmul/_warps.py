"""The kernel of `skinny_matmul` for Hopper: weights go from memory into the operands.

A thread block takes 16 outputs (or 8 gates and their 8 values), or a few times as many,
for up to 16 tokens. Its warps share the inputs in turns of 32. Sums do not depend on
the order of inputs, so a thread takes eight neighbours of a row of weights, and of a
token, in one load, and both are what `mma.sync` wants without a way through shared
memory: word s of a thread is its part of the s-th half of an instruction's 16 inputs,
for weights and tokens alike. What the warps have summed meets in shared memory.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

TOKENS = 16  # of a thread block, at most
TURN = 32  # inputs that a warp takes at a time
_STRIDE = 20  # words from one token to the next in shared memory: no bank is hit twice
_LOG2E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class Case:
    """What a kernel is specialised for.

    Attributes:
      m, k, n: tokens, inputs, outputs (pairs of columns with `swiglu`).
      norm, swiglu, bias, residual: which of these there are.
      float_out: float32 results instead of bfloat16.
      eps: of the norm.
      warps: of a thread block, a multiple of 4.
      tiles: of 16 rows of the weight that a thread block takes.
      parts: arrays that the inputs come in, of `k` each, with a norm of their own; each
        part of the warps takes one.
    """

    m: int
    k: int
    n: int
    norm: bool
    swiglu: bool
    bias: bool
    residual: bool
    float_out: bool
    eps: float
    warps: int
    tiles: int
    parts: int = 1

    @property
    def outputs(self) -> int:
        """Of a thread block."""
        return self.tiles * (8 if self.swiglu else 16)

    @property
    def groups(self) -> int:
        """Of tokens."""
        return -(-self.m // TOKENS)

    @property
    def grid(self) -> int:
        """Thread blocks."""
        return self.groups * -(-self.n // self.outputs)

    @property
    def halves(self) -> int:
        """Groups of 8 tokens that there are at most in a thread block."""
        return 1 if self.m <= 8 else 2

    @property
    def turns(self) -> int:
        """Of a warp."""
        return -(-self.k // (TURN * self.sharing))

    @property
    def sharing(self) -> int:
        """Warps that take the inputs of one array in turns."""
        return self.warps // self.parts

    @property
    def ahead(self) -> int:
        """Turns whose words are in registers, or on the way there."""
        words = 8 * self.tiles + 4 * self.halves + 4 * self.norm
        sums = 8 * self.tiles * self.halves
        return max(1, min(self.turns, (180 - sums) // words))

    @property
    def smem_words(self) -> int:
        """Of sums, and of squares behind them."""
        return self.warps * 8 * self.halves * (self.tiles * _STRIDE + 1)


def emit(asm: Any, c: Case, *refs: Any) -> None:
    """`refs`: each x, w, then norm, bias, residual where they are, then y, shared
    memory.
    """
    x, *rest, y, smem = map(asm.pointer, refs)
    other = rest.pop(0) if c.parts == 2 else x
    w = rest.pop(0)
    norm = rest.pop(0) if c.norm else None
    bias = rest.pop(0) if c.bias else None
    residual = rest.pop(0) if c.residual else None
    Int, Float = asm.Int, asm.Float
    thread, block = asm.special("tid.x"), asm.special("ctaid.x")
    lane, warp = thread & 31, thread >> 5
    g, t = lane >> 2, lane & 3
    own, behind_others = warp, Int.of(0)  # its number, and loads of the norm before
    if c.parts == 2:
        second = Int.of(c.sharing - 1).less(warp)
        own = asm.select(second, warp - c.sharing, warp)
        behind_others = asm.select(second, Int.of(c.k // 8), Int.of(0))
        x = asm.select_pointer(second, other, x)
    # Neighbours have the same weights, which are then read from memory once.
    first = (block // c.groups) * c.outputs
    start = (block % c.groups) * TOKENS

    def capped(i: Any, count: int) -> Any:
        return asm.select(i.less(count), i, Int.of(count - 1))

    tokens = [capped(start + g + 8 * j, c.m) for j in range(c.halves)]
    rows = []  # of the weight, those of a thread
    for tile in range(c.tiles):
        if c.swiglu:
            gate = capped(first + g + 8 * tile, c.n)
            rows += [gate, gate + c.n]
        else:
            rows += [capped(first + g + 16 * tile + 8 * i, c.n) for i in range(2)]
    words = c.k // 8  # of a row, in loads
    spare = c.k // TURN  # turns that there are

    def place(turn: int) -> Any:
        at = own + c.sharing * turn
        if c.sharing * (turn + 1) > spare:
            at = capped(at, spare)
        return at * 4 + t

    def weights(turn: int) -> list[Any]:
        hint = "global.nc.L1::no_allocate.L2::128B"
        at = place(turn) + behind_others
        step = words * c.parts
        return [asm.load(w, r * step + at, 16, words=4, hint=hint) for r in rows]

    def inputs(turn: int) -> list[Any]:
        at = place(turn)
        found = [
            asm.load(x, i * words + at, 16, words=4, hint="global") for i in tokens
        ]
        if norm is not None:
            at = at + behind_others
            found.append(asm.load(norm, at, 16, words=4, hint="global.nc"))
        return found

    # Of two accumulators, so that one instruction need not wait for the last.
    sums = [
        [[[Float.of(0.0)] * 4 for _ in range(2)] for _ in tokens]
        for _ in range(c.tiles)
    ]
    squares = [Float.of(0.0) for _ in tokens]
    held = [weights(turn) for turn in range(c.ahead)]
    given = [inputs(turn) for turn in range(c.ahead)]
    for turn in range(c.turns):
        a, b = held[turn], given[turn]
        scale = [v for word in b.pop() for v in asm.unpack_bf16(word)] if c.norm else []
        for j, part in enumerate(b):
            if c.sharing * (turn + 1) > spare:
                inside = (own + c.sharing * turn).less(spare)
                part = [asm.select(inside, word, Int.of(0)) for word in part]
            if scale:
                wide = [v for word in part for v in asm.unpack_bf16(word)]
                for v in wide:
                    squares[j] = squares[j] + v * v
                made = [v * s for v, s in zip(wide, scale, strict=True)]
                part = [asm.pack_bf16(*made[i : i + 2]) for i in range(0, 8, 2)]
            for tile in range(c.tiles):
                low, high = a[2 * tile : 2 * tile + 2]
                for s in range(2):
                    sums[tile][j][s] = asm.mma_bf16(
                        sums[tile][j][s],
                        [low[2 * s], high[2 * s], low[2 * s + 1], high[2 * s + 1]],
                        part[2 * s : 2 * s + 2],
                    )
        if turn + c.ahead < c.turns:
            held.append(weights(turn + c.ahead))
            given.append(inputs(turn + c.ahead))

    # Sums of a warp: [warps, tiles, tokens, _STRIDE], of which 16 are rows.
    width = 8 * c.halves
    for tile in range(c.tiles):
        for j in range(c.halves):
            total = [p + q for p, q in zip(*sums[tile][j], strict=True)]
            token = t * 2 + 8 * j
            at = ((warp * c.tiles + tile) * width + token) * _STRIDE + g
            for i, value in enumerate(total):
                to = at + (i % 2) * _STRIDE + 8 * (i // 2)
                asm.store(smem, to, 4, value, "shared.f32")
    behind = c.warps * c.tiles * width * _STRIDE
    if c.norm:
        for j, square in enumerate(squares):
            square = square + asm.shuffle_xor(square, 1)
            square = square + asm.shuffle_xor(square, 2)
            # Four threads write the same.
            at = warp * width + g + (behind + 8 * j)
            asm.store(smem, at, 4, square, "shared.f32")

    pairs = 4 if c.swiglu else 8  # of a token and a tile
    count = c.tiles * width * pairs
    work = []
    for begin in range(0, count, 32 * c.warps):
        item = thread + begin
        pair, rest_ = item % pairs, item // pairs
        token, tile = rest_ % width, rest_ // width
        column = first + tile * (2 * pairs) + pair * 2
        good = asm.both((start + token).less(c.m), column.less(c.n))
        good = asm.both(good, item.less(count))
        at = asm.select(good, (start + token) * c.n + column, Int.of(0)) >> 1
        more = []
        if bias is not None:
            there = asm.select(good, column, Int.of(0))
            places = [there, there + c.n] if c.swiglu else [there]
            more += [
                asm.load(bias, p >> 1, 4, words=1, hint="global.nc")[0] for p in places
            ]
        if residual is not None:
            more += asm.load(residual, at, 4, words=1, hint="global")
        work.append((capped(item, count), pair, good, at, more))
    asm.barrier()

    def summed(at: Any, step: int) -> list[Any]:
        """Over the warps of each array of inputs."""
        found = [
            asm.load(smem, at + step * i, 4, words=1, hint="shared")[0].as_float()
            for i in range(c.warps)
        ]
        while len(found) > c.parts:
            found = [p + q for p, q in zip(found[::2], found[1::2], strict=True)]
        return found

    for item, pair, good, at, more in work:
        rest_ = item // pairs
        token = rest_ % width
        base = rest_ * _STRIDE + pair * 2
        each = c.tiles * width * _STRIDE
        values = [summed(base + i, each) for i in range(2)]
        if c.swiglu:
            values += [summed(base + 8 + i, each) for i in range(2)]
        if c.norm:
            factors = [
                asm.rsqrt(total * (1.0 / c.k) + c.eps)
                for total in summed(token + behind, width)
            ]
            values = [
                [v * f for v, f in zip(part, factors, strict=True)] for part in values
            ]
        values = [functools.reduce(operator.add, part) for part in values]
        if c.bias:
            added = [
                v for word in more[: len(values) // 2] for v in asm.unpack_bf16(word)
            ]
            values = [v + b for v, b in zip(values, added, strict=True)]
        if c.swiglu:
            values = [_silu(asm, a) * b for a, b in zip(*_split(values), strict=True)]
        if c.residual:
            values = [
                v + r for v, r in zip(values, asm.unpack_bf16(more[-1]), strict=True)
            ]
        with asm.when(good):
            if c.float_out:
                for i, v in enumerate(values):
                    asm.store(y, at * 2 + i, 4, v, "global.f32")
            else:
                asm.store(y, at, 4, asm.pack_bf16(*values), "global.u32")


def _silu(asm: Any, v: Any) -> Any:
    return v / (asm.exp2(v * -_LOG2E) + 1.0)


def _split(values: list[Any]) -> tuple[list[Any], list[Any]]:
    return values[:2], values[2:]
