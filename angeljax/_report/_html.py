"""A compression report as one HTML page: totals, plots as inline SVG, all leaves."""

from __future__ import annotations

import io
from collections import Counter
from typing import TYPE_CHECKING, Any

from angeljax._report._table import _row, megabytes

if TYPE_CHECKING:
    from angeljax._report._measure import CompressionReport

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem;
  padding: 0 1rem; color: #222; background: #fff }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere }
.totals { display: flex; gap: 2.5rem; flex-wrap: wrap; margin: 1rem 0 2rem }
.totals b { display: block; font-size: 1.6rem; font-weight: 600 }
.plots { display: flex; flex-wrap: wrap; gap: 1rem }
.plots svg { width: 34rem; max-width: 48%; height: auto }
</style></head><body>
<h1>{{ title }}</h1>
<div class="totals">
{% for name, value in totals %}<div><b>{{ value }}</b>{{ name }}</div>{% endfor %}
</div>
<div class="plots">{% for plot in plots %}{{ plot | safe }}{% endfor %}</div>
<h2>Leaves</h2>
<table><thead><tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></body></html>
"""


def render(report: CompressionReport, title: str) -> str:
    """The page as text, without references to other files."""
    from jinja2 import Environment

    totals = [
        ("parameters", f"{report.weights / 1e6:.2f} M"),
        ("before", megabytes(report.original_nbytes)),
        ("after", megabytes(report.nbytes)),
        ("ratio", f"{report.ratio:.2f}x"),
        ("bits per weight, whole tree", f"{report.bits_per_weight:.3f}"),
    ]
    columns = (
        "leaf",
        "shape",
        "format",
        "bit/weight",
        "size",
        "ratio",
        "rel. error",
        "SNR",
    )
    page = Environment(autoescape=True).from_string(_PAGE)
    return page.render(
        title=title,
        totals=totals,
        plots=[_bytes_by_format(report), _error_by_leaf(report)],
        columns=columns,
        rows=[_row(leaf) for leaf in report.leaves],
    )


def _figure() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "the HTML report draws with matplotlib: pip install 'angeljax[report]'"
        ) from None
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _bytes_by_format(report: CompressionReport) -> str:
    sizes: Counter[str] = Counter()
    for leaf in report.leaves:
        sizes[leaf.format] += leaf.nbytes
    figure, axes = _figure()
    names, values = zip(*sizes.most_common(), strict=True)
    axes.barh(names, [v / 1e6 for v in values], color="#4477aa")
    axes.invert_yaxis()
    axes.set_xlabel("MB")
    axes.set_title("Bytes by format")
    return _svg(figure)


def _error_by_leaf(report: CompressionReport) -> str:
    figure, axes = _figure()
    leaves = report.quantized
    kinds = sorted({leaf.path.split("/")[-2:][0] for leaf in leaves})
    for kind in kinds:
        points = [
            (i, leaf.relative_error)
            for i, leaf in enumerate(leaves)
            if leaf.path.split("/")[-2:][0] == kind
        ]
        axes.plot(*zip(*points, strict=True), "o", markersize=3, label=kind)
    axes.set_xlabel("leaf, in tree order")
    axes.set_ylabel("relative error")
    axes.set_ylim(bottom=0)
    axes.set_title("Error by leaf")
    if 0 < len(kinds) <= 12:
        axes.legend(fontsize=7, ncols=2)
    return _svg(figure)
