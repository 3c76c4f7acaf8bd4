"""What the implementations share: settings, cleaned inputs and keys of candidates.

Each module (`reference`, `xla`, `triton`, `mosaic_gpu`, `tpu`) has

  unsupported(batch, n, settings) -> str | None
      one clause saying why it cannot run this, None if it can
  select(gram, importance, valid, limit, settings) -> int32 [B, K]
      gram float32 [B, N, N], whose row j holds the similarities of token j to all;
      importance float32 [B, N] of finite numbers, see `clean`; valid bool [B, N];
      limit int32 [B], at most K and at most the valid tokens of the row. Gives the
      choices in order, N from slot `limit` on.

All of them give the same choices, ties included: what is compared is computed by the
same roundings everywhere. So products and sums never stand where a compiler could fuse
them, and facility gains are sums of integers.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_LEAST = float(np.finfo(np.float32).min)
LARGE = -_LEAST  # finite, so that differences are numbers
# A token of a DPP whose variance, given the chosen ones, is below both of these (the
# second relative to the variance that it started with) lies in their span.
DPP_FLOOR = 1e-12
DPP_RELATIVE_FLOOR = 1e-6
# Facility gains are counted in units of 2**-24, the spacing of float32 below 1.
UNIT = 2**24


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is static about a call."""

    num_select: int
    objective: str
    weight: float
    parallel: int


def clean(importance: jax.Array | None, valid: jax.Array, s: Settings) -> jax.Array:
    """Importance float32 `[B, N]` of finite numbers.

    NaN becomes the lowest number. DPP and facility weigh by importance, so negative
    entries are 0 there.
    """
    if importance is None:
        return jnp.zeros(valid.shape, jnp.float32)
    x = importance.astype(jnp.float32)
    x = jnp.clip(jnp.where(jnp.isnan(x), _LEAST, x), _LEAST, -_LEAST)
    if s.objective != "mmr":
        x = jnp.clip(x, 0.0, 1e18)  # whose square is finite
    # One zero: as integers the two would differ.
    return jnp.where(x == 0, 0.0, x)


def limits(valid: jax.Array, counts: jax.Array | None, num_select: int) -> jax.Array:
    """int32 `[B]`: choices that each row makes."""
    limit = jnp.minimum(jnp.sum(valid, axis=-1, dtype=jnp.int32), num_select)
    if counts is not None:
        limit = jnp.clip(counts.astype(jnp.int32), 0, limit)
    return limit


def mmr_factor(s: Settings) -> float:
    """What similarities are multiplied by, a float32."""
    return float(np.float32(1) - np.float32(s.weight))


def mmr_base(importance: jax.Array, s: Settings) -> jax.Array:
    """`weight * importance`, of which similarities are subtracted."""
    # The barrier keeps the product out of the subtraction that follows it.
    base = lax.optimization_barrier(importance * np.float32(s.weight))
    return jnp.where(base == 0, 0.0, base)


def mmr_start(
    importance: jax.Array, valid: jax.Array, s: Settings
) -> tuple[jax.Array, jax.Array]:
    """Scores of the first choice and `mmr_base`, -inf where there is no token."""
    first, base = importance, mmr_base(importance, s)
    return jnp.where(valid, first, -jnp.inf), jnp.where(valid, base, -jnp.inf)


def one_launch(n: int, settings: Settings, most: int) -> str | None:
    """One clause if kernels of one thread block for each row cannot run this."""
    if settings.objective != "mmr":
        return f"objective {settings.objective!r} (it takes 'mmr')"
    if settings.parallel != 1:
        return f"parallel={settings.parallel} (it takes 1)"
    if n > most:
        return f"{n} tokens (it takes up to {most})"
    return None


def tiered(
    value: jax.Array, floor: jax.Array | float, importance: jax.Array
) -> jax.Array:
    """int32 keys: tokens whose value is above the floor by it, others by importance.

    Values and importance are not negative, so their bits ascend as they do.
    """
    first = lax.bitcast_convert_type(value, jnp.int32)
    second = lax.bitcast_convert_type(importance, jnp.int32) + np.int32(-(2**31) + 1)
    return jnp.where(value > floor, first, second)


def units(gram: jax.Array) -> jax.Array:
    """Similarities clipped to 0..1, int32 in `UNIT`."""
    return jnp.round(jnp.clip(gram, 0.0, 1.0) * UNIT).astype(jnp.int32)


def exact_sum(parts: jax.Array) -> jax.Array:
    """Sum over the last axis of integers in 0..UNIT, rounded once to float32."""
    high = jnp.sum(parts >> 12, axis=-1, dtype=jnp.int32)
    low = jnp.sum(parts & 4095, axis=-1, dtype=jnp.int32)
    high, low = high + (low >> 12), low & 4095
    # Exact product: the sum alone rounds, fused or not, while high is below 2**24.
    return high.astype(jnp.float32) * 4096.0 + low.astype(jnp.float32)


def facility_scale(importance: jax.Array, s: Settings) -> jax.Array:
    """`importance ** weight`, which gains are multiplied by."""
    if s.weight in (0, 1):
        return importance if s.weight else jnp.ones_like(importance)
    return lax.optimization_barrier(importance ** np.float32(s.weight))


def gains(
    units: jax.Array, covered: jax.Array, scale: jax.Array, importance: jax.Array
) -> jax.Array:
    """Keys of facility: what rows of `units` add to `covered`; see `tiered`.

    Exact sums and one rounding each, so a gain has the same bits however many rows are
    looked at, and never rises as tokens are covered.
    """
    gain = exact_sum(jnp.maximum(units - covered, 0))
    return tiered(gain * scale, 0.0, importance)
