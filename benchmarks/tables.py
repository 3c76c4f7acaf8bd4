"""Writes docs/results.md from benchmarks/results/*.json.

    python -m benchmarks.tables [--check]

`--check` fails if the page is out of date, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks._results import RESULTS, ROOT

PAGE = ROOT / "docs" / "results.md"
HEAD = """# Results

Made from `benchmarks/results/*.json` by `python -m benchmarks.tables`. Each section
names the device and the command that measured it.
"""
TITLES = {"formats": "Quality of the data-free recipes"}
COLUMNS = {
    "perplexity": ("perplexity", ".2f"),
    "kl": ("KL (nats)", ".4f"),
    "top1_agreement": ("top-1 agreement", ".2%"),
    "bits_per_weight": ("bit/weight, whole model", ".2f"),
    "checkpoint_size": ("MB on disk", ".1f"),
    "compress_time": ("compress (s)", ".1f"),
}


def number(value: float, form: str) -> str:
    """A number in its format, or in powers of ten where that would be long."""
    return f"{value:.1e}" if abs(value) >= 1e5 else format(value, form)


def render_file(file: Path) -> str:
    """One section: a row for each case, a column for each metric."""
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    cases: dict[str, dict[str, Any]] = {}
    for row in data["rows"]:
        key = json.dumps(row["case"], sort_keys=True)
        cases.setdefault(key, {"case": row["case"]})[row["metric"]] = row
    metrics = list(dict.fromkeys(row["metric"] for row in data["rows"]))
    constant = {
        k: v
        for k, v in data["rows"][0]["case"].items()
        if all(c["case"].get(k) == v for c in cases.values())
    }
    varying = [k for k in data["rows"][0]["case"] if k not in constant]
    names = [*varying, *(COLUMNS.get(m, (m, ""))[0] for m in metrics)]
    lines = [
        f"## {TITLES.get(data['claim'], data['claim'])}",
        "",
        f"{data['device']}, {data['date'][:10]}, "
        + ", ".join(f"{k} {v}" for k, v in data["versions"].items())
        + f". `{data['command']}`",
        "",
        ", ".join(f"{k}: {v}" for k, v in constant.items()) + ".",
        "",
        "| " + " | ".join(names) + " |",
        "| " + " | ".join(["---"] * len(varying) + ["---:"] * len(metrics)) + " |",
    ]
    for entry in cases.values():
        cells = [str(entry["case"][k]) for k in varying]
        for metric in metrics:
            form = COLUMNS.get(metric, (metric, ".4g"))[1]
            cells.append(number(entry[metric]["value"], form))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def render() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(render_file(f) for f in sorted(RESULTS.glob("*.json")))])


def main() -> None:
    """Writes or checks the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = render()
    if not args.check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{PAGE} is out of date: run python -m benchmarks.tables")


if __name__ == "__main__":
    main()
