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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from angeljax.evaluation._progress import progress_bar
from angeljax.models.language_model import LanguageModel
from angeljax.qat import QATState, make
from angeljax.recipe import Recipe
from angeljax.train._blockwise_run import BlockwiseRun
from angeljax.train._kept_layers import KeptLayers
from angeljax.train._layers import joined, layer_of, outside, put_back
from angeljax.train._options import BlockwiseOptions

__all__ = ["BlockwiseOptions", "Reconstructed", "reconstruct"]


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
    folder: str | Path | None = None,
    report: Callable[[int, float, float], None] | None = None,
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
      folder: keeps each layer that is done; the same call after an interruption goes on
        from there and gives the same result.
      report: called with the number of a layer that is done and its errors before and
        after.
      progress: show a progress bar on stderr; default: if it is a terminal.

    Returns:
      A `Reconstructed`; `finalize(r.params, r.state)` packs it.

    Raises:
      ValueError: the rows do not divide into batches, the tokens are outside the
        vocabulary, the recipe takes no weight of a layer, a layer diverged (named), or
        `folder` is of another reconstruction.
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
    check_state(state)
    kept = None
    if folder is not None:
        kept = KeptLayers.begin(folder, model, params, recipe, tokens, o)
    run = BlockwiseRun(model, qat, o, tokens.shape[1])
    place = np.asarray if o.host else jnp.asarray

    full = run.embed(params, None, tokens, place)
    quantized = run.embed(params, outside(state), tokens, place)
    trained: list[tuple[Any, QATState]] = []
    learned, before, after = dict(state.learned), [], []
    total = steps * model.config.num_layers
    with progress_bar("layers", total, progress) as advance:
        for i in range(model.config.num_layers):
            layer, part = layer_of(model, params, state, i)
            window = (model.config.windows or [0] * model.config.num_layers)[i]
            exact = functools.partial(run.forward, layer, None, window=window)
            following = exact(full, place)
            goal = following if o.targets == "full" else exact(quantized, place)
            new: tuple[Any, QATState]
            found = None if kept is None else kept.load(i, (layer, part))
            if found is not None:
                new, start, end = found
                for _ in range(steps):
                    advance(None)
            else:
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
                if kept is not None:
                    kept.save(i, new, start, end)
            before.append(start)
            after.append(end)
            if report is not None:
                report(i, start, end)
            quantized = run.forward(*new, quantized, place, window=window)
            full = following
            trained.append(new)
    for i, (_, part) in enumerate(trained):
        learned = put_back(model, learned, part, i)
    out = {**params, "layers": joined(model, [t for t, _ in trained])}
    state = dataclasses.replace(state, learned=learned)
    return Reconstructed(out, state, tuple(before), tuple(after))


def check_state(state: QATState) -> None:
    """Refuses a recipe that takes no weight of a layer."""
    if not any(plan.path.startswith("layers/") for plan in state.plan):
        raise ValueError("the recipe takes no weight of a layer: nothing to train")
