"""FP8: e4m3 and e5m2 elements with a floating-point scale.

s = amax / max(format), q = cast(clip(w / s)): the clip comes first because a cast of a
value beyond the range gives NaN (e4m3) or infinity (e5m2). Casts round to nearest even.
Granularities: tensor, channel, group, and 128x128 blocks (the DeepSeek-V3 scheme,
arXiv 2412.19437, section 3.3).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.formats._blocks import Granules, rounded
from angeljax.formats._registry import Format, Planes, Snapped, register
from angeljax.formats._spec import Spec
from angeljax.formats.integer import inverse, to_scale, values

E4M3 = jnp.float8_e4m3fn
E5M2 = jnp.float8_e5m2


def cast(x: jax.Array, dtype: Any) -> jax.Array:
    """Saturating cast to an 8-bit float."""
    top = float(jnp.finfo(dtype).max)
    return rounded(jnp.clip(x, -top, top), dtype)


def encode(w: jax.Array, spec: Spec, *, dtype: Any) -> Planes:
    """Elements and scales of blocks `[*lead, G, g]`."""
    return pack(*snap(w, spec, dtype=dtype), spec, dtype=dtype)


def pack(levels: jax.Array, granules: Planes, spec: Spec, *, dtype: Any) -> Planes:
    """All planes of elements that `snap` gave."""
    del spec
    return {"codes": rounded(levels, dtype), **granules}


def snap(
    w: jax.Array, spec: Spec, scale: jax.Array | None = None, *, dtype: Any
) -> Snapped:
    """Elements (as float32) and scales of blocks `[*lead, G, g]`."""
    if scale is None:
        planes = scales(w, spec, dtype=dtype)
    else:
        planes = {"scale": to_scale(scale, spec)}
    return nearest(w, planes, spec, dtype=dtype), planes


def scales(w: jax.Array, spec: Spec, *, dtype: Any) -> Planes:
    """Scales that hold every weight of blocks `[*lead, G, g]`."""
    scale = Granules(spec).max(jnp.abs(w)) * inverse(float(jnp.finfo(dtype).max))
    return {"scale": to_scale(scale, spec)}


def nearest(w: jax.Array, planes: Planes, spec: Spec, *, dtype: Any) -> jax.Array:
    """Elements (as float32) for given scales."""
    x = Granules(spec).divide(w, planes["scale"])
    return cast(x, dtype).astype(jnp.float32)


def clip_range(spec: Spec, *, dtype: Any) -> tuple[float, float]:
    """The finite range of the type."""
    del spec
    return -float(jnp.finfo(dtype).max), float(jnp.finfo(dtype).max)


def decode(planes: Planes, spec: Spec) -> jax.Array:
    """Float32 blocks `[*lead, G, g]`."""
    scale = Granules(spec).expand(planes["scale"].astype(jnp.float32))
    return planes["codes"].astype(jnp.float32) * scale


for _name, _dtype in (("float8_e4m3", E4M3), ("float8_e5m2", E5M2)):
    register(
        Format(
            name=_name,
            payload_bits=8,
            encode=functools.partial(encode, dtype=_dtype),
            decode=decode,
            granularities=("channel", "tensor", "group", "block"),
            summary=f"8-bit floats ({_name[-4:]})",
            snap=functools.partial(snap, dtype=_dtype),
            pack=functools.partial(pack, dtype=_dtype),
            clip=functools.partial(clip_range, dtype=_dtype),
            scales=functools.partial(scales, dtype=_dtype),
            nearest=functools.partial(nearest, dtype=_dtype),
            values=values,
        )
    )
