"""A progress bar that neither slows the device down nor litters a log file."""

from __future__ import annotations

import collections
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax

# Batches the host may run ahead of the bar: enough to keep the device busy.
_AHEAD = 2


@contextlib.contextmanager
def progress_bar(
    label: str, total: int, show: bool | None
) -> Iterator[Callable[[Any], None]]:
    """Yields `advance(output)`, to be called with the device arrays of each step.

    A hidden bar never waits for the device. A shown one waits for the step before the
    last two, which keeps it honest and still leaves the device two steps of work.

    Args:
      label: what stands before the bar.
      total: number of steps.
      show: None shows it where standard error is a terminal.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda output: None
        return

    from rich import progress
    from rich.console import Console

    # A forced bar also draws where rich sees no terminal: a notebook, a CI log.
    console = Console(stderr=True, force_terminal=True if show else None)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    pending: collections.deque[Any] = collections.deque()
    with progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total)

        def finish(left: int) -> None:
            while len(pending) > left:
                jax.block_until_ready(pending.popleft())
                bar.advance(task)

        def advance(output: Any) -> None:
            pending.append(output)
            finish(left=_AHEAD)

        yield advance
        finish(left=0)
