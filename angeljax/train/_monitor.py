"""Numbers of the steps under way: fetched an interval late, checked, written."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import jax

from angeljax.train.guards import LossWatch, TrainingStopped
from angeljax.train.metrics import Writers
from angeljax.train.step import TrainState, culprit_names


class Monitor:
    """Follows a run without making it wait.

    Args:
      steps: of the whole training.
      start: step that this run begins at.
      out: where numbers go.
      watch: stops a loss that runs away.
      log_every: steps in an interval.
      schedule: learning rate by step, or None.
      unit: what `numbers["weight"]` counts.
      flops: operations per unit, 0 if not known.
      peak: FLOP/s of all devices, None if not known.
      kept: folder of the checkpoints, for messages.
      deadline: when the run ends, by `time.perf_counter`, if time ends it.

    Attributes:
      last: numbers of the last interval.
    """

    def __init__(
        self,
        *,
        steps: int,
        start: int,
        out: Writers,
        watch: LossWatch,
        log_every: int,
        schedule: Any,
        unit: str,
        flops: float,
        peak: float | None,
        kept: str | None,
        deadline: float | None = None,
    ) -> None:
        self.watch = watch
        self._deadline = deadline
        self.last: dict[str, float] = {}
        self._out = out
        self._steps, self._every, self._schedule = steps, max(log_every, 1), schedule
        self._unit, self._flops, self._peak, self._kept = unit, flops, peak, kept
        self._current: list[tuple[int, Any]] = []
        self._waiting: list[tuple[int, Any]] = []
        self._first = start + 1
        self._clock: float | None = None
        self._count, self._pace = 0.0, 1.0

    def add(
        self, step: int, numbers: Any, state: TrainState, pace: float = 1.0
    ) -> None:
        """Takes the numbers of a step that has just begun.

        Args:
          step: its number.
          numbers: on the device.
          state: after it.
          pace: what its learning rate was multiplied by.

        Raises:
          TrainingStopped: one of an earlier interval failed.
        """
        self._current.append((step, numbers))
        self._pace = pace
        if step == self._first:
            # Compilation is no part of the speed.
            jax.block_until_ready(numbers)
            self._clock = time.perf_counter()
        if step % self._every == 0:
            self._report(state)
            self._waiting, self._current = self._current, []

    def flush(self, state: TrainState) -> None:
        """Waits for all that was begun, and checks it."""
        # An interval is reported while the next one runs: here there is none, and its
        # time is not known.
        self._report(state, timed=False)
        self._waiting, self._current = self._current, []
        self._report(state, timed=False)
        self._waiting = []

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here does not count."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            if self._clock is not None:
                self._clock += time.perf_counter() - begun

    def _report(self, state: TrainState, timed: bool = True) -> None:
        if not self._waiting:
            return
        steps = [step for step, _ in self._waiting]
        rows = jax.device_get([numbers for _, numbers in self._waiting])
        now = time.perf_counter()
        for step, row in zip(steps, rows, strict=True):
            if row["failed"]:
                self._stop_not_finite(step, row, state)
            self._guarded(float(row["loss"]), step)
        values = {
            name: sum(float(row[name]) for row in rows) / len(rows)
            for name in rows[0]
            if name not in ("weight", "failed")
        }
        amount = sum(float(row["weight"]) for row in rows)
        if steps[0] == self._first:  # what was read before a resume
            self._count = (self._first - 1) * amount / len(rows)
        self._count += amount
        values[self._unit] = self._count
        if self._schedule is not None:
            values["lr"] = float(self._schedule(steps[-1] - 1)) * self._pace
        timed = timed and steps[0] > self._first
        seconds = now - (self._clock or now)
        if timed and seconds > 0:
            values[f"{self._unit}_per_second"] = amount / seconds
            left = seconds / len(steps) * (self._steps - steps[-1])
            if self._deadline is not None:
                left = min(left, max(self._deadline - now, 0.0))
            values["seconds_left"] = left
            if self._flops and self._peak:
                values["mfu"] = amount / seconds * self._flops / self._peak
        else:
            rates = (f"{self._unit}_per_second", "mfu")
            values |= {name: self.last[name] for name in rates if name in self.last}
        self._clock = now
        self.last = values
        self._out.write(steps[-1], values)

    def _guarded(self, loss: float, step: int) -> None:
        try:
            self.watch.add(loss, step)
        except TrainingStopped as e:
            raise TrainingStopped(f"{e}{self._what_is_kept()}") from None

    def _stop_not_finite(self, step: int, row: Any, state: TrainState) -> None:
        parts = []
        if not math.isfinite(row["loss"]):
            parts.append(f"the loss is {float(row['loss'])}")
        if names := culprit_names(state):
            parts.append(f"the gradient of {names} is not finite")
        what = " and ".join(parts) or "an update of the optimizer is not finite"
        raise TrainingStopped(
            f"stopped at step {step}: {what}; the update was not applied"
            f"{self._what_is_kept()}: lower optimizer.lr, or look at that tensor"
        )

    def _what_is_kept(self) -> str:
        return f", the checkpoints in {self._kept} are as before" if self._kept else ""
