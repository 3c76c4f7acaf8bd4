"""Scales of weights: from the largest of a granule, from a percentile, by a search.

A format says by itself which scales hold every weight of a granule (the weights that
share a scale). A smaller one clips the largest of them and has finer steps for all
others, which is the better bargain below 8 bits.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.algorithms._base import Found
from angeljax.algorithms._blocks import padded
from angeljax.formats import Spec, get_format
from angeljax.formats._blocks import Granules, rounded

Planes = dict[str, jax.Array]
Method = Literal["amax", "percentile", "mse"]
Weighting = Literal["none", "hessian"]
# Formats whose scale is a mean of magnitudes, and may be too small as well as too big.
_MEANS = ("binary", "seq2", "sherry", "t1_6", "t2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleOptions:
    """How scales of weights are found; algorithms add these to their options.

    Attributes:
      scales: "amax" takes those of the format; "percentile" those that hold all but
        the largest magnitudes of a granule; "mse" those with the least squared error of
        the weights rounded to the nearest code.
      percentile: of the magnitudes in a granule, in percent, linear between two of
        them; what lies above is clipped.
      steps: ratios that "mse" tries, evenly spaced from 1 (the range of the granule)
        down to `lowest`; formats whose scale is a mean also try 1 / ratio.
      lowest: the smallest ratio.
      weighting: "hessian" weighs the squared errors by the mean square of the input
        that each weight is multiplied with (needs calibration).

    Raises:
      ValueError: a value out of range.
    """

    scales: Method = "amax"
    percentile: float = 99.9
    steps: int = 25
    lowest: float = 0.4
    weighting: Weighting = "none"

    def __post_init__(self) -> None:
        for name, known in (("scales", Method), ("weighting", Weighting)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: use {', '.join(get_args(known))}"
                )
        for name, low, high in (("percentile", 0, 100), ("lowest", 0, 1)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not low < value <= high:
                raise ValueError(
                    f"{name}={value!r}: use a number above {low} and up to {high}"
                )
        if type(self.steps) is not int or self.steps < 2:
            raise ValueError(f"steps={self.steps!r}: use an integer of at least 2")
        if self.weighting != "none" and self.scales != "mse":
            raise ValueError(
                f"weighting={self.weighting!r} goes with scales 'mse', not "
                f"{self.scales!r}"
            )


def scale_needs(options: ScaleOptions) -> tuple[str, ...]:
    """Names of the statistics that `scale_weights` reads."""
    return ("hessian",) if options.weighting == "hessian" else ()


def scale_weights(
    stats: Found | None, spec: Spec, options: ScaleOptions
) -> jax.Array | None:
    """Weights of squared errors `[*batch, k_padded]` from statistics, or None."""
    if options.weighting == "none":
        return None
    if stats is None or "hessian" not in stats:
        raise ValueError("weighting='hessian' needs the statistic hessian: calibrate")
    # The sum over tokens: a common factor changes no choice.
    return padded(jnp.diagonal(stats["hessian"], axis1=-2, axis2=-1), spec)


def search_scales(
    blocks: jax.Array,
    spec: Spec,
    options: ScaleOptions,
    weights: jax.Array | None = None,
    under: Planes | None = None,
) -> Planes:
    """Granule planes (scales, zero points) for blocks of weights.

    Args:
      blocks: float32 `[*batch, *out, G, g]`, zero where K is padded.
      spec: of these blocks; that of `as_matrix` where the outputs are merged into one.
      options: see `ScaleOptions`.
      weights: of squared errors, `[*batch, K]` or `[*batch, k_padded]`, the batch axes
        broadcast; for "mse" only.
      under: planes whose scale for the whole tensor is to be kept (`scale2`), for
        blocks that are a part of it.

    Returns:
      Granule planes as `Format.scales` gives them. A scale for the whole tensor over
      those of groups (`scale2`) stays that of the format.
    """
    fmt = get_format(spec.format)
    assert fmt.scales is not None
    own = (
        fmt.scales(blocks, spec) if under is None else _scales_for(blocks, spec, under)
    )
    if options.scales == "amax":
        return own
    if options.scales == "percentile":
        granules = Granules(spec)
        top = granules.expand(_percentile(jnp.abs(blocks), spec, options.percentile))
        return _scales_for(jnp.clip(blocks, -top, top), spec, own)
    return _least_error(blocks, spec, options, weights, own)


def _scales_for(blocks: jax.Array, spec: Spec, own: Planes) -> Planes:
    """Scales for other blocks under the tensor scale of `own`, if there is one."""
    fmt = get_format(spec.format)
    assert fmt.scales is not None
    if fmt.scales_under is not None:
        return fmt.scales_under(blocks, own, spec)
    return fmt.scales(blocks, spec)


def ratios(spec: Spec, options: ScaleOptions) -> np.ndarray:
    """The ratios that "mse" tries, in the order in which ties are decided."""
    down = np.linspace(1.0, options.lowest, options.steps, dtype=np.float32)
    return np.append(down, 1 / down[1:]) if spec.format in _MEANS else down


def _least_error(
    blocks: jax.Array,
    spec: Spec,
    options: ScaleOptions,
    weights: jax.Array | None,
    own: Planes,
) -> Planes:
    fmt, granules = get_format(spec.format), Granules(spec)
    nearest, values = fmt.nearest, fmt.values
    assert nearest and values
    # What is padded may be given a level that is not 0; it must not count.
    counted = jnp.asarray(granules.mask(), jnp.float32)
    if weights is not None:
        weights = padded(weights, spec) if weights.shape[-1] == spec.k else weights
        lead = weights.shape[:-1]
        ones = (1,) * (spec.rank - 1)
        counted = counted * weights.astype(jnp.float32).reshape(
            *lead, *ones, spec.groups, spec.group_size
        )

    def candidate(ratio: jax.Array) -> Planes:
        if spec.format in _MEANS:
            scale = own["scale"].astype(jnp.float32) * ratio
            top = float(jnp.finfo(spec.scale_dtype).max)
            return {**own, "scale": rounded(jnp.minimum(scale, top), spec.scale_dtype)}
        # The range of `ratio` times the weights is that of the clipped ones.
        return _scales_for(blocks * ratio, spec, own)

    def step(best: tuple, ratio: jax.Array) -> tuple:
        least, chosen = best
        planes = candidate(ratio)
        levels = nearest(blocks, planes, spec)
        wrong = blocks - values(levels, planes, spec)
        error = granules.sum(counted * jnp.square(wrong))
        better = error < least
        planes = {
            name: p if p.shape != better.shape else jnp.where(better, p, chosen[name])
            for name, p in planes.items()
        }
        return (jnp.minimum(error, least), planes), None

    first = jnp.full(jnp.shape(own["scale"]), jnp.inf, jnp.float32)
    grid = jnp.asarray(ratios(spec, options))
    return jax.lax.scan(step, (first, own), grid)[0][1]


def _percentile(a: jax.Array, spec: Spec, percent: float) -> jax.Array:
    """Percentiles of granules of `[*lead, G, g]`, padding left out: `[*lead', G, 1]`.

    Linear between the two nearest of the sorted magnitudes, as numpy's default.
    """
    granules, block = Granules(spec), spec.out_block
    a = jnp.where(granules.mask(), a, -1.0)
    n_out = spec.rank - 1
    if block == 0:
        lead = a.shape[: a.ndim - 2 - n_out]
        a = jnp.moveaxis(a, -2, len(lead)).reshape(
            *lead, *(1,) * n_out, spec.groups, -1
        )
    elif block > 1:
        pad = [(0, 0)] * a.ndim
        pad[-3] = (0, -a.shape[-3] % block)
        a = jnp.pad(a, pad, constant_values=-1.0)
        a = a.reshape(*a.shape[:-3], -1, block, *a.shape[-2:])
        a = jnp.moveaxis(a, -3, -2).reshape(*a.shape[:-3], a.shape[-2], -1)
    a = jnp.sort(a, axis=-1)
    # Padding was sorted to the front.
    count = np.asarray(granules.count(), np.float64)
    place = a.shape[-1] - count + (count - 1) * (percent / 100)
    low = np.floor(place).astype(np.int32)
    high = np.ceil(place).astype(np.int32)

    def at(index: np.ndarray) -> jax.Array:
        index = np.broadcast_to(index, np.broadcast_shapes(index.shape, (1,) * a.ndim))
        shape = (*a.shape[:-1], 1)
        return jnp.take_along_axis(a, jnp.broadcast_to(index, shape), axis=-1)

    part = jnp.asarray(place - low, jnp.float32)
    return at(low) * (1 - part) + at(high) * part
