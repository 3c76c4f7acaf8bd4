"""Rotary position embeddings and their extensions to longer contexts.

RoFormer (arXiv 2104.09864); linear interpolation (arXiv 2306.15595); YaRN (arXiv
2309.00071, sections 3.2-3.4); the frequency-dependent scaling of Llama 3.1 (arXiv
2407.21783, section 3.4.2, parameters as in its configuration files).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.models.config import DecoderConfig


def frequencies(config: DecoderConfig) -> tuple[np.ndarray, float]:
    """Angular frequencies, float32 `[head_dim / 2]`, and a factor on cos and sin."""
    dim, theta = config.head_dim, config.rope_theta
    plain = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    factor = 1.0
    scaling = dict(config.rope_scaling)
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        plain = plain / scaling["factor"]
    elif kind == "llama3":
        plain = _llama3(plain, scaling)
    elif kind == "yarn":
        plain, factor = _yarn(plain, scaling, dim, theta)
    if config.rope_factors:
        plain = plain / np.asarray(config.rope_factors)
    return plain.astype(np.float32), factor


def _llama3(plain: np.ndarray, scaling: dict[str, Any]) -> np.ndarray:
    context = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = context * plain / (2 * math.pi)  # full turns within the trained context
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return share * plain + (1 - share) * plain / scaling["factor"]


def _yarn(
    plain: np.ndarray, scaling: dict[str, Any], dim: int, theta: float
) -> tuple[np.ndarray, float]:
    context, s = scaling["original_max_position_embeddings"], scaling["factor"]

    def index_of(turns: float) -> float:
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def gain(weight: float) -> float:
        return 0.1 * weight * math.log(s) + 1.0 if s > 1 else 1.0

    low = index_of(scaling.get("beta_fast", 32))
    high = index_of(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = (high - low) or 0.001
    interpolate = np.clip((np.arange(dim // 2) - low) / width, 0.0, 1.0)
    out = plain / s * interpolate + plain * (1 - interpolate)
    factor = scaling.get("attention_factor")
    if factor is None:
        # A model may weigh the gain, and divide by that of its softmax.
        m, whole = scaling.get("mscale"), scaling.get("mscale_all_dim")
        factor = gain(m) / gain(whole) if m and whole else gain(1.0)
    return out, float(factor)


def cos_sin(config: DecoderConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 `[B, T, 1, head_dim / 2]` each, for int positions `[B, T]`."""
    frequency, factor = frequencies(config)
    angles = positions.astype(jnp.float32)[..., None, None] * frequency
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates pairs (i, i + head_dim / 2) of `[B, T, H, head_dim]`, in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
