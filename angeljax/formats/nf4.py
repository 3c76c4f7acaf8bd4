"""NF4: sixteen levels at quantiles of a normal distribution, scaled by the maximum.

Levels from QLoRA (arXiv 2305.14314, appendix E); s = amax, code = nearest level.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.formats._blocks import Granules
from angeljax.formats._packing import pack_bits, unpack_bits
from angeljax.formats._registry import Format, Planes, register
from angeljax.formats._spec import Spec
from angeljax.formats.integer import to_scale, values

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def scales(w: jax.Array, spec: Spec) -> Planes:
    """Scales that hold every weight of blocks `[*lead, G, g]`."""
    return {"scale": to_scale(Granules(spec).max(jnp.abs(w)), spec)}


def _codes(x: jax.Array) -> jax.Array:
    levels = np.asarray(LEVELS, np.float32)
    codes = jnp.zeros(x.shape, jnp.uint8)
    for middle in (levels[1:] + levels[:-1]) / 2:
        codes += (x > middle).astype(jnp.uint8)
    return codes


def nearest(w: jax.Array, planes: Planes, spec: Spec) -> jax.Array:
    """The nearest levels, as float32, for given scales."""
    codes = _codes(Granules(spec).divide(w, planes["scale"]))
    return jnp.take(jnp.asarray(LEVELS, jnp.float32), codes, mode="clip")


def pack(levels: jax.Array, planes: Planes, spec: Spec) -> Planes:
    """All planes of levels that `nearest` gave."""
    del spec
    return {"codes": pack_bits(_codes(levels), 4), **planes}


def encode(w: jax.Array, spec: Spec) -> Planes:
    """Codes and scales of blocks `[*lead, G, g]`."""
    planes = scales(w, spec)
    codes = _codes(Granules(spec).divide(w, planes["scale"]))
    return {"codes": pack_bits(codes, 4), **planes}


def decode(planes: Planes, spec: Spec) -> jax.Array:
    """Float32 blocks `[*lead, G, g]`."""
    levels = jnp.asarray(LEVELS, jnp.float32)
    values = jnp.take(levels, unpack_bits(planes["codes"], 4), mode="clip")
    return values * Granules(spec).expand(planes["scale"].astype(jnp.float32))


register(
    Format(
        name="nf4",
        payload_bits=4,
        encode=encode,
        decode=decode,
        unit=2,
        granularities=("group", "channel", "tensor"),
        group_size=64,
        scales=scales,
        nearest=nearest,
        values=values,
        pack=pack,
        summary="4-bit levels at normal quantiles",
    )
)
