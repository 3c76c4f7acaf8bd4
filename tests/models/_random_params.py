"""Random parameters without the compiler."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.models import LanguageModel


def random_params(model: LanguageModel, seed: int = 0, std: float = 0.02) -> Any:
    """As `model.init`; compiling that takes seconds for the smallest of models."""
    rng = np.random.default_rng(seed)

    def leaf(path: Any, x: Any) -> jax.Array:
        if path[-1].key == "scale":
            return jnp.ones(x.shape, jnp.float32)
        return jnp.asarray(std * rng.normal(size=x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, model.abstract())
