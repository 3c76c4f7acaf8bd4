"""Between a weight and what algorithms work on: a matrix of blocks for each entry.

Algorithms see `[*batch, N, G, g]`: N outputs merged into one axis, G groups along the
contraction, g weights each, padding included. Columns of the Hessian go with the
merged last two axes.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from angeljax.formats import QTensor, Spec, get_format
from angeljax.formats import _blocks as blocked
from angeljax.formats._blocks import GRANULE_PLANES

Planes = dict[str, jax.Array]


def as_matrix(spec: Spec) -> Spec:
    """The spec of the same weight with its outputs merged, `[K, N]`."""
    n = math.prod(spec.shape) // spec.k
    return dataclasses.replace(spec, shape=(spec.k, n), axis=(-2,))


def to_matrix(w: jax.Array, spec: Spec) -> jax.Array:
    """`[*batch, *spec.shape]` -> float32 blocks `[*batch, N, G, g]`.

    Raises:
      ValueError: as `check_matrix`.
    """
    check_matrix(spec)
    x = blocked.to_blocks(w, spec)
    lead = x.shape[: x.ndim - spec.rank - 1]
    return x.reshape(*lead, -1, spec.groups, spec.group_size)


def check_matrix(spec: Spec) -> None:
    """Checks that the outputs of a spec can be merged.

    Raises:
      ValueError: blocks of outputs do not end where the merged axes do.
    """
    if spec.out_block > 1 and spec.rank > 2:
        raise ValueError(
            f"blocks of {spec.out_block} outputs need one output axis, not shape "
            f"{list(spec.shape)}: use another granularity, or algorithm rtn"
        )


def from_matrix(levels: jax.Array, granules: Planes, spec: Spec) -> QTensor:
    """A QTensor of levels `[*batch, N, G, g]` and granule planes `[*batch, N', G, 1]`.

    Both as the parts of the format (`scales`, `nearest`) give them for the spec of
    `as_matrix`.
    """
    fmt = get_format(spec.format)
    assert fmt.pack is not None
    planes = fmt.pack(levels, granules, as_matrix(spec))
    first = len(spec.shape) + spec.axis[0]
    outputs = (*spec.shape[:first], *spec.shape[first + len(spec.axis) :])

    def unmerge(name: str, p: jax.Array) -> jax.Array:
        lead, n, rest = p.shape[:-3], p.shape[-3], p.shape[-2:]
        if len(outputs) == 1:
            return p
        one = name in GRANULE_PLANES and n == 1
        return p.reshape(*lead, *((1,) * len(outputs) if one else outputs), *rest)

    planes = {name: unmerge(name, p) for name, p in planes.items()}
    stored = blocked.store(planes, spec, fmt.tail_unit(spec))
    return QTensor(planes=stored, spec=spec)


def padded(x: jax.Array, spec: Spec, axes: tuple[int, ...] = (-1,)) -> jax.Array:
    """Statistics `[..., K]` (or `[..., K, K]`) with zeros where K is padded."""
    more = spec.k_padded - spec.k
    if not more:
        return x
    pad = [(0, 0)] * x.ndim
    for axis in axes:
        pad[axis] = (0, more)
    return jnp.pad(x, pad)
