"""Writes the tables of the documentation from benchmarks/results/*.json.

    python -m benchmarks.tables [--check]

They are docs/results.md, docs/results_kernels.md, docs/results_training.md,
docs/results_attention.md, docs/results_tokens.md, docs/results_ptq.md,
docs/results_speculative.md and the parts of README.md and of guides between two marks.
`--check` fails if a page is out of date, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import (
    _attention_tables,
    _ptq_tables,
    _speculative_tables,
    _token_tables,
    _training_tables,
)
from benchmarks._results import RESULTS, ROOT

DOCS = ROOT / "docs"
HEAD = """# {title}

Made from `benchmarks/results/*.json` by `python -m benchmarks.tables`. Each section
names the device and the command that measured it.
"""
KERNELS_HEAD = (
    HEAD
    + """
`times faster` is the baseline over the product, in one run; `roofline` the share of
what the device allows. [What the kernels do](guides/kernels.md).
"""
)
ATTENTION_HEAD = (
    HEAD
    + """
`blocks read` is the share of the causal blocks, `recall` the share of the dense softmax
mass in them. A benchmark that has not been run has no section here.
[What is measured](guides/sparse_attention.md).
"""
)
TOKENS_HEAD = (
    HEAD
    + """
Shares are of the vision or audio tokens. A benchmark that has not been run has no
section here. [What is measured](guides/token_pruning.md#measured).
"""
)
PTQ_HEAD = (
    HEAD
    + """
`KL` (nats) and `top-1` compare with the original model, `float32`: a smaller KL and a
larger agreement are better. Weights outside of the layers are not compressed and not
counted in `bit/weight`. Rows that share a device (`--threads`) take longer to compress
than they would alone. [What the rows are](guides/ptq.md).
"""
)
SPECULATIVE_HEAD = (
    HEAD
    + """
All times are of this library's own plain decoding and of its speculative decoding, in
one run and by the same code, after the prompt is read unless it says otherwise. `times
faster` is the mean over prompts of the ratio of each. A benchmark that has not been run
has no section here. [What is measured](guides/speculative.md).
"""
)
# Claims about speed; every other one is about quality.
KERNELS = {
    "packed_matmul": "Packed products on a GPU",
    "decode_step": "A token of a whole decoder",
    "decode_round": "Rounds of decoding by width",
    "ragged_matmul": "Products of experts",
    "cpu_matmul": "Packed products on a CPU",
    "tpu_bundles": "Instruction bundles of the TPU kernels",
}
BASELINES = {
    "packed_matmul": "bfloat16 by XLA",
    "decode_step": "bfloat16",
    "decode_round": "layers by XLA",
    "cpu_matmul": "dequantized first",
}
MARKS = ("<!-- what one token gains -->", "<!-- end -->")
GUIDE = "guides/ternary_qat.md"
ATTENTION_GUIDE = "guides/sparse_attention.md"
TOKENS_GUIDE = "guides/token_pruning.md"
PTQ_GUIDE = "guides/ptq.md"
END = "<!-- end -->"
README_SHAPES = ("4096 x 4096", "4096 x 14336", "8192 x 8192", "8192 x 28672")
README_FORMATS = {
    "sherry": "Sherry, 1.25 bits",
    "t2": "ternary, 2 bits",
    "int4": "int4, groups of 128",
    "int8": "int8",
    "float8_e4m3": "FP8",
}
# Claims about training have a page of their own, by benchmarks/_training_tables.py.
TRAINING = ("qat_quality", "qat_curves", "qat_search", "qat_throughput")
TITLES = {
    "formats": "Quality of the data-free recipes",
    "whisper_pruning": "Whisper with fewer encoder tokens",
    **KERNELS,
}
COLUMNS = {
    "perplexity": ("perplexity", ".2f"),
    "kl": ("KL (nats)", ".4f"),
    "top1_agreement": ("top-1 agreement", ".2%"),
    "bits_per_weight": ("bit/weight, whole model", ".2f"),
    "checkpoint_size": ("MB on disk", ".1f"),
    "compress_time": ("compress (s)", ".1f"),
    "wer": ("word error rate (%)", ".2f"),
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
        if len(cases) > 1 and all(c["case"].get(k) == v for c in cases.values())
    }
    varying = [k for k in data["rows"][0]["case"] if k not in constant]
    columns = [c for m in metrics for c in columns_of(data, m)]
    names = [*varying, *(name for name, *_ in columns)]
    lines = [
        f"## {TITLES.get(data['claim'], data['claim'])}",
        "",
        f"{data['device']}, {data['date'][:10]}, "
        + ", ".join(f"{k} {v}" for k, v in data["versions"].items())
        + f". `{data['command']}`",
        "",
    ]
    shown = [f"{k}: {v}" for k, v in constant.items() if v != ""]
    lines += [", ".join(shown) + ".", ""] if shown else []
    lines += [
        "| " + " | ".join(names) + " |",
        "| " + " | ".join(["---"] * len(varying) + ["---:"] * len(columns)) + " |",
    ]
    for entry in cases.values():
        cells = [str(entry["case"].get(k, "")) for k in varying]
        for _, metric, field, form in columns:
            value = entry.get(metric, {}).get(field)
            cells.append("" if value is None else number(value, form))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def columns_of(data: dict[str, Any], metric: str) -> list[tuple[str, str, str, str]]:
    """Heading, metric, field and number format of each column of a metric."""
    if data["claim"] not in KERNELS:
        name, form = COLUMNS.get(metric, (metric, ".4g"))
        return [(name, metric, "value", form)]
    rows = [row for row in data["rows"] if row["metric"] == metric]
    unit = f" ({rows[0]['unit']})" if rows[0]["unit"] != "1" else ""
    base = BASELINES.get(data["claim"], "baseline")
    better = "times faster" if metric == "time" else "times less"
    every = [
        (f"{metric}{unit}", metric, "value", ".3g"),
        (f"{base}{unit}", metric, "baseline", ".3g"),
        (better, metric, "ratio", ".2f"),
        ("roofline", metric, "roofline", ".0%"),
    ]
    return [c for c in every if any(row[c[2]] is not None for row in rows)]


def render(directory: Path = RESULTS) -> dict[str, str]:
    """The pages by name."""
    files = sorted(directory.glob("*.json"))
    claims = {f: f.name.split(".")[0] for f in files}
    speed = [f for claim in KERNELS for f in files if claims[f] == claim]
    pages_of = _attention_tables, _token_tables, _ptq_tables, _speculative_tables
    own = [claim for page in pages_of for claim in page.CLAIMS]
    others = *KERNELS, *TRAINING, *own
    quality = [f for f in files if claims[f] not in others]
    heads = {
        "results.md": (HEAD.format(title="Results"), quality),
        "results_kernels.md": (
            KERNELS_HEAD.format(title="Results of the kernels"),
            speed,
        ),
    }
    pages = {
        name: "\n".join([head, *map(render_file, some)])
        for name, (head, some) in heads.items()
    }
    if any(claims[f] == "qat_quality" for f in files):
        head = HEAD.format(title="Results of training")
        pages["results_training.md"] = "\n".join(
            [head, *_training_tables.sections(directory)]
        )
    head = ATTENTION_HEAD.format(title="Results of sparse attention")
    pages["results_attention.md"] = "\n".join(
        [head, *_attention_tables.sections(directory)]
    )
    head = TOKENS_HEAD.format(title="Results of token pruning")
    pages["results_tokens.md"] = "\n".join([head, *_token_tables.sections(directory)])
    head = PTQ_HEAD.format(title="Results of post-training quantization")
    pages["results_ptq.md"] = "\n".join([head, *_ptq_tables.sections(directory)])
    head = SPECULATIVE_HEAD.format(title="Results of speculative decoding")
    pages["results_speculative.md"] = "\n".join(
        [head, *_speculative_tables.sections(directory)]
    )
    return pages


def guides(directory: Path = RESULTS) -> dict[str, dict[str, str]]:
    """Tables of the guides: name of the page, then of the mark that stands before."""
    found = {
        ATTENTION_GUIDE: _attention_tables.guide(directory),
        TOKENS_GUIDE: _token_tables.guide(directory),
        PTQ_GUIDE: _ptq_tables.guide(directory),
    }
    if (directory / "qat_quality.h100.json").is_file():
        found[GUIDE] = {"measured": _training_tables.quality(directory)}
    return found


def between(text: str, name: str, table: str) -> str:
    """A page with a table between `<!-- name -->` and the end mark.

    Raises:
      ValueError: the page has no such mark.
    """
    mark = f"<!-- {name} -->"
    before, found, rest = text.partition(mark)
    _, end, after = rest.partition(END)
    if not (found and end):
        raise ValueError(f"no {mark} ... {END} in the page")
    return f"{before}{mark}\n{table}{END}{after}"


def readme(text: str, directory: Path = RESULTS) -> str:
    """README.md with what one token gains, between its marks."""
    products = directory / "packed_matmul.h100.json"
    step = directory / "decode_step.h100.json"
    found: dict[tuple[str, str], str] = {}
    names: list[str] = []
    for file in (products, step):
        for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
            case = row["case"]
            if row["ratio"] is None or case.get("m", 1) != 1:
                continue
            if file is step:
                fmt, _, head = case["format"].partition("+")
                name = "decoder of 8 billion" if head else ""
            else:
                fmt = case["format"]
                # Whole products: bfloat16 in and out.
                name = f"{case['k']} x {case['n']}"
                if case["activations"] == "int8" or name not in README_SHAPES:
                    name = ""
                if case["activations"] == "bfloat16" and fmt in ("t2", "sherry"):
                    name = ""
            if name and fmt in README_FORMATS:
                names += [] if name in names else [name]
                gain = row["baseline"], row["value"], row["unit"], row["ratio"]
                found[name, fmt] = "{3:.1f}x ({1:.3g} {2})".format(*gain)
    lines = ["| | " + " | ".join(README_FORMATS.values()) + " |"]
    lines.append("| --- |" + " ---: |" * len(README_FORMATS))
    for name in names:
        cells = [found.get((name, fmt), "") for fmt in README_FORMATS]
        if sum(map(bool, cells)) > 1:
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    before, rest = text.split(MARKS[0])
    return (
        f"{before}{MARKS[0]}\n"
        + "\n".join(lines)
        + f"\n{MARKS[1]}"
        + (rest.split(MARKS[1])[1])
    )


def main(
    arguments: list[str] | None = None, docs: Path = DOCS, front: Path = ROOT
) -> None:
    """Writes or checks the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(arguments)
    pages = {docs / name: text for name, text in render().items()}
    for name, tables in guides().items():
        guide = docs / name
        if guide.is_file():
            text = guide.read_text(encoding="utf-8")
            for mark, table in tables.items():
                text = between(text, mark, table)
            pages[guide] = text
    if (front / "README.md").is_file():
        first = front / "README.md"
        pages[first] = readme(first.read_text(encoding="utf-8"))
    for page, text in pages.items():
        if not args.check:
            page.write_text(text, encoding="utf-8")
        elif not page.is_file() or page.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{page} is out of date: run python -m benchmarks.tables")


if __name__ == "__main__":
    main()
