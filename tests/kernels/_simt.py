"""The words of `greedy_select._lanes` on numpy arrays: all threads of a block at once.

Shared memory is watched for races: what a thread wrote may be read after a barrier
only, and what was read may be written over after a barrier only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np


class Int:
    """A 32-bit register of every thread."""

    def __init__(self, value: Any):
        self.value = np.asarray(value).astype(np.int64).astype(np.int32)

    @staticmethod
    def of(x: Any) -> Int:
        return x if isinstance(x, Int) else Int(x)

    def _do(self, op: Callable[..., Any], other: Any) -> Int:
        a, b = self.value.astype(np.int64), Int.of(other).value.astype(np.int64)
        return Int(op(a, b))

    def __add__(self, o: Any) -> Int:
        return self._do(np.add, o)

    def __sub__(self, o: Any) -> Int:
        return self._do(np.subtract, o)

    def __and__(self, o: Any) -> Int:
        return self._do(np.bitwise_and, o)

    def __xor__(self, o: Any) -> Int:
        return self._do(np.bitwise_xor, o)

    def __mul__(self, o: Any) -> Int:
        return self._do(np.multiply, o)

    def __rshift__(self, bits: int) -> Int:
        return Int(self.value.view(np.uint32) >> np.uint32(bits))

    def divided(self, bits: int) -> Int:
        return Int(self.value >> bits)

    def less(self, o: Any) -> Any:
        return self.value < Int.of(o).value

    def equals(self, o: Any) -> Any:
        return self.value == Int.of(o).value

    def as_float(self) -> Float:
        return Float(np.ascontiguousarray(self.value).view(np.float32))


class Float:
    """A float32 register of every thread."""

    def __init__(self, value: Any):
        self.value = np.asarray(value, np.float32)

    @staticmethod
    def of(x: Any) -> Float:
        return x if isinstance(x, Float) else Float(x)

    def as_int(self) -> Int:
        return Int(np.ascontiguousarray(self.value).view(np.int32))


class Memory:
    """An array of words; `shared` ones are watched."""

    def __init__(self, array: Any, shared: bool = False):
        self.words = np.ascontiguousarray(array).reshape(-1).view(np.int32)
        self.shared = shared
        self.read_at = np.full(self.words.shape, -1)
        self.written_at = np.full(self.words.shape, -1)


class Machine:
    """One thread block; see `_lanes` for what the functions mean."""

    Int, Float = Int, Float

    def __init__(self, threads: int, block: int):
        self.threads, self.block = threads, block
        self.active = [np.ones(threads, bool)]
        self.epoch = 0  # barriers passed
        self.copies = 0

    def special(self, name: str) -> Int:
        if name == "tid.x":
            return Int(np.arange(self.threads))
        assert name == "ctaid.x"
        return Int(np.full(self.threads, self.block))

    def pointer(self, memory: Memory) -> tuple[Memory, Any]:
        return memory, np.zeros(self.threads, np.int64)

    def offset(self, base: Any, index: Int, item_bytes: int) -> Any:
        unsigned = np.broadcast_to(index.value, self.threads).view(np.uint32)
        return base[0], base[1] + unsigned.astype(np.int64) * item_bytes

    def _places(self, at: Any, words: int) -> tuple[Memory, Any]:
        memory, bytes_ = at
        here = bytes_[self.active[-1]]
        assert not np.any(here % (4 * words)), "not aligned"
        return memory, here // 4

    def _load(self, at: Any) -> Any:
        memory, places = self._places(at, 1)
        assert np.all((places >= 0) & (places < memory.words.size)), "outside"
        if memory.shared:
            assert np.all(memory.written_at[places] < self.epoch), "race"
            memory.read_at[places] = self.epoch
        return memory.words[places]

    def load(
        self, base: Any, index: Int, item_bytes: int, *, words: int, hint: str
    ) -> list[Int]:
        memory, start = self.offset(base, index, item_bytes)
        assert (hint == "shared") == memory.shared
        self._places((memory, start), words)
        return [Int(self._load((memory, start + 4 * i))) for i in range(words)]

    def store(
        self, base: Any, index: Int, item_bytes: int, value: Int, kind: str
    ) -> None:
        memory, places = self._places(self.offset(base, index, item_bytes), 1)
        assert np.all((places >= 0) & (places < memory.words.size)), "outside"
        assert kind == ("shared.u32" if memory.shared else "global.u32")
        if memory.shared:
            assert np.all(memory.read_at[places] < self.epoch), "race"
            memory.written_at[places] = self.epoch
        whole = np.broadcast_to(value.value, self.threads)
        memory.words[places] = whole[self.active[-1]]

    def store_pair(self, base: Any, index: Int, a: Int, b: Int) -> None:
        base = self.offset(base, index, 8)
        self._places(base, 2)
        for i, value in enumerate((a, b)):
            self.store(base, Int(i), 4, value, "shared.u32")

    def start_copy(self, base: Any, index: Int, source: Any) -> None:
        memory, places = self._places(self.offset(base, index, 4), 1)
        memory.words[places] = self._load(source)
        self.copies += 1

    def wait_for_copies(self) -> None:
        self.copies = 0

    def prefetch(self, source: Any) -> None:
        self._load(source)

    def barrier(self) -> None:
        assert len(self.active) == 1, "some threads do not arrive"
        self.epoch += 1

    @contextlib.contextmanager
    def when(self, predicate: Any) -> Iterator[None]:
        self.active.append(self.active[-1] & predicate)
        yield
        self.active.pop()

    def select(self, predicate: Any, a: Any, b: Any) -> Any:
        return type(a)(np.where(predicate, a.value, b.value))

    def larger(self, a: Float, b: Float) -> Float:
        return Float(np.fmax(a.value, b.value))

    def times(self, a: Float, b: float) -> Float:
        return Float(a.value * np.float32(b))

    def minus(self, a: Float, b: Float) -> Float:
        return Float(a.value - b.value)

    def exceeds(self, a: Float, b: Float) -> Any:
        return a.value > b.value

    def _over_lanes(self, op: Any, x: Int) -> Int:
        lanes = np.broadcast_to(x.value, self.threads).reshape(-1, 32)
        return Int(np.repeat(op(lanes, axis=1), 32))

    def highest(self, x: Int) -> Int:
        return self._over_lanes(np.max, x)

    def lowest(self, x: Int) -> Int:
        return self._over_lanes(np.min, x)

    def span(
        self, start: int, stop: Int, body: Any, carry: Sequence[Any]
    ) -> Sequence[Any]:
        (end,) = np.unique(stop.value)
        for i in range(start, int(end)):
            carry = body(Int(i), *carry)
        return carry
