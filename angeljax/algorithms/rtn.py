"""Rounding to the nearest code, with scales from the largest weight of a granule."""

from __future__ import annotations

import dataclasses

import jax

from angeljax.algorithms._base import Algorithm, Found, register
from angeljax.formats import QTensor, Spec, quantize_to


@dataclasses.dataclass(frozen=True, kw_only=True)
class RTNOptions:
    """No options: scales are those of the format."""


def rtn(
    w: jax.Array,
    spec: Spec,
    stats: Found | None = None,
    options: RTNOptions | None = None,
) -> QTensor:
    """Rounds a weight to the nearest codes; data-free.

    Args:
      w: float `[*batch, *spec.shape]`.
      spec: as `angeljax.formats.make_spec` resolves it.
      stats: not used.
      options: see `RTNOptions`.

    Returns:
      A QTensor.
    """
    del stats, options
    return quantize_to(w, spec)


register(
    Algorithm(
        name="rtn",
        quantize=rtn,
        options=RTNOptions,
        summary="round to nearest",
    )
)
