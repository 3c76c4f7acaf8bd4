"""The Hessian of a weight: scaled, damped, factored.

The Hessian of the squared error of a product with respect to one output's weights is
2 sum x x' over tokens. What is factored here has diagonal entries of mean 1, so that
damping is a share of that mean and the number of tokens does not matter.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from angeljax.algorithms._base import require

# How much the damping grows from one try to the next.
GROWTH = 10.0
HIGHEST = jax.lax.Precision.HIGHEST


class Factored(NamedTuple):
    """A damped Hessian and its factor.

    Attributes:
      damped: `[K, K]`.
      upper: `[K, K]`, upper triangular with `inverse(damped) = upper' upper`; NaN where
        even the most damping did not make it positive definite.
      ok: bool `[]`, whether it did.
    """

    damped: jax.Array
    upper: jax.Array
    ok: jax.Array


def require_definite(ok: jax.Array, damping: float, tries: int) -> None:
    """Tells `angeljax.compress` what to say where `factor` did not succeed."""
    require(
        ok,
        "the Hessian of its inputs is not positive definite even with damping "
        f"{damping * GROWTH ** (tries - 1):g}: calibrate with more tokens, or raise "
        "damping",
    )


def marked(planes: dict[str, jax.Array], ok: jax.Array) -> dict[str, jax.Array]:
    """Planes whose floating-point numbers are NaN unless all is well."""
    return {
        name: jnp.where(ok, p, jnp.nan).astype(p.dtype)
        if jnp.issubdtype(p.dtype, jnp.floating)
        else p
        for name, p in planes.items()
    }


def mean_diagonal(h: jax.Array) -> jax.Array:
    """Mean over inputs that are not always zero; 1 if there are none."""
    diagonal = jnp.diagonal(h)
    live = jnp.sum(diagonal > 0)
    mean = jnp.sum(diagonal) / jnp.maximum(live, 1)
    return jnp.where(live > 0, mean, 1.0)


def factor(h: jax.Array, damping: float, tries: int) -> Factored:
    """Damps and factors a Hessian.

    With J the reversal of rows and columns and J H J = L L' (Cholesky), R = J L J is
    upper triangular and H = R R', so that inv(H) = inv(R)' inv(R): one factorization
    and one triangular inverse.

    Args:
      h: float32 `[K, K]` with diagonal entries of mean 1. Inputs that are always zero
        have a row of zeros: with damping they depend on no other and no other on them.
      damping: added to the diagonal.
      tries: each with ten times the damping of the one before, until one succeeds.

    Returns:
      See `Factored`.
    """
    eye = jnp.eye(h.shape[-1], dtype=jnp.float32)

    def failed(upper: jax.Array) -> jax.Array:
        return ~jnp.all(jnp.isfinite(upper))

    def again(state: tuple[jax.Array, ...]) -> jax.Array:
        return (state[0] < tries) & failed(state[2])

    def attempt(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        done, more, _, _ = state
        damped = h + more * eye
        lower = jnp.linalg.cholesky(jnp.flip(damped, (-2, -1)))
        upper = solve_triangular(jnp.flip(lower, (-2, -1)), eye, lower=False)
        return done + 1, more * GROWTH, upper, damped

    start: tuple[jax.Array, ...] = (
        jnp.zeros((), jnp.int32),
        jnp.asarray(damping, jnp.float32),
        jnp.full_like(h, jnp.nan),
        h,
    )
    _, _, upper, damped = jax.lax.while_loop(again, attempt, start)
    return Factored(damped, upper, ~failed(upper))
