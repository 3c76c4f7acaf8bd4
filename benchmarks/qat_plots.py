"""Draws docs/images/qat_trapping.png and qat_loss.png from the results of training.

python -m benchmarks.qat_plots
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from angeljax.qat import diagnostics, plots
from benchmarks._results import RESULTS, ROOT


def main() -> None:
    """Reads benchmarks/results/qat_curves.h100.json and writes the pictures."""
    text = (RESULTS / "qat_curves.h100.json").read_text(encoding="utf-8")
    rows = json.loads(text)["rows"]
    shares: dict[str, list[float]] = {}
    losses: dict[str, dict[int, float]] = {}
    for r in rows:
        case: Any = r["case"]
        if r["metric"] == "histogram":
            shares.setdefault(case["row"], []).append(r["value"])
        elif r["metric"] == "loss" and case["seed"] == 0:
            losses.setdefault(case["row"], {})[case["seen"]] = r["value"]
    folder = ROOT / "docs" / "images"
    folder.mkdir(exist_ok=True)
    found = {
        row: diagnostics.Histogram({"all": np.asarray(values)}, 3.0)  # type: ignore
        for row, values in sorted(shares.items())
    }
    plots.trapping(found).savefig(folder / "qat_trapping.png", dpi=80)
    curves = {
        row: (list(curve), list(curve.values()))
        for row, curve in sorted(losses.items())
    }
    plots.loss(curves).savefig(folder / "qat_loss.png", dpi=80)


if __name__ == "__main__":
    main()
