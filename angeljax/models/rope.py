"""Rotary position embeddings and their extensions to longer contexts.

RoFormer (arXiv 2104.09864); linear interpolation (arXiv 2306.15595); YaRN (arXiv
2309.00071, sections 3.2-3.4); the frequency-dependent scaling of Llama 3.1 (arXiv
2407.21783, section 3.4.2, parameters as in its configuration files); multimodal rotary
embedding with axes for time, height and width (arXiv 2409.12191, section 2.1).
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


def axes(config: DecoderConfig) -> np.ndarray:
    """Which of time, height and width turns each frequency, int `[head_dim / 2]`.

    Qwen2.5-VL gives each axis a run of frequencies; Qwen3-VL deals them out in turn, so
    that each axis has high and low ones, and time has what is left over.
    """
    sections = config.mrope_section
    if not config.mrope_interleaved:
        return np.repeat(np.arange(3), sections)
    turn = np.arange(config.head_dim // 2)
    axis = turn % 3
    return np.where(turn < 3 * np.asarray(sections)[axis], axis, 0)


def cos_sin(config: DecoderConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `rotate` multiplies by, for int positions `[B, T]`, or `[3, B, T]`.

    Returns:
      float32 `[B, T, 1, 1, head_dim / 2]`, and `[B, T, 1, 2, head_dim / 2]` with the
      sine as it stands in the rows of the rotation.
    """
    frequency, factor = frequencies(config)
    where = positions.astype(jnp.float32)[..., None, None, None]
    if positions.ndim == 3:
        # Two of the three terms are zeros: the sum is exact, and no gather.
        of = axes(config)
        angles = sum(where[i] * np.where(of == i, frequency, 0) for i in range(3))
    else:
        angles = where * frequency
    signs = jnp.asarray([[-1.0], [1.0]], jnp.float32)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor * signs


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates pairs (i, i + head_dim / 2) of `[B, T, H, head_dim]`, in float32."""
    # Without a concatenation, which XLA for GPUs does not fuse into what follows.
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    pairs = pairs * cos + pairs[..., ::-1, :] * sin
    return pairs.reshape(x.shape).astype(x.dtype)
