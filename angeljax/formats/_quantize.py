"""Round-to-nearest quantization of one array."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.formats import _blocks
from angeljax.formats._qtensor import QTensor
from angeljax.formats._registry import get_format
from angeljax.formats._resolve import make_spec
from angeljax.formats._spec import Spec


def quantize(w: Any, *, format: str, **options: Any) -> QTensor:
    """Quantizes one array, data-free.

    Pure; works under `jit`, `vmap` (over leading axes) and `eval_shape`. Statistics are
    computed in float32 whatever the input.

    Args:
      w: float array `[*batch, *core]` with at least 2 axes.
      format: a name from `angeljax.formats.format_names()`.
      **options: see `angeljax.formats.make_spec`: `granularity`, `group_size`, `axis`,
        `batch_axes`, `scale_dtype`, `pad`, and the options of the format.

    Returns:
      A `QTensor` of the same shape and dtype.

    Raises:
      ValueError: an unknown format or option, or a shape that it cannot take.

    Example:
      >>> import jax, angeljax as aj
      >>> w = jax.random.normal(jax.random.key(0), (256, 64))
      >>> aj.quantize(w, format="sherry", group_size=128)
      QTensor(sherry g128 [256,64] float32, 1.375 bit/weight)
    """
    w = jnp.asarray(w)
    spec = make_spec(w.shape, w.dtype, format=format, **options)
    return quantize_to(w, spec)


@functools.partial(jax.jit, static_argnames="spec")
def quantize_to(w: jax.Array, spec: Spec) -> QTensor:
    """Quantizes one array as a spec says; see `quantize`.

    Args:
      w: float array `[*batch, *spec.shape]`.
      spec: as `make_spec` resolves it.

    Returns:
      A `QTensor` with this spec.
    """
    fmt = get_format(spec.format)
    planes = fmt.encode(_blocks.to_blocks(w, spec), spec)
    return QTensor(planes=_blocks.store(planes, spec, fmt.tail_unit(spec)), spec=spec)
