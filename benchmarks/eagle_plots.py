"""Draws docs/images/eagle_acceptance.png from the results of `eagle_training`.

python -m benchmarks.eagle_plots
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks._results import RESULTS, ROOT


def figure(directory: Path = RESULTS) -> Figure:
    """Agreement of the first and of the last draft with the target, by tokens seen."""
    drawn = Figure(figsize=(7, 4), layout="constrained")
    axes = drawn.add_subplot()
    for i, file in enumerate(sorted(directory.glob("eagle_training.*.json"))):
        data = json.loads(file.read_text(encoding="utf-8"))
        curves: dict[int, list[tuple[float, float]]] = {}
        for row in data["rows"]:
            case: Any = row["case"]
            if row["metric"] == "top-1 agreement":
                point = case["tokens"] / 1e6, row["value"]
                curves.setdefault(case["draft"], []).append(point)
        for draft, style in ((min(curves), "-"), (max(curves), ":")):
            axes.plot(
                *zip(*curves[draft], strict=True),
                style,
                color=f"C{i}",
                label=f"{file.name.split('.')[1]}, draft {draft}",
            )
    axes.set_xlabel("million tokens seen")
    axes.set_ylabel("drafts that are the target's choice")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend()
    return drawn


def main() -> None:
    """Reads benchmarks/results/eagle_training.*.json and writes the picture."""
    folder = ROOT / "docs" / "images"
    folder.mkdir(exist_ok=True)
    figure().savefig(folder / "eagle_acceptance.png", dpi=80)


if __name__ == "__main__":
    main()
