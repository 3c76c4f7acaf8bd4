"""A value with the gradient of another."""

from __future__ import annotations

from typing import Any

import jax


@jax.custom_jvp
def straight_through(x: jax.Array, value: jax.Array) -> jax.Array:
    """`value` bit for bit; the gradient goes to `x` as if it were that (1308.3432)."""
    del x
    return value


@straight_through.defjvp
def _jvp(primals: Any, tangents: Any) -> Any:
    return primals[1], tangents[0]
