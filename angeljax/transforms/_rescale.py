"""Scales along a link: applied to weights and statistics, and what they are worth."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.algorithms import _blocks
from angeljax.calibration._statistics import Statistics, for_weight
from angeljax.formats import Spec, quantize_to
from angeljax.transforms._graph import Link, geometry

_HIGHEST = jax.lax.Precision.HIGHEST
# Activations: the largest number of those with equal steps, and half the distance
# between neighbours, relative to the number, of those with floating point.
_TOPS = {"int8": 127.0, "int4": 7.0}
_RELATIVE = {"float8_e4m3": 2.0**-4, "mxfp8": 2.0**-4, "mxfp4": 0.25, "nvfp4": 0.25}


def along(s: jax.Array, w: Any, lead: int, axes: tuple[int, ...]) -> jax.Array:
    """`s [*lead, K]` for a product with `w`: its K on the contraction axes."""
    first = w.ndim + axes[0]
    inner = w.shape[first : first + len(axes)]
    after = w.ndim - first - len(axes)
    ones = (1,) * (first - lead)
    return s.reshape(*s.shape[:lead], *ones, *inner, *(1,) * after)


def weight_amax(w: jax.Array, lead: int, axes: tuple[int, ...]) -> jax.Array:
    """The largest magnitude of each input, over outputs and experts: `[*lead, K]`."""
    kept = (*range(lead), *(w.ndim + a for a in axes))
    rest = tuple(a for a in range(w.ndim) if a not in kept)
    top = jnp.max(jnp.abs(w.astype(jnp.float32)), axis=rest)
    return top.reshape(*w.shape[:lead], -1)


def found_of(
    link: Link,
    leaves: Mapping[str, Any],
    stats: Statistics,
    plan: Mapping[str, Spec],
    kinds: tuple[str, ...],
) -> dict[str, dict[str, jax.Array]]:
    """Statistics of those consumers that are quantized.

    Raises:
      StatisticsError: missing, or of another model.
      ValueError: a consumer has rotated inputs.
    """
    out = {}
    for path in link.consumers:
        if path not in plan:
            continue
        spec, w = plan[path], leaves[path]
        if spec.rotation:
            raise ValueError(
                f"{path} has rotated inputs, which have no scales of their own: leave "
                "out its rotation, or its pair"
            )
        batch = w.shape[: w.ndim - len(spec.shape)]
        norm = frobenius(w, n_batch=len(batch)) if stats.norms else None
        out[path] = for_weight(stats, path, spec.k, batch, kinds, norm)
    return out


@functools.partial(jax.jit, static_argnames="n_batch")
def frobenius(w: jax.Array, n_batch: int) -> jax.Array:
    """Norm of each entry of the batch axes."""
    axes = tuple(range(n_batch, w.ndim))
    return jnp.sqrt(jnp.sum(jnp.square(w.astype(jnp.float32)), axis=axes))


def over_experts(x: jax.Array, lead: int, how: str, trailing: int = 1) -> jax.Array:
    """`[*lead, *experts, ...]` reduced over the axes between."""
    axes = tuple(range(lead, x.ndim - trailing))
    if not axes:
        return x
    return jnp.max(x, axis=axes) if how == "max" else jnp.sum(x, axis=axes)


@functools.partial(jax.jit, static_argnames=("spec", "lead", "activations"))
def output_error(
    w: jax.Array,
    found: dict[str, jax.Array],
    scales: jax.Array,
    *,
    spec: Spec,
    lead: int,
    activations: bool,
) -> jax.Array:
    """Squared error of a product for each of several scales, summed over tokens.

    With dW = Q(W s)/s - W and H the sum of x x', the part of the weights is tr(dW' H
    dW), exactly. Rounding of activations is modelled as noise without correlation: for
    integers step^2/12 with the step of the largest input (but no more than the power of
    the input itself), for floating point a share of that power.

    Args:
      w: `[*batch, *spec.shape]`.
      found: its `hessian` and `count`; with `activations` also `amax_channel`.
      scales: `[R, *lead, K]`, R candidates.
      spec: of the weight. Activations are rounded to `spec.activation`, whatever the
        weight is rounded to.
      lead: axes of the batch that have scales of their own; experts share theirs.
      activations: add their part.

    Returns:
      float32 `[R, *lead]`.
    """
    n_batch = w.ndim - len(spec.shape)
    dense = w.astype(jnp.float32)
    h = found["hessian"]

    def rows(x: jax.Array) -> jax.Array:
        blocks = _blocks.to_matrix(x, spec)
        return blocks.reshape(*blocks.shape[:-2], -1)[..., : spec.k]

    def one(s: jax.Array) -> jax.Array:
        by = along(s, w, lead, spec.axis)
        q = quantize_to((dense * by).astype(w.dtype), spec).dequantize(jnp.float32)
        d = rows(q / by - dense)
        seen = jnp.matmul(d, h, precision=_HIGHEST)
        error = jnp.sum(seen * d, axis=(-2, -1))
        if activations and spec.activation is not None:
            noise = _noise(found, s, lead, n_batch, spec.activation)
            gain = jnp.sum(jnp.square(rows(q)), axis=-2)
            error += found["count"] * jnp.sum(noise * gain, axis=-1)
        return over_experts(error, lead, "sum", trailing=0)

    return jax.lax.map(one, scales)


def _noise(
    found: dict[str, jax.Array], s: jax.Array, lead: int, n_batch: int, kind: str
) -> jax.Array:
    """Mean squared rounding error `[*batch, K]` of inputs divided by `s`."""
    s = s.reshape(*s.shape[:-1], *(1,) * (n_batch - lead), s.shape[-1])
    count = jnp.maximum(found["count"], 1)[..., None]
    power = jnp.diagonal(found["hessian"], axis1=-2, axis2=-1) / count / s**2
    if kind in _RELATIVE:
        return power * (_RELATIVE[kind] ** 2 / 3)
    top = jnp.max(found["amax_channel"] / s, axis=-1, keepdims=True)
    return jnp.minimum(power, (top / _TOPS[kind]) ** 2 / 12)


def rescale(
    link: Link,
    s: jax.Array,
    leaves: Mapping[str, Any],
    stats: Statistics | None,
    plan: Mapping[str, Spec],
) -> tuple[dict[str, Any], Statistics | None]:
    """Divides the features of a producer by `s` and multiplies all its readers by it.

    Args:
      link: the producer and its readers.
      s: float32 `[*lead, width]`, positive.
      leaves: path -> array.
      stats: of the tree as it is.
      plan: path -> spec.

    Returns:
      The leaves that changed, and statistics of the new tree: of the readers count,
      amax_channel, amax, abs_sum, hessian and mismatch follow; histograms, moving
      averages and maxima of tokens do not and are left out.
    """
    changed: dict[str, Any] = {}
    value = leaves[link.producer]
    flat = value.shape[: link.lead] if link.kind == "norm" else ()
    if link.kind == "norm":
        by = s.reshape(*flat, link.width)
    else:
        _, axes = geometry(link.producer, value, plan)
        outer = value.shape[value.ndim + axes[-1] + 1 :]
        ones = (1,) * (value.ndim - link.lead - len(outer))
        by = s.reshape(*s.shape[:-1], *ones, *outer)
    changed[link.producer] = times(value, 1 / by)
    if link.bias is not None:
        changed[link.bias] = times(
            leaves[link.bias], 1 / s.reshape(leaves[link.bias].shape)
        )
    inputs = link.expand(s)
    for path in link.consumers:
        _, axes = geometry(path, leaves[path], plan)
        by = along(inputs, leaves[path], link.lead, axes)
        changed[path] = times(leaves[path], by)
    if stats is None:
        return changed, None
    layers, norms = dict(stats.layers), dict(stats.norms)
    for path, new in changed.items():
        if path in norms:
            norms[path] = frobenius(new, n_batch=norms[path].ndim)
    for path in link.consumers:
        if path in layers:
            layers[path] = _scaled(layers[path], inputs, link.lead)
    return changed, Statistics(layers, norms)


def times(w: jax.Array, by: jax.Array) -> jax.Array:
    """A product in float32, in the dtype of the weight."""
    return (w.astype(jnp.float32) * by).astype(w.dtype)


def _scaled(
    found: dict[str, jax.Array], s: jax.Array, lead: int
) -> dict[str, jax.Array]:
    """Statistics of inputs divided by `s [*lead, K]`."""
    more = found["count"].ndim - lead
    s = s.reshape(*s.shape[:-1], *(1,) * more, s.shape[-1])
    kept = ("count", "nonfinite")
    out: dict[str, jax.Array] = {k: found[k] for k in kept if k in found}
    for kind in ("amax_channel", "abs_sum"):
        if kind in found:
            out[kind] = found[kind] / s
    if "amax_channel" in out:
        out["amax"] = jnp.max(out["amax_channel"], axis=-1)
    for kind in ("hessian", "mismatch"):
        if kind in found:
            out[kind] = found[kind] / s[..., :, None] / s[..., None, :]
    return out


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Refuses what is not a number in `[low, high]`.

    Raises:
      ValueError: names the field.
    """
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}: use a number from {low:g} to {high:g}")
