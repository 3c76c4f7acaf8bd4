"""Tables of docs/results_ptq.md and of its guide, from post-training quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import _markdown as md
from benchmarks._markdown import Column, Entry

QUALITY, TIME = "ptq_quality", "gptq_time"
CLAIMS = (QUALITY, TIME)
ORIGINAL = "original"
TEXTS = {"wikitext2": "wikitext-2", "heldout": "held-out"}
# The section that the guide shows whole, and what rows are compared by.
SHOWN, JUDGE = "W4 g128", "wikitext2 kl"


def sections(directory: Path) -> list[str]:
    """All sections of the page, for the files that are there."""
    found = []
    for data in md.read(directory, QUALITY):
        entries = rows(data)
        found.append(f"## Quality on one {data['device']}\n\n{md.source(data)}")
        for name in dict.fromkeys(e[0]["section"] for e in entries):
            if name != ORIGINAL:
                found.append(f"### {name}\n\n{_section(entries, name)}")
    for data in md.read(directory, TIME):
        found.append(f"## Time of GPTQ\n\n{md.source(data)}")
        # Whole models and single weights have other fields.
        for whole in (True, False):
            own = [e for e in md.entries(data) if ("model" in e[0]) == whole]
            if own:
                found.append(md.table(_time_columns(own), own))
    return found


def guide(directory: Path) -> dict[str, str]:
    """Tables of the guide by the name of their place, for the files that are there."""
    files = md.read(directory, QUALITY)
    if not files:
        return {}
    fullest = max(files, key=lambda data: len(data["rows"]))
    entries = rows(fullest)
    return {
        "ptq table": f"{md.source(fullest)}\n{_section(entries, SHOWN)}",
        "ptq sections": _best(entries),
    }


def rows(data: dict[str, Any]) -> list[Entry]:
    """What belongs to one row of a section; metrics have the text before them."""
    found: dict[tuple[str, str], Entry] = {}
    for case, metrics in md.entries(data):
        key = case["section"], case["row"]
        entry = found.setdefault(key, ({"section": key[0], "row": key[1]}, {}))
        text = f"{case['text']} " if "text" in case else ""
        entry[1].update({f"{text}{name}": row for name, row in metrics.items()})
    return list(found.values())


def _section(entries: list[Entry], name: str) -> str:
    own = [e for e in entries if e[0]["section"] == name]
    first = [e for e in entries if e[0]["section"] == ORIGINAL]
    return md.table(_columns(own), [*first, *own] if own else [])


def _columns(own: list[Entry]) -> list[Column]:
    columns: list[Column] = [("row", lambda e: e[0]["row"], "")]
    if any("bits_per_weight" in e[1] for e in own):
        columns.append(("bit/weight", md.of("bits_per_weight"), ".3f"))
    for text, title in TEXTS.items():
        if any(f"{text} perplexity" in e[1] for e in own):
            columns += [
                (f"{title} perplexity", md.of(f"{text} perplexity"), "#.4g"),
                ("KL", md.of(f"{text} kl"), ".4f"),
                ("top-1", md.of(f"{text} top1_agreement"), ".1%"),
            ]
    return [*columns, ("compress (s)", md.of("compress_time"), ".1f")]


def _best(entries: list[Entry]) -> str:
    """One line for each section: rounding, its first row, beside the best row."""
    found: list[Entry] = []
    for name in dict.fromkeys(e[0]["section"] for e in entries):
        own = [e for e in entries if e[0]["section"] == name and JUDGE in e[1]]
        if own:
            best = min(own, key=lambda e: e[1][JUDGE]["value"])
            case = {"section": name, "first": own[0][0]["row"], "best": best[0]["row"]}
            measured = {"first": own[0][1][JUDGE], "best": best[1][JUDGE]}
            found.append((case, measured))
    columns: list[Column] = [
        ("section", lambda e: e[0]["section"], ""),
        ("first row", lambda e: e[0]["first"], ""),
        ("KL", md.of("first"), ".4f"),
        ("best row", lambda e: e[0]["best"], ""),
        ("KL", md.of("best"), ".4f"),
    ]
    return md.table(columns, found)


def _time_columns(entries: list[Entry]) -> list[Column]:
    """The fields of the cases, whatever they are, and both times."""

    def field(name: str) -> Column:
        kind = "d" if all(type(e[0].get(name)) is int for e in entries) else ""
        return name, lambda e: _shown(e[0].get(name)), kind

    names = dict.fromkeys(name for case, _ in entries for name in case)
    times = {
        "first_time": ("first time (s)", ".1f"),
        "again_time": ("again (s)", ".1f"),
        "compile_time": ("compile (s)", ".1f"),
        "run_time": ("run (s)", ".3f"),
    }
    measured = {metric for _, found in entries for metric in found}
    return [
        *map(field, names),
        *((title, md.of(m), f) for m, (title, f) in times.items() if m in measured),
    ]


def _shown(value: Any) -> Any:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
