"""Markdown tables from results: what all pages of documentation share."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

MS = "ms"  # three digits, or all before the point
# A case, and its rows by metric.
Entry = tuple[dict[str, Any], dict[str, dict[str, Any]]]
Column = tuple[str, Callable[[Entry], Any], str]


def of(
    metric: str, field: str = "value", *, scale: float = 1.0
) -> Callable[[Entry], float | None]:
    """Reads a field of a metric; None where it was not measured."""

    def read(entry: Entry) -> float | None:
        value = entry[1].get(metric, {}).get(field)
        return None if value is None else scale * value

    return read


def entries(data: dict[str, Any]) -> list[Entry]:
    """Rows put together by their case, in the order of the file.

    A metric that a case has already begins an entry of its own: the same shapes may
    have been measured against more than one thing.
    """
    entries: list[Entry] = []
    latest: dict[str, Entry] = {}
    for row in data["rows"]:
        key = json.dumps(row["case"], sort_keys=True)
        if key not in latest or row["metric"] in latest[key][1]:
            latest[key] = (row["case"], {})
            entries.append(latest[key])
        latest[key][1][row["metric"]] = row
    return entries


def source(data: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in data["versions"].items())
    # Folders of the machine that measured are of no use to anybody.
    command = re.sub(r"(?<![^\s=])/\S*/(?=\S)", "", data["command"])
    return f"{data['device']}, {data['date'][:10]}, {versions}. `{command}`\n"


def read(directory: Path, claim: str) -> list[dict[str, Any]]:
    """What was measured, by device."""
    files = sorted(directory.glob(f"{claim}.*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def table(columns: Iterable[Column], entries: Sequence[Entry]) -> str:
    """Markdown; nothing without entries. Columns of text stand on the left."""
    if not entries:
        return ""
    columns = list(columns)
    rule = ["---" if not form else "---:" for *_, form in columns]
    rows = [[name for name, *_ in columns], rule]
    for entry in entries:
        values = [(read(entry), form) for _, read, form in columns]
        rows.append(["" if v is None else _format(v, form) for v, form in values])
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _format(value: Any, form: str) -> str:
    if form == MS:
        form = ".3g" if value < 1000 else ".0f"
    return format(value, form)
