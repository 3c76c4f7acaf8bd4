"""A picture of the blocks that a layer reads.

As in `angeljax.qat.plots` a function returns a `matplotlib.figure.Figure` that belongs
to no window. Needs `pip install 'angeljax[report]'`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def block_mask(mask: Any, *, block_size: int, title: str = "") -> Figure:
    """The blocks that are read, query blocks downwards and key blocks to the right.

    Args:
      mask: bool `[num_q_blocks, num_k_blocks]`, or `[heads, num_q_blocks,
        num_k_blocks]` for a panel each.
      block_size: tokens of a block, for the axes.
      title: of the figure.

    Returns:
      A figure; blocks that no query may see are left white.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: the mask has another number of axes.

    Example:
      >>> import numpy as np
      >>> from angeljax.attention import plots
      >>> figure = plots.block_mask(np.eye(8, dtype=bool), block_size=128)
      >>> len(figure.axes)
      1
    """
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib: pip install matplotlib") from None
    panels = np.asarray(mask, bool)
    if panels.ndim == 2:
        panels = panels[None]
    if panels.ndim != 3:
        raise ValueError(f"mask must be [heads, n, n] or [n, n], not {panels.shape}")
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    size = (3.2 * columns, 3.2 * rows + 0.3)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    n_q, n_k = panels.shape[1:]
    seen = np.arange(n_k) <= np.arange(n_q)[:, None] + n_k - n_q
    colors = ListedColormap(["white", "#dddddd", "#4477aa"])
    extent = (0, n_k * block_size, n_q * block_size, 0)
    for head, (panel, axis) in enumerate(zip(panels, axes, strict=False)):
        shown = seen.astype(int) + (panel & seen)
        axis.imshow(
            shown, cmap=colors, vmin=0, vmax=2, extent=extent, interpolation="nearest"
        )
        share = (panel & seen).sum() / seen.sum()
        label = f"head {head}, " if len(panels) > 1 else ""
        axis.set_title(f"{label}{share:.1%}", fontsize=9)
        axis.tick_params(labelsize=7)
    for axis in axes[len(panels) :]:
        axis.remove()
    if title:
        figure.suptitle(title, fontsize=10)
    figure.supxlabel("key", fontsize=9)
    figure.supylabel("query", fontsize=9)
    return figure
