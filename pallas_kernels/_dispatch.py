"""The packed products of all formats behind one set of functions."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax

from pallas_kernels import _devices, _implementation
from pallas_kernels._weights import (
    TERNARY,
    KernelError,
    Planes,
    WeightLayout,
    package_of,
)
from pallas_kernels.quantized_matmul import api as _quantized
from pallas_kernels.ternary_matmul import api as _ternary


def _api_of(layout: WeightLayout) -> ModuleType:
    return _ternary if package_of(layout).endswith("ternary_matmul") else _quantized


def packed_matmul(
    x: jax.Array, planes: Planes, layout: WeightLayout, **options: Any
) -> jax.Array:
    """`ternary_matmul` or `quantized_matmul`, by the format of the weight.

    Args:
      x: `[..., K]`.
      planes: of the weight.
      layout: what they mean.
      **options: as in those two.

    Returns:
      `[..., N]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from pallas_kernels import WeightLayout, packed_matmul
      >>> layout = WeightLayout(format="int8", k=64, n=8, group_size=64)
      >>> planes = {"codes": jnp.ones((64, 8), jnp.int8), "scale": jnp.ones((1, 8))}
      >>> packed_matmul(jnp.ones((2, 64)), planes, layout).shape
      (2, 8)
    """
    if layout.format in TERNARY:
        return _ternary.ternary_matmul(x, planes, layout, **options)
    _api_of(layout)
    return _quantized.quantized_matmul(x, planes, layout, **options)


def prepare(
    planes: Planes, layout: WeightLayout, *, implementation: str | None = None
) -> tuple[Planes, WeightLayout]:
    """Permutes canonical planes into the order that an implementation reads.

    Args:
      planes: canonical, without leading axes (`jax.vmap` adds them).
      layout: of the order "canonical".
      implementation: default `implementation_for()`, or "xla" where that one has no
        place for the weight.

    Returns:
      Planes and layout in that order.

    Raises:
      KernelError: the implementation was named and has no place for the weight.
    """
    api = _api_of(layout)
    if implementation is None:
        best = _devices.implementation_for()
        implementation = best if cannot_hold(best, layout) is None else "xla"
    return api.prepare(planes, layout, implementation=implementation)


def restore(planes: Planes, layout: WeightLayout) -> tuple[Planes, WeightLayout]:
    """Exact inverse of `prepare`.

    Args:
      planes: in the order that `layout` names.
      layout: of any order.

    Returns:
      Canonical planes and their layout.
    """
    return _api_of(layout).restore(planes, layout)


def cannot_hold(implementation: str, layout: WeightLayout) -> str | None:
    """One clause if an implementation has no place for a weight, else None."""
    package = package_of(layout)
    try:
        module = _implementation.implementation(package, implementation)
    except KernelError as e:
        return str(e)
    return None if module.ORDER is None else module.unsupported(None, layout, None)
