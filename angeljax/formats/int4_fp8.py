"""4-bit integers whose products with their scales lie on a grid of FP8 (W4A8-FP8).

w' = E4M3(q s / s_2) s_2, with q in -8..7, a scale s for each group and one float32
scale s_2 = amax / 448 for the tensor: a kernel turns codes into FP8 operands by a table
of 16 entries for each group and multiplies FP8 activations with FP8 tensor cores. (The
layout of DeepSeek and Kimi checkpoints in 4 bits; there s = amax_g / 8, here amax_g /
7.5 as in int4, so that encoder and reader share one rule for both signs.)

The cast moves what a code stands for by up to half a step. A code is chosen by what it
stands for afterwards, straight from the weight: the nearest of the 16 values, ties to
the even code.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from angeljax.formats import integer
from angeljax.formats._packing import unit_of, unpack_bits
from angeljax.formats._registry import Format, Planes, register
from angeljax.formats._spec import Spec
from angeljax.formats.float8 import E4M3, cast
from angeljax.formats.integer import TINY, inverse, to_scale

_LOWEST, _HIGHEST = -8, 7


def scales(w: jax.Array, spec: Spec) -> Planes:
    """Scales of groups and of the tensor for blocks `[*lead, G, g]`."""
    amax = jnp.max(jnp.abs(w), axis=-1, keepdims=True)
    # One for each batch entry: over the outputs and all groups.
    axes = tuple(range(amax.ndim - spec.rank - 1, amax.ndim))
    scale2 = jnp.max(amax, axis=axes, keepdims=True) * inverse(448.0)
    scale2 = jnp.where(scale2 < TINY, 1.0, scale2)
    return scales_under(w, {"scale2": scale2}, spec)


def scales_under(w: jax.Array, planes: Planes, spec: Spec) -> Planes:
    """Scales of groups under the tensor scale of other planes."""
    amax = jnp.max(jnp.abs(w), axis=-1, keepdims=True)
    scale = to_scale(amax * inverse(_HIGHEST + 0.5), spec)
    return {"scale": scale, "scale2": planes["scale2"]}


def values(levels: jax.Array, planes: Planes, spec: Spec) -> jax.Array:
    """Weights of integer levels: on the grid of FP8 times the tensor scale."""
    del spec
    scale2 = planes["scale2"]
    step = planes["scale"].astype(jnp.float32) * (1.0 / scale2)
    return cast(levels * step, E4M3).astype(jnp.float32) * scale2


def nearest(w: jax.Array, planes: Planes, spec: Spec) -> jax.Array:
    """The integer levels whose values are nearest."""
    codes = jnp.arange(_LOWEST, _HIGHEST + 1, dtype=jnp.float32)
    table = values(codes, planes, spec)  # [*lead', G, 16], rising
    levels = jnp.full(w.shape, float(_LOWEST))
    for i in range(_HIGHEST - _LOWEST):
        middle = (table[..., i : i + 1] + table[..., i + 1 : i + 2]) * 0.5
        up_is_even = (_LOWEST + i + 1) % 2 == 0
        passed = w >= middle if up_is_even else w > middle
        levels = levels + passed.astype(jnp.float32)
    return levels


def pack(levels: jax.Array, granules: Planes, spec: Spec) -> Planes:
    """All planes of levels that `nearest` gave."""
    return integer.pack(levels, granules, spec, bits=4)


def encode(w: jax.Array, spec: Spec) -> Planes:
    """Codes and scales of blocks `[*lead, G, g]`."""
    planes = scales(w, spec)
    return pack(nearest(w, planes, spec), planes, spec)


def decode(planes: Planes, spec: Spec) -> jax.Array:
    """Float32 blocks `[*lead, G, g]`."""
    # Two's complement: move the sign bit to the top, then shift it down again.
    levels = (unpack_bits(planes["codes"], 4) << 4).astype(jnp.int8) >> 4
    return values(levels.astype(jnp.float32), planes, spec)


register(
    Format(
        name="int4_fp8",
        payload_bits=4,
        encode=encode,
        decode=decode,
        unit=unit_of(4),
        granularities=("group", "channel"),
        scales=scales,
        scales_under=scales_under,
        nearest=nearest,
        values=values,
        pack=pack,
        summary="4-bit integers on a grid of FP8 under a tensor scale",
    )
)
