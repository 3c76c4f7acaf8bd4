"""Batches made and sent to the device by a thread, ahead of the step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


def prefetch(
    make: Callable[[int], Any], start: int, stop: int, *, depth: int = 2
) -> Iterator[Any]:
    """Yields `make(start), ..., make(stop - 1)`, `depth` of them ready in advance.

    An exception in `make` is raised where its result would have come. Closing the
    iterator ends the thread.
    """
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
    ended = threading.Event()

    def put(item: tuple[Any, BaseException | None]) -> None:
        while not ended.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        for i in range(start, stop):
            if ended.is_set():
                return
            try:
                item = make(i), None
            except BaseException as e:  # noqa: BLE001
                put((None, e))
                return
            put(item)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in range(start, stop):
            value, error = ready.get()
            if error is not None:
                raise error
            yield value
    finally:
        ended.set()
        thread.join()
