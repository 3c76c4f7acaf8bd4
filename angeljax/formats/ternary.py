"""Free ternary weights {-1, 0, 1} times a scale, in 2 bits or in base 3.

`scale_method`:
  absmean: a = mean|w|, w becomes 0 below a/2 (BitNet b1.58, arXiv 2402.17764).
  twn: threshold 3/4 mean|w|, a = mean of the weights above it (Ternary Weight
    Networks, arXiv 1605.04711).
  lstsq: from twn, alternate the nearest ternary value and the least-squares scale
    a = <w, T> / <T, T> until they agree (at most 10 rounds).

With `shift=True` a granule also has an offset, w' = a T + shift, the mean of what is
left of its weights (learned in training: DLT, TernaryLLM, arXiv 2406.07177).

`t2` stores value + 1 in 2 bits, planar in runs of up to 128 (the order of GGUF's
TQ2_0); `t1_6` stores five values to a byte. Scales are rounded to `scale_dtype` after
the codes are chosen; the scale of a granule of zeros is 0.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.formats._blocks import Granules, rounded
from angeljax.formats._packing import (
    pack_base3,
    pack_planar2,
    unpack_base3,
    unpack_planar2,
)
from angeljax.formats._registry import Format, Planes, Snapped, register
from angeljax.formats._spec import Spec
from angeljax.formats.integer import TINY

_ROUNDS = 10


def mean_scale(scale: jax.Array, spec: Spec) -> jax.Array:
    """A mean magnitude in the dtype of the spec: finite, and 0 where all weights are 0.

    Codes need not be 0 there (Sherry's cannot) and no code was divided by this scale.
    """
    top = float(jnp.finfo(spec.scale_dtype).max)
    return rounded(jnp.minimum(scale, top), spec.scale_dtype)


def snap(w: jax.Array, spec: Spec, scale: jax.Array | None = None) -> Snapped:
    """Ternary levels in {-1, 0, 1} and scales of blocks `[*lead, G, g]`."""
    granules = Granules(spec)
    if scale is None:
        levels, scale = _from_data(w, spec)
    else:
        scale = mean_scale(jnp.maximum(scale, TINY), spec)
        x = granules.divide(w, jnp.maximum(scale.astype(jnp.float32), TINY))
        levels = jnp.clip(jnp.round(x), -1, 1)
    planes = {"scale": scale}
    if spec.option("shift"):
        rest = w - levels * granules.expand(scale.astype(jnp.float32))
        inside = jnp.broadcast_to(granules.mask().astype(jnp.float32), w.shape)
        mean = granules.sum(rest * inside) / granules.sum(inside)
        planes["shift"] = rounded(mean, spec.scale_dtype)
    return levels, planes


def scales(w: jax.Array, spec: Spec) -> Planes:
    """Scales (and shifts) of blocks `[*lead, G, g]`."""
    return snap(w, spec)[1]


def nearest(w: jax.Array, planes: Planes, spec: Spec) -> jax.Array:
    """The nearest of -1, 0, 1 for given scales, and shifts if there are any."""
    granules = Granules(spec)
    if "shift" in planes:
        w = w - granules.expand(planes["shift"].astype(jnp.float32))
    scale = jnp.maximum(planes["scale"].astype(jnp.float32), TINY)
    return jnp.clip(jnp.round(granules.divide(w, scale)), -1, 1)


def _from_data(w: jax.Array, spec: Spec) -> tuple[jax.Array, jax.Array]:
    granules = Granules(spec)
    a = jnp.abs(w)
    method = spec.option("scale_method")
    # Padding adds nothing to a sum but must not enter a count.
    inside = jnp.broadcast_to(granules.mask().astype(jnp.float32), a.shape)
    mean = granules.sum(a) / granules.sum(inside)

    def kept_mean(keep: jax.Array) -> jax.Array:
        kept = keep.astype(jnp.float32)
        return granules.sum(a * kept) / jnp.maximum(granules.sum(kept), 1.0)

    if method == "absmean":
        scale, keep = mean, a >= granules.expand(mean) / 2
    else:
        keep = a >= 0.75 * granules.expand(mean)
        scale = kept_mean(keep)
    if method == "lstsq":

        def step(_: int, s: jax.Array) -> jax.Array:
            return kept_mean(a >= granules.expand(s) / 2)

        scale = jax.lax.fori_loop(0, _ROUNDS, step, scale)
        keep = a >= granules.expand(scale) / 2
    return jnp.where(keep, jnp.sign(w), 0.0), mean_scale(scale, spec)


def run_length(spec: Spec) -> int:
    """Length of a planar run: the largest of 128, 64, ... that divides group and K."""
    k = -(-spec.k // 4) * 4
    return math.gcd(spec.group_size, k, 128)


def decoded(levels: jax.Array, planes: Planes, spec: Spec) -> jax.Array:
    """Levels times their scale, plus the shift if there is one."""
    granules = Granules(spec)
    w = levels * granules.expand(planes["scale"].astype(jnp.float32))
    if "shift" in planes:
        w = w + granules.expand(planes["shift"].astype(jnp.float32))
    return w


def t2_encode(w: jax.Array, spec: Spec) -> Planes:
    """2-bit codes and scales of blocks `[*lead, G, g]`."""
    return t2_pack(*snap(w, spec), spec)


def t2_pack(levels: jax.Array, granules: Planes, spec: Spec) -> Planes:
    """All planes of levels that `snap` gave."""
    codes = pack_planar2((levels + 1).astype(jnp.uint8), run_length(spec))
    return {"codes": codes, **granules}


def t2_decode(planes: Planes, spec: Spec) -> jax.Array:
    """Float32 blocks `[*lead, G, g]`."""
    t = unpack_planar2(planes["codes"], run_length(spec)).astype(jnp.float32) - 1
    return decoded(t, planes, spec)


def t1_6_encode(w: jax.Array, spec: Spec) -> Planes:
    """Base-3 codes and scales of blocks `[*lead, G, g]`."""
    return t1_6_pack(*snap(w, spec), spec)


def t1_6_pack(levels: jax.Array, granules: Planes, spec: Spec) -> Planes:
    """All planes of levels that `snap` gave."""
    del spec
    return {"codes": pack_base3((levels + 1).astype(jnp.uint8)), **granules}


def t1_6_decode(planes: Planes, spec: Spec) -> jax.Array:
    """Float32 blocks `[*lead, G, g]`."""
    t = unpack_base3(planes["codes"], spec.group_size).astype(jnp.float32) - 1
    return decoded(t, planes, spec)


_PARTS: dict[str, Any] = {"scales": scales, "nearest": nearest, "values": decoded}
_OPTIONS = {"scale_method": ("absmean", "twn", "lstsq"), "shift": (False, True)}
register(
    Format(
        name="t2",
        payload_bits=2,
        encode=t2_encode,
        decode=t2_decode,
        unit=4,
        unit_for=run_length,
        granularities=("group", "channel", "tensor"),
        options=_OPTIONS,
        summary="ternary, 2 bits each",
        snap=snap,
        pack=t2_pack,
        clip=lambda spec: (-1.0, 1.0),
        **_PARTS,
    )
)
register(
    Format(
        name="t1_6",
        payload_bits=1.6,
        encode=t1_6_encode,
        decode=t1_6_decode,
        unit_for=lambda spec: spec.group_size,
        granularities=("group", "channel", "tensor"),
        options=_OPTIONS,
        summary="ternary, five to a byte",
        snap=snap,
        pack=t1_6_pack,
        clip=lambda spec: (-1.0, 1.0),
        **_PARTS,
    )
)
