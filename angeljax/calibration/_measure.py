"""Statistics of the inputs of one product, and how those of two batches combine."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

BINS = 2048
# Bins of |x| are equally wide in log2|x|: no range has to be known beforehand, and
# histograms of different batches add up. 1.4 % from one bin to the next.
LOG2_LOWEST, LOG2_HIGHEST = -24.0, 16.0
EMA_DECAY = 0.98

# name -> axes after the batch axes, as functions of K; None: not measured by itself.
SHAPES: dict[str, tuple[int | str, ...]] = {
    "count": (),
    "nonfinite": (),
    "amax": (),
    "amax_channel": ("K",),
    "abs_sum": ("K",),
    "token_amax": (),
    "histogram": (BINS,),
    "hessian": ("K", "K"),
    "mismatch": ("K", "K"),
    "ema": (),
    "batches": (),
}
# Combined by the maximum; everything else by the sum.
MAXIMA = ("amax", "amax_channel")
# Not measured by a pass of its own: `ema` and `batches` follow from `amax`, and
# `mismatch` needs two models side by side.
DERIVED = ("ema", "batches", "mismatch")
Found = dict[str, jax.Array]


def shape_of(kind: str, k: int) -> tuple[int, ...]:
    """Shape of a statistic without batch axes."""
    return tuple(k if n == "K" else int(n) for n in SHAPES[kind])


def measure(x: jax.Array, valid: jax.Array, *, kinds: tuple[str, ...]) -> Found:
    """Statistics of `x [T, K]`, rows that are not `valid [T]` left out; float32."""
    finite = jnp.isfinite(x)
    f = jnp.where(valid[:, None] & finite, x, 0).astype(jnp.float32)
    a = jnp.abs(f)
    found: Found = {}
    if "count" in kinds:
        found["count"] = jnp.sum(valid, dtype=jnp.float32)
    if "nonfinite" in kinds:
        bad = valid[:, None] & ~finite
        found["nonfinite"] = jnp.sum(bad, dtype=jnp.float32)
    if "amax" in kinds:
        found["amax"] = jnp.max(a, initial=0.0)
    if "amax_channel" in kinds:
        found["amax_channel"] = jnp.max(a, axis=0, initial=0.0)
    if "abs_sum" in kinds:
        found["abs_sum"] = jnp.sum(a, axis=0)
    if "token_amax" in kinds:
        found["token_amax"] = jnp.sum(jnp.max(a, axis=1, initial=0.0))
    if "histogram" in kinds:
        weights = jnp.broadcast_to(valid[:, None], a.shape)
        found["histogram"] = _histogram(a, weights)
    if "hessian" in kinds:
        found["hessian"] = jnp.matmul(f.T, f, precision=jax.lax.Precision.HIGHEST)
    return found


def measure_mismatch(full: jax.Array, own: jax.Array, valid: jax.Array) -> jax.Array:
    """Sum over the `valid [T]` rows of (full - own) own', `[K, K]`; float32."""

    def rows(x: jax.Array) -> jax.Array:
        keep = valid[:, None] & jnp.isfinite(x)
        return jnp.where(keep, x, 0).astype(jnp.float32)

    f, x = rows(full), rows(own)
    return jnp.matmul((f - x).T, x, precision=jax.lax.Precision.HIGHEST)


def measure_ragged(
    x: jax.Array, valid: jax.Array, sizes: jax.Array, *, kinds: tuple[str, ...]
) -> Found:
    """As `measure` for each expert: rows of `x [T, K]` are sorted by expert."""
    ends = jnp.cumsum(sizes)
    row = jnp.arange(x.shape[0])

    def one(bounds: tuple[jax.Array, jax.Array]) -> Found:
        start, end = bounds
        return measure(x, valid & (row >= start) & (row < end), kinds=kinds)

    # One after another: each is a pass over all rows, but holds one expert's only.
    return jax.lax.map(one, (ends - sizes, ends))


def _histogram(a: jax.Array, weights: jax.Array) -> jax.Array:
    per_octave = BINS / (LOG2_HIGHEST - LOG2_LOWEST)
    place = (jnp.log2(jnp.maximum(a, 1e-30)) - LOG2_LOWEST) * per_octave
    bins = jnp.clip(jnp.floor(place), 0, BINS - 1).astype(jnp.int32)
    flat = jnp.zeros(BINS, jnp.float32)
    return flat.at[bins.reshape(-1)].add(weights.reshape(-1).astype(jnp.float32))


def bin_centers() -> jax.Array:
    """The |x| that stands for each bin `[BINS]`: its geometric middle; 0 for the first.

    Zeros fall into the first bin, with everything below 2^-24.
    """
    per_octave = BINS / (LOG2_HIGHEST - LOG2_LOWEST)
    centers = jnp.exp2((jnp.arange(BINS) + 0.5) / per_octave + LOG2_LOWEST)
    return centers.at[0].set(0.0)


def combine(old: Found, new: Found) -> Found:
    """Statistics of everything so far, and of one batch more."""
    out = {}
    for kind, value in old.items():
        if kind == "ema":
            out[kind] = EMA_DECAY * value + (1 - EMA_DECAY) * new["amax"]
        elif kind == "batches":
            out[kind] = value + 1
        elif kind in MAXIMA:
            out[kind] = jnp.maximum(value, new[kind])
        elif kind in new:
            out[kind] = value + new[kind]
    return out


def merge(one: Found, other: Found) -> Found:
    """Statistics of two disjoint sets of batches.

    The moving average of both is the mean weighted by their numbers of batches.
    """
    out = {}
    for kind in one:
        a, b = one[kind], other[kind]
        if kind == "ema":
            # Uncorrected averages have weights 1 - decay^n; correct, mix, take back.
            n, m = one["batches"], other["batches"]
            mixed = (n * ema(one) + m * ema(other)) / jnp.maximum(n + m, 1)
            out[kind] = mixed * (1 - EMA_DECAY ** (n + m))
        elif kind in MAXIMA:
            out[kind] = jnp.maximum(a, b)
        else:
            out[kind] = a + b
    return out


def ema(found: Found) -> jax.Array:
    """Exponential moving average of the maxima of batches, its start corrected."""
    weight = 1 - jnp.float32(EMA_DECAY) ** found["batches"]
    return found["ema"] / jnp.maximum(weight, math.ulp(1.0))
