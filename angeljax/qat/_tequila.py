"""The dead-zone bias of Tequila (arXiv 2509.23809, equation 3).

Weights that ternary rounding makes 0 get only noise for a gradient and stay around the
threshold. Tequila gives each of them a small effect of its own that does not depend on
the input: Y = X Q(W) + B with B_o = lambda sum of the weights of output o in the dead
zone, so that they receive lambda times the gradient of the bias. When training ends, B
is a constant and becomes part of the layer's bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from angeljax._train_options import QATOptions
from angeljax.formats import Spec
from angeljax.recipe import RecipeError


def bias_path(path: str, spec: Spec, leaves: Mapping[str, Any]) -> str:
    """The leaf that takes the bias of a weight.

    Raises:
      RecipeError: there is none, or its shape is not that of the outputs.
    """
    parent, _, _ = path.rpartition("/")
    for name in ("bias", "b"):
        found = f"{parent}/{name}" if parent else name
        if found not in leaves:
            continue
        outputs = _outputs(spec)
        shape = tuple(leaves[found].shape)
        if shape[len(shape) - len(outputs) :] != outputs:
            raise RecipeError(
                f"{path}: qat.tequila needs a bias of shape {list(outputs)}, and "
                f"{found} has {list(shape)}"
            )
        return found
    raise RecipeError(
        f"{path}: qat.tequila adds to the bias of the layer, which has none: build the "
        "model with biases (zeros at first), or leave tequila out"
    )


def _outputs(spec: Spec) -> tuple[int, ...]:
    first = len(spec.shape) + spec.axis[0]
    return (*spec.shape[:first], *spec.shape[first + len(spec.axis) :])


def dead_zone_bias(
    w: jax.Array, fake: jax.Array, spec: Spec, options: QATOptions
) -> jax.Array | None:
    """lambda times the sum of the weights that became 0, for each output.

    Args:
      w: latent weight `[*batch, *spec.shape]`.
      fake: its fake-quantized form; only where it is 0 matters.
      spec: its format.
      options: with the factor.

    Returns:
      float32 `[*batch, *outputs]`, or None without the option.
    """
    if options.tequila is None:
        return None
    dead = jax.lax.stop_gradient(fake) == 0
    kept = jnp.where(dead, w.astype(jnp.float32), 0.0)
    return options.tequila * jnp.sum(kept, axis=spec.axis)
