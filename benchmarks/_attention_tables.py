"""Tables of docs/results_attention.md and of its guide, from the attention results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks import _markdown as md
from benchmarks._markdown import MS, Column, Entry

CLAIMS = ("block_sparse_attention", "stem", "attention_quality")
KERNEL = "mosaic_gpu"
FLEX = "FlexAttention"
FLOAT8 = "fp8"
QUALITY = {
    "measured density": ("blocks read", ".1%"),
    "recall": ("recall", ".1%"),
    "perplexity": ("perplexity", ".2f"),
    "kl": ("KL to dense", "z.4f"),
    "top1_agreement": ("top-1 agreement", ".1%"),
}


def sections(directory: Path) -> list[str]:
    """All sections of the page, for the files that are there."""
    tables: dict[str, tuple[tuple[str, Callable[[list[Entry]], str]], ...]] = {
        "block_sparse_attention": (
            ("The kernel", _kernel),
            ("FP8 keys and values", _float8),
            ("Other implementations and the backward pass", _implementations),
            ("FlexAttention of PyTorch", _flex),
        ),
        "stem": (
            ("Stem, selection included", stem),
            ("Selectors, selection included", _selectors),
            ("Time to the first token", _first_token),
        ),
        "attention_quality": (
            ("Quality at equal density", quality),
            ("Needles by depth", _needles),
        ),
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
    tables = {"stem": ("stem", stem), "quality": ("attention_quality", _sparsest)}
    found = {}
    for name, (claim, table) in tables.items():
        if files := md.read(directory, claim):
            fullest = max(files, key=lambda data: len(data["rows"]))
            found[name] = f"{md.source(fullest)}\n{table(md.entries(fullest))}"
    return found


def _kernel(entries: list[Entry]) -> str:
    own = [e for e in entries if e[0]["what"] == KERNEL and "executed" in e[1]]
    return _speeds(own, [])


def _float8(entries: list[Entry]) -> str:
    own = [e for e in entries if e[0]["what"].startswith(FLOAT8)]
    return _speeds(own, _what(), ("error", md.of("error"), ".1%"))


def _speeds(own: list[Entry], first: list[Column], *last: Column) -> str:
    return md.table(
        [
            *first,
            *_shapes(own),
            ("density", lambda e: e[0]["density"], ".1%"),
            *_against("cuDNN"),
            ("executed, TFLOP/s", md.of("executed"), ".0f"),
            ("cuDNN, TFLOP/s", md.of("executed", "baseline"), ".0f"),
            ("of the peak", md.of("time", "roofline"), ".0%"),
            *last,
        ],
        own,
    )


def _implementations(entries: list[Entry]) -> str:
    own = [
        e
        for e in entries
        if not e[0]["what"].startswith(FLEX) and "executed" not in e[1]
    ]
    columns = [*_what(), *_shapes(own), _density(), *_against("cuDNN")]
    return md.table(columns, own)


def _flex(entries: list[Entry]) -> str:
    own = [e for e in entries if e[0]["what"].startswith(FLEX)]
    columns = [
        *_what(),
        *_shapes(own),
        _density(),
        ("time (ms)", md.of("time", scale=1e-3), MS),
        ("ours (ms)", md.of("time", "baseline", scale=1e-3), MS),
        ("of our speed", md.of("time", "ratio"), ".0%"),
        ("executed, TFLOP/s", md.of("executed"), ".0f"),
    ]
    return md.table(columns, own)


def stem(entries: list[Entry]) -> str:
    """One line for each length of the prompt."""
    own = [e for e in entries if e[0]["selector"].startswith("stem") and "time" in e[1]]
    kinds = {e[0]["selector"] for e in own}
    first: list[Column] = [("selector", lambda e: e[0]["selector"], "")]
    return md.table([*(first if len(kinds) > 1 else []), *_operator()], own)


def _selectors(entries: list[Entry]) -> str:
    others = [e for e in entries if not e[0]["selector"].startswith("stem")]
    lengths = {e[0]["tokens"] for e in others}
    own = [
        e
        for e in entries
        if e in others or (e[0]["selector"] == "stem" and e[0]["tokens"] in lengths)
    ]
    own = [e for e in own if "time" in e[1]] if others else []
    return md.table([("selector", lambda e: e[0]["selector"], ""), *_operator()], own)


def _operator() -> list[Column]:
    return [
        ("tokens", lambda e: e[0]["tokens"], "d"),
        _density(),
        *_against("cuDNN"),
        ("attention alone (ms)", md.of("attention", scale=1e-3), MS),
        ("selection alone (ms)", md.of("selection", scale=1e-3), MS),
        ("share of selection", md.of("selection share"), ".1%"),
        ("memory of selection (MiB)", md.of("memory"), ".0f"),
    ]


def _first_token(entries: list[Entry]) -> str:
    metric = "time to first token"
    own = [e for e in entries if metric in e[1]]
    columns: list[Column] = [
        ("model", lambda e: e[0]["model"], ""),
        ("layers", lambda e: e[0]["layers"], "d"),
        ("tokens", lambda e: e[0]["tokens"], "d"),
        (f"{_one(own, 'selector')} (ms)", md.of(metric), ".0f"),
        ("dense (ms)", md.of(metric, "baseline"), ".0f"),
        ("times faster", md.of(metric, "ratio"), ".2f"),
    ]
    return md.table(columns, own)


def quality(entries: list[Entry]) -> str:
    """One line for each selector and density, dense attention first."""
    metrics = _metrics(entries)
    names = {m: QUALITY[m] for m in QUALITY if m in metrics}
    for metric in metrics:
        if metric.endswith(" accuracy"):
            name = metric.removesuffix(" accuracy").replace(" token", ", tokens")
            names[metric] = name, ".1%"
    columns: list[Column] = [
        ("selector", lambda e: e[0]["selector"], ""),
        ("share asked for", lambda e: e[0]["density"], ".0%"),
        *((name, md.of(metric), form) for metric, (name, form) in names.items()),
    ]
    return f"{_lengths(entries)}\n\n{md.table(columns, _by_density(entries))}"


def _sparsest(entries: list[Entry]) -> str:
    """Quality at the lowest density, and of dense attention."""
    shares = [e[0]["density"] for e in entries if e[0]["selector"] != "dense"]
    lowest = min(shares, default=1.0)
    return quality([e for e in entries if e[0]["density"] in (lowest, 1.0)])


def _needles(entries: list[Entry]) -> str:
    metrics = [m for m in _metrics(entries) if " at " in m]
    columns: list[Column] = [
        ("selector", lambda e: e[0]["selector"], ""),
        ("share asked for", lambda e: e[0]["density"], ".0%"),
        *((m, md.of(m), ".0%") for m in metrics),
    ]
    return md.table(columns, _by_density(entries)) if metrics else ""


def _by_density(entries: list[Entry]) -> list[Entry]:
    """Dense attention first, then from few blocks to many."""
    return sorted(entries, key=lambda e: (e[0]["selector"] != "dense", e[0]["density"]))


def _lengths(entries: list[Entry]) -> str:
    return f"{_one(entries, 'length')} tokens, blocks of {_one(entries, 'block')}."


def _one(entries: list[Entry], name: str) -> str:
    """Values of a field of the cases, of which there mostly is one."""
    return " or ".join(str(v) for v in dict.fromkeys(e[0][name] for e in entries))


def _metrics(entries: list[Entry]) -> list[str]:
    return list(dict.fromkeys(m for _, rows in entries for m in rows))


def _what() -> list[Column]:
    return [("what", lambda e: e[0]["what"], "")]


def _density() -> Column:
    return "density", lambda e: e[0]["density"], ".1%"


def _shapes(entries: list[Entry]) -> list[Column]:
    """Columns of shapes; of batch and head size only where they differ."""
    columns: list[Column] = [("tokens", lambda e: e[0]["tokens"], "d")]
    if any(e[0]["batch"] != 1 for e in entries):
        columns.append(("batch", lambda e: e[0]["batch"], "d"))
    heads: Column = ("heads", lambda e: f"{e[0]['heads']} / {e[0]['kv_heads']}", "")
    return [*columns, heads, ("head size", lambda e: e[0]["head_dim"], "d")]


def _against(baseline: str) -> list[Column]:
    return [
        ("time (ms)", md.of("time", scale=1e-3), MS),
        (f"{baseline} (ms)", md.of("time", "baseline", scale=1e-3), MS),
        ("times faster", md.of("time", "ratio"), ".2f"),
    ]
