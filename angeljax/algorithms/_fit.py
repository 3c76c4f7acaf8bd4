"""Least squares of the scales (and shifts) of one group, given its levels.

A weight w of levels q is a sum of terms, each a coefficient times a function of q:

  shift=False        w = a q
  shift=True         w = a q + b
  ptqtp              w = a T + b U, q = 3 T + U
  ptqtp, tied        w = a q

Coefficients with the least error (w - w') M (w - w')' for a metric M solve a system of
one or two equations, which is written out here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from angeljax.algorithms._hessian import HIGHEST
from angeljax.formats import Spec
from angeljax.formats._blocks import rounded
from angeljax.formats.ternary import mean_scale
from angeljax.formats.two_planes import trits

Planes = dict[str, jax.Array]
# Formats whose weights are such sums.
FORMATS = ("ptqtp", "seq2", "sherry", "t1_6", "t2")
# A determinant, relative to that of orthogonal terms, that float32 can still divide by.
_SINGULAR = 1e-5


def terms(levels: jax.Array, spec: Spec) -> list[jax.Array]:
    """The functions of levels `[N, g]` that coefficients go with."""
    if spec.format == "ptqtp" and not spec.option("tied"):
        return list(trits(levels))
    if spec.option("shift"):
        return [levels, jnp.ones_like(levels)]
    return [levels]


def names(spec: Spec) -> list[str]:
    """The planes that hold the coefficients."""
    if spec.format == "ptqtp" and not spec.option("tied"):
        return ["scale", "scale_low"]
    return ["scale", "shift"] if spec.option("shift") else ["scale"]


def refit(
    w: jax.Array,
    levels: jax.Array,
    planes: Planes,
    inside: jax.Array,
    spec: Spec,
    metric: jax.Array | None = None,
) -> Planes:
    """The coefficients with the least error for given levels.

    Args:
      w: float32 `[N, g]`.
      levels: `[N, g]`.
      planes: `[N, 1, 1]` each, kept where the equations are singular or their solution
        is none that the format can have (a scale that is not positive).
      inside: bool `[g]`, False where K is padded.
      spec: of the weight.
      metric: `[g, g]`; None is the identity.

    Returns:
      New planes, in the dtype of scales.
    """
    basis = [jnp.where(inside, t, 0.0) for t in terms(levels, spec)]
    w = jnp.where(inside, w, 0.0)

    def weighted(t: jax.Array) -> jax.Array:
        return t if metric is None else jnp.matmul(t, metric, precision=HIGHEST)

    def dot(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum(x * y, axis=-1)

    images = [weighted(t) for t in basis]
    if len(basis) == 1:
        gram = dot(images[0], basis[0])
        ok = gram > 0
        found = [dot(images[0], w) / jnp.where(ok, gram, 1.0)]
    else:
        tt, tu = dot(images[0], basis[0]), dot(images[0], basis[1])
        uu = dot(images[1], basis[1])
        tw, uw = dot(images[0], w), dot(images[1], w)
        determinant = tt * uu - tu * tu
        ok = determinant > _SINGULAR * tt * uu
        safe = jnp.where(ok, determinant, 1.0)
        found = [(uu * tw - tu * uw) / safe, (tt * uw - tu * tw) / safe]
    ok = ok & (found[0] > 0) & jnp.isfinite(found[0])
    if "scale_low" in planes:
        ok = ok & (found[1] >= 0) & (found[0] >= found[1])
    new = {}
    for name, value in zip(names(spec), found, strict=True):
        value = value[:, None, None]
        stored = (
            rounded(value, spec.scale_dtype)
            if name == "shift"
            else mean_scale(value, spec)
        )
        new[name] = jnp.where(ok[:, None, None], stored, planes[name])
    return {**planes, **new}
