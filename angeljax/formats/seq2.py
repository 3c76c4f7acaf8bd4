"""SEQ in 2 bits: the four levels -3/2, -1/2, 1/2, 3/2 times a scale, none of them zero.

w' = s (round(clip(w / (2 s), -0.99, 0.99) 2 - 1/2) + 1/2), ties to even: the stretched
elastic quantization of ParetoQ (arXiv 2502.02631, section 4.1), whose alpha is 2 s. The
largest level is 3/4 alpha.

`scale_method`:
  lstsq: from alpha = 2 mean|w|, alternate the nearest level and the least-squares scale
    s = <w, q> / <q, q> (10 rounds).
  amax: alpha = amax, where ParetoQ starts its training from.

The scale of a granule of zeros is 0. Codes 0..3 stand for the levels in rising order,
four to a byte, the lowest bits first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from angeljax.formats._blocks import Granules
from angeljax.formats._packing import pack_bits, unpack_bits
from angeljax.formats._registry import Format, Planes, Snapped, register
from angeljax.formats._spec import Spec
from angeljax.formats.integer import TINY, values
from angeljax.formats.ternary import mean_scale

_ROUNDS = 10
# In units of s: what is clipped before rounding.
CLIP = 2 * 0.99


def snap(w: jax.Array, spec: Spec, scale: jax.Array | None = None) -> Snapped:
    """Levels in {-3/2, -1/2, 1/2, 3/2} and scales of blocks `[*lead, G, g]`."""
    granules = Granules(spec)
    if scale is None:
        scale = _from_data(w, spec)
    scale = mean_scale(jnp.maximum(scale, 0.0), spec)
    return _nearest(w, granules, scale), {"scale": scale}


def _nearest(w: jax.Array, granules: Granules, scale: jax.Array) -> jax.Array:
    scale = jnp.maximum(scale.astype(jnp.float32), TINY)
    x = jnp.clip(granules.divide(w, scale), -CLIP, CLIP)
    return jnp.round(x - 0.5) + 0.5


def scales(w: jax.Array, spec: Spec) -> Planes:
    """Scales of blocks `[*lead, G, g]`."""
    return {"scale": mean_scale(jnp.maximum(_from_data(w, spec), 0.0), spec)}


def nearest(w: jax.Array, planes: Planes, spec: Spec) -> jax.Array:
    """The nearest levels for given scales."""
    return _nearest(w, Granules(spec), planes["scale"])


def _from_data(w: jax.Array, spec: Spec) -> jax.Array:
    granules = Granules(spec)
    a = jnp.abs(w)
    if spec.option("scale_method") == "amax":
        return granules.max(a) / 2
    # What is padded is 0 but is given a level, which must not be counted.
    inside = jnp.broadcast_to(granules.mask().astype(jnp.float32), a.shape)

    def step(_: int, s: jax.Array) -> jax.Array:
        q = jnp.abs(_nearest(a, granules, s)) * inside
        return granules.sum(a * q) / jnp.maximum(granules.sum(q * q), 0.25)

    mean = granules.sum(a) / granules.sum(inside)
    return jax.lax.fori_loop(0, _ROUNDS, step, mean)


def encode(w: jax.Array, spec: Spec) -> Planes:
    """Codes and scales of blocks `[*lead, G, g]`."""
    return pack(*snap(w, spec), spec)


def pack(levels: jax.Array, granules: Planes, spec: Spec) -> Planes:
    """All planes of levels that `snap` gave."""
    del spec
    return {"codes": pack_bits((levels + 1.5).astype(jnp.uint8), 2), **granules}


def decode(planes: Planes, spec: Spec) -> jax.Array:
    """Float32 blocks `[*lead, G, g]`."""
    levels = unpack_bits(planes["codes"], 2).astype(jnp.float32) - 1.5
    return levels * Granules(spec).expand(planes["scale"].astype(jnp.float32))


register(
    Format(
        name="seq2",
        payload_bits=2,
        encode=encode,
        decode=decode,
        unit=4,
        granularities=("channel", "group", "tensor"),
        options={"scale_method": ("lstsq", "amax")},
        summary="2 bits, four levels around zero",
        snap=snap,
        pack=pack,
        clip=lambda spec: (-CLIP, CLIP),
        scales=scales,
        nearest=nearest,
        values=values,
    )
)
