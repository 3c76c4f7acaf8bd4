"""One training step: gradients, accumulation, clipping, a guarded update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from angeljax._leaves import path_string

Metrics = dict[str, jax.Array]
# (trainable, frozen, batch, step, key) -> (mean loss, metrics)
LossFn = Callable[[Any, Any, Any, jax.Array, jax.Array], tuple[jax.Array, Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step takes and gives; a pytree.

    Attributes:
      step: int32 scalar, optimizer steps that were applied.
      trainable: the float32 parameters.
      opt_state: of the optimizer.
      failed: bool scalar: a gradient, loss or update was not finite. Nothing is applied
        from then on, so that `trainable` stays as it was before.
      culprits: bool `[leaves]`, where the first such gradient was not finite.
    """

    step: jax.Array
    trainable: Any
    opt_state: Any
    failed: jax.Array
    culprits: jax.Array


def init_state(trainable: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; `jit` may take it.

    Args:
      trainable: pytree of float32 arrays; they become part of the state, uncopied.
      optimizer: an optax transformation.

    Returns:
      A `TrainState` at step 0.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        opt_state=optimizer.init(trainable),
        failed=jnp.zeros((), bool),
        culprits=jnp.zeros(len(jax.tree.leaves(trainable)), bool),
    )


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    clip: float = 0.0,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A pure step function, to be jitted with its state donated.

    Args:
      loss_fn: `(trainable, frozen, batch, step, key) -> (loss, metrics)`. The loss is a
        mean; `metrics["weight"]`, if there is one, is over how many things (valid
        tokens), so that micro-batches are averaged exactly. Other metrics are means
        over the same things.
      optimizer: an optax transformation.
      accumulate: micro-batches; with more than 1, batches have a leading axis of them.
      clip: largest global norm of the gradient; 0 does not clip.

    Returns:
      `(state, frozen, batch, key, pace=None) -> (state, metrics)`; the metrics are
      float32 scalars with "loss", "grad_norm" (before clipping), "weight" and "failed"
      among them. `pace`, a scalar, multiplies the update as a factor on the learning
      rate would.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from angeljax.train.step import init_state, make_step
      >>> def loss_fn(w, frozen, x, step, key):
      ...     return jnp.mean((w - x) ** 2), {}
      >>> optimizer = optax.sgd(0.5)
      >>> step = jax.jit(make_step(loss_fn, optimizer), donate_argnums=0)
      >>> state = init_state(jnp.zeros(()), optimizer)
      >>> state, metrics = step(state, None, jnp.ones(4), jax.random.key(0))
      >>> float(state.trainable), float(metrics["loss"])
      (1.0, 1.0)
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def one(trainable: Any, frozen: Any, batch: Any, step: Any, key: Any) -> Any:
        (loss, metrics), grads = gradient(trainable, frozen, batch, step, key)
        metrics = {k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}
        weight = metrics.pop("weight", jnp.ones((), jnp.float32))
        return grads, {"loss": loss.astype(jnp.float32), **metrics}, weight

    def summed(trainable: Any, frozen: Any, batches: Any, step: Any, key: Any) -> Any:
        def micro(total: Any, item: Any) -> tuple[Any, None]:
            batch, number = item
            part = one(trainable, frozen, batch, step, jax.random.fold_in(key, number))
            grads, metrics, weight = part
            weighted = jax.tree.map(lambda x: weight * x, (grads, metrics))
            return jax.tree.map(jnp.add, total, (*weighted, weight)), None

        first = jax.tree.map(lambda x: x[0], batches)
        shapes = jax.eval_shape(one, trainable, frozen, first, step, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        numbers = jnp.arange(accumulate)
        (grads, metrics, weight), _ = jax.lax.scan(micro, zeros, (batches, numbers))
        mean = jax.tree.map(lambda x: x / jnp.maximum(weight, 1e-30), (grads, metrics))
        return *mean, weight

    def step(
        state: TrainState, frozen: Any, batch: Any, key: jax.Array, pace: Any = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        run = one if accumulate == 1 else summed
        grads, metrics, weight = run(state.trainable, frozen, batch, state.step, key)
        squares = _squares(grads)
        norm = jnp.sqrt(squares.sum())
        bad = ~jnp.isfinite(squares)
        if clip:
            scale = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-30))
            grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        if pace is not None:
            updates = jax.tree.map(lambda u: u * jnp.asarray(pace, u.dtype), updates)
        moved = jnp.sqrt(_squares(updates).sum())
        fine = jnp.isfinite(metrics["loss"]) & ~bad.any() & jnp.isfinite(moved)
        keep = fine & ~state.failed
        new = optax.apply_updates(state.trainable, updates)
        trainable, opt_state = jax.tree.map(
            lambda a, b: jnp.where(keep, a, b),
            (new, opt_state),
            (state.trainable, state.opt_state),
        )
        after = TrainState(
            step=state.step + keep,
            trainable=trainable,
            opt_state=opt_state,
            failed=state.failed | ~fine,
            culprits=jnp.where(state.failed, state.culprits, bad),
        )
        failed = after.failed.astype(jnp.float32)
        return after, {
            **metrics,
            "grad_norm": norm,
            "weight": weight,
            "failed": failed,
        }

    return step


def culprit_names(state: TrainState, limit: int = 3) -> str:
    """Names of the first leaves whose gradient was not finite; waits for the device."""
    paths = jax.tree_util.tree_flatten_with_path(state.trainable)[0]
    flags = jax.device_get(state.culprits)
    names = [path_string(p) for (p, _), bad in zip(paths, flags, strict=True) if bad]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _squares(tree: Any) -> jax.Array:
    """Sum of squares of each leaf, float32 `[leaves]`."""
    leaves = jax.tree.leaves(tree)
    return jnp.stack([jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves])
