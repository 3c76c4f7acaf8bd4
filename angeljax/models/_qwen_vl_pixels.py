"""Images and videos as patches, in NumPy.

For images the processor of `transformers` needs Pillow and gives the same; for videos
it needs PyTorch and torchvision. What is here needs neither.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from angeljax.models._qwen_vl_config import QwenVisionConfig
from angeljax.models._qwen_vl_layout import Grid

_MEAN_STD = {
    "qwen2_5_vl": (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
    "qwen3_vl": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
# Tokens of an image, at least and at most, as the published processors have them.
_IMAGE_TOKENS = {"qwen2_5_vl": (4, 16384), "qwen3_vl": (64, 16384)}
# Of a step in time (Qwen2.5-VL), or of a whole video for each frame of it (Qwen3-VL).
_VIDEO_TOKENS = {"qwen2_5_vl": (128, 768), "qwen3_vl": (4, 24576)}
_LONGEST = 200  # times as long as wide


def smart_resize(
    height: int,
    width: int,
    *,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    frames: int = 1,
) -> tuple[int, int]:
    """Height and width in whole tokens, with about the same aspect.

    Args:
      height, width: in pixels.
      factor: pixels of a token in height and width.
      min_pixels, max_pixels: of the result, in `frames` frames together.
      frames: of a video whose pixels count as one.

    Raises:
      ValueError: more than 200 times as long as wide, or empty.

    Example:
      >>> smart_resize(1080, 1920, factor=28, min_pixels=3136, max_pixels=12845056)
      (1092, 1932)
    """
    if min(height, width) < 1 or max(height, width) > _LONGEST * min(height, width):
        raise ValueError(
            f"an image of {height} x {width}: the longer side may be at most "
            f"{_LONGEST} times the shorter"
        )
    # Python rounds halves to even, which decides between two grids now and then.
    tall, wide = (max(round(x / factor), 1) * factor for x in (height, width))
    if frames * tall * wide > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        tall, wide = (
            max(math.floor(x / shrink / factor), 1) * factor for x in (height, width)
        )
    elif frames * tall * wide < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        tall, wide = (math.ceil(x * grow / factor) * factor for x in (height, width))
    return tall, wide


def image_patches(
    config: QwenVisionConfig,
    image: Any,
    *,
    size: tuple[int, int] | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> tuple[np.ndarray, Grid]:
    """Patches of an image.

    Args:
      config: of the vision tower.
      image: uint8 `[H, W, 3]`, RGB.
      size: height and width to resize to, multiples of the pixels of a token. Default:
        those of `smart_resize`. Few sizes mean few compilations.
      min_pixels, max_pixels: for `smart_resize`; default those of the published models.

    Returns:
      float32 `[P, patch_dim]` and the grid `(1, h, w)`.

    Raises:
      ValueError: the image has another shape or dtype, or the size no whole tokens.

    Example:
      >>> import numpy as np
      >>> from angeljax.models.qwen_vl import QwenVisionConfig, image_patches
      >>> config = QwenVisionConfig(
      ...     model_type="qwen2_5_vl", depth=1, hidden_size=16, intermediate_size=32,
      ...     num_heads=2, out_hidden_size=16, patch_size=14,
      ... )
      >>> pixels, grid = image_patches(config, np.zeros((60, 90, 3), np.uint8))
      >>> pixels.shape, grid
      ((24, 1176), (1, 4, 6))
    """
    frames = _checked(image, 3)[None]
    fewest, most = _IMAGE_TOKENS[config.model_type]
    size = _size(config, frames, size, min_pixels, max_pixels, fewest, most, 1)
    return _patches(config, np.repeat(frames, config.temporal_patch_size, 0), size)


def video_patches(
    config: QwenVisionConfig,
    frames: Any,
    *,
    size: tuple[int, int] | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> tuple[np.ndarray, Grid]:
    """Patches of a video; the last frame fills up the last step in time.

    Args:
      config: of the vision tower.
      frames: uint8 `[T, H, W, 3]`, RGB, at the rate at which the model is to see them.
        A step in time is `config.temporal_patch_size` of them, from which follows what
        `rope_index` takes as `seconds_per_grid`.
      size, min_pixels, max_pixels: as in `image_patches`. Pixels are those of one frame
        for Qwen2.5-VL, and of all frames for Qwen3-VL.

    Returns:
      float32 `[P, patch_dim]` and the grid `(t, h, w)`.

    Raises:
      ValueError: the frames have another shape or dtype, or the size no whole tokens.

    Example:
      >>> import numpy as np
      >>> from angeljax.models.qwen_vl import QwenVisionConfig, video_patches
      >>> config = QwenVisionConfig(
      ...     model_type="qwen3_vl", depth=1, hidden_size=16, intermediate_size=32,
      ...     num_heads=2, out_hidden_size=16, patch_size=16,
      ... )
      >>> frames = np.zeros((3, 64, 96, 3), np.uint8)
      >>> pixels, grid = video_patches(config, frames, size=(64, 96))
      >>> pixels.shape, grid
      ((48, 1536), (2, 4, 6))
    """
    frames = _checked(frames, 4)
    last = np.repeat(frames[-1:], -len(frames) % config.temporal_patch_size, 0)
    frames = np.concatenate([frames, last])
    fewest, most = _VIDEO_TOKENS[config.model_type]
    count = 1 if config.model_type == "qwen2_5_vl" else len(frames)
    size = _size(config, frames, size, min_pixels, max_pixels, fewest, most, count)
    return _patches(config, frames, size)


def _checked(image: Any, ndim: int) -> np.ndarray:
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != ndim or image.shape[-1] != 3:
        want = "[H, W, 3]" if ndim == 3 else "[T, H, W, 3]"
        raise ValueError(f"must be uint8 {want}, not {image.dtype} {image.shape}")
    return image


def _size(
    config: QwenVisionConfig,
    frames: np.ndarray,
    size: tuple[int, int] | None,
    min_pixels: int | None,
    max_pixels: int | None,
    fewest: int,
    most: int,
    count: int,
) -> tuple[int, int]:
    factor = config.patch_size * config.spatial_merge_size
    if size is not None:
        if min(size) < 1 or size[0] % factor or size[1] % factor:
            raise ValueError(f"size={size} must be multiples of {factor}")
        return size
    return smart_resize(
        *frames.shape[1:3],
        factor=factor,
        min_pixels=fewest * factor**2 if min_pixels is None else min_pixels,
        max_pixels=most * factor**2 if max_pixels is None else max_pixels,
        frames=count,
    )


def _patches(
    config: QwenVisionConfig, frames: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, Grid]:
    mean, std = (np.asarray(x, np.float32) for x in _MEAN_STD[config.model_type])
    pixels = _resize(frames, size).astype(np.float32) * np.float32(1 / 255)
    pixels = (pixels - mean) / std
    p, m, tp = (
        config.patch_size,
        config.spatial_merge_size,
        config.temporal_patch_size,
    )
    t, h, w = len(frames) // tp, size[0] // p, size[1] // p
    split = pixels.reshape(t, tp, h // m, m, p, w // m, m, p, 3)
    # Patches of a token after another; in a patch channels, time, height, width.
    split = split.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return np.ascontiguousarray(split.reshape(t * h * w, -1)), (t, h, w)


def _resize(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bicubic with antialiasing, rounded to bytes after each axis as Pillow does it."""
    for axis in (2, 1):
        old, new = frames.shape[axis], size[axis - 1]
        if old != new:
            rows = np.moveaxis(frames, axis, -2).astype(np.float32)
            done = np.einsum("oi,...ic->...oc", _cubic(old, new), rows, optimize=True)
            done = np.clip(np.floor(done + 0.5), 0, 255).astype(np.uint8)
            frames = np.moveaxis(done, -2, axis)
    return frames


def _cubic(old: int, new: int) -> np.ndarray:
    """Weights `[new, old]` of the convolution of Keys (1981) with a = -1/2."""
    step = old / new
    centre = (np.arange(new) + 0.5) * step
    x = np.abs(np.arange(old) + 0.5 - centre[:, None]) / max(step, 1.0)
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights /= weights.sum(axis=1, keepdims=True)
    return weights.astype(np.float32)
