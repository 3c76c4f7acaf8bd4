"""One bit: the sign of a weight times the mean magnitude of its granule.

w' = mean|w| where w >= 0, else -mean|w| (XNOR-Net, arXiv 1603.05279, equation 6: the
mean is the least-squares scale). Eight weights to a byte, the lowest bit first; 1 is
negative. The scale of a granule of zeros is 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from angeljax.formats._blocks import Granules
from angeljax.formats._packing import pack_bits, unpack_bits
from angeljax.formats._registry import Format, Planes, Snapped, register
from angeljax.formats._spec import Spec
from angeljax.formats.integer import values
from angeljax.formats.ternary import mean_scale


def snap(w: jax.Array, spec: Spec, scale: jax.Array | None = None) -> Snapped:
    """Levels -1 and 1 and scales of blocks `[*lead, G, g]`."""
    granules = Granules(spec)
    if scale is None:
        inside = jnp.broadcast_to(granules.mask().astype(jnp.float32), w.shape)
        scale = granules.sum(jnp.abs(w)) / granules.sum(inside)
    scale = mean_scale(jnp.maximum(scale, 0.0), spec)
    return jnp.where(w < 0, -1.0, 1.0), {"scale": scale}


def encode(w: jax.Array, spec: Spec) -> Planes:
    """Codes and scales of blocks `[*lead, G, g]`."""
    return pack(*snap(w, spec), spec)


def pack(levels: jax.Array, granules: Planes, spec: Spec) -> Planes:
    """All planes of levels that `snap` gave."""
    del spec
    return {"codes": pack_bits((levels < 0).astype(jnp.uint8), 1), **granules}


def decode(planes: Planes, spec: Spec) -> jax.Array:
    """Float32 blocks `[*lead, G, g]`."""
    levels = 1.0 - 2.0 * unpack_bits(planes["codes"], 1).astype(jnp.float32)
    return levels * Granules(spec).expand(planes["scale"].astype(jnp.float32))


register(
    Format(
        name="binary",
        payload_bits=1,
        encode=encode,
        decode=decode,
        unit=8,
        granularities=("group", "channel", "tensor"),
        summary="signs, one bit each",
        snap=snap,
        pack=pack,
        clip=lambda spec: (-1.0, 1.0),
        level_depends_on_scale=False,
        scales=lambda w, spec: snap(w, spec)[1],
        nearest=lambda w, planes, spec: jnp.where(w < 0, -1.0, 1.0),
        values=values,
    )
)
