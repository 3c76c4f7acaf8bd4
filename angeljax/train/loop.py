"""`fit`: the training loop around a pure loss function.

The host never waits for the step it has just begun. Numbers stay on the device until
the next logging interval is under way; the step itself applies no update that is not
finite, so that nothing is lost by noticing late.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from angeljax.train._prefetch import prefetch
from angeljax.train.checkpoints import Checkpoints
from angeljax.train.guards import Divergence, LossWatch, TrainingStopped
from angeljax.train.metrics import Writer, Writers
from angeljax.train.sharding import make_mesh, place, place_batch, shardings_of
from angeljax.train.step import (
    LossFn,
    TrainState,
    culprit_names,
    init_state,
    make_step,
)


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What `fit` gives back.

    Attributes:
      trainable: the parameters after the last step, float32, on the mesh.
      opt_state: of the optimizer.
      step: optimizer steps that were done, those before a resume included.
      metrics: of the last interval.
    """

    trainable: Any
    opt_state: Any
    step: int
    metrics: dict[str, float]


def fit(
    loss_fn: LossFn,
    trainable: Any,
    batches: Callable[[int], Any],
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    frozen: Any = None,
    key: jax.Array | None = None,
    accumulate: int = 1,
    clip: float = 0.0,
    mesh: jax.sharding.Mesh | None = None,
    schedule: Callable[[Any], Any] | None = None,
    checkpoints: Checkpoints | None = None,
    resume: bool = True,
    log_every: int = 10,
    writers: Callable[[int], list[Writer]] | None = None,
    evaluate: Callable[[Any, Any, int], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
    divergence: Divergence | None = None,
    unit: str = "tokens",
    flops: float = 0.0,
    peak: float | None = None,
) -> FitResult:
    """Minimises a loss; every other part is optional.

    Args:
      loss_fn: pure, `(trainable, frozen, batch, step, key) -> (loss, metrics)`; the
        loss is a mean over `metrics["weight"]` things, see `make_step`. `step` is the
        int32 number of optimizer steps done, whatever `accumulate` is.
      trainable: pytree of arrays; copied to float32, the caller's stay.
      batches: `step -> pytree of numpy arrays [rows, ...]`, a function of the step
        alone, so that a resumed run continues where it was. Called in a thread.
      optimizer: an optax transformation, see `make_optimizer`.
      steps: optimizer steps in all.
      frozen: pytree that `loss_fn` reads, such as a teacher's parameters; an argument
        of the compiled step and no constant in it.
      key: random key that `loss_fn` gets a new one of at every step.
      accumulate: micro-batches that a batch is cut into.
      clip: largest global norm of a gradient; 0 does not clip.
      mesh: see `make_mesh`; default all devices as copies, or one.
      schedule: learning rate by step, for the log.
      checkpoints: where to save and resume.
      resume: continue from the newest checkpoint, if there is one; without, a folder
        with checkpoints is refused.
      log_every: steps in an interval.
      writers: `start step -> writers` of the numbers; see `angeljax.train.metrics`.
      evaluate: `(trainable, opt_state, step) -> numbers`, logged as they are.
      evaluate_every: steps between two evaluations; 0 for none. The last step is always
        evaluated.
      divergence: when to stop; default `Divergence()`.
      unit: what `metrics["weight"]` counts, for the log.
      flops: floating-point operations per unit, for the utilisation.
      peak: FLOP/s of all devices together.

    Returns:
      A `FitResult`.

    Raises:
      ValueError: `steps` is not positive, or the batch cannot be divided.
      TrainingStopped: a gradient was not finite (names the leaves) or the loss
        diverges; the checkpoints are those from before.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> from angeljax.train import fit
      >>> def loss_fn(w, frozen, batch, step, key):
      ...     return jnp.mean((batch @ w - batch @ frozen) ** 2), {}
      >>> def batches(step):
      ...     rng = np.random.default_rng(step)
      ...     return rng.normal(size=(8, 2)).astype(np.float32)
      >>> goal = jnp.array([1.0, -2.0])
      >>> result = fit(loss_fn, jnp.zeros(2), batches, optimizer=optax.sgd(0.1),
      ...              steps=60, frozen=goal)
      >>> result.trainable.round(2).tolist()
      [1.0, -2.0]
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if not jax.tree.leaves(trainable):
        raise ValueError("nothing is trainable: every leaf is frozen")
    mesh = _default_mesh() if mesh is None else mesh
    key = jax.random.key(0) if key is None else key
    state = _start(trainable, optimizer, mesh)
    frozen = place(mesh, frozen)
    start = 0
    if checkpoints is not None and checkpoints.latest() is not None:
        if not resume:
            raise ValueError(
                f"{checkpoints.directory} holds the checkpoints of another run: resume "
                "it, or choose another folder"
            )
        state = _restored(checkpoints, state)
        start = int(state.step)
    out = Writers(writers(start) if writers else [])
    run = _Run(
        steps=steps,
        start=start,
        out=out,
        watch=LossWatch(divergence or Divergence()),
        log_every=log_every,
        schedule=schedule,
        unit=unit,
        flops=flops,
        peak=peak,
        kept=None if checkpoints is None else str(checkpoints.directory),
    )
    step_fn = _compiled(loss_fn, optimizer, accumulate, clip, mesh, state)
    first = batches(start)  # what is wrong with the data is said before compiling
    place_batch(mesh, first, accumulate)
    feed = prefetch(lambda i: place_batch(mesh, batches(i), accumulate), start, steps)
    try:
        for done, batch in enumerate(feed, start + 1):
            state, numbers = step_fn(state, frozen, batch, key)
            run.add(done, numbers, state)
            last = done == steps
            save = checkpoints is not None and (checkpoints.due(done) or last)
            measure = evaluate is not None and (
                last or (evaluate_every > 0 and done % evaluate_every == 0)
            )
            if not save and not measure:
                continue
            run.flush(state)
            with run.paused():
                if checkpoints is not None and save:
                    checkpoints.save(done, _saved(state), loss=run.watch.average)
                if evaluate is not None and measure:
                    found = evaluate(state.trainable, state.opt_state, done)
                    out.write(done, found)
        run.flush(state)
    finally:
        feed.close()  # type: ignore[attr-defined]
        out.close()
        if checkpoints is not None:
            checkpoints.wait()
    return FitResult(state.trainable, state.opt_state, int(state.step), run.last)


def _default_mesh() -> jax.sharding.Mesh:
    """One device. More are used when they are asked for."""
    return make_mesh({"data": 1})


def _start(trainable: Any, optimizer: Any, mesh: Any) -> TrainState:
    """The first state, made on the mesh, nothing of it shared with the caller."""

    def begin(tree: Any) -> TrainState:
        return init_state(
            jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), tree),
            optimizer,
        )

    targets = shardings_of(mesh, jax.eval_shape(begin, trainable))
    placed = place(mesh, trainable)
    return jax.jit(begin, out_shardings=targets)(placed)


def _saved(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "trainable": state.trainable,
        "opt_state": state.opt_state,
    }


def _restored(checkpoints: Checkpoints, state: TrainState) -> TrainState:
    found = checkpoints.restore(_saved(state))
    return dataclasses.replace(state, **found)


def _compiled(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    accumulate: int,
    clip: float,
    mesh: jax.sharding.Mesh,
    state: TrainState,
) -> Any:
    step = make_step(loss_fn, optimizer, accumulate=accumulate, clip=clip)
    where = shardings_of(mesh, state)
    copied = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(where, copied))


class _Run:
    """Numbers of the steps under way: fetched an interval late, checked, written."""

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
    ) -> None:
        self.out, self.watch, self.last = out, watch, {}  # type: ignore[var-annotated]
        self._steps, self._every, self._schedule = steps, max(log_every, 1), schedule
        self._unit, self._flops, self._peak, self._kept = unit, flops, peak, kept
        self._current: list[tuple[int, Any]] = []
        self._waiting: list[tuple[int, Any]] = []
        self._first = start + 1
        self._clock: float | None = None
        self._count = 0.0

    def add(self, step: int, numbers: Any, state: TrainState) -> None:
        self._current.append((step, numbers))
        if step == self._first:
            # Compilation is no part of the speed.
            jax.block_until_ready(numbers)
            self._clock = time.perf_counter()
        if step % self._every == 0:
            self._report(state)
            self._waiting, self._current = self._current, []

    def flush(self, state: TrainState) -> None:
        """Waits for all that was begun, and checks it."""
        self._report(state)
        self._waiting, self._current = self._current, []
        self._report(state)
        self._waiting = []

    def paused(self) -> _Paused:
        """Time in here does not count."""
        return _Paused(self)

    def _report(self, state: TrainState) -> None:
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
            values["lr"] = float(self._schedule(steps[-1] - 1))
        timed = steps[0] > self._first
        seconds = now - (self._clock or now)
        if timed and seconds > 0:
            values[f"{self._unit}_per_second"] = amount / seconds
            values["seconds_left"] = seconds / len(steps) * (self._steps - steps[-1])
            if self._flops and self._peak:
                values["mfu"] = amount / seconds * self._flops / self._peak
        self._clock = now
        self.last = values
        self.out.write(steps[-1], values)

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


class _Paused:
    def __init__(self, run: _Run) -> None:
        self._run = run

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *unused: Any) -> None:
        if self._run._clock is not None:
            self._run._clock += time.perf_counter() - self._begun
