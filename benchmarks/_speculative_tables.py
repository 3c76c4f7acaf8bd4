"""Tables of docs/results_speculative.md, from `benchmarks.speculative`."""

from __future__ import annotations

from pathlib import Path

from benchmarks import _markdown as md
from benchmarks._markdown import MS, Column, Entry

SPECULATIVE, TORCH = "speculative", "speculative_torch"
EAGLE = "eagle_training"
CLAIMS = (SPECULATIVE, TORCH, EAGLE)


def sections(directory: Path) -> list[str]:
    """All sections of the page, for the files that are there."""
    found = []
    for data in md.read(directory, SPECULATIVE):
        own = md.entries(data)
        parts = [
            ("Plain decoding", _plain(own)),
            ("Rounds by width", _rounds(own)),
            ("All prompts", _drafters(own)),
            ("Times faster than plain decoding, by task", _tasks(own, "ratio")),
            ("Tokens for each forward, by task", _tasks(own, "tau")),
            ("Texts that differ from plain decoding", _equality(own)),
        ]
        fused = any(case.get("rows") == "fused" for case, _ in own)
        how = " with `FusedRows`" if fused else ""
        found.append(f"## Measured on one {data['device']}{how}\n\n{md.source(data)}")
        found += [f"### {title}\n\n{table}" for title, table in parts if table]
    for data in md.read(directory, TORCH):
        own = md.entries(data)
        columns: list[Column] = [
            *(_named(name) for name in ("way", "torch", "transformers")),
            ("ms for a token", md.of("time of a token"), MS),
        ]
        table = md.table(columns, own)
        found.append(f"## Plain decoding by PyTorch\n\n{md.source(data)}\n{table}")
    for data in md.read(directory, EAGLE):
        own = md.entries(data)
        title = f"## Training of an EAGLE-3 head on one {data['device']}"
        source = f"{title}\n\n{md.source(data)}"
        found += [source, _curve(own), _on_prompts(own)]
    if any(directory.glob(f"{EAGLE}.*.json")):
        found.append("![drafts that are right](images/eagle_acceptance.png)")
    return found


def _curve(own: list[Entry]) -> str:
    """What each draft of the head agrees with, on the text it is trained on."""
    steps: dict[int, Entry] = {}
    for case, rows in own:
        if "step" in case:
            entry = steps.setdefault(case["step"], (case, {}))
            name = f"draft {case['draft']}" if "draft" in case else "tau"
            entry[1][name] = next(iter(rows.values()))
    drafts = sorted({name for _, rows in steps.values() for name in rows} - {"tau"})
    columns: list[Column] = [
        *(_named(name, "d") for name in ("step", "tokens")),
        *((name, md.of(name), ".1%") for name in drafts),
        ("tau", md.of("tau"), ".2f"),
    ]
    return md.table(columns, list(steps.values()))


def _on_prompts(own: list[Entry]) -> str:
    """Tokens for each forward on prompts that it was not trained on."""
    return md.table(
        [_named("task"), ("tau", md.of("tau"), ".2f")],
        [entry for entry in own if "task" in entry[0]],
    )


def _part(own: list[Entry], name: str, metric: str) -> list[Entry]:
    return [e for e in own if e[0]["part"] == name and metric in e[1]]


def _named(name: str, form: str = "") -> Column:
    return name, lambda e: e[0].get(name), form


def _plain(own: list[Entry]) -> str:
    columns: list[Column] = [
        _named("loop"),
        ("ms for a token", md.of("time of a token"), MS),
        ("of the bandwidth", md.of("time of a token", "roofline"), ".0%"),
        ("kernels", md.of("kernels"), ".0f"),
        ("in the profile", md.of("kernels in the profile"), ".0f"),
        ("ms in kernels", md.of("time of kernels"), MS),
        ("gaps", md.of("share of gaps"), ".0%"),
    ]
    return md.table(columns, _part(own, "plain", "time of a token"))


def _rounds(own: list[Entry]) -> str:
    def cost(entry: Entry) -> float:
        row = entry[1]["time of a round"]
        return row["value"] / row["baseline"]

    columns: list[Column] = [
        _named("model"),
        *(_named(name, "d") for name in ("batch", "width")),
        ("ms", md.of("time of a round"), MS),
        ("of width 1", cost, ".2f"),
        ("kernels", md.of("kernels"), ".0f"),
        ("break-even acceptance", md.of("break-even acceptance"), ".1%"),
    ]
    return md.table(columns, _part(own, "width", "time of a round"))


def _drafters(own: list[Entry]) -> str:
    kernels = {
        (case["drafter"], case["batch"]): rows["kernels"]["value"]
        for case, rows in _part(own, "speed", "kernels")
    }
    columns: list[Column] = [
        _named("drafter"),
        *(_named(name, "d") for name in ("batch", "prompts", "new")),
        ("ms for a token", md.of("time of a token"), MS),
        ("times faster", md.of("time of a token", "ratio"), ".2f"),
        ("with the prompt", md.of("speed-up with the prompt"), ".2f"),
        ("tau", md.of("tau"), ".2f"),
        ("kernels", lambda e: kernels.get((e[0]["drafter"], e[0]["batch"])), ".0f"),
    ]
    return md.table(columns, [e for e in _part(own, "speed", "tau") if _whole(e)])


def _whole(entry: Entry) -> bool:
    return entry[0]["task"] == "all"


def _tasks(own: list[Entry], what: str) -> str:
    """A line for each drafter, a column for each task; batch 1."""
    some = [e for e in _part(own, "speed", "tau") if e[0]["batch"] == 1]
    read = md.of("tau") if what == "tau" else md.of("time of a token", "ratio")
    found: dict[str, Entry] = {}
    for case, rows in some:
        entry = found.setdefault(case["drafter"], (case, {}))
        entry[1][case["task"]] = {"value": read((case, rows))}
    tasks = dict.fromkeys(case["task"] for case, _ in some)
    columns = [_named("drafter"), *((task, md.of(task), ".2f") for task in tasks)]
    return md.table(columns, list(found.values()))


def _equality(own: list[Entry]) -> str:
    """A line for each drafter; `texts that differ / prompts`."""
    found: dict[str, Entry] = {}
    names: dict[str, None] = {}
    for case, rows in _part(own, "equality", "texts that differ"):
        exact = "" if case["dtype"] == "float32" else f", {case['exact']}"
        name = f"{case['dtype']}{exact}, {case['sampling']}, batch {case['batch']}"
        differ = rows["texts that differ"]["value"]
        names[name] = None
        entry = found.setdefault(case["drafter"], (case, {}))
        entry[1][name] = {"value": f"{differ:.0f} / {case['prompts']}"}

    def cell(name: str) -> Column:
        return name, lambda e: e[1].get(name, {}).get("value"), "s"

    return md.table([_named("drafter"), *map(cell, names)], list(found.values()))
