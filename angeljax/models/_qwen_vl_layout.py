"""How patches of images and videos are laid out: all that follows from their grids.

A grid is `(t, h, w)`: patches in time, height and width, `t` 1 for an image. Grids are
static, so that this is NumPy and runs while tracing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from angeljax.models._qwen_vl_config import QwenVisionConfig

Grid = tuple[int, int, int]
Grids = tuple[Grid, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Frames:
    """Frames of one size, which follow each other.

    Attributes:
      count: how many.
      size: patches of a frame.
      windows: `((windows, patches of each), ...)`, one after another in each frame.
    """

    count: int
    size: int
    windows: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Where each patch goes, and what it sees.

    Patches go in units of those that become one token. Frames of one size stand
    together, and in a frame windows of one size do: attention is then a batch of equal
    pieces, with slices only and no padding.

    Attributes:
      order: int32 `[N]`, which token of the input goes to each place; None if all stay.
      inverse: int32 `[N]`, where each one went.
      rows, columns: int32 `[P]`, where in its frame each patch is, as ordered.
      groups: frames in that order.
      taps: int32 `[P, 4]`, learned positions around each patch; None without.
      weights: float32 `[P, 4]`, for bilinear interpolation between them.
    """

    order: np.ndarray | None
    inverse: np.ndarray | None
    rows: np.ndarray
    columns: np.ndarray
    groups: tuple[Frames, ...]
    taps: np.ndarray | None
    weights: np.ndarray | None


def check_grids(grids: Iterable[Any], merge: int, name: str = "grid") -> Grids:
    """Grids as tuples of integers.

    Raises:
      ValueError: one is no `(t, h, w)`, or does not divide into tokens.
    """
    out = []
    for grid in grids:
        sizes = tuple(int(n) for n in grid) if np.ndim(grid) == 1 else ()
        if len(sizes) != 3 or min(sizes) < 1 or sizes[1] % merge or sizes[2] % merge:
            raise ValueError(
                f"{name} must be (t, h, w) for each image or video, h and w multiples "
                f"of {merge}, not {grid!r}"
            )
        out.append(sizes)
    return tuple(out)


def num_patches(grids: Sequence[Grid]) -> int:
    """Patches of all images."""
    return sum(t * h * w for t, h, w in grids)


@functools.lru_cache(maxsize=64)
def layout(config: QwenVisionConfig, grids: Grids) -> Layout:
    """The layout of images and videos with these grids."""
    m = config.spatial_merge_size
    window = config.window_size // (config.patch_size * m)
    # By size of frame, each with the tokens of its frames: start and shape.
    frames: dict[tuple[int, int], list[int]] = {}
    start = 0
    for t, h, w in grids:
        for _ in range(t):
            frames.setdefault((h // m, w // m), []).append(start)
            start += h * w // m**2
    order, rows, columns, groups = [], [], [], []
    side, taps, weights = config.num_positions_per_side, [], []
    for (h, w), starts in frames.items():
        inside, windows = _windows(h, w, window)
        order += [first + inside for first in starts]
        # The patches of each token, and those tokens in their new order.
        row = (inside // w)[:, None, None] * m + np.arange(m)[:, None]
        column = (inside % w)[:, None, None] * m + np.arange(m)
        row, column = (
            np.broadcast_to(x, (h * w, m, m)).reshape(-1) for x in (row, column)
        )
        rows.append(np.tile(row, len(starts)))
        columns.append(np.tile(column, len(starts)))
        sizes = tuple((count, tokens * m**2) for count, tokens in windows)
        groups.append(Frames(len(starts), h * w * m**2, sizes))
        if side:
            around, weight = _between(row, h * m, column, w * m, side)
            taps.append(np.tile(around, (len(starts), 1)))
            weights.append(np.tile(weight, (len(starts), 1)))
    whole = np.concatenate(order).astype(np.int32)
    stays = bool((whole == np.arange(len(whole))).all())
    return Layout(
        order=None if stays else whole,
        inverse=None if stays else np.argsort(whole).astype(np.int32),
        rows=np.concatenate(rows).astype(np.int32),
        columns=np.concatenate(columns).astype(np.int32),
        groups=tuple(groups),
        taps=np.concatenate(taps).astype(np.int32) if taps else None,
        weights=np.concatenate(weights).astype(np.float32) if weights else None,
    )


def _windows(h: int, w: int, window: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Tokens of a frame by window, windows by size, and how many there are of each."""
    if not window:
        return np.arange(h * w), [(1, h * w)]
    grid = np.arange(h * w).reshape(h, w)
    pieces = [
        grid[i : i + window, j : j + window].reshape(-1)
        for i in range(0, h, window)
        for j in range(0, w, window)
    ]
    pieces.sort(key=len, reverse=True)  # keeps the order among equals
    sizes = [len(piece) for piece in pieces]
    counts = [(sizes.count(n), n) for n in sorted(set(sizes), reverse=True)]
    return np.concatenate(pieces), counts


def _between(
    row: np.ndarray, height: int, column: np.ndarray, width: int, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear interpolation in a table `[side, side]` whose corners are the frame's.

    Returns:
      Indices and weights, `[patches, 4]`.
    """

    def axis(at: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        # In float32, where a patch falls on a learned position, as the model was
        # trained; the next one then has no weight.
        where = (
            at.astype(np.float32) * np.float32(side - 1) / np.float32(max(size, 2) - 1)
        )
        low = np.floor(where).astype(np.int64)
        share = where - low.astype(np.float32)
        both = np.stack([low, np.minimum(low + 1, side - 1)], axis=-1)
        return both, np.stack([1 - share, share], axis=-1)

    (up, up_share), (left, left_share) = axis(row, height), axis(column, width)
    index = up[:, :, None] * side + left[:, None, :]
    weight = up_share[:, :, None] * left_share[:, None, :]
    return index.reshape(-1, 4), weight.reshape(-1, 4)
