"""What the two benchmarks of training share: rows, data, and steps in one dispatch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import angeljax as aj
from angeljax.models import LanguageModel, add_biases, load_model, stack_layers
from angeljax.train import LMTask, OptimizerConfig, load_tokens, make_optimizer
from angeljax.train.language_model import ready
from angeljax.train.losses import DistillOptions
from angeljax.train.objective import Objective

ARENAS = aj.qat.Arenas()
_G = {"group_size": 128}
_LEARNED = {"scale": "learned"}
# Row -> rule of all linear layers, and whether Arenas is on.
ROWS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "bfloat16": (None, False),
    "absmean": ({"format": "t2", **_G}, False),
    "absmean+arenas": ({"format": "t2", **_G}, True),
    "tequila": ({"format": "t2", **_G, "qat": {"tequila": 1e-3}}, False),
    "lsq": ({"format": "t2", **_G, "qat": _LEARNED}, False),
    "sherry": ({"format": "sherry", **_G}, False),
    "sherry+arenas": ({"format": "sherry", **_G}, True),
    "seq2": ({"format": "seq2", "qat": _LEARNED}, False),
    "int4": ({"format": "int4", **_G}, False),
    "binary": ({"format": "binary", **_G}, False),
    "binary+arenas": ({"format": "binary", **_G}, True),
}


def recipe_of(row: str) -> aj.Recipe | None:
    """The recipe of a row."""
    rule, arenas = ROWS[row]
    if rule is None:
        return None
    return aj.Recipe(
        name=row, rules=[aj.Rule(**rule)], arenas=ARENAS if arenas else None
    )


@dataclasses.dataclass(frozen=True)
class Start:
    """The model that training starts from, ready for it."""

    model: LanguageModel
    params: Any


def start(source: str, *, scan_layers: bool = True) -> Start:
    """Loads a model in float32, for compute in bfloat16."""
    loaded = load_model(source, dtype=jnp.float32)
    params = stack_layers(loaded.params) if scan_layers else loaded.params
    return Start(ready(loaded.model, "bfloat16", scan_layers=scan_layers), params)


def token_stream(sources: Sequence[str]) -> jax.Array:
    """All ids on the device, uint16 or int32."""
    return jnp.asarray(load_tokens(tuple(sources), None))


@dataclasses.dataclass(frozen=True)
class Training:
    """One row ready to train; `run` does many steps in one dispatch."""

    task: LMTask
    trainable: Any
    frozen: Any
    opt_state: Any
    optimizer: optax.GradientTransformation
    length: int

    def run(
        self, trainable: Any, opt_state: Any, data: Any, rows: Any, step: int, lr: float
    ) -> Any:
        """Steps on the windows that begin at `rows [steps, batch]`; donates.

        Returns:
          ((trainable, opt_state, step), losses by name `[steps]`).
        """
        return _run(
            trainable,
            opt_state,
            self.frozen,
            data,
            jnp.asarray(rows),
            jnp.asarray(step),
            jnp.asarray(lr, jnp.float32),
            task=self.task,
            optimizer=self.optimizer,
            length=self.length,
        )


@functools.partial(
    jax.jit, static_argnames=("task", "optimizer", "length"), donate_argnums=(0, 1)
)
def _run(
    trainable: Any,
    opt_state: Any,
    frozen: Any,
    data: jax.Array,
    rows: jax.Array,
    step: jax.Array,
    lr: jax.Array,
    *,
    task: LMTask,
    optimizer: Any,
    length: int,
) -> Any:
    def one(carry: Any, at: jax.Array) -> Any:
        trainable, opt_state, step = carry
        window = at[:, None] + jnp.arange(length + 1)
        batch = {"tokens": jnp.take(data, window).astype(jnp.int32)}
        grad = jax.value_and_grad(task.loss, has_aux=True)
        (loss, more), g = grad(trainable, frozen, batch, step, jax.random.key(0))
        updates, opt_state = optimizer.update(g, opt_state, trainable)
        updates = jax.tree.map(lambda u: u * lr, updates)
        trainable = optax.apply_updates(trainable, updates)
        kept = {k: more[k] for k in ("ce", "kd") if k in more}
        return (trainable, opt_state, step + 1), {"loss": loss, **kept}

    return jax.lax.scan(one, (trainable, opt_state, step), rows)


def training(
    begin: Start, row: str, *, steps: int, length: int, distill: DistillOptions | None
) -> Training:
    """A row with a fresh copy of the start; embeddings (the tied head) are frozen."""
    recipe = recipe_of(row)
    model, params = begin.model, begin.params
    if row == "tequila":
        model, params = add_biases(model, params)
    taught = distill is not None
    options = DistillOptions(weight=0.0) if distill is None else distill
    objective = Objective(
        model=model, options=options, teacher=begin.model if taught else None
    )
    qat = None if recipe is None else aj.qat.make(recipe, total_steps=steps)
    task = LMTask(objective, qat, "bfloat16")
    trainable, frozen = task.init(
        params,
        teacher=begin.params if taught else None,
        freeze=("embed_tokens/embedding",),
    )
    trainable = jax.tree.map(lambda x: jnp.array(x, jnp.float32), trainable)
    # Rates are multiplied outside, so that one compilation serves them all.
    config = OptimizerConfig(
        lr=1.0, schedule="wsd", decay_fraction=0.4, warmup=max(steps // 20, 1)
    )
    optimizer = make_optimizer(config, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optimizer)
    return Training(
        task, trainable, frozen, optimizer.init(trainable), optimizer, length
    )


def windows_of(count: int, length: int, rows: int, steps: int, seed: int) -> np.ndarray:
    """Where the windows of each step begin, int32 `[steps, rows]`, epoch by epoch."""
    rng = np.random.default_rng(seed)
    starts = np.arange((count - 1) // length) * length
    need = steps * rows
    epochs = -(-need // len(starts))
    order = np.concatenate([rng.permutation(starts) for _ in range(epochs)])
    return order[:need].reshape(steps, rows).astype(np.int32)
