"""Static scales of activations, found by calibration.

One scale holds magnitudes up to some top; what lies above is clipped. Each method finds
a top from what calibration saw:

| method | top |
| --- | --- |
| amax | the largest magnitude |
| ema | moving average of the largest of each batch (decay 0.98, start corrected) |
| percentile | what 99.99 % of all magnitudes do not exceed |
| mse | least squared error of the values, of 8 octaves below the largest |
| lepto | above the largest: FP8 only, see `input_scale` |

The last three read a histogram of magnitudes, whose bins are 1.4 % wide.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.calibration import _measure
from angeljax.formats import Spec
from angeljax.formats.float8 import E4M3, cast

# How the largest magnitude that a static scale holds is found; "dynamic" has none.
METHODS = ("dynamic", "amax", "ema", "percentile", "mse", "lepto")
PERCENTILE = 99.99
_NEEDS: dict[str, tuple[str, ...]] = {
    "dynamic": (),
    "amax": ("amax",),
    "ema": ("ema", "batches"),
    "percentile": ("amax", "histogram"),
    "mse": ("amax", "histogram"),
    "lepto": ("amax", "histogram"),
}
_TOP = {"int8": 127.0, "int4": 7.0, "float8_e4m3": 448.0, "nvfp4": 6.0 * 448.0}
# Tops that "mse" tries: the largest magnitude times these, 16 to an octave.
_RATIOS = np.exp2(-np.arange(8 * 16 + 1) / 16).astype(np.float32)
# Quantiles that "lepto" tries, the last one first: it is the plain scale.
_QUANTILES = (0.999 + 5e-5 * np.arange(20, 7, -1)).round(8)


def needs(method: str) -> tuple[str, ...]:
    """Names of the statistics that a method reads."""
    return _NEEDS[method]


def check(method: str, activation: str | None) -> None:
    """Checks that a method can find scales for a kind of activations.

    Raises:
      ValueError: it cannot; says which can.
    """
    if method == "lepto" and activation != "float8_e4m3":
        raise ValueError(
            f"activation_scale='lepto' is for activation float8_e4m3, not "
            f"{activation!r}: use amax, ema, percentile or mse"
        )
    if method == "mse" and activation == "nvfp4":
        raise ValueError(
            "activation_scale='mse' is not for activation nvfp4, whose errors depend "
            "on blocks of 16: use amax, ema or percentile"
        )


def input_scale(found: Mapping[str, jax.Array], spec: Spec, method: str) -> jax.Array:
    """The scale of all inputs of a weight.

    LeptoQuant (AngelSlim, arXiv 2602.21233) moves the bulk of a distribution instead of
    clipping it: for quantiles x_p of the magnitudes, p from 99.94 % to 100 %, the
    scales amax / E4M3(448 x_p / amax) are candidates, none smaller than amax / 448. The
    one with the least squared error is taken; the authors compare outputs of blocks.

    Args:
      found: statistics of the weight.
      spec: of the weight; its `activation` says to what inputs are rounded.
      method: one of `METHODS`, not "dynamic".

    Returns:
      float32 `[*batch, 1, ...]`, a plane of the QTensor: 1 for each axis of its spec.
      1 where calibration saw nothing but zeros.
    """
    assert spec.activation is not None
    kind = spec.activation
    check(method, kind)
    if method == "ema":
        scale = _measure.ema(dict(found)) / _TOP[kind]
    elif method == "percentile":
        top = quantile(found["histogram"], found["amax"], PERCENTILE / 100)
        scale = top / _TOP[kind]
    elif method == "mse":
        scale = _best(found, found["amax"][..., None] * _RATIOS / _TOP[kind], kind)
    elif method == "lepto":
        scale = _best(found, _lepto_scales(found), kind)
    else:
        scale = found["amax"] / _TOP[kind]
    scale = jnp.where(scale > 0, scale, 1.0).astype(jnp.float32)
    return scale.reshape(*scale.shape, *(1,) * spec.rank)


def quantile(histogram: jax.Array, amax: jax.Array, p: float) -> jax.Array:
    """The magnitude that a share `p` of all does not exceed, linear inside of a bin.

    Args:
      histogram: `[*batch, BINS]` of `angeljax.calibration`.
      amax: `[*batch]`, the largest magnitude, which nothing exceeds.
      p: in (0, 1].

    Returns:
      float32 `[*batch]`.
    """
    # Counted from above: what matters are few values, of a sum of billions.
    above = jnp.flip(jnp.cumsum(jnp.flip(histogram, -1), -1), -1)
    beyond = above[..., :1] * np.float32(1 - p)
    bins = jnp.arange(_measure.BINS)
    at = jnp.max(jnp.where(above > beyond, bins, 0), axis=-1, keepdims=True)

    def pick(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, at, axis=-1)

    inside = (pick(above) - beyond) / jnp.maximum(pick(histogram), 1.0)
    per_octave = _measure.BINS / (_measure.LOG2_HIGHEST - _measure.LOG2_LOWEST)
    edges = jnp.exp2(jnp.arange(_measure.BINS + 1) / per_octave + _measure.LOG2_LOWEST)
    edges = edges.at[0].set(0.0)
    value = edges[at] + inside * (edges[at + 1] - edges[at])
    return jnp.minimum(value[..., 0], amax)


def _lepto_scales(found: Mapping[str, jax.Array]) -> jax.Array:
    """Candidates `[*batch, 13]`; the first is that of the largest magnitude."""
    histogram, amax = found["histogram"], found["amax"]
    safe = jnp.where(amax > 0, amax, 1.0)
    scales = []
    for p in _QUANTILES:
        x = amax if p == 1 else quantile(histogram, amax, float(p))
        held = cast(x * (_TOP["float8_e4m3"] / safe), E4M3).astype(jnp.float32)
        # A quantile that rounds to 0 has no scale.
        scales.append(amax / jnp.where(held > 0, held, _TOP["float8_e4m3"]))
    return jnp.stack(scales, axis=-1)


def _best(found: Mapping[str, jax.Array], scales: jax.Array, kind: str) -> jax.Array:
    """Of scales `[*batch, n]` the first with the least squared error: `[*batch]`."""
    histogram = found["histogram"]
    # No value of the last bin lies above the largest.
    x = jnp.minimum(_measure.bin_centers(), found["amax"][..., None])
    # Shares instead of counts, so that sums of billions stay small.
    weight = histogram / jnp.maximum(jnp.sum(histogram, -1, keepdims=True), 1.0)

    def error(scale: jax.Array) -> jax.Array:
        """`[*batch]` of `scale [*batch]`."""
        s = jnp.where(scale > 0, scale, 1.0)[..., None]
        return jnp.sum(weight * jnp.square(x - _rounded(x / s, kind) * s), axis=-1)

    # One after another: all at once would be [*batch, n, BINS].
    errors = jax.lax.map(error, jnp.moveaxis(scales, -1, 0))
    best = jnp.argmin(errors, axis=0)
    return jnp.take_along_axis(scales, best[..., None], axis=-1)[..., 0]


def _rounded(x: jax.Array, kind: str) -> jax.Array:
    """Magnitudes in units of a scale, rounded to those that a kind has."""
    if kind == "float8_e4m3":
        return cast(x, E4M3).astype(jnp.float32)
    return jnp.minimum(jnp.round(x), _TOP[kind])
