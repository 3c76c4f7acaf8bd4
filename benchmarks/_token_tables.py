"""Tables of the guide to token pruning, from the results of `whisper_pruning`."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any


def guide(directory: Path) -> dict[str, str]:
    """Tables by the name of their place, for the files that are there."""
    file = directory / "whisper_pruning.cpu.json"
    if not file.is_file():
        return {}
    data = json.loads(file.read_text(encoding="utf-8"))
    rows = [(r["case"], r["value"]) for r in data["rows"] if r["metric"] == "wer"]
    source = f"{data['device']}, {data['date'][:10]}. `{data['command']}`"
    return {"whisper": f"{source}\n\n{unpruned(rows)}\n{by_share(rows)}"}


def unpruned(rows: list[tuple[dict[str, Any], float]]) -> str:
    """Padding and weights, all real tokens kept."""
    lines = [
        "| tokens read | padding | weights | word errors (%) |",
        "| ---: | --- | --- | ---: |",
    ]
    for case, value in rows:
        if case["method"] == "none":
            lines.append(
                f"| {case['tokens']:.0f} | {case['padding']} "
                f"| {case['weights']} | {value:.2f} |"
            )
    return "\n".join(lines) + "\n"


def by_share(rows: list[tuple[dict[str, Any], float]]) -> str:
    """A row for each method, a column for each share; seeds are averaged."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for case, value in rows:
        if case["method"] == "none":
            continue
        option = case["option"]
        name = case["method"]
        if option.startswith("seed"):
            name += ", mean of seeds"
        elif option:
            name += f", {option}"
        if case["padding"] == "all":
            name += ", all padding"
        found[name][case["keep"]].append(value)
    keeps = sorted({keep for shares in found.values() for keep in shares}, reverse=True)
    lines = [
        "| word errors (%) at a share kept | " + " | ".join(f"{k:.0%}" for k in keeps)
    ]
    lines[0] += " |"
    lines.append("| --- |" + " ---: |" * len(keeps))
    for name, shares in found.items():
        cells = [
            f"{sum(shares[k]) / len(shares[k]):.2f}" if k in shares else ""
            for k in keeps
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
