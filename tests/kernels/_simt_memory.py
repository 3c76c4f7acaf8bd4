"""Memory of thread blocks on numpy arrays, watched for races.

What a thread wrote may be read, or written over with something else, by another thread
of its block after a barrier only, and by another block never. What was read in shared
memory may be written over by another thread after a barrier only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

# Not a number as float32 and as two bfloat16, and no index of anything.
GARBAGE = 0x7FC07FC0
_TYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_MANY = 0xFFF  # the thread of a stamp if there are several


def stamp(block: int, barriers: int) -> int:
    """A moment; plus a thread it says who did something when."""
    return block << 28 | barriers << 12


class Memory:
    """An array, changed in place."""

    def __init__(self, array: Any, shared: bool = False, name: str = "array"):
        array = np.asarray(array)
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} must be contiguous")
        self.bytes = array.reshape(-1).view(np.uint8)
        self.shared, self.name = shared, name
        self.unit = min(array.itemsize, 4)  # of what is watched, in bytes
        self.reader = np.full(-(-self.bytes.size // self.unit), -1, np.int64)
        self.writer = self.reader.copy()
        self.written = False

    @property
    def words(self) -> Any:
        """The array as int32."""
        return self.bytes.view(np.int32)

    def _places(self, at: Any, size: int, count: int) -> tuple[Any, Any, Any]:
        """Items of `size` bytes: their array, their indices, the watched units."""
        low, high = int(at.min()), int(at.max())
        if low < 0 or high + size * count > self.bytes.size:
            far = low if low < 0 else high
            raise IndexError(
                f"byte {far} is outside of {self.name} of {self.bytes.size}"
            )
        if np.bitwise_or.reduce(at) & (size * count - 1):
            raise IndexError(f"{self.name}: not aligned to {size * count} bytes")
        items = self.bytes[: self.bytes.size // size * size].view(_TYPES[size])
        index = (at // size)[:, None]
        if count > 1:
            index = index + np.arange(count)
        if size == self.unit:
            return items, index, index
        covered = max(1, size * count // self.unit)
        return items, index, (at // self.unit)[:, None] + np.arange(covered)

    def _check(self, stamps: Any, now: int, threads: Any) -> None:
        """Raises if somebody else may do it at the same time."""
        together = (stamps >> 12 == now >> 12) & (stamps != now + threads)
        if ((stamps >= 0) & (together | (stamps >> 28 != now >> 28))).any():
            raise RuntimeError(f"a race in {self.name}")

    def read(self, at: Any, size: int, count: int, threads: Any, now: int) -> Any:
        """`[len(at), count]` items; `threads` says who reads."""
        items, index, units = self._places(at, size, count)
        threads = threads[:, None]
        if self.written:
            self._check(self.writer[units], now, threads)
        if self.shared:
            mine, old = now + threads, self.reader[units]
            others = (old >= now) & (old != mine)  # nobody reads in the future
            self.reader[units] = np.where(others, now + _MANY, mine)
            last = self.reader[units]
            if (last != mine).any():
                self.reader[units[last != mine]] = now + _MANY
        return items[index]

    def write(self, at: Any, values: Any, threads: Any, now: int) -> None:
        """Writes `values [len(at), count]`, whose type says the size of an item."""
        items, index, units = self._places(at, values.itemsize, values.shape[1])
        threads = threads[:, None]
        if self.written:
            new = (items[index] != values).any(1)  # twice the same is harmless
            self._check(self.writer[units[new]], now, threads[new])
        if self.shared:
            self._check(self.reader[units], now, threads)
        items[index] = values
        if (items[index] != values).any():
            raise RuntimeError(f"two threads write one place of {self.name}")
        self.written = True
        self.writer[units] = now + threads


@dataclasses.dataclass(frozen=True)
class Pointer:
    """An address of every thread.

    Attributes:
      parts: memories, and which threads point into them.
      at: `[threads]`, in bytes from the start of the memory.
    """

    parts: tuple[tuple[Memory, Any], ...]
    at: Any

    @property
    def shared(self) -> bool:
        """Of which kind the memory is."""
        return self.parts[0][0].shared
