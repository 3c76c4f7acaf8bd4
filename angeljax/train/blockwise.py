"""Block-wise reconstruction: quantization-aware training of one layer at a time.

Each layer learns to give, on what the quantized layers before it put out, what the
full-precision layer gave (BRECQ, arXiv 2102.05426; EfficientQAT, arXiv 2407.11062,
section 3.2). No gradient passes from layer to layer, so that memory is that of one
layer, and a few hundred rows of text are enough.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from angeljax import _leaves, ops
from angeljax.evaluation._progress import progress_bar
from angeljax.models.decoder import attend_mask
from angeljax.models.features import run_block
from angeljax.models.language_model import LanguageModel
from angeljax.models.rope import cos_sin
from angeljax.qat import QAT, QATState, make
from angeljax.recipe import Recipe
from angeljax.train._layers import joined, layer_of, outside, put_back

__all__ = ["BlockwiseOptions", "Reconstructed", "reconstruct"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockwiseOptions:
    """How each layer is trained.

    Attributes:
      epochs: passes over the rows, for each layer.
      batch_size: rows of a step.
      learning_rate: of the latent weights (Adam); falls along a cosine.
      scale_learning_rate: of learned scales.
      final_ratio: last learning rate, as a part of the first.
      targets: "full" takes what the full-precision model computed; "quantized" what the
        full-precision layer makes of the quantized layers' output.
      host: keep the activations of all rows in host memory instead of on the device.
      seed: of the order of rows.

    Raises:
      ValueError: a field is out of range; names it.
    """

    epochs: int = 2
    batch_size: int = 4
    learning_rate: float = 1e-4
    scale_learning_rate: float = 1e-4
    final_ratio: float = 0.05
    targets: str = "full"
    host: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"blockwise.{name} must be >= 1, not {value!r}")
        for name in ("learning_rate", "scale_learning_rate", "final_ratio"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"blockwise.{name} must be >= 0, not {value!r}")
        if self.targets not in ("full", "quantized"):
            raise ValueError(
                f"blockwise.targets must be full or quantized, not {self.targets!r}"
            )


@dataclasses.dataclass(frozen=True)
class Reconstructed:
    """What `reconstruct` returns.

    Attributes:
      params: the tree with trained latent weights.
      state: for `angeljax.qat.finalize`.
      before: mean squared error of each layer's output before it was trained.
      after: and after.
    """

    params: Any
    state: QATState
    before: tuple[float, ...]
    after: tuple[float, ...]


def reconstruct(
    model: LanguageModel,
    params: dict[str, Any],
    recipe: Recipe,
    tokens: np.ndarray,
    options: BlockwiseOptions | None = None,
    *,
    progress: bool | None = None,
) -> Reconstructed:
    """Trains the quantized weights of a decoder layer by layer.

    Weights outside of the layers are quantized as the recipe says and not trained, and
    neither are norms and biases. A layer that training did not improve keeps its
    weights. Layers of one shape and format share one compiled step. An Arenas schedule
    of the form "residual" gets in the way: with few steps for each layer the residual,
    which doubles the weights, has hardly gone when the layer is done.

    Args:
      model: the architecture; layers apart or stacked.
      params: full-precision params.
      recipe: see `angeljax.qat.make`; schedules run over the steps of each layer.
      tokens: int32 `[rows, T]`, without padding.
      options: see `BlockwiseOptions`.
      progress: show a progress bar on stderr; default: if it is a terminal.

    Returns:
      A `Reconstructed`; `finalize(r.params, r.state)` packs it.

    Raises:
      ValueError: the rows do not divide into batches, the tokens are outside the
        vocabulary, the recipe takes no weight of a layer, or a layer diverged (named).
      RecipeError: the recipe does not fit the tree.
    """
    o = options or BlockwiseOptions()
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or len(tokens) % o.batch_size or not tokens.size:
        raise ValueError(
            f"tokens {tokens.shape} are not [rows, T] with rows that divide into "
            f"batches of {o.batch_size}"
        )
    if tokens.min() < 0 or tokens.max() >= model.config.vocab_size:
        raise ValueError(
            f"tokens must be in the vocabulary of {model.config.vocab_size}"
        )
    steps = o.epochs * len(tokens) // o.batch_size
    qat = make(recipe, total_steps=steps)
    state = qat.init(params)
    if not any(plan.path.startswith("layers/") for plan in state.plan):
        raise ValueError("the recipe takes no weight of a layer: nothing to train")
    run = _Run(model, qat, o, tokens.shape[1])
    place = np.asarray if o.host else jnp.asarray

    full = run.embed(params, None, tokens, place)
    quantized = run.embed(params, outside(state), tokens, place)
    trained, learned, before, after = [], dict(state.learned), [], []
    total = steps * model.config.num_layers
    with progress_bar("layers", total, progress) as advance:
        for i in range(model.config.num_layers):
            layer, part = layer_of(model, params, state, i)
            window = (model.config.windows or [0] * model.config.num_layers)[i]
            exact = functools.partial(run.forward, layer, None, window=window)
            following = exact(full, place)
            goal = following if o.targets == "full" else exact(quantized, place)
            start = run.error(layer, part, quantized, goal, window)
            new = run.train(layer, part, quantized, goal, window, i, advance)
            end = run.error(*new, quantized, goal, window)
            if not math.isfinite(end):
                raise ValueError(
                    f"layer {i} diverged: lower blockwise.learning_rate (it is "
                    f"{o.learning_rate})"
                )
            if end >= start:
                new, end = (layer, part), start
            before.append(start)
            after.append(end)
            quantized = run.forward(*new, quantized, place, window=window)
            full = following
            trained.append(new)
    for i, (_, part) in enumerate(trained):
        learned = put_back(model, learned, part, i)
    out = {**params, "layers": joined(model, [t for t, _ in trained])}
    state = dataclasses.replace(state, learned=learned)
    return Reconstructed(out, state, tuple(before), tuple(after))


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """The compiled parts, which all layers share."""

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
        carry = (layer, state), self._optimizer(layer, state).init((layer, state))
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

    @functools.partial(jax.jit, static_argnums=0)
    def _step(self, carry: Any, step: Any, x: Any, goal: Any, window: Any) -> Any:
        trained, moments = carry

        def loss(trained: Any) -> jax.Array:
            return self._loss(*trained, step, x, goal, window)

        value, grads = jax.value_and_grad(loss)(trained)
        optimizer = self._optimizer(*trained)
        updates, moments = optimizer.update(grads, moments, trained)
        return (optax.apply_updates(trained, updates), moments), value
