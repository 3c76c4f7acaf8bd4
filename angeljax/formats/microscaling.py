"""Block-scaled floats: NVFP4, MXFP4 and MXFP8.

E2M1 magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4, 6; the 4-bit code is sign << 3 | index, two
to a byte, the even K index in the low nibble.

MX (OCP Microscaling Formats v1.0): blocks of 32 share a power of two, stored as the
biased exponent E8M0. `scale_rounding="ceil"` takes the smallest power of two that
keeps the block maximum in range; "floor" is the specification's suggestion
(exponent of the maximum less that of the largest element), which saturates it.

NVFP4: blocks of 16 with an E4M3 scale s_b under one float32 scale s_2 for the tensor,
s_2 = amax / (6 * 448), s_b = E4M3(amax_16 / 6 / s_2), w' = code * s_b * s_2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.formats._packing import pack_bits, unpack_bits
from angeljax.formats._registry import Format, Planes, register
from angeljax.formats._spec import Spec
from angeljax.formats.float8 import E4M3, cast
from angeljax.formats.integer import TINY, inverse

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX, E4M3_MAX = 6.0, 448.0
# Midpoints of neighbours, and whether the tie goes up (to the even mantissa).
_E2M1_STEPS = (
    (0.25, False),
    (0.75, True),
    (1.25, False),
    (1.75, True),
    (2.5, False),
    (3.5, True),
    (5.0, False),
)


def e2m1_encode(x: jax.Array) -> jax.Array:
    """4-bit codes of `x`, round to nearest even, saturating at 6."""
    a = jnp.abs(x)
    index = sum(
        (a >= t if up else a > t).astype(jnp.uint8) for t, up in _E2M1_STEPS
    ) + jnp.zeros(x.shape, jnp.uint8)
    return index | (jnp.signbit(x).astype(jnp.uint8) << 3)


def e2m1_decode(codes: jax.Array) -> jax.Array:
    """Float32 values of 4-bit codes."""
    # Built from the bit fields: exponent e and mantissa m give (1 + m/2) 2^(e-1), and
    # e = 0 is the subnormal m/2. Arithmetic vectorises where a table look-up does not.
    e, m = (codes >> 1) & 3, (codes & 1).astype(jnp.float32)
    power = (1 << e).astype(jnp.float32)
    magnitude = jnp.where(e == 0, 0.5 * m, (0.5 + 0.25 * m) * power)
    return jnp.where(codes >= 8, -magnitude, magnitude)


def e8m0_encode(x: jax.Array, rounding: str) -> jax.Array:
    """Biased exponent (uint8, 1..254) of positive `x` rounded to a power of two."""
    mantissa, exponent = jnp.frexp(x)  # x = mantissa * 2^exponent, mantissa in [.5, 1)
    if rounding == "ceil":
        e = jnp.where(mantissa > 0.5, exponent, exponent - 1)
    else:
        e = exponent - 1
    return jnp.clip(e + 127, 1, 254).astype(jnp.uint8)


def e8m0_decode(code: jax.Array) -> jax.Array:
    """Float32 power of two of a biased exponent in 1..254."""
    bits = code.astype(jnp.uint32) << 23
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _mx_scale(w: jax.Array, spec: Spec, element_max: float) -> jax.Array:
    amax = jnp.max(jnp.abs(w), axis=-1, keepdims=True)
    amax = jnp.where(amax < TINY, element_max, amax)
    if spec.option("scale_rounding") == "ceil":
        return e8m0_encode(amax * inverse(element_max), "ceil")
    largest = 2.0 ** math.floor(math.log2(element_max))
    return e8m0_encode(amax * inverse(largest), "floor")


def e2m1_round(x: jax.Array) -> jax.Array:
    """The nearest E2M1 values, as float32."""
    return e2m1_decode(e2m1_encode(x))


def e4m3_round(x: jax.Array) -> jax.Array:
    """The nearest E4M3 values, as float32."""
    return cast(x, E4M3).astype(jnp.float32)


def mx_scales(w: jax.Array, spec: Spec, *, element_max: float) -> Planes:
    """E8M0 scales of blocks `[*lead, G, 32]`."""
    return {"scale": _mx_scale(w, spec, element_max)}


def nv_scales(w: jax.Array, spec: Spec) -> Planes:
    """E4M3 block scales and the tensor scale of blocks `[*lead, G, 16]`."""
    amax = jnp.max(jnp.abs(w), axis=-1, keepdims=True)
    # One scale2 for each batch entry: over the outputs and all groups.
    n_out = spec.rank - 1
    axes = tuple(range(amax.ndim - 2 - n_out, amax.ndim))
    scale2 = jnp.max(amax, axis=axes, keepdims=True) * inverse(E2M1_MAX * E4M3_MAX)
    return nv_block_scales(amax, jnp.where(scale2 < TINY, 1.0, scale2))


def nv_block_scales(amax: jax.Array, scale2: jax.Array) -> Planes:
    """E4M3 scales for block maxima `[*lead, G, 1]` under a given tensor scale."""
    smallest = float(jnp.finfo(E4M3).smallest_subnormal)
    scale = amax * inverse(E2M1_MAX) * (1.0 / scale2)
    scale = jnp.clip(scale, smallest, E4M3_MAX)
    scale = cast(jnp.where(amax == 0, 1.0, scale), E4M3)
    return {"scale": scale, "scale2": scale2}


def nv_scales_under(w: jax.Array, planes: Planes, spec: Spec) -> Planes:
    """E4M3 block scales under the tensor scale of other planes."""
    del spec
    amax = jnp.max(jnp.abs(w), axis=-1, keepdims=True)
    return nv_block_scales(amax, planes["scale2"])


def block_scale(planes: Planes) -> jax.Array:
    """The float32 factor of each block."""
    if "scale2" in planes:
        return planes["scale"].astype(jnp.float32) * planes["scale2"]
    return e8m0_decode(planes["scale"])


def nearest(
    w: jax.Array, planes: Planes, spec: Spec, *, rounding: Callable[..., jax.Array]
) -> jax.Array:
    """Elements (as float32) for given scales."""
    del spec
    return rounding(w * (1.0 / block_scale(planes)))


def values(levels: jax.Array, planes: Planes, spec: Spec) -> jax.Array:
    """Float32 weights of elements."""
    del spec
    return levels * block_scale(planes)


def pack_e2m1(levels: jax.Array, planes: Planes, spec: Spec) -> Planes:
    """All planes of E2M1 elements."""
    del spec
    return {"codes": pack_bits(e2m1_encode(levels), 4), **planes}


def pack_e4m3(levels: jax.Array, planes: Planes, spec: Spec) -> Planes:
    """All planes of E4M3 elements."""
    del spec
    return {"codes": cast(levels, E4M3), **planes}


def e2m1_blocks(planes: Planes, spec: Spec) -> jax.Array:
    """Float32 blocks `[*lead, G, g]` of packed E2M1."""
    return values(e2m1_decode(unpack_bits(planes["codes"], 4)), planes, spec)


def e4m3_blocks(planes: Planes, spec: Spec) -> jax.Array:
    """Float32 blocks `[*lead, G, g]` of E4M3."""
    return values(planes["codes"].astype(jnp.float32), planes, spec)


def _format(
    scales: Callable[..., Planes],
    rounding: Callable[..., jax.Array],
    pack: Callable[..., Planes],
    decode: Callable[..., jax.Array],
    **fields: Any,
) -> None:
    near = functools.partial(nearest, rounding=rounding)

    def encode(w: jax.Array, spec: Spec) -> Planes:
        planes = scales(w, spec)
        return pack(near(w, planes, spec), planes, spec)

    register(
        Format(
            encode=encode,
            decode=decode,
            granularities=("group",),
            fixed_group=True,
            scales=scales,
            nearest=near,
            values=values,
            pack=pack,
            **fields,
        )
    )


_format(
    nv_scales,
    e2m1_round,
    pack_e2m1,
    e2m1_blocks,
    name="nvfp4",
    payload_bits=4,
    unit=2,
    group_size=16,
    fixed_scale_dtype="float8_e4m3fn",
    scales_under=nv_scales_under,
    summary="E2M1 in blocks of 16 with E4M3 scales under a tensor scale",
)
_format(
    functools.partial(mx_scales, element_max=E2M1_MAX),
    e2m1_round,
    pack_e2m1,
    e2m1_blocks,
    name="mxfp4",
    payload_bits=4,
    unit=2,
    group_size=32,
    fixed_scale_dtype="uint8",
    options={"scale_rounding": ("ceil", "floor")},
    summary="E2M1 in blocks of 32 with power-of-two scales",
)
_format(
    functools.partial(mx_scales, element_max=E4M3_MAX),
    e4m3_round,
    pack_e4m3,
    e4m3_blocks,
    name="mxfp8",
    payload_bits=8,
    group_size=32,
    fixed_scale_dtype="uint8",
    options={"scale_rounding": ("ceil", "floor")},
    summary="E4M3 in blocks of 32 with power-of-two scales",
)
