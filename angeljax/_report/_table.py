"""A compression report as a `rich` table."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from angeljax._report._measure import CompressionReport, LeafReport


def megabytes(nbytes: float) -> str:
    """Bytes as text in MB (10^6), or kB below one."""
    return f"{nbytes / 1e6:.2f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} kB"


def table(report: CompressionReport) -> Any:
    """One row for each leaf and one for the whole tree."""
    from rich.table import Table

    out = Table(show_footer=True)
    out.add_column("leaf", footer="whole tree", overflow="fold")
    out.add_column("shape")
    out.add_column("format")
    for name, footer in (
        ("bit/weight", f"{report.bits_per_weight:.3f}"),
        ("size", megabytes(report.nbytes)),
        ("ratio", f"{report.ratio:.2f}x"),
        ("rel. error", ""),
        ("SNR", ""),
    ):
        out.add_column(name, footer=footer, justify="right", no_wrap=True)
    for leaf in report.leaves:
        out.add_row(*_row(leaf))
    return out


def _row(leaf: LeafReport) -> tuple[str, ...]:
    changed = leaf.relative_error is not None and leaf.snr_db is not None
    return (
        leaf.path,
        "x".join(map(str, leaf.shape)) or "scalar",
        leaf.format,
        f"{leaf.bits_per_weight:.3f}",
        megabytes(leaf.nbytes),
        f"{leaf.original_nbytes / max(leaf.nbytes, 1):.2f}x",
        f"{leaf.relative_error:.4f}" if changed else "",
        f"{leaf.snr_db:.1f} dB" if changed else "",
    )


def as_text(report: CompressionReport) -> str:
    """The table without colours, 120 columns wide."""
    from rich.console import Console

    buffer = io.StringIO()
    Console(file=buffer, width=120, no_color=True).print(table(report))
    return buffer.getvalue()
