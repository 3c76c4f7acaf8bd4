"""Tables of the guide to token pruning, from the results of `whisper_pruning`."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any


def guide(directory: Path) -> dict[str, str]:
    """Tables by the name of their place, for the files that are there."""
    files = sorted(directory.glob("whisper_pruning.cpu*.json"))
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if not runs:
        return {}
    # Runs share their unpruned rows; of equal cases the first counts.
    cases: dict[str, tuple[dict[str, Any], float]] = {}
    for run in runs:
        for row in run["rows"]:
            if row["metric"] == "wer":
                key = json.dumps(row["case"], sort_keys=True)
                cases.setdefault(key, (row["case"], row["value"]))
    rows = list(cases.values())
    lines = [f"{r['device']}, {r['date'][:10]}. `{r['command']}`\n" for r in runs]
    source = "\n".join(lines)
    return {"whisper": f"{source}\n{unpruned(rows)}\n{by_share(rows)}"}


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
