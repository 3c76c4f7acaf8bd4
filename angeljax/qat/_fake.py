"""The fake quantizer: what a packed weight will hold, with a straight-through gradient.

Forward is the number format itself, so a fake-quantized weight equals the dequantized
packed one bit for bit. Backward is one of two families, for a weight w with scale s,
levels q and G the gradient of the output:

pass_through (arXiv 1308.3432)   dw = G
clipped (LSQ, arXiv 1902.08153)  dw = G where lo <= w / s <= hi, else 0

A learned scale gets LSQ's gradient (its equation 3), summed over a granule of N
weights and divided by sqrt(N hi):

    ds = sum G (q - w / s)   inside the range, and with "pass_through" everywhere
    ds = sum G q             outside; everywhere for formats whose levels do not depend
                             on the scale (Sherry, binary)
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.formats import QTensor, Spec, _blocks, get_format
from angeljax.formats._blocks import Granules
from angeljax.formats._registry import Planes
from angeljax.formats.integer import TINY

# Trained granule planes of one weight: "scale", "shift", in the stored layout.
Learned = dict[str, jax.Array]


def fake_quantize(
    w: jax.Array, spec: Spec, learned: Learned | None = None, estimator: str = ""
) -> jax.Array:
    """A weight as its packed form will hold it, differentiable.

    Args:
      w: float `[*batch, *spec.shape]`.
      spec: the format, as `angeljax.formats.make_spec` resolves it.
      learned: trained planes in the layout that the QTensor stores, float32: "scale",
        and "shift" for ternary formats with one. None takes both from `w`.
      estimator: "pass_through" or "clipped"; by default the former without and the
        latter with a learned scale.

    Returns:
      float32, of the shape of `w`: bit for bit
      `quantize_learned(w, spec, learned).dequantize(jnp.float32)`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.formats import make_spec
      >>> from angeljax.qat import fake_quantize
      >>> w = jax.random.normal(jax.random.key(0), (64, 8))
      >>> spec = make_spec(w.shape, w.dtype, format="sherry")
      >>> g = jax.grad(lambda w: fake_quantize(w, spec).sum())(w)
      >>> bool((g == 1).all())
      True
    """
    learned = dict(learned or {})
    estimator = estimator or ("clipped" if learned else "pass_through")
    return _fake(w, learned, spec, estimator)


def quantize_learned(
    w: jax.Array, spec: Spec, learned: Learned | None = None
) -> QTensor:
    """Packs a weight with trained scales.

    Args:
      w: float `[*batch, *spec.shape]`.
      spec, learned: as in `fake_quantize`.

    Returns:
      A QTensor.
    """
    fmt = get_format(spec.format)
    blocks = _blocks.to_blocks(w, spec)
    if fmt.snap is None or fmt.pack is None:
        planes = fmt.encode(blocks, spec)
    else:
        planes = fmt.pack(*_snap(blocks, spec, learned or {}), spec)
    return QTensor(planes=_blocks.store(planes, spec, fmt.tail_unit(spec)), spec=spec)


def initial_scale(w: jax.Array, spec: Spec) -> Learned:
    """Where training starts: the data-free scale (and shift) of a weight.

    Args:
      w: float `[*batch, *spec.shape]`.
      spec: a format with `snap`.

    Returns:
      float32 planes in the layout that the QTensor stores.
    """
    snap = get_format(spec.format).snap
    assert snap is not None
    _, granules = snap(_blocks.to_blocks(w, spec), spec, None)
    stored = _blocks.store(granules, spec, 1)
    return {k: v.astype(jnp.float32) for k, v in stored.items()}


def _snap(blocks: jax.Array, spec: Spec, learned: Learned) -> tuple[jax.Array, Planes]:
    fmt = get_format(spec.format)
    assert fmt.snap is not None
    planes = _blocks.unstore(learned, spec, 1)
    levels, granules = fmt.snap(blocks, spec, planes.get("scale"))
    if "shift" in planes:
        granules["shift"] = _blocks.rounded(planes["shift"], spec.scale_dtype)
    return levels, granules


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _fake(w: jax.Array, learned: Learned, spec: Spec, estimator: str) -> jax.Array:
    del estimator
    fmt, blocks = get_format(spec.format), _blocks.to_blocks(w, spec)
    if fmt.snap is None:
        values = fmt.decode(fmt.encode(blocks, spec), spec)
    else:
        levels, granules = _snap(blocks, spec, learned)
        expand = Granules(spec).expand
        values = levels * expand(granules["scale"].astype(jnp.float32))
        if "shift" in granules:
            values = values + expand(granules["shift"].astype(jnp.float32))
    return _blocks.from_blocks(values, spec)


def _forward(
    w: jax.Array, learned: Learned, spec: Spec, estimator: str
) -> tuple[jax.Array, Any]:
    # Nothing but the arguments is kept: levels are cheaper to find again than to store.
    keep = w if learned or estimator == "clipped" else jnp.zeros((0,), w.dtype)
    return _fake(w, learned, spec, estimator), (keep, learned)


def _backward(
    spec: Spec, estimator: str, residuals: Any, g: jax.Array
) -> tuple[jax.Array, Learned]:
    w, learned = residuals
    if not learned and estimator == "pass_through":
        return g.astype(w.dtype), {}
    fmt, granules = get_format(spec.format), Granules(spec)
    assert fmt.clip is not None, "the recipe was checked"
    low, high = fmt.clip(spec)
    levels, planes = _snap(_blocks.to_blocks(w, spec), spec, learned)
    scale = jnp.maximum(planes["scale"].astype(jnp.float32), TINY)
    x = _blocks.to_blocks(w, spec)
    if "shift" in learned:
        # Levels are chosen around 0, so the range lies around 0 as well.
        gradient_shift = granules.sum(_blocks.to_blocks(g, spec))
    x = granules.divide(x, scale)
    inside = (x >= low) & (x <= high)
    gb = _blocks.to_blocks(g, spec)
    dw = jnp.where(inside, gb, 0.0) if estimator == "clipped" else gb
    out: Learned = {}
    if "scale" in learned:
        step = levels
        if fmt.level_depends_on_scale:
            near = inside if estimator == "clipped" else jnp.ones_like(inside)
            step = jnp.where(near, levels - x, levels)
        n = np.sqrt(granules.count() * max(abs(high), 1.0)).astype(np.float32)
        out["scale"] = granules.sum(gb * step) / n
    if "shift" in learned:
        out["shift"] = gradient_shift
    stored = _blocks.store(out, spec, 1)
    return _blocks.from_blocks(dw, spec).astype(w.dtype), stored


_fake.defvjp(_forward, _backward)
