"""Pictures of a training run: trapping, flips, ranks and the loss.

Each function returns a `matplotlib.figure.Figure` that belongs to no window, so that it
also works without a display. A notebook shows one that ends a cell; elsewhere use
`figure.savefig(path)`. Needs `pip install 'angeljax[report]'`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from angeljax.qat.diagnostics import Histogram

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["flips", "loss", "ranks", "running_mean", "trapping"]

# Readable for the colour-blind, and in grey.
_COLORS = ("#4477aa", "#cc6677", "#117733", "#ddaa33", "#882255", "#666666")

Curve = tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]
"""x and y of a line, equally long."""


def trapping(histograms: Mapping[str, Histogram]) -> Figure:
    """Histograms of |w| / alpha side by side, with and without Arenas for example.

    Args:
      histograms: title -> what `diagnostics.histogram` found; leaves are pooled.

    Returns:
      A figure with one panel each, on one scale; what lies beyond is a number.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: there is none.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.qat import diagnostics, plots
      >>> found = diagnostics.Histogram({"w": jnp.array([3, 5, 2])}, 2.0)
      >>> len(plots.trapping({"plain": found, "Arenas": found}).axes)
      2
    """
    if not histograms:
        raise ValueError("there is no histogram to plot")
    figure = _figure(width=4.5 * len(histograms))
    panels = figure.subplots(1, len(histograms), sharex=True, sharey=True)
    panels = np.atleast_1d(panels)
    for panel, (title, found), color in zip(
        panels, histograms.items(), _cycle(len(histograms)), strict=True
    ):
        shares, edges = np.asarray(found.shares), np.asarray(found.edges)
        panel.stairs(shares[:-1], edges, fill=True, color=color)
        for level in (0.0, 1.0):
            panel.axvline(level, color="black", linewidth=0.6, linestyle=":")
        panel.set(title=title, xlabel="|w| / alpha")
        if shares[-1] > 0:
            note = f"{shares[-1]:.1%} beyond {found.limit:g}"
            panel.annotate(
                note, (0.98, 0.95), xycoords="axes fraction", ha="right", va="top"
            )
    panels[0].set_ylabel("share of the weights")
    return figure


def flips(curves: Mapping[str, Curve], *, every: int | None = None) -> Figure:
    """Share of the weights whose code changed, over the steps.

    Args:
      curves: label -> steps and shares from 0 to 1.
      every: steps between two comparisons, for the axis.

    Returns:
      A figure with a logarithmic axis of shares; a share of 0 leaves a gap.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: there is no curve, or its two parts differ in length.

    Example:
      >>> from angeljax.qat import plots
      >>> figure = plots.flips({"Arenas": ([10, 20], [0.02, 0.01])}, every=10)
    """
    what = "codes changed" if every is None else f"codes changed in {every} steps"
    return _lines(curves, xlabel="step", ylabel=what, yscale="log")


def ranks(curves: Mapping[str, Curve], *, full: int | None = None) -> Figure:
    """Effective rank of a gradient, over the steps.

    Args:
      curves: label -> steps and ranks.
      full: the largest rank that there can be, drawn as a line.

    Returns:
      A figure.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: there is no curve, or its two parts differ in length.

    Example:
      >>> from angeljax.qat import plots
      >>> figure = plots.ranks({"Arenas": ([10, 20], [300, 310])}, full=576)
    """
    figure = _lines(curves, xlabel="step", ylabel="effective rank of the gradient")
    if full is not None:
        figure.axes[0].axhline(full, color="black", linewidth=0.6, linestyle=":")
    figure.axes[0].set_ylim(bottom=0)
    return figure


def loss(
    curves: Mapping[str, Curve],
    *,
    smooth: float = 0.0,
    levels: Mapping[str, float] = {},
) -> Figure:
    """Loss against the tokens seen, with a logarithmic axis of tokens.

    Loss falls about as a straight line there, so that more tokens can be read off.

    Args:
      curves: label -> tokens and losses.
      smooth: weight of the past in a running mean, in [0, 1); the raw values stay
        visible behind it.
      levels: label -> a loss to compare with, drawn as a line: the start without
        training, or full precision.

    Returns:
      A figure.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: there is no curve, its two parts differ in length, or `smooth` is out
        of range.

    Example:
      >>> from angeljax.qat import plots
      >>> curve = [1e5, 1e6, 1e7], [5.0, 4.0, 3.5]
      >>> figure = plots.loss({"Sherry": curve}, levels={"full precision": 3.0})
    """
    if not 0 <= smooth < 1:
        raise ValueError(f"smooth must be in [0, 1), not {smooth}")
    shown = {k: (x, running_mean(y, smooth)) for k, (x, y) in curves.items()}
    figure = _lines(shown, xlabel="tokens", ylabel="loss (nats)", xscale="log")
    axes = figure.axes[0]
    if smooth:
        for (x, y), color in zip(curves.values(), _cycle(len(curves)), strict=True):
            axes.plot(np.asarray(x), np.asarray(y), color=color, alpha=0.2, zorder=1)
    for name, level in (levels or {}).items():
        axes.axhline(level, color="black", linewidth=0.8, linestyle="--")
        axes.annotate(name, (0.01, level), xycoords=("axes fraction", "data"))
    return figure


def running_mean(values: Sequence[float] | np.ndarray, weight: float) -> np.ndarray:
    """Exponential mean that does not favour its first value.

    Args:
      values: `[n]`.
      weight: of the past, in [0, 1).

    Returns:
      float64 `[n]`.

    Example:
      >>> from angeljax.qat.plots import running_mean
      >>> running_mean([1.0, 4.0], 0.5).tolist()
      [1.0, 3.0]
    """
    out, mean, total = [], 0.0, 0.0
    for value in np.asarray(values, np.float64):
        mean, total = weight * mean + value, weight * total + 1.0
        out.append(mean / total)
    return np.asarray(out)


def _figure(width: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, 3.4), dpi=100, layout="constrained")


def _cycle(count: int) -> list[str]:
    return [_COLORS[i % len(_COLORS)] for i in range(count)]


def _lines(curves: Mapping[str, Curve], **axis: Any) -> Any:
    if not curves:
        raise ValueError("there is no curve to plot")
    for label, (x, y) in curves.items():
        if len(x) != len(y):
            raise ValueError(f"curve {label!r} has {len(x)} x and {len(y)} y")
    figure = _figure(width=6.0)
    axes = figure.subplots()
    for (label, (x, y)), color in zip(curves.items(), _cycle(len(curves)), strict=True):
        values = np.asarray(y, np.float64)
        if axis.get("yscale") == "log":
            values = np.where(values > 0, values, np.nan)
        marker = "." if len(values) <= 40 else ""
        axes.plot(np.asarray(x), values, marker=marker, color=color, label=label)
    axes.set(**axis)
    axes.legend(fontsize=8)
    return figure
