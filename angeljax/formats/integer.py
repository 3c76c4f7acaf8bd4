"""Signed and asymmetric integers of 8, 4, 3 and 2 bits.

Symmetric:  s = amax / b,                q = clip(round(w / s)),       w' = s q
Asymmetric: s = (max - min) / (2^n - 1), q = clip(round(w / s + z)),   w' = s (q - z)

with b = 2^(n-1) - 1 when `narrow_range` (levels -b..b, the same on both sides) and
b = 2^(n-1) - 1/2 otherwise (all 2^n levels; the largest positive weight loses half a
step). Asymmetric ranges are widened to hold 0, so that 0 is exact.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.formats._blocks import Granules, rounded
from angeljax.formats._packing import pack_bits, unit_of, unpack_bits
from angeljax.formats._registry import Format, Planes, Snapped, register
from angeljax.formats._spec import Spec

# Below this a scale would underflow when squared or divided by: an all-zero granule.
TINY = float(jnp.finfo(jnp.float32).tiny) ** 0.5


def inverse(x: float) -> np.float32:
    """1 / x as a constant; see `Granules.divide` for why not to divide by x."""
    return np.float32(1 / x)


def to_scale(scale: jax.Array, spec: Spec) -> jax.Array:
    """A float32 scale in the dtype of the spec: 1 for an empty granule, finite."""
    info = jnp.finfo(spec.scale_dtype)
    scale = jnp.where(scale < TINY, 1.0, scale)
    # float16 ends at 65504 and 6e-8: saturate there instead of infinity and 0.
    low, high = max(TINY, float(info.smallest_subnormal)), float(info.max)
    return rounded(jnp.clip(scale, low, high), spec.scale_dtype)


def encode(w: jax.Array, spec: Spec, *, bits: int) -> Planes:
    """Codes, scales (and zero points) of blocks `[*lead, G, g]`."""
    return pack(*snap(w, spec, bits=bits), spec, bits=bits)


def snap(
    w: jax.Array, spec: Spec, scale: jax.Array | None = None, *, bits: int
) -> Snapped:
    """Integer levels (less the zero point) and scales of blocks `[*lead, G, g]`."""
    if scale is None:
        planes = scales(w, spec, bits=bits)
    else:
        assert spec.option("symmetric"), "a zero point follows from the data"
        planes = {"scale": to_scale(scale, spec)}
    return nearest(w, planes, spec, bits=bits), planes


def scales(w: jax.Array, spec: Spec, *, bits: int) -> Planes:
    """Scales (and zero points) that hold every weight of blocks `[*lead, G, g]`."""
    granules = Granules(spec)
    if spec.option("symmetric"):
        low, high = clip_range(spec, bits=bits)
        top = granules.max(jnp.abs(w))
        top = top * inverse(high if low == -high else high + 0.5)
        return {"scale": to_scale(top, spec)}
    lowest = -(2 ** (bits - 1))
    # The zero padding of the last group never widens a range that holds 0.
    least, most = jnp.minimum(granules.min(w), 0), jnp.maximum(granules.max(w), 0)
    scale = to_scale((most - least) * inverse(2**bits - 1), spec)
    zero = jnp.round(lowest - least / scale.astype(jnp.float32))
    zero = jnp.clip(zero, lowest, -lowest - 1)
    return {"scale": scale, "zero": (zero - lowest).astype(jnp.uint8)}


def nearest(w: jax.Array, planes: Planes, spec: Spec, *, bits: int) -> jax.Array:
    """Integer levels (less the zero point) for given scales."""
    granules = Granules(spec)
    low, high = clip_range(spec, bits=bits)
    x = granules.divide(w, planes["scale"])
    if "zero" not in planes:
        return jnp.clip(jnp.round(x), low, high)
    lowest = -(2.0 ** (bits - 1))
    zero = granules.expand(planes["zero"].astype(jnp.float32) + lowest)
    return jnp.clip(jnp.round(x + zero), lowest, -lowest - 1) - zero


def values(levels: jax.Array, planes: Planes, spec: Spec) -> jax.Array:
    """Weights of levels: each times its scale. Other formats share this."""
    return levels * Granules(spec).expand(planes["scale"].astype(jnp.float32))


def clip_range(spec: Spec, *, bits: int) -> tuple[float, float]:
    """Lowest and highest level of the symmetric code."""
    top = 2.0 ** (bits - 1) - 1
    return (-top if narrow_range(spec, bits) else -top - 1), top


def pack(levels: jax.Array, granules: Planes, spec: Spec, *, bits: int) -> Planes:
    """All planes of levels that `snap` gave."""
    if "zero" in granules:
        zero = Granules(spec).expand(granules["zero"].astype(jnp.float32))
        codes = pack_bits((levels + zero).astype(jnp.uint8), bits)
    else:
        codes = _pack(levels.astype(jnp.int8), bits)
    return {"codes": codes, **granules}


def decode(planes: Planes, spec: Spec, *, bits: int) -> jax.Array:
    """Float32 blocks `[*lead, G, g]`."""
    granules = Granules(spec)
    q = unpack_codes(planes["codes"], spec, bits).astype(jnp.float32)
    if not spec.option("symmetric"):
        q = q - granules.expand(planes["zero"].astype(jnp.float32))
    return q * granules.expand(planes["scale"].astype(jnp.float32))


def narrow_range(spec: Spec, bits: int) -> bool:
    """Whether the lowest level is left out; "auto" does so for 8 bits only."""
    choice = spec.option("narrow_range")
    return bits == 8 if choice == "auto" else choice == "yes"


def _pack(q: jax.Array, bits: int) -> jax.Array:
    if bits == 8:
        return q
    return pack_bits(q.astype(jnp.uint8) & (2**bits - 1), bits)


def unpack_codes(codes: jax.Array, spec: Spec, bits: int) -> jax.Array:
    """int8 codes (symmetric) or uint8 codes (asymmetric), `[*lead, G, g]`."""
    if bits == 8:
        return codes
    q = unpack_bits(codes, bits)
    if not spec.option("symmetric"):
        return q
    # Two's complement: move the sign bit to the top, then shift it down again.
    return (q << (8 - bits)).astype(jnp.int8) >> (8 - bits)


for _bits in (8, 4, 3, 2):
    register(
        Format(
            name=f"int{_bits}",
            payload_bits=_bits,
            encode=functools.partial(encode, bits=_bits),
            decode=functools.partial(decode, bits=_bits),
            unit=unit_of(_bits),
            granularities=("channel", "tensor", "group")
            if _bits == 8
            else ("group", "channel", "tensor"),
            group_size={8: 128, 4: 128, 3: 64, 2: 32}[_bits],
            options={
                "symmetric": (True, False),
                "narrow_range": ("auto", "yes", "no"),
            },
            summary=f"{_bits}-bit integers, symmetric or with a zero point",
            snap=functools.partial(snap, bits=_bits),
            pack=functools.partial(pack, bits=_bits),
            clip=functools.partial(clip_range, bits=_bits),
            scales=functools.partial(scales, bits=_bits),
            nearest=functools.partial(nearest, bits=_bits),
            values=values,
        )
    )
