"""`fit`: the training loop around a pure loss function.

The host never waits for the step it has just begun. Numbers stay on the device until
the next logging interval is under way; the step itself applies no update that is not
finite, so that nothing is lost by noticing late.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from angeljax.train._monitor import Monitor
from angeljax.train._prefetch import prefetch
from angeljax.train.checkpoints import Checkpoints
from angeljax.train.guards import Divergence, LossWatch
from angeljax.train.metrics import Writer, Writers
from angeljax.train.sharding import make_mesh, place, place_batch, shardings_of
from angeljax.train.step import (
    LossFn,
    TrainState,
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
    max_minutes: float | None = None,
    pace: Callable[[float], float] | None = None,
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
      max_minutes: of this call, compilation included: the step that is then under way
        is the last one, and what belongs to the end is done. Default no limit.
      pace: share of the limit that is over -> factor on the learning rate.
      divergence: when to stop; default `Divergence()`.
      unit: what `metrics["weight"]` counts, for the log.
      flops: floating-point operations per unit, for the utilisation.
      peak: FLOP/s of all devices together.

    Returns:
      A `FitResult`.

    Raises:
      ValueError: `steps` or `max_minutes` is not positive, or the batch cannot be
        divided.
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
    if max_minutes is not None and not max_minutes > 0:
        raise ValueError(f"max_minutes must be above 0, not {max_minutes}")
    begun = time.perf_counter()
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
    run = Monitor(
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
        deadline=None if max_minutes is None else begun + 60 * max_minutes,
    )
    step_fn = _compiled(loss_fn, optimizer, accumulate, clip, mesh, state)
    first = batches(start)  # what is wrong with the data is said before compiling
    place_batch(mesh, first, accumulate)
    feed = prefetch(lambda i: place_batch(mesh, batches(i), accumulate), start, steps)
    try:
        for done, batch in enumerate(feed, start + 1):
            last = done == steps
            paced: tuple[Any, ...] = ()
            if max_minutes is not None:
                share = (time.perf_counter() - begun) / (60 * max_minutes)
                last |= share >= 1
                if pace is not None:
                    paced = (np.float32(pace(min(share, 1.0))),)
            state, numbers = step_fn(state, frozen, batch, key, *paced)
            run.add(done, numbers, state, *map(float, paced))
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
            if last:
                break
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
