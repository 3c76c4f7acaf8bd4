"""Tables of docs/results_tokens.md and of its guide, from the results on tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks import _markdown as md
from benchmarks._markdown import MS, Column, Entry

CLAIMS = ("greedy_select", "vision_pruning", "whisper_pruning", "vision_prefill")
LOOP = "PyTorch"
BOTH = "both "
CHOICES = "select "
CHOSEN = {"max_error": "largest error of a cosine", "jaccard": "in common with exact"}
WORDS = ("substitutions", "deletions", "insertions")


def sections(directory: Path) -> list[str]:
    """All sections of the page, for the files that are there."""
    tables: dict[str, tuple[tuple[str, Callable[[list[Entry]], str]], ...]] = {
        "greedy_select": (
            ("Greedy selection", greedy),
            ("Greedy selection, part by part", _parts),
            ("Greedy selection: precision", _precision),
        ),
        "vision_pruning": (
            ("A small vision-language model", vision),
            ("A small vision-language model, by question", _questions),
        ),
        "whisper_pruning": (
            ("Whisper", whisper),
            ("Whisper, kinds of errors", _kinds),
        ),
        "vision_prefill": (("Prefill of a vision-language model", _prefill),),
    }
    found = []
    for claim, parts in tables.items():
        files = [(data, md.entries(data)) for data in md.read(directory, claim)]
        for title, table in parts:
            shown = [(data, table(entries)) for data, entries in files]
            if text := "\n".join(f"{md.source(d)}\n{t}" for d, t in shown if t):
                found.append(f"## {title}\n\n{text}")
    return found


def guide(directory: Path) -> dict[str, str]:
    """Tables of the guide by the name of their place, for the files that are there."""
    tables = {
        "vision": ("vision_pruning", vision),
        "greedy": ("greedy_select", greedy),
        "whisper": ("whisper_pruning", whisper),
    }
    found = {}
    for name, (claim, table) in tables.items():
        files = md.read(directory, claim)
        files.sort(key=lambda data: -len(data["rows"]))
        if claim != "whisper_pruning":
            files = files[:1]
        if not files:
            continue
        # Runs of one benchmark share their unpruned rows; the larger run's count.
        rows: list[Entry] = []
        for data in files:
            known = [case for case, _ in rows]
            rows += [entry for entry in md.entries(data) if entry[0] not in known]
        found[name] = "".join(f"{md.source(d)}\n" for d in files) + table(rows)
    return found


def greedy(entries: list[Entry]) -> str:
    """One line for each shape: the public function, and what it takes the place of."""
    timed = [e for e in entries if "time" in e[1]]
    names = list(dict.fromkeys(e[0]["what"] for e in timed))
    choices = [n for n in names if n.startswith(CHOICES) and "reference" not in n]
    shown = {n: n.replace(BOTH, "all, ") for n in names if n.startswith(BOTH)}
    shown |= {n: n.replace(CHOICES, "choices, ") for n in choices}
    shown |= {n: n for n in names if n.startswith(LOOP)}
    shapes: list[Entry] = []
    for case, rows in timed:
        shape = {k: v for k, v in case.items() if k != "what"}
        if not shapes or shape not in [s for s, _ in shapes]:
            shapes.append((shape, {}))
        entry = next(e for e in shapes if e[0] == shape)
        entry[1].setdefault(case["what"], rows["time"])
    own = [e for e in shapes if e[1].keys() & shown.keys()]
    columns = [
        (f"{name} (us)", md.of(what), MS)
        for what, name in shown.items()
        if any(what in rows for _, rows in own)
    ]
    return md.table([*_shape(own), *columns], own)


def _parts(entries: list[Entry]) -> str:
    own = [e for e in entries if "time" in e[1]]
    columns: list[Column] = [
        ("what", lambda e: e[0]["what"], ""),
        *_shape(own),
        ("time (us)", md.of("time"), MS),
        ("for a choice (us)", md.of("step"), ".2f"),
        ("of the roofline", md.of("time", "roofline"), ".1%"),
    ]
    return md.table(columns, own)


def _precision(entries: list[Entry]) -> str:
    own = [e for e in entries if e[1].keys() & CHOSEN.keys()]
    columns: list[Column] = [
        ("what", lambda e: e[0]["what"], ""),
        *_shape(own),
        (CHOSEN["max_error"], md.of("max_error"), ".1e"),
        (CHOSEN["jaccard"], md.of("jaccard"), ".2%"),
    ]
    return md.table(columns, own)


def _shape(own: list[Entry]) -> list[Column]:
    """Columns of shapes; of the batch only where there is more than one row."""
    columns: list[Column] = [
        ("tokens", lambda e: e[0]["tokens"], "d"),
        ("channels", lambda e: e[0]["dim"], "d"),
        ("kept", lambda e: e[0]["select"], "d"),
    ]
    if any(e[0]["batch"] != 1 for e in own):
        columns.append(("images", lambda e: e[0]["batch"], "d"))
    return columns


def vision(entries: list[Entry]) -> str:
    """One line for each method: right answers by share."""
    return _by_keep(entries, "accuracy", ".1%")


def _questions(entries: list[Entry]) -> str:
    head = "accuracy, "
    kinds = dict.fromkeys(m for _, rows in entries for m in rows if m.startswith(head))
    columns: list[Column] = [
        ("method", lambda e: e[0]["method"], ""),
        ("kept", lambda e: e[0]["keep"], ".0%"),
        ("tokens", lambda e: e[0]["tokens"], ".0f"),
        ("accuracy", md.of("accuracy"), ".1%"),
        ("standard error", md.of("standard error"), ".1%"),
        *((kind.removeprefix(head), md.of(kind), ".1%") for kind in kinds),
    ]
    return md.table(columns, entries)


def whisper(entries: list[Entry]) -> str:
    """What was read unpruned, then word errors by share for each method and option."""
    unpruned = [e for e in entries if e[0]["method"] == "none"]
    columns: list[Column] = [
        ("tokens read", lambda e: e[0].get("tokens"), ".0f"),
        ("padding", lambda e: e[0].get("padding", ""), ""),
        ("weights", lambda e: e[0].get("weights", ""), ""),
        ("word errors (%)", md.of("wer"), ".2f"),
    ]
    named = []
    for case, rows in entries:
        if case["method"] == "none":
            continue
        name, option = case["method"], case.get("option", "")
        if option.startswith("seed"):
            name += ", mean of seeds"
        elif option:
            name += f", {option}"
        if case.get("padding") == "all":
            name += ", all padding"
        named.append(({**case, "method": name}, rows))
    return f"{md.table(columns, unpruned)}\n{_by_keep(named, 'wer', '.2f')}"


def _kinds(entries: list[Entry]) -> str:
    own = [e for e in entries if e[1].keys() & set(WORDS)]
    columns: list[Column] = [
        ("method", lambda e: e[0]["method"], ""),
        ("kept", lambda e: e[0]["keep"], ".0%"),
        ("option", lambda e: e[0].get("option", ""), ""),
        ("tokens", lambda e: e[0].get("tokens"), ".0f"),
        ("word error rate (%)", md.of("wer"), ".1f"),
        *((kind, md.of(kind), ".0f") for kind in WORDS),
    ]
    return md.table(columns, own)


def _by_keep(entries: list[Entry], metric: str, form: str) -> str:
    """Methods down, shares across, from all tokens to few."""
    cells: dict[str, dict[float, list[float]]] = {}
    for case, rows in entries:
        if metric in rows:
            shares = cells.setdefault(case["method"], {})
            shares.setdefault(case["keep"], []).append(rows[metric]["value"])
    keeps = sorted({k for shares in cells.values() for k in shares}, reverse=True)

    def read(keep: float) -> Callable[[Entry], float | None]:
        def mean(entry: Entry) -> float | None:
            found = entry[0]["cells"].get(keep, [])
            return sum(found) / len(found) if found else None

        return mean

    lines: list[Entry] = [({"name": k, "cells": v}, {}) for k, v in cells.items()]
    columns: list[Column] = [("method", lambda e: e[0]["name"], "")]
    return md.table([*columns, *((f"{k:.0%}", read(k), form) for k in keeps)], lines)


def _prefill(entries: list[Entry]) -> str:
    columns: list[Column] = [
        ("what", lambda e: e[0].get("what", ""), ""),
        ("vision tokens", lambda e: e[0].get("vision_tokens"), "d"),
        ("kept", lambda e: e[0].get("kept"), "d"),
        ("text tokens", lambda e: e[0].get("text_tokens"), "d"),
        ("time (ms)", md.of("time"), MS),
        ("all tokens (ms)", md.of("time", "baseline"), MS),
        ("times faster", md.of("time", "ratio"), ".2f"),
        ("of the peak", md.of("time", "roofline"), ".0%"),
    ]
    return md.table(columns, [e for e in entries if "time" in e[1]])
