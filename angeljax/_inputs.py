"""What happens to the other operand of a product before a weight sees it.

A weight may want its inputs rotated by a Hadamard matrix and rounded to the numbers of
a format; one that is being calibrated looks at them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.calibration._tap import TappedTensor
from angeljax.formats import QTensor
from angeljax.formats._activation import fake_quantize_activation
from angeljax.formats._rotation import rotate
from angeljax.prepare import PreparedTensor


def changes_inputs(w: Any) -> bool:
    """Whether `as_seen` would do anything."""
    if not isinstance(w, QTensor):
        return False
    return isinstance(w, TappedTensor) or bool(w.spec.rotation) or _rounds(w)


def as_seen(
    x: jax.Array,
    w: Any,
    inputs: Sequence[tuple[int, int]],
    batch: Sequence[int | None] = (),
    group_sizes: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """The operands that a product is to be computed with.

    Args:
      x: the left operand.
      w: the weight.
      inputs: pairs of contracted axes, of `x` and of `w`.
      batch: for each batch axis of `w` that the product does not slice away, the axis
        of `x` that goes with it, or None if each of its entries sees all of `x`.
      group_sizes: of a ragged product.

    Returns:
      `x`, and a weight for it that changes nothing any more.
    """
    if not changes_inputs(w):
        return x, w
    pairs = sorted((b % w.ndim - w.ndim, a % x.ndim) for a, b in inputs)
    axes = [a for _, a in pairs]
    last = tuple(range(-len(axes), 0))
    moved = jnp.moveaxis(x, axes, last)
    shape = moved.shape
    rows = moved.reshape(*shape[: x.ndim - len(axes)], -1)
    packed_along = tuple(b for b, _ in pairs) == w.spec.axis

    if packed_along and w.spec.rotation:
        rows = rotate(rows, w.spec.rotation)
    if isinstance(w, TappedTensor):
        if packed_along:
            left = [a for a in range(x.ndim) if a not in axes]
            at = [None if a is None else left.index(a % x.ndim) for a in batch]
            rows = w.observe(rows, at, group_sizes)
        new: Any = w.planes["codes"]
    else:
        if _rounds(w):
            rows = fake_quantize_activation(rows, w.spec.activation, _static(w))
        new = _at_rest(w, packed_along)
    # A weight in training is kept as it stands for, not as it is stored.
    if packed_along and w.spec.rotation and not w.packed:
        rows = rotate(rows, w.spec.rotation, inverse=True)
    return jnp.moveaxis(rows.reshape(shape), last, axes), new


def _rounds(w: QTensor) -> bool:
    """Whether the other operand must be rounded here, and is not by the kernel."""
    if w.spec.activation is None:
        return False
    return not isinstance(w, PreparedTensor) or w.activation is None


def _static(w: QTensor) -> jax.Array | None:
    """One scale for all inputs; experts share the largest of theirs."""
    scale = w.planes.get("input_scale")
    return None if scale is None else jnp.max(scale)


def _at_rest(w: QTensor, packed_along: bool) -> Any:
    """The same weight for inputs that are rotated and rounded already."""
    if not packed_along and w.spec.rotation:
        return w.dequantize()
    planes = {n: p for n, p in w.planes.items() if n != "input_scale"}
    spec = dataclasses.replace(w.spec, activation=None, rotation=0)
    return dataclasses.replace(w, planes=planes, spec=spec)
