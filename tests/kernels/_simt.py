"""The words of `_ptx` and `greedy_select._lanes` on numpy arrays.

All threads of a block take every step together; blocks run one after the other. What a
device forbids raises: addresses outside of an array or not aligned, races, barriers
that some threads do not reach, shuffles and products of a part of a warp.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from tests.kernels._simt_memory import GARBAGE, Memory, Pointer, stamp

_LANES = np.arange(32)


def _layout(
    shape: tuple[int, int], place: Callable[[int, Any, Any, int], Any], per_word: int
) -> Any:
    """Where the items of a matrix lie among those of its registers and lanes.

    `place(register, lane >> 2, lane & 3, half)` is the row and column of an item.
    """
    out = np.full(shape, -1)
    for i in range(out.size // 32 // per_word):
        for half in range(per_word):
            row, column = place(i, _LANES >> 2, _LANES & 3, half)
            out[row, column] = (32 * i + _LANES) * per_word + half
    assert sorted(out.flat) == list(range(out.size))
    return out


# The operands of mma.m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16").
_OF_A = _layout(
    (16, 16), lambda i, g, t, h: (g + 8 * (i & 1), 2 * t + 8 * (i >> 1) + h), 2
)
_OF_B = _layout((16, 8), lambda i, g, t, h: (2 * t + 8 * i + h, g), 2)
_OF_ACC = _layout((16, 8), lambda i, g, t, h: (g + 8 * (i >> 1), 2 * t + (i & 1)), 1)


def _wide(bits: Any) -> Any:
    """Bits of bfloat16 as float64."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


class Int:
    """A 32-bit register: uint32 of every thread, or of all of them."""

    def __init__(self, value: Any):
        value = np.atleast_1d(value)
        if value.dtype != np.uint32:
            value = value.astype(np.int64).astype(np.uint32)
        self.value = value

    @staticmethod
    def of(x: Int | int) -> Int:
        return x if isinstance(x, Int) else Int(x)

    @property
    def signed(self) -> Any:
        return self.value.view(np.int32)

    def _do(self, op: Callable[..., Any], other: Int | int) -> Int:
        return Int(op(self.value, Int.of(other).value))

    def __add__(self, o: Int | int) -> Int:
        return self._do(operator.add, o)

    def __sub__(self, o: Int | int) -> Int:
        return self._do(operator.sub, o)

    def __mul__(self, o: Int | int) -> Int:
        return self._do(operator.mul, o)

    def __and__(self, o: Int | int) -> Int:
        return self._do(operator.and_, o)

    def __or__(self, o: Int | int) -> Int:
        return self._do(operator.or_, o)

    def __xor__(self, o: Int | int) -> Int:
        return self._do(operator.xor, o)

    def __lshift__(self, o: Int | int) -> Int:
        return self._do(operator.lshift, o)

    def __rshift__(self, o: Int | int) -> Int:
        return self._do(operator.rshift, o)

    def __floordiv__(self, o: int) -> Int:
        return self._do(operator.floordiv, o)

    def __mod__(self, o: int) -> Int:
        return self._do(operator.mod, o)

    def __invert__(self) -> Int:
        return Int(~self.value)

    def divided(self, bits: int) -> Int:
        return Int(self.signed >> bits)

    def less(self, o: Int | int) -> Any:
        return self.signed < Int.of(o).signed

    def equals(self, o: Int | int) -> Any:
        return self.value == Int.of(o).value

    def to_float(self) -> Float:
        return Float(self.signed.astype(np.float32))

    def as_float(self) -> Float:
        return Float(self.value.view(np.float32))


class Float:
    """A float32 register of every thread, or of all of them."""

    def __init__(self, value: Any):
        self.value = np.atleast_1d(np.asarray(value, np.float32))

    @staticmethod
    def of(x: Float | float) -> Float:
        return x if isinstance(x, Float) else Float(x)

    def _do(self, op: Callable[..., Any], other: Float | float) -> Float:
        with np.errstate(all="ignore"):
            found = op(self.value, Float.of(other).value)
        # All NaN of a GPU's arithmetic are one.
        one = np.uint32(0x7FFFFFFF).view(np.float32)
        return Float(np.where(np.isnan(found), one, found))

    def __add__(self, o: Float | float) -> Float:
        return self._do(operator.add, o)

    def __sub__(self, o: Float | float) -> Float:
        return self._do(operator.sub, o)

    def __mul__(self, o: Float | float) -> Float:
        return self._do(operator.mul, o)

    def __truediv__(self, o: Float | float) -> Float:
        return self._do(operator.truediv, o)

    def as_int(self) -> Int:
        return Int(self.value.view(np.uint32))


class Machine:
    """One thread block; see `_ptx` and `_lanes` for what the functions mean."""

    Int, Float = Int, Float

    def __init__(self, threads: int, block: int | tuple[int, int]):
        if threads % 32:
            raise ValueError(f"threads must be whole warps of 32, not {threads}")
        self.threads = threads
        self.block = (block, 0) if isinstance(block, int) else block
        self.active = [np.ones(threads, bool)]
        self.barriers = 0
        self.copies = 0

    @property
    def _now(self) -> int:
        return stamp(self.block[1] << 16 | self.block[0], self.barriers)

    def _all(self, x: Int | Float) -> Any:
        """A register as `[threads]`."""
        return np.broadcast_to(x.value, self.threads)

    def _warps(self, x: Int | Float) -> Any:
        """A register as `[warps, 32]`, for what a warp does together."""
        active = self.active[-1].reshape(-1, 32)
        if len(self.active) > 1 and (active.any(1) != active.all(1)).any():
            raise RuntimeError("only a part of a warp is here")
        return self._all(x).reshape(-1, 32)

    def special(self, name: str) -> Int:
        if name == "tid.x":
            return Int(np.arange(self.threads))
        return Int(self.block[{"ctaid.x": 0, "ctaid.y": 1}[name]])

    def barrier(self) -> None:
        here = self.active[-1]
        if here.any() and not here.all():
            raise RuntimeError("some threads do not arrive at the barrier")
        self.barriers += bool(here.any())

    @contextlib.contextmanager
    def when(self, predicate: Any) -> Iterator[None]:
        self.active.append(self.active[-1] & predicate)
        try:
            yield
        finally:
            self.active.pop()

    def both(self, a: Any, b: Any) -> Any:
        return a & b

    def either(self, a: Any, b: Any) -> Any:
        return a | b

    def select(self, predicate: Any, a: Any, b: Any) -> Any:
        assert type(a) is type(b)
        return type(a)(np.where(predicate, a.value, b.value))

    def choose(
        self, predicate: Any, then: Callable[[], list], otherwise: Callable[[], list]
    ) -> list:
        with self.when(predicate):
            a = then()
        with self.when(~predicate):
            b = otherwise()
        return [self.select(predicate, x, y) for x, y in zip(a, b, strict=True)]

    def loop(
        self,
        count: int,
        body: Callable[..., Sequence[Any]],
        carry: Sequence[Any] = (),
        unroll: int = 4,
    ) -> list[Any]:
        return self.span(0, Int(count), body, carry)

    def loop_tree(
        self, count: int, body: Callable[[Int, Any], Any], carry: Any, unroll: int = 1
    ) -> Any:
        for i in range(count):
            before = jax.tree.structure(carry)
            carry = body(Int(i), carry)
            assert jax.tree.structure(carry) == before
        return carry

    def span(
        self,
        start: Int | int,
        stop: Int,
        body: Callable[..., Sequence[Any]],
        carry: Sequence[Any],
    ) -> list[Any]:
        (first,), (end,) = np.unique(Int.of(start).signed), np.unique(stop.signed)
        values = list(carry)
        for i in range(int(first), int(end)):
            kinds = [type(v) for v in values]
            values = list(body(Int(i), *values))
            assert [type(v) for v in values] == kinds
        return values

    # Memory.

    def pointer(self, ref: Memory | Pointer) -> Pointer:
        if isinstance(ref, Pointer):
            return ref
        everyone = np.ones(self.threads, bool)
        return Pointer(((ref, everyone),), np.zeros(self.threads, np.int64))

    def offset(self, base: Any, index: Int, item_bytes: int) -> Pointer:
        base = self.pointer(base)
        at = base.at + self._all(index).astype(np.int64) * item_bytes
        # Addresses of shared memory have 32 bits: a negative index steps back.
        return Pointer(base.parts, at & 0xFFFFFFFF if base.shared else at)

    def select_pointer(self, predicate: Any, a: Pointer, b: Pointer) -> Pointer:
        assert a.shared == b.shared
        parts = [(memory, who & predicate) for memory, who in a.parts]
        parts += [(memory, who & ~predicate) for memory, who in b.parts]
        return Pointer(tuple(parts), np.where(predicate, a.at, b.at))

    def _ways(self, at: Pointer, kind: str) -> Iterator[tuple[Memory, Any]]:
        """Each memory that is pointed to, and the threads that do it."""
        if (kind.split(".")[0] == "shared") != at.shared:
            raise ValueError(f"{kind} of {at.parts[0][0].name}")
        for memory, who in at.parts:
            threads = np.flatnonzero(who & self.active[-1])
            if threads.size:
                yield memory, threads

    def _load(self, at: Pointer, size: int, count: int, hint: str) -> list[Int]:
        out = np.full((count, self.threads), GARBAGE, np.uint32)
        for memory, threads in self._ways(at, hint):
            got = memory.read(at.at[threads], size, count, threads, self._now)
            out[:, threads] = got.T
        return [Int(word) for word in out]

    def _store(self, at: Pointer, size: int, values: Sequence[Any], kind: str) -> None:
        rows = [self._all(v).view(np.uint32) for v in values]
        bits = np.stack(rows, axis=1).astype(f"u{size}")
        for memory, threads in self._ways(at, kind):
            memory.write(at.at[threads], bits[threads], threads, self._now)

    def load(
        self, base: Any, index: Int, item_bytes: int, *, words: int, hint: str
    ) -> list[Int]:
        return self._load(self.offset(base, index, item_bytes), 4, words, hint)

    def load_byte(self, base: Any, index: Int, hint: str) -> Int:
        return self._load(self.offset(base, index, 1), 1, 1, hint)[0]

    def store(
        self, base: Any, index: Int, item_bytes: int, value: Any, kind: str
    ) -> None:
        size = {"u32": 4, "f32": 4, "b16": 2, "u16": 2, "u8": 1}[kind.split(".")[1]]
        self._store(self.offset(base, index, item_bytes), size, [value], kind)

    def store_words(self, base: Any, index: Int, words: Sequence[Int]) -> None:
        assert len(words) == 4
        self._store(self.offset(base, index, 4), 4, words, "shared")

    def store_words_global(
        self, base: Any, index: Int, item_bytes: int, words: Sequence[Int]
    ) -> None:
        assert len(words) == 4
        self._store(self.offset(base, index, item_bytes), 4, words, "global")

    def store_pair(self, base: Any, index: Int, a: Int, b: Int) -> None:
        self._store(self.offset(base, index, 8), 4, [a, b], "shared")

    def start_copy(self, base: Any, index: Int, source: Pointer) -> None:
        self.store(base, index, 4, *self._load(source, 4, 1, "global"), "shared.u32")
        self.copies += 1

    def wait_for_copies(self) -> None:
        self.copies = 0

    def prefetch(self, source: Pointer) -> None:
        self._load(source, 4, 1, "global")

    # Arithmetic.

    def exp2(self, x: Float) -> Float:
        with np.errstate(all="ignore"):
            found = np.exp2(x.value.astype(np.float64)).astype(np.float32)
        return Float(np.where(found < np.finfo(np.float32).tiny, 0, found))

    def log2(self, x: Float) -> Float:
        with np.errstate(all="ignore"):
            return Float(np.log2(x.value.astype(np.float64)))

    def rsqrt(self, x: Float) -> Float:
        with np.errstate(all="ignore"):
            return Float(1 / np.sqrt(x.value.astype(np.float64)))

    def maximum(self, a: Float, b: Float) -> Float:
        return Float(np.fmax(a.value, b.value))

    larger = maximum

    def times(self, a: Float, b: Float | float) -> Float:
        return a * b

    def minus(self, a: Float, b: Float) -> Float:
        return a - b

    def exceeds(self, a: Float, b: Float) -> Any:
        return a.value > b.value

    def pack_bf16(self, low: Float, high: Float) -> Int:
        def half(x: Float) -> Int:
            bits = x.value.astype(ml_dtypes.bfloat16).view(np.uint16)
            return Int(np.where(np.isnan(x.value), 0x7FFF, bits))

        return half(low) | (half(high) << 16)

    def unpack_bf16(self, word: Int) -> list[Float]:
        return [(word << 16).as_float(), (word & 0xFFFF0000).as_float()]

    # What the lanes of a warp do together.

    def shuffle_xor(self, x: Any, distance: int) -> Any:
        return type(x)(self._warps(x)[:, _LANES ^ distance].reshape(-1))

    def _over_lanes(self, op: Any, x: Int) -> Int:
        return Int(np.repeat(op(self._warps(x).view(np.int32), axis=1), 32))

    def highest(self, x: Int) -> Int:
        return self._over_lanes(np.max, x)

    def lowest(self, x: Int) -> Int:
        return self._over_lanes(np.min, x)

    def mma_bf16(
        self, acc: Sequence[Float], a: Sequence[Int], b: Sequence[Int]
    ) -> list[Float]:
        assert (len(acc), len(a), len(b)) == (4, 4, 2)
        left, right = (self._fragments(x).view(np.uint16) for x in (a, b))
        start = self._fragments(acc).view(np.float32)[:, _OF_ACC]
        with np.errstate(all="ignore"):
            product = _wide(left[:, _OF_A]) @ _wide(right[:, _OF_B])
            out = (start + product).astype(np.float32).reshape(-1, 128)
        out = out[:, np.argsort(_OF_ACC, axis=None)].reshape(-1, 4, 32)
        return [Float(out[:, i].reshape(-1)) for i in range(4)]

    def _fragments(self, registers: Sequence[Any]) -> Any:
        """`[warps, registers * 32]` words."""
        words = [self._warps(r).view(np.uint32) for r in registers]
        return np.concatenate(words, axis=1)


def run(
    emit: Callable[..., None],
    case: Any,
    *,
    grid: int | tuple[int, ...],
    threads: int,
    smem_words: int,
    arrays: Sequence[Any],
) -> None:
    """Runs `emit(asm, case, *pointers, shared memory)` for every block.

    Args:
      emit: writes a kernel.
      case: its first argument after the machine.
      grid: blocks along x, or along x and y.
      threads: of a block.
      smem_words: shared memory; it starts as NaN.
      arrays: global memory, changed in place.
    """
    columns, rows = (grid, 1) if isinstance(grid, int) else (*grid, 1)[:2]
    memories = [Memory(a, name=f"array {i}") for i, a in enumerate(arrays)]
    for block in ((x, y) for y in range(rows) for x in range(columns)):
        asm = Machine(threads, block)
        garbage = np.full(smem_words, GARBAGE, np.uint32)
        shared = Memory(garbage, shared=True, name="shared memory")
        emit(asm, case, *map(asm.pointer, [*memories, shared]))
