"""Static scales of activations, found by calibration."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from angeljax.formats import Spec

# How the largest magnitude that a static scale holds is found; "dynamic" has none.
METHODS = ("dynamic", "amax")
_TOP = {"int8": 127.0, "int4": 7.0, "float8_e4m3": 448.0, "nvfp4": 6.0 * 448.0}


def needs(method: str) -> tuple[str, ...]:
    """Names of the statistics that a method reads."""
    return {"dynamic": (), "amax": ("amax",)}[method]


def input_scale(found: Mapping[str, jax.Array], spec: Spec, method: str) -> jax.Array:
    """The scale of all inputs of a weight.

    Args:
      found: statistics of the weight.
      spec: of the weight; its `activation` says to what inputs are rounded.
      method: one of `METHODS`, not "dynamic".

    Returns:
      float32 `[*batch, 1, ...]`, a plane of the QTensor: 1 for each axis of its spec.
    """
    assert spec.activation is not None
    scale = found["amax"] / _TOP[spec.activation]
    scale = jnp.where(scale > 0, scale, 1.0).astype(jnp.float32)
    return scale.reshape(*scale.shape, *(1,) * spec.rank)
