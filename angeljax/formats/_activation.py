"""Activations in the numbers of a format, each token by itself, for products."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from angeljax.formats import _blocks
from angeljax.formats._registry import get_format
from angeljax.formats._resolve import make_spec
from angeljax.formats.microscaling import nv_block_scales

# What is rounded to: a format, and how it shares its scales.
_KINDS: dict[str, dict[str, Any]] = {
    "int8": {"granularity": "channel"},
    "int4": {"granularity": "channel", "narrow_range": "yes"},
    "float8_e4m3": {"granularity": "channel"},
    "float8_e4m3_block128": {
        "format": "float8_e4m3",
        "group_size": 128,
        "scale_dtype": "float32",
    },
    "mxfp8": {},
    "mxfp4": {},
    "nvfp4": {},
}
ACTIVATIONS = tuple(_KINDS)
# Those that can have one scale for all tokens, found by calibration.
STATIC_ACTIVATIONS = ("int8", "int4", "float8_e4m3", "nvfp4")


@jax.custom_jvp
def _straight_through(x: jax.Array, y: jax.Array) -> jax.Array:
    """`y`, with the derivative of `x`."""
    del x
    return y


@_straight_through.defjvp
def _tangent(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return _straight_through(*primals), tangents[0]


def fake_quantize_activation(
    x: jax.Array, kind: str, scale: jax.Array | None = None
) -> jax.Array:
    """`x` rounded to the numbers of a format, scales taken from each token.

    int8, int4 and float8_e4m3 have one scale for each token (the last axis);
    float8_e4m3_block128 one for 128 features of it (DeepSeek-V3, arXiv 2412.19437,
    section 3.3), mxfp8 and mxfp4 one for 32, nvfp4 one for 16 under one for the whole
    array. The derivative is that of `x` itself: no value lies outside its own range.

    Args:
      x: float `[..., K]`.
      kind: one of `ACTIVATIONS`.
      scale: a scalar that takes the place of the scales of the tokens (static
        quantization; int8, int4, float8_e4m3), or of the scale of the whole array
        (nvfp4). What lies outside of its range is clipped.

    Returns:
      An array of the shape and dtype of `x`.

    Raises:
      ValueError: an unknown kind.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.qat import fake_quantize_activation
      >>> fake_quantize_activation(jnp.asarray([[7.0, 2.2]]), "int4")
      Array([[7., 2.]], dtype=float32)
    """
    if kind not in ACTIVATIONS:
        raise ValueError(f"activation {kind!r}: use {', '.join(ACTIVATIONS)}")
    # One token is one column of a "weight" whose contraction is the last axis.
    rows = x.reshape(-1, x.shape[-1])
    options = {"format": kind, **_KINDS[kind]}
    spec = make_spec(rows.shape, jnp.float32, axis=-1, **options)
    fmt = get_format(spec.format)
    blocks = _blocks.to_blocks(jax.lax.stop_gradient(rows), spec)
    assert fmt.scales and fmt.nearest and fmt.values
    granules = fmt.scales(blocks, spec)
    if scale is not None:
        scale = jnp.asarray(scale, jnp.float32).reshape(())
        if kind == "nvfp4":
            amax = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
            granules = nv_block_scales(amax, jnp.full((1, 1, 1), scale))
        else:
            granules = {"scale": jnp.full_like(granules["scale"], scale)}
    blocks = fmt.values(fmt.nearest(blocks, granules, spec), granules, spec)
    y = _blocks.from_blocks(blocks, spec).reshape(x.shape).astype(x.dtype)
    return _straight_through(x, y)
