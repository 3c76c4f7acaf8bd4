"""Sizes of what a drafter reads of its target."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax._fields import choice
from angeljax.models import LanguageModel


def feature_scales(
    model: LanguageModel,
    params: Any,
    layers: Sequence[int],
    batches: Iterable[Any],
    *,
    kind: str = "channel",
) -> np.ndarray:
    """Factors that bring the target's features to a size of one.

    A few channels of inner layers are hundreds of times as large as the others (massive
    activations, arXiv 2402.17762). Fixed factors make them alike while the head is
    trained, and become part of `fc` when it is written.

    Args:
      model, params: the target.
      layers: whose outputs are the features.
      batches: int32 tokens `[B, T]` each.
      kind: "channel", one factor for each channel; "layer", one for each layer; "none".

    Returns:
      float32 `[len(layers) * hidden_size]`.

    Raises:
      ConfigError: another kind.
    """
    choice("head.normalize", kind, ("channel", "layer", "none"))
    size = model.config.hidden_size
    if kind == "none":
        return np.ones(len(layers) * size, np.float32)

    @jax.jit
    def sums(params: Any, tokens: jax.Array) -> jax.Array:
        found = model.features(params, tokens, hidden=layers).hidden
        # The mean of magnitudes: a square would see nothing but the first token.
        wide = [jnp.abs(x.astype(jnp.float32)).mean(axis=(0, 1)) for x in found]
        return jnp.stack(wide)

    means = np.mean([np.asarray(sums(params, jnp.asarray(t))) for t in batches], axis=0)
    if kind == "layer":
        means = np.broadcast_to(means.mean(axis=1, keepdims=True), means.shape)
    # No channel becomes more than what is usual in its layer would.
    least = 0.1 * np.median(means, axis=1, keepdims=True)
    out = 1.0 / np.maximum(np.maximum(means, least), 1e-6)
    return out.reshape(-1).astype(np.float32)
