"""Between an array and the blocked form that the number formats work on.

A format sees `[*lead, G, g]`: every leading axis is a batch or output axis, `G` counts
scale groups along the contraction and `g` is the group size. This module moves arrays
into that form and back, and reduces and expands over a *granule*, the set of weights
that share a scale (a tensor, a channel, a group or a 128x128 block).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.formats._rotation import rotate
from angeljax.formats._spec import Spec

# Planes that hold one entry per granule; every other plane holds packed codes. The
# scale of static activations is one for all of them.
GRANULE_PLANES = frozenset(
    {"scale", "scale2", "scale_low", "zero", "shift", "input_scale"}
)


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` in a narrower float dtype, rounded for certain.

    XLA may keep the wide value where a narrow one is widened again in the same
    computation ("excess precision"), and does so on GPUs: codes would then be chosen
    for a scale that is not the one stored.
    """
    return jax.lax.optimization_barrier(x.astype(dtype))


def to_blocks(w: jax.Array, spec: Spec) -> jax.Array:
    """`[*batch, *core]` -> float32 `[*batch, *out, G, g]`, zero-padded along K.

    With a rotation the weight for rotated inputs: x W = (x H) (H' W).
    """
    batch = w.shape[: w.ndim - len(spec.shape)]
    x = w.astype(jnp.float32).reshape(*batch, *spec.merged_shape)
    x = jnp.moveaxis(x, spec.k_position, -1)
    if spec.rotation:
        x = rotate(x, spec.rotation)
    if spec.k_padded != spec.k:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, spec.k_padded - spec.k)])
    return x.reshape(*x.shape[:-1], spec.groups, spec.group_size)


def from_blocks(x: jax.Array, spec: Spec) -> jax.Array:
    """Inverse of `to_blocks`, padding cut off; dtype unchanged."""
    x = x.reshape(*x.shape[:-2], spec.k_padded)[..., : spec.k]
    if spec.rotation:
        x = rotate(x, spec.rotation, inverse=True)
    x = jnp.moveaxis(x, -1, spec.k_position)
    return x.reshape(*x.shape[: x.ndim - spec.rank], *spec.shape)


def store(planes: dict[str, jax.Array], spec: Spec, unit: int) -> dict[str, jax.Array]:
    """Blocked planes `[*lead, n, b]` -> stored planes with K at its own position.

    Packed units (of `unit` weights) that hold nothing but padding are dropped.
    """
    out = {}
    for name, p in planes.items():
        flat = p.reshape(*p.shape[:-2], -1)
        if name not in GRANULE_PLANES:
            flat = flat[..., : _kept(spec, unit, p.shape[-1])]
        out[name] = jnp.moveaxis(flat, -1, spec.k_position)
    return out


def unstore(
    planes: dict[str, jax.Array], spec: Spec, unit: int
) -> dict[str, jax.Array]:
    """Inverse of `store`; dropped units come back as zero bytes."""
    out = {}
    for name, p in planes.items():
        p = jnp.moveaxis(p, spec.k_position, -1)
        if name in GRANULE_PLANES:
            out[name] = p[..., None]
            continue
        per_unit = p.shape[-1] // -(-spec.k // unit)
        full = spec.k_padded // unit * per_unit
        if full != p.shape[-1]:
            p = jnp.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, full - p.shape[-1])])
        out[name] = p.reshape(*p.shape[:-1], spec.groups, -1)
    return out


def _kept(spec: Spec, unit: int, entries_per_group: int) -> int:
    """Entries of a code plane along K that hold at least one weight."""
    return -(-spec.k // unit) * (entries_per_group * unit // spec.group_size)


_REDUCE: dict[str, Callable[..., jax.Array]] = {
    "max": jnp.max,
    "min": jnp.min,
    "sum": jnp.sum,
}


@dataclasses.dataclass(frozen=True)
class Granules:
    """Reductions over granules for one spec; all statistics are float32."""

    spec: Spec

    def _over_outputs(self, x: jax.Array, op: str) -> jax.Array:
        reduce = _REDUCE[op]
        block = self.spec.out_block
        if block == 1:
            return x
        n_out = self.spec.rank - 1
        if block == 0:
            axes = tuple(range(x.ndim - 2 - n_out, x.ndim - 2))
            return reduce(x, axis=axes, keepdims=True)
        n = x.shape[-3]
        fill = {"max": -jnp.inf, "min": jnp.inf, "sum": 0.0}[op]
        pad = [(0, 0)] * x.ndim
        pad[-3] = (0, -n % block)
        x = jnp.pad(x, pad, constant_values=fill)
        x = x.reshape(*x.shape[:-3], -1, block, *x.shape[-2:])
        return reduce(x, axis=-3)

    def max(self, x: jax.Array) -> jax.Array:
        """`[*lead, G, g]` -> `[*lead', G, 1]`, the maximum in each granule."""
        return self._over_outputs(jnp.max(x, axis=-1, keepdims=True), "max")

    def min(self, x: jax.Array) -> jax.Array:
        """As `max`, the minimum."""
        return self._over_outputs(jnp.min(x, axis=-1, keepdims=True), "min")

    def sum(self, x: jax.Array) -> jax.Array:
        """As `max`, the sum."""
        x = jnp.sum(x, axis=-1, keepdims=True, dtype=jnp.float32)
        return self._over_outputs(x, "sum")

    def expand(self, s: jax.Array) -> jax.Array:
        """`[*lead', G, 1]` -> an array that broadcasts against `[*lead, G, g]`."""
        if self.spec.out_block <= 1:
            return s
        n = self.spec.merged_shape[-1 if self.spec.k_position != -1 else -2]
        return jnp.repeat(s, self.spec.out_block, axis=-3)[..., :n, :, :]

    def divide(self, x: jax.Array, s: jax.Array) -> jax.Array:
        """`x / s` for blocks `[*lead, G, g]` and granules `[*lead', G, 1]`.

        By one reciprocal for each granule and a product: XLA turns such a quotient
        into that on some devices and in some fusions only, and codes at a tie would
        then depend on where they were computed.
        """
        return x * self.expand(1.0 / s.astype(jnp.float32))

    def mask(self) -> np.ndarray:
        """bool `[G, g]`: False where `to_blocks` padded."""
        inside = np.arange(self.spec.k_padded) < self.spec.k
        return inside.reshape(self.spec.groups, self.spec.group_size)

    def count(self) -> np.ndarray:
        """Weights in each granule, padding left out; broadcasts to `[*lead', G, 1]`."""
        along = self.mask().sum(axis=-1, keepdims=True)
        block = self.spec.out_block
        if block == 1:
            return along
        outputs = list(self.spec.merged_shape)
        del outputs[self.spec.k_position]
        if block == 0:
            return along * math.prod(outputs)
        starts = np.arange(0, outputs[-1], block)
        return along * np.minimum(block, outputs[-1] - starts)[:, None, None]
