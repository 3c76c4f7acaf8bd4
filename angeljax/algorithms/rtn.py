"""Rounding to the nearest code."""

from __future__ import annotations

import dataclasses
import functools

import jax

from angeljax.algorithms._base import Algorithm, Found, register
from angeljax.algorithms._scales import (
    ScaleOptions,
    scale_needs,
    scale_weights,
    search_scales,
)
from angeljax.formats import QTensor, Spec, get_format, quantize_to
from angeljax.formats._blocks import store, to_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class RTNOptions(ScaleOptions):
    """How scales are found; see `ScaleOptions`. By default those of the format."""


def rtn(
    w: jax.Array,
    spec: Spec,
    stats: Found | None = None,
    options: RTNOptions | None = None,
) -> QTensor:
    """Rounds a weight to the nearest codes; data-free unless its options ask for data.

    Args:
      w: float `[*batch, *spec.shape]`.
      spec: as `angeljax.formats.make_spec` resolves it.
      stats: `hessian`, with `weighting="hessian"`.
      options: see `RTNOptions`.

    Returns:
      A QTensor.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.algorithms import RTNOptions, rtn
      >>> from angeljax.formats import make_spec
      >>> w = jax.random.normal(jax.random.key(0), (256, 64))
      >>> spec = make_spec(w.shape, w.dtype, format="int3")
      >>> error = lambda q: float(jnp.mean((q.dequantize() - w) ** 2))
      >>> error(rtn(w, spec, options=RTNOptions(scales="mse"))) < error(rtn(w, spec))
      True
    """
    options = RTNOptions() if options is None else options
    if options.scales == "amax":
        return quantize_to(w, spec)
    return _searched(w, spec, scale_weights(stats, spec, options), options)


@functools.partial(jax.jit, static_argnames=("spec", "options"))
def _searched(
    w: jax.Array, spec: Spec, weights: jax.Array | None, options: RTNOptions
) -> QTensor:
    fmt = get_format(spec.format)
    assert fmt.nearest is not None and fmt.pack is not None
    blocks = to_blocks(w, spec)
    granules = search_scales(blocks, spec, options, weights)
    planes = fmt.pack(fmt.nearest(blocks, granules, spec), granules, spec)
    return QTensor(planes=store(planes, spec, fmt.tail_unit(spec)), spec=spec)


register(
    Algorithm(
        name="rtn",
        quantize=rtn,
        options=RTNOptions,
        needs=scale_needs,
        summary="round to nearest",
    )
)
