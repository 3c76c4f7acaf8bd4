"""The compiled parts of block-wise reconstruction, which all layers share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from angeljax import _leaves, ops
from angeljax.models.attention import attend_mask
from angeljax.models.features import run_block
from angeljax.models.language_model import LanguageModel
from angeljax.models.rope import cos_sin
from angeljax.qat import QAT, QATState
from angeljax.train._options import BlockwiseOptions


@dataclasses.dataclass(frozen=True)
class BlockwiseRun:
    """Forward, error and training step of one layer; hashable, compiled once.

    Attributes:
      model: the architecture.
      qat: the recipe, with the steps of a layer.
      options: see `BlockwiseOptions`.
      length: of a row.
    """

    model: LanguageModel
    qat: QAT
    options: BlockwiseOptions
    length: int

    def embed(
        self, params: Any, state: QATState | None, tokens: Any, place: Any
    ) -> Any:
        rest = {name: p for name, p in params.items() if name != "layers"}
        if state is not None:
            rest = self._fake(rest, state, self.qat.total_steps)
        table = rest["embed_tokens"]["embedding"]
        look_up = jax.jit(lambda ids: ops.embed(table, ids, dtype=self.model.dtype))
        return self._over(lambda ids: look_up(ids), place, tokens)

    def forward(
        self, layer: Any, state: QATState | None, x: Any, place: Any, *, window: int
    ) -> Any:
        step = self.qat.total_steps
        return self._over(
            lambda rows: self._output(layer, state, step, rows, window), place, x
        )

    def error(self, layer: Any, state: Any, x: Any, goal: Any, window: int) -> float:
        step = self.qat.total_steps
        each = self._over(
            lambda x, y: self._loss(layer, state, step, x, y, window)[None],
            np.asarray,
            x,
            goal,
        )
        return float(np.mean(each, dtype=np.float64))

    def train(
        self,
        layer: Any,
        state: QATState,
        x: Any,
        goal: Any,
        window: int,
        number: int,
        advance: Any,
    ) -> tuple[Any, QATState]:
        size, rows = self.options.batch_size, len(x)
        carry = self._start((layer, state))
        step = 0
        for epoch in range(self.options.epochs):
            seed = np.random.SeedSequence([self.options.seed, number, epoch])
            order = np.random.default_rng(seed).permutation(rows)
            for first in range(0, rows, size):
                picked = order[first : first + size]
                carry, loss = self._step(carry, step, x[picked], goal[picked], window)
                step += 1
                advance(loss)
        return carry[0]

    def _over(self, f: Any, place: Any, *arrays: Any) -> Any:
        size = self.options.batch_size
        parts = [
            place(f(*(a[i : i + size] for a in arrays)))
            for i in range(0, len(arrays[0]), size)
        ]
        return np.concatenate(parts) if place is np.asarray else jnp.concatenate(parts)

    def _fake(self, tree: Any, state: QATState, step: Any) -> Any:
        return self.qat.apply(tree, state, step, dtype=self.model.dtype)

    def _optimizer(self, layer: Any, state: QATState) -> Any:
        o, steps = self.options, self.qat.total_steps
        planned = {plan.path for plan in state.plan}
        paths = jax.tree_util.tree_map_with_path(
            lambda path, _: (
                "weights" if _leaves.path_string(path) in planned else "frozen"
            ),
            layer,
        )
        labels = paths, jax.tree.map(lambda _: "scales", state)
        rates = {"weights": o.learning_rate, "scales": o.scale_learning_rate}
        rules: dict[Any, Any] = {
            name: optax.adam(optax.cosine_decay_schedule(rate, steps, o.final_ratio))
            for name, rate in rates.items()
        }
        return optax.multi_transform({**rules, "frozen": optax.set_to_zero()}, labels)

    def _block(self, tree: Any, x: jax.Array, window: Any) -> jax.Array:
        layer = tree["layers"] if self.model.scan_layers else tree["layers"][0]
        positions = jnp.broadcast_to(jnp.arange(self.length), x.shape[:2])
        mask = attend_mask(positions, positions, window)
        rotation = cos_sin(self.model.config, positions)
        block = self.model.bind_block(layer)
        return run_block(block, x, rotation, mask, self.model.attention_fn, False)[0]

    @functools.partial(jax.jit, static_argnums=0)
    def _output(self, layer: Any, state: Any, step: Any, x: Any, window: Any) -> Any:
        tree = layer if state is None else self._fake(layer, state, step)
        return self._block(tree, x, window)

    @functools.partial(jax.jit, static_argnums=0)
    def _loss(
        self, layer: Any, state: Any, step: Any, x: Any, goal: Any, window: Any
    ) -> jax.Array:
        y = self._block(self._fake(layer, state, step), x, window)
        return jnp.mean(jnp.square(y.astype(jnp.float32) - goal.astype(jnp.float32)))

    # Compiled, so that moments lie where the weights do, from the first step on.
    @functools.partial(jax.jit, static_argnums=0)
    def _start(self, trained: Any) -> Any:
        return trained, self._optimizer(*trained).init(trained)

    @functools.partial(jax.jit, static_argnums=0)
    def _step(self, carry: Any, step: Any, x: Any, goal: Any, window: Any) -> Any:
        trained, moments = carry

        def loss(trained: Any) -> jax.Array:
            return self._loss(*trained, step, x, goal, window)

        value, grads = jax.value_and_grad(loss)(trained)
        optimizer = self._optimizer(*trained)
        updates, moments = optimizer.update(grads, moments, trained)
        return (optax.apply_updates(trained, updates), moments), value
