"""Rotary positions of a prompt with images and videos, on the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from angeljax.models._qwen_vl_config import QwenVLConfig
from angeljax.models._qwen_vl_layout import Grid, check_grids


def rope_index(
    config: QwenVLConfig,
    tokens: Any,
    *,
    images: Sequence[Grid] = (),
    videos: Sequence[Grid] = (),
    seconds_per_grid: Sequence[float] | None = None,
    mask: Any = None,
) -> np.ndarray:
    """Positions in time, height and width (arXiv 2502.13923, section 2.1.3).

    Text counts on all three axes alike. An image has one position in time and goes on
    in height and width from where the text before it ended; text after it goes on from
    the largest position of any axis, as both models were trained and as `transformers`
    had it up to 5.2. Later versions leave out time for that, and let the text after a
    video of Qwen2.5-VL stand between its frames, where time is the longest axis.

    Args:
      config: of the model.
      tokens: int `[B, T]`, with one placeholder for each token of an image or video.
      images: `(t, h, w)` of each image, in patches, in the order of rows and tokens.
      videos: of each video. Qwen3-VL has text between the frames of one.
      seconds_per_grid: of each video, seconds from one of its `t` steps to the next.
        Default 1. Only for Qwen2.5-VL.
      mask: bool `[B, T]`, True for real tokens; the others get position 0.

    Returns:
      int32 `[3, B, T]`.

    Raises:
      ValueError: placeholders and grids do not go together.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be [batch, length], not {tokens.shape}")
    real = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask, bool)
    if real.shape != tokens.shape:
        raise ValueError(f"mask has shape {real.shape}, tokens have {tokens.shape}")
    merge = config.vision.spatial_merge_size
    images = check_grids(images, merge, "images")
    videos = check_grids(videos, merge, "videos")
    seconds = [1.0] * len(videos) if seconds_per_grid is None else seconds_per_grid
    if len(seconds) != len(videos):
        raise ValueError(
            f"seconds_per_grid has {len(seconds)} entries for {len(videos)} videos"
        )
    pace = config.vision.tokens_per_second
    kinds: dict[int, tuple[str, Iterator[tuple[Grid, float]]]] = {
        config.image_token_id: ("image", iter([(grid, 1.0) for grid in images])),
        config.video_token_id: ("video", iter(_steps(videos, seconds, pace))),
    }
    out = np.zeros((3, *tokens.shape), np.int32)
    for row in range(len(tokens)):
        where = np.flatnonzero(real[row])
        out[:, row, where] = _row(tokens[row, where], kinds, merge, row)
    for name, rest in kinds.values():
        left = len(list(rest))
        if left:
            raise ValueError(f"tokens have no placeholders for {left} {name} grids")
    return out


def _steps(
    videos: Sequence[Grid], seconds: Sequence[float], pace: float
) -> list[tuple[Grid, float]]:
    """Grids with the positions that one step in time takes."""
    if pace:
        return [(g, pace * s) for g, s in zip(videos, seconds, strict=True)]
    return [((1, h, w), 1.0) for t, h, w in videos for _ in range(t)]


def _row(
    tokens: np.ndarray,
    kinds: dict[int, tuple[str, Iterator[tuple[Grid, float]]]],
    merge: int,
    row: int,
) -> np.ndarray:
    """int `[3, T]` of the real tokens of one row."""
    parts, at, position = [np.zeros((3, 0), np.int64)], 0, 0
    special = np.isin(tokens, list(kinds))
    while at < len(tokens):
        if not special[at]:
            run = int(np.argmax(special[at:])) or len(tokens) - at
            parts.append(np.tile(position + np.arange(run), (3, 1)))
        else:
            name, grids = kinds[int(tokens[at])]
            grid, step = next(grids, (None, 0.0))
            if grid is None:
                raise ValueError(f"row {row}: more {name} placeholders than grids")
            t, h, w = grid[0], grid[1] // merge, grid[2] // merge
            run = t * h * w
            same = tokens[at : at + run] == tokens[at]
            if len(same) < run or not same.all():
                raise ValueError(
                    f"row {row}: {int(same.sum())} {name} placeholders for the {run} "
                    f"tokens of the grid {grid}"
                )
            time = (np.arange(t) * step).astype(np.int64)
            axes = np.meshgrid(time, np.arange(h), np.arange(w), indexing="ij")
            parts.append(position + np.stack(axes).reshape(3, -1))
        at += run
        position = int(parts[-1].max()) + 1
    return np.concatenate(parts, axis=1)
