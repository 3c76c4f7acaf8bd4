"""Largest weights clipped where the error of outputs falls: the second half of AWQ."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from angeljax.algorithms._base import Algorithm, Found, register
from angeljax.algorithms._blocks import (
    Planes,
    as_matrix,
    from_matrix,
    padded,
    to_matrix,
)
from angeljax.formats import QTensor, Spec, get_format

_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQClipOptions:
    """Which limits are tried.

    Attributes:
      steps: limits are the largest magnitude of a group times 1 - i / steps.
      lowest: the smallest such factor is above this.

    Raises:
      ValueError: a value out of range.
    """

    steps: int = 20
    lowest: float = 0.5

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 2:
            raise ValueError(f"steps={self.steps!r}: use an integer of at least 2")
        if not isinstance(self.lowest, float) or not 0 < self.lowest < 1:
            raise ValueError(f"lowest={self.lowest!r}: use a number between 0 and 1")

    @property
    def ratios(self) -> tuple[float, ...]:
        """The factors, from 1 down."""
        tried = (1 - i / self.steps for i in range(self.steps))
        return tuple(r for r in tried if r > self.lowest + 1e-9)


def awq_clip(
    w: jax.Array,
    spec: Spec,
    stats: Found | None = None,
    options: AWQClipOptions | None = None,
) -> QTensor:
    """Clips each group of each row where that makes the error of outputs smallest.

    The error is the sum over tokens of the square of what a group contributes, dw' H dw
    with the part of the Hessian that belongs to the group (arXiv 2306.00978, section
    3.2; its code). The paper leaves queries and keys out, whose products attention
    multiplies with each other: give them a rule with another algorithm.

    Args:
      w: float `[*batch, *spec.shape]`.
      spec: of the result. Scales for each row or group of it are meant; others are
        found for the clipped weight.
      stats: `hessian` `[*batch, K, K]`.
      options: see `AWQClipOptions`.

    Returns:
      A QTensor.

    Raises:
      ValueError: there is no Hessian.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.algorithms import awq_clip
      >>> from angeljax.formats import make_spec
      >>> w = jax.random.normal(jax.random.key(0), (64, 8))
      >>> spec = make_spec(w.shape, w.dtype, format="int4", group_size=32)
      >>> awq_clip(w, spec, {"hessian": jnp.eye(64)})
      QTensor(int4 g32 [64,8] float32, 4.500 bit/weight)
    """
    options = AWQClipOptions() if options is None else options
    if stats is None or "hessian" not in stats:
        raise ValueError("awq_clip needs the statistic hessian")
    one = as_matrix(spec)
    blocks = to_matrix(w, spec)
    h = padded(stats["hessian"], spec, axes=(-2, -1))
    groups, size = spec.groups, spec.group_size
    h = h.reshape(*h.shape[:-2], groups, size, groups, size)
    h = jnp.moveaxis(jnp.diagonal(h, axis1=-4, axis2=-2), -1, -3)
    amax = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)

    def try_one(best: tuple[jax.Array, jax.Array], ratio: jax.Array) -> tuple:
        top = amax * ratio
        clipped = jnp.clip(blocks, -top, top)
        d = _round(clipped, one)[2] - blocks
        seen = jnp.einsum("...ngi,...gij->...ngj", d, h, precision=_HIGHEST)
        error = jnp.sum(seen * d, axis=-1, keepdims=True)
        better = error < best[0]
        return (jnp.where(better, error, best[0]), jnp.where(better, top, best[1])), 0

    start = jnp.full_like(amax, jnp.inf), amax
    (_, top), _ = jax.lax.scan(try_one, start, jnp.asarray(options.ratios, jnp.float32))
    levels, granules, _ = _round(jnp.clip(blocks, -top, top), one)
    return from_matrix(levels, granules, spec)


def _round(blocks: jax.Array, spec: Spec) -> tuple[jax.Array, Planes, jax.Array]:
    """Levels, granule planes, and the weights that they stand for."""
    fmt = get_format(spec.format)
    assert fmt.scales and fmt.nearest and fmt.values
    granules = fmt.scales(blocks, spec)
    levels = fmt.nearest(blocks, granules, spec)
    return levels, granules, fmt.values(levels, granules, spec)


register(
    Algorithm(
        name="awq_clip",
        quantize=awq_clip,
        options=AWQClipOptions,
        needs=lambda options: ("hessian",),
        summary="the limit of each group by the error of outputs",
    )
)
