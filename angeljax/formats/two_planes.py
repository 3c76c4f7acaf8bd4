"""Two ternary planes: w = a T + b U with T and U in {-1, 0, 1} (PTQTP).

PTQTP (arXiv 2509.16989) decomposes each group of weights into two trit planes without
data: it alternates

  (a, b) = the least squares over the group, with a ridge that grows where T and U are
    nearly parallel,
  (T, U) = of the nine pairs, for each weight, the one that is nearest.

This finds a local optimum that depends on where it starts. Here a few starts are tried
and the best is kept: b = 0.65 a, with a + b at several fractions of the largest weight,
and b = 0.35 a. The optimum for normal and Laplace weights is near b = 2/3 a, levels 0,
1/3, 2/3, 1 and 5/3 of a, and clearly better than the nearly uniform levels of b = a/3
where greedy starts end: in groups of 128 a relative squared error of .026 instead of
.029 (normal), of .040 instead of .050 (Laplace).

With `tied=True` a = 3 b: nine equally spaced levels (arXiv 2608.08910), which an
integer kernel can run; `scale` is then b.

Without it `scale` is a and `scale_low` is b, a >= b >= 0; `codes` holds T and
`codes_low` holds U, each as the format `t2` does. Levels, as the parts of the format
give them, are 3 T + U, a number from -4 to 4 for each of the nine pairs.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.formats._blocks import Granules
from angeljax.formats._packing import pack_planar2, unpack_planar2
from angeljax.formats._qtensor import QTensor
from angeljax.formats._registry import Format, Planes, get_format, register
from angeljax.formats._spec import Spec
from angeljax.formats.integer import TINY
from angeljax.formats.ternary import mean_scale, run_length

_ROUNDS = 10
# The largest level as a fraction of the largest weight, and b / a.
_STARTS = ((1.0, 0.35), (1.0, 0.65), (0.8, 0.65), (0.6, 0.65))
_TIED_STARTS = (1.0, 0.85, 0.7, 0.55)
# A ridge, relative to the trace of the Gram matrix of the planes, where its determinant
# is less than this part of what it is for orthogonal planes.
_RIDGE, _SINGULAR = 1e-3, 1e-4


def scales(w: jax.Array, spec: Spec) -> Planes:
    """Scales of blocks `[*lead, G, g]`."""
    granules = Granules(spec)
    top = granules.max(jnp.abs(w))
    unit = jnp.where(top < TINY, 1.0, top)
    # In units of the largest weight nothing overflows when it is squared.
    x = jnp.abs(granules.divide(w, unit))
    found = (_tied if spec.option("tied") else _free)(x, granules, top / unit)
    return {name: mean_scale(s * unit, spec) for name, s in found.items()}


def _free(x: jax.Array, granules: Granules, top: jax.Array) -> Planes:
    def round_(_: int, ab: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        high, low = trits(_index(x, *map(granules.expand, ab)))
        hh, ll = granules.sum(high * high), granules.sum(low * low)
        hl = granules.sum(high * low)
        trace, determinant = hh + ll, hh * ll - hl * hl
        singular = determinant < _SINGULAR * trace * trace / 4
        ridge = jnp.where(singular, _RIDGE * trace, 0.0) + TINY
        hh, ll = hh + ridge, ll + ridge
        xh, xl = granules.sum(x * high), granules.sum(x * low)
        inverse = 1.0 / jnp.maximum(hh * ll - hl * hl, TINY)
        a = jnp.abs(ll * xh - hl * xl) * inverse
        b = jnp.abs(hh * xl - hl * xh) * inverse
        # The nine values stay the same when the planes swap or change their signs.
        return jnp.maximum(a, b), jnp.minimum(a, b)

    def start(best: tuple[jax.Array, ...], s: jax.Array) -> tuple[tuple, None]:
        a = top * s[0] / (1 + s[1])
        a, b = jax.lax.fori_loop(0, _ROUNDS, round_, (a, a * s[1]))
        wide_a, wide_b = granules.expand(a), granules.expand(b)
        left = x - _magnitude(_index(x, wide_a, wide_b), wide_a, wide_b)
        error = granules.sum(left * left)
        better = error < best[0]
        new = zip((error, a, b), best, strict=True)
        return tuple(jnp.where(better, n, old) for n, old in new), None

    none = (jnp.full_like(top, jnp.inf), top * 0, top * 0)
    (_, a, b), _ = jax.lax.scan(start, none, jnp.asarray(_STARTS, jnp.float32))
    return {"scale": a, "scale_low": b}


def _tied(x: jax.Array, granules: Granules, top: jax.Array) -> Planes:
    def levels(b: jax.Array) -> jax.Array:
        safe = jnp.maximum(b, TINY)
        return jnp.minimum(jnp.round(granules.divide(x, safe)), 4.0)

    def round_(_: int, b: jax.Array) -> jax.Array:
        q = levels(b)
        return granules.sum(x * q) / jnp.maximum(granules.sum(q * q), 1.0)

    def start(best: tuple[jax.Array, ...], s: jax.Array) -> tuple[tuple, None]:
        b = jax.lax.fori_loop(0, _ROUNDS, round_, top * s / 4)
        left = x - levels(b) * granules.expand(b)
        error = granules.sum(left * left)
        better = error < best[0]
        new = zip((error, b), best, strict=True)
        return tuple(jnp.where(better, n, old) for n, old in new), None

    none = (jnp.full_like(top, jnp.inf), top * 0)
    (_, b), _ = jax.lax.scan(start, none, jnp.asarray(_TIED_STARTS, jnp.float32))
    return {"scale": b}


def _index(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Which of 0, b, a - b, a, a + b is nearest to magnitudes; the first at a tie."""
    index, best = jnp.zeros_like(x), x
    for i, value in enumerate((b, a - b, a, a + b), 1):
        distance = jnp.abs(x - value)
        index = jnp.where(distance < best, float(i), index)
        best = jnp.minimum(distance, best)
    return index


def trits(levels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """T and U of levels 3 T + U."""
    high = jnp.round(levels * np.float32(1 / 3))
    return high, levels - 3 * high


def _magnitude(levels: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    high, low = trits(levels)
    return a * high + b * low


def nearest(w: jax.Array, planes: Planes, spec: Spec) -> jax.Array:
    """The nearest of nine levels for given scales."""
    granules = Granules(spec)
    a = planes["scale"].astype(jnp.float32)
    if "scale_low" not in planes:
        return jnp.clip(jnp.round(granules.divide(w, jnp.maximum(a, TINY))), -4, 4)
    b = planes["scale_low"].astype(jnp.float32)
    index = _index(jnp.abs(w), granules.expand(a), granules.expand(b))
    return jnp.where(w < 0, -index, index)


def values(levels: jax.Array, planes: Planes, spec: Spec) -> jax.Array:
    """Float32 weights of levels."""
    granules = Granules(spec)
    a = granules.expand(planes["scale"].astype(jnp.float32))
    if "scale_low" not in planes:
        return levels * a
    b = granules.expand(planes["scale_low"].astype(jnp.float32))
    return _magnitude(levels, a, b)


def pack(levels: jax.Array, granules: Planes, spec: Spec) -> Planes:
    """All planes of levels that `nearest` gave."""
    run = run_length(spec)
    high, low = (pack_planar2((t + 1).astype(jnp.uint8), run) for t in trits(levels))
    return {"codes": high, "codes_low": low, **granules}


def encode(w: jax.Array, spec: Spec) -> Planes:
    """Two planes of 2-bit codes and scales of blocks `[*lead, G, g]`."""
    planes = scales(w, spec)
    return pack(nearest(w, planes, spec), planes, spec)


def decode(planes: Planes, spec: Spec) -> jax.Array:
    """Float32 blocks `[*lead, G, g]`."""
    run = run_length(spec)
    high, low = (
        unpack_planar2(planes[name], run).astype(jnp.float32) - 1
        for name in ("codes", "codes_low")
    )
    return values(3 * high + low, planes, spec)


def split_planes(q: QTensor) -> tuple[QTensor, QTensor]:
    """The two ternary weights whose sum a weight of two planes is.

    Products with them run on the kernels for `t2`: x W = x A + x B.

    Args:
      q: of the format ptqtp.

    Returns:
      Two QTensors of the format t2, with float32 scales where `tied`.

    Raises:
      ValueError: it has another format.

    Example:
      >>> import jax, jax.numpy as jnp, angeljax as aj
      >>> from angeljax.formats import split_planes
      >>> w = jax.random.normal(jax.random.key(0), (256, 8))
      >>> q = aj.quantize(w, format="ptqtp")
      >>> high, low = split_planes(q)
      >>> bool((high.dequantize() + low.dequantize() == q.dequantize()).all())
      True
    """
    spec = q.spec
    if spec.format != "ptqtp":
        raise ValueError(f"split_planes takes weights of ptqtp, not {spec.format}")
    options = {k: v[0] for k, v in get_format("t2").options.items()}
    scale = q.planes["scale"]
    low_scale = q.planes.get("scale_low", scale)
    if spec.option("tied"):
        scale = 3 * scale.astype(jnp.float32)
        low_scale = low_scale.astype(jnp.float32)
    one = dataclasses.replace(
        spec,
        format="t2",
        scale_dtype=scale.dtype.name,
        options=tuple(sorted(options.items())),
    )
    more = {k: v for k, v in q.planes.items() if k == "input_scale"}
    high = {"codes": q.planes["codes"], "scale": scale, **more}
    low = {"codes": q.planes["codes_low"], "scale": low_scale, **more}
    return QTensor(planes=high, spec=one), QTensor(planes=low, spec=one)


register(
    Format(
        name="ptqtp",
        payload_bits=4,
        encode=encode,
        decode=decode,
        unit=4,
        unit_for=run_length,
        granularities=("group", "channel", "tensor"),
        options={"tied": (False, True)},
        summary="two ternary planes, 2 bits each",
        pack=pack,
        scales=scales,
        nearest=nearest,
        values=values,
    )
)
