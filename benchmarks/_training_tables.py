"""Tables of docs/results_training.md, from the results of the qat benchmarks."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

QUALITY = {
    "held-out perplexity": ("held-out perplexity", ".2f"),
    "held-out kl": ("KL to the start", ".3f"),
    "held-out top1_agreement": ("top-1 agreement", ".1%"),
    "wikitext perplexity": ("wikitext-2 perplexity", ".1f"),
    "wikitext kl": ("KL", ".3f"),
    "tasks acc_norm": ("12 tasks, acc_norm", ".3f"),
    "minutes": ("minutes", ".1f"),
}
SHOWN = 10


def sections(directory: Path) -> list[str]:
    """All sections of the page."""
    parts = [
        ("Quality at equal tokens", "qat_quality", quality),
        ("Learning rates", "qat_search", _search),
        ("Loss over tokens", "qat_curves", _loss),
        ("Weight trapping", "qat_curves", _trapping),
        ("Throughput", "qat_throughput", _throughput),
    ]
    found = []
    for title, claim, table in parts:
        if (directory / f"{claim}.h100.json").is_file():
            found.append(
                f"## {title}\n\n{_source(directory, claim)}\n{table(directory)}"
            )
        if claim == "qat_quality" and (directory / f"{claim}.h200.json").is_file():
            more = _source(directory, claim, "h200"), quality(directory, "h200")
            found.append("## More rows, on another device\n\n" + "\n".join(more))
    return found


def quality(directory: Path, tag: str = "h100") -> str:
    """One line for each row and seed."""
    runs: dict[Any, dict[str, float]] = defaultdict(dict)
    for row in _read(directory, "qat_quality", tag)["rows"]:
        case = row["case"]
        runs[case["row"], case["seed"], case["lr"], case["tokens"]][row["metric"]] = (
            row["value"]
        )
    lines = []
    for (row, seed, lr, tokens), found in sorted(runs.items(), key=_order):
        trained = f"{tokens / 1e6:.1f} M" if tokens else "none"
        head = [row, trained, f"{lr:g}" if tokens else "", seed if tokens else ""]
        cells = []
        for metric, (_, form) in QUALITY.items():
            value = found.get(metric)
            long = value is not None and value >= 1e5
            form = ".1e" if long else form
            cells.append("" if value is None else format(value, form))
        lines.append([*map(str, head), *cells])
    names = [name for name, _ in QUALITY.values()]
    return _table(["row", "tokens", "rate", "seed", *names], lines, left=1)


def _order(item: Any) -> Any:
    (row, seed, _, tokens), found = item
    return tokens, found["held-out perplexity"] if not tokens else 0, row, seed


def _search(directory: Path) -> str:
    lines = [
        [c["row"], f"{c['tokens'] / 1e6:g} M", f"{c['lr']:g}", f"{r['value']:.3f}"]
        for r in _read(directory, "qat_search")["rows"]
        for c in [r["case"]]
    ]
    return _table(["row", "tokens", "rate", "last loss (nats)"], sorted(lines), left=1)


def _loss(directory: Path) -> str:
    curves: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    for r in _read(directory, "qat_curves")["rows"]:
        if r["metric"] == "loss":
            c = r["case"]
            curves[c["row"], c["seed"]][c["seen"]] = r["value"]
    seen = sorted({s for curve in curves.values() for s in curve})
    seen = [s for i, s in enumerate(seen) if i % 3 == 2][:SHOWN]
    lines = [
        [row, str(seed), *(f"{curve[s]:.3f}" for s in seen)]
        for (row, seed), curve in sorted(curves.items())
    ]
    names = [f"{s / 1e6:.1f} M" for s in seen]
    text = (
        "KL to the teacher in nats, as trained (with the residual while it lasts).\n\n"
    )
    return text + _table(["row", "seed", *names], lines, left=1)


def _trapping(directory: Path) -> str:
    flips: dict[str, dict[int, float]] = defaultdict(dict)
    ranks: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in _read(directory, "qat_curves")["rows"]:
        c = r["case"]
        if r["metric"] == "flip rate":
            flips[c["row"]][c["step"]] = r["value"]
        elif r["metric"] == "effective rank":
            ranks[f"{c['row']}, {c['leaf'].split('/')[-2]}"][c["step"]].append(
                r["value"]
            )
    text = "Share of weights whose code changed since the column before:\n\n"
    text += _steps({k: {s: f"{x:.1%}" for s, x in v.items()} for k, v in flips.items()})
    text += "\nEffective rank of the gradient, mean of four layers, of 576:\n\n"
    text += _steps(
        {
            k: {s: f"{sum(x) / len(x):.0f}" for s, x in v.items()}
            for k, v in ranks.items()
        }
    )
    return text + "\n![weight trapping](images/qat_trapping.png)\n"


def _steps(curves: dict[str, dict[int, str]]) -> str:
    steps = sorted({s for curve in curves.values() for s in curve})
    lines = [[k, *(c.get(s, "") for s in steps)] for k, c in sorted(curves.items())]
    return _table(["row", *(f"step {s}" for s in steps)], lines, left=1)


def _throughput(directory: Path) -> str:
    lines = [
        [
            r["case"]["row"],
            "yes" if r["case"]["teacher"] else "no",
            f"{r['value']:.0f}",
            f"{r['ratio']:.3f}",
            f"{r['roofline']:.1%}",
        ]
        for r in _read(directory, "qat_throughput")["rows"]
    ]
    names = ["row", "teacher", "tokens/s", "of bfloat16", "FLOP utilisation"]
    return _table(names, lines, left=1)


def _source(directory: Path, claim: str, tag: str = "h100") -> str:
    data = _read(directory, claim, tag)
    versions = ", ".join(f"{k} {v}" for k, v in data["versions"].items())
    return f"{data['device']}, {data['date'][:10]}, {versions}. `{data['command']}`\n"


def _read(directory: Path, claim: str, tag: str = "h100") -> dict[str, Any]:
    text = (directory / f"{claim}.{tag}.json").read_text(encoding="utf-8")
    return json.loads(text)


def _table(names: Sequence[str], lines: Sequence[Sequence[str]], *, left: int) -> str:
    rule = ["---"] * left + ["---:"] * (len(names) - left)
    rows = [list(names), rule, *map(list, lines)]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
