"""The tables of the documentation: made from the results, all of them, and current."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _markdown as md
from benchmarks import tables
from benchmarks._results import Row, write


def test_pages_are_current() -> None:
    tables.main(["--check"])


def test_main_writes_and_checks(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="results.md is out of date: run python -m be"):
        tables.main(["--check"], docs=tmp_path, front=tmp_path)
    tables.main([], docs=tmp_path, front=tmp_path)
    tables.main(["--check"], docs=tmp_path, front=tmp_path)
    others = ("attention", "kernels", "ptq", "speculative", "tokens", "training")
    names = {"results", *(f"results_{other}" for other in others)}
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.md" for name in names}
    (tmp_path / "results_kernels.md").write_text("old")
    with pytest.raises(SystemExit, match="results_kernels.md is out of date"):
        tables.main(["--check"], docs=tmp_path, front=tmp_path)


def test_the_guide_to_training_shows_every_run_between_its_marks(
    tmp_path: Path,
) -> None:
    case = {"row": "sherry", "seed": 1, "lr": 1e-3, "tokens": 16_000_000}
    rows = [
        Row(case, "held-out perplexity", 31.25, "1"),
        Row(case, "minutes", 2, "min"),
    ]
    write("qat_quality", rows, device_tag="h100", directory=tmp_path)
    table = tables.guides(tmp_path)[tables.GUIDE]["measured"]
    assert (
        _lines(table)[-1]
        == "| sherry | 16.0 M | 0.001 | 1 | 31.25 |  |  |  |  |  | 2.0 |"
    )
    guide = (tables.DOCS / tables.GUIDE).read_text(encoding="utf-8")
    inside = guide.split("<!-- measured -->")[1].split(tables.END)[0]
    assert inside.count("| sherry+arenas | 15.7 M |") == 2


def test_readme_shows_what_one_token_gains() -> None:
    first, end = tables.MARKS
    text = tables.readme(f"a\n{first}\nold\n{end}\nb")
    assert text.startswith(f"a\n{first}\n| |") and text.endswith(f"|\n{end}\nb")
    assert "old" not in text and "| 4096 x 4096 |" in text
    assert tables.readme(text) == text


def test_commands_name_no_folder_of_a_machine() -> None:
    data = {"device": "GPU", "date": "2026-11-27", "versions": {"jax": "1"}}
    command = (
        "python -m a.b --images /tmp/x/images --text z=/tmp/z --out results/y "
        "--tag h100"
    )
    assert md.source({**data, "command": command}) == (
        "GPU, 2026-11-27, jax 1. "
        "`python -m a.b --images images --text z=z --out results/y --tag h100`\n"
    )


def _lines(page: str) -> list[str]:
    return [line for line in page.split("\n") if line.startswith("|")]


def test_claims_about_speed_have_a_page_of_their_own(tmp_path: Path) -> None:
    case: dict[str, Any] = {"n": 8, "format": "t2"}
    other = {"n": 8, "format": "bfloat16"}
    rows = [
        Row(case, "time", 2.0, "us", baseline=5.0, ratio=2.5, roofline=0.5),
        Row(case, "temporary", 0.5, "MB"),
        Row(other, "time", 5.0, "us"),
    ]
    write("packed_matmul", rows, device_tag="x", directory=tmp_path)
    write("unheard", [Row(case, "kl", 0.25, "nats")], directory=tmp_path)
    pages = tables.render(tmp_path)
    assert _lines(pages["results_kernels.md"]) == [
        "| format | time (us) | bfloat16 by XLA (us) | times faster | roofline |"
        " temporary (MB) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| t2 | 2 | 5 | 2.50 | 50% | 0.5 |",
        "| bfloat16 | 5 |  |  |  |  |",
    ]
    assert "n: 8." in pages["results_kernels.md"]
    assert _lines(pages["results.md"])[-1] == "| 8 | t2 | 0.2500 |"
    assert "## unheard" in pages["results.md"]


def test_long_numbers() -> None:
    assert tables.number(123456.0, ".2f") == "1.2e+05"
    assert tables.number(99999.0, ".2f") == "99999.00"


KERNEL = {"tokens": 16384, "batch": 1, "heads": 32, "kv_heads": 8, "head_dim": 128}
ATTENTION: dict[str, list[Any]] = {
    "block_sparse_attention": [
        ({**KERNEL, "density": 0.262, "what": "mosaic_gpu"}, "time", 900.0, 3600.0),
        ({**KERNEL, "density": 0.262, "what": "mosaic_gpu"}, "executed", 610.0, 600.0),
        # The same shapes, measured again beside the other implementations.
        ({**KERNEL, "density": 0.262, "what": "mosaic_gpu"}, "time", 910.0, 3640.0),
        ({**KERNEL, "density": 0.262, "what": "fp8"}, "time", 600.0, 3600.0),
        ({**KERNEL, "density": 0.262, "what": "fp8"}, "executed", 915.0, 600.0),
        ({**KERNEL, "density": 0.262, "what": "fp8"}, "error", 0.0472),
        ({**KERNEL, "density": 0.262, "what": "xla"}, "time", 7.2e6, 3600.0),
        ({**KERNEL, "density": 0.262, "what": "FlexAttention, x"}, "time", 1500.0, 900),
        ({**KERNEL, "density": 0.262, "what": "FlexAttention, x"}, "executed", 366.0),
    ],
    "stem": [
        ({"tokens": 32768, "selector": "stem", "density": 0.36}, "time", 5.5e3, 14e3),
        ({"tokens": 32768, "selector": "stem", "density": 0.36}, "memory", 91.6),
        ({"tokens": 65536, "selector": "stem", "density": 0.27}, "time", 16e3, 56e3),
        ({"tokens": 32768, "selector": "a_shape", "density": 0.2}, "time", 3e3, 15e3),
        (
            {"tokens": 32768, "selector": "stem", "layers": 32, "model": "8B"},
            "time to first token",
            1700.0,
            2000.0,
        ),
    ],
    "attention_quality": [
        ({"selector": "dense", "density": 1.0}, "kl", 0.0),
        ({"selector": "dense", "density": 1.0}, "needle 7680 accuracy", 1.0),
        ({"selector": "stem", "density": 0.25}, "kl", 0.0321),
        ({"selector": "stem", "density": 0.25}, "recall", 0.875),
        ({"selector": "stem", "density": 0.25}, "needle 7680 accuracy", 0.75),
        ({"selector": "stem", "density": 0.25}, "needle 7680 at 0.5", 0.5),
        ({"selector": "stem", "density": 0.5}, "kl", 0.0101),
    ],
}


def test_attention_has_a_page_and_two_tables_of_its_guide(tmp_path: Path) -> None:
    for claim, made in ATTENTION.items():
        rows = []
        for case, metric, value, *more in made:
            around = {"length": 8192, "block": 128} if "quality" in claim else {}
            base = more[0] if more else None
            ratio = base / value if base else None
            rows.append(Row({**case, **around}, metric, value, "?", base, ratio))
        write(claim, rows, device_tag="h100", directory=tmp_path)
    pages = tables.render(tmp_path)
    assert not _lines(pages["results.md"])
    parts = pages["results_attention.md"].split("\n## ")
    found = {part.split("\n")[0]: _lines(part)[2:] for part in parts[1:]}
    shape = "| 16384 | 32 / 8 | 128 | 26.2% |"
    stem = ["| 32768 | 36.0% | 5.5 | 14 | 2.55 |  |  |  | 92 |"]
    stem += ["| 65536 | 27.0% | 16 | 56 | 3.50 |  |  |  |  |"]
    quality = ["| dense | 100% |  | 0.0000 | 100.0% |"]
    quality += ["| stem | 25% | 87.5% | 0.0321 | 75.0% |"]
    assert found == {
        "The kernel": [f"{shape} 0.9 | 3.6 | 4.00 | 610 | 600 |  |"],
        "FP8 keys and values": [
            f"| fp8 {shape} 0.6 | 3.6 | 6.00 | 915 | 600 |  | 4.7% |"
        ],
        "Other implementations and the backward pass": [
            f"| mosaic_gpu {shape} 0.91 | 3.64 | 4.00 |",
            f"| xla {shape} 7200 | 3.6 | 0.00 |",
        ],
        "FlexAttention of PyTorch": [
            f"| FlexAttention, x {shape} 1.5 | 0.9 | 60% | 366 |"
        ],
        "Stem, selection included": stem,
        "Selectors, selection included": [
            f"| stem {stem[0]}",
            "| a_shape | 32768 | 20.0% | 3 | 15 | 5.00 |  |  |  |  |",
        ],
        "Time to the first token": ["| 8B | 32 | 32768 | 1700 | 2000 | 1.18 |"],
        "Quality at equal density": [*quality, "| stem | 50% |  | 0.0101 |  |"],
        "Needles by depth": [
            "| dense | 100% |  |",
            "| stem | 25% | 50% |",
            "| stem | 50% |  |",
        ],
    }
    own = tables.guides(tmp_path)[tables.ATTENTION_GUIDE]
    assert {k: _lines(v)[2:] for k, v in own.items()} == {
        "stem": stem,
        "quality": quality,
    }
    text = tables.between("a <!-- stem -->\nold\n<!-- end --> b", "stem", "new\n")
    assert text == "a <!-- stem -->\nnew\n<!-- end --> b"
    with pytest.raises(ValueError, match="no <!-- quality --> ... <!-- end --> in the"):
        tables.between(text, "quality", "new\n")
    # Another device has a table of its own, below; a missing file has no section.
    file = tmp_path / "stem.h100.json"
    (tmp_path / "stem.h200.json").write_text(file.read_text())
    page = tables.render(tmp_path)["results_attention.md"]
    assert page.count(stem[1]) == 2 and page.count("## Stem") == 1
    file.unlink()
    (tmp_path / "stem.h200.json").unlink()
    assert "## Stem" not in tables.render(tmp_path)["results_attention.md"]


SHAPE = {"tokens": 2691, "dim": 3584, "select": 672, "batch": 1}
WHISPER = {"option": "", "padding": "last 50", "weights": "float32"}
PREFILL = {"vision_tokens": 2691, "text_tokens": 64}
TOKENS: dict[str, list[Any]] = {
    "greedy_select": [
        ({**SHAPE, "what": "both float32"}, "time", 616.1),
        ({**SHAPE, "what": "select mosaic_gpu"}, "time", 374.4),
        ({**SHAPE, "what": "select mosaic_gpu"}, "step", 0.557),
        ({**SHAPE, "what": "rows"}, "bytes", 7.0),
        ({**SHAPE, "what": "PyTorch 2 loop"}, "time", 112441.0),
        ({**SHAPE, "what": "gram fast"}, "max_error", 2.5e-3),
        ({**SHAPE, "what": "select fast"}, "jaccard", 0.75),
        # Measured later than what it is compared with.
        ({**SHAPE, "what": "select reference"}, "time", 9000.0),
        ({**SHAPE, "batch": 8, "what": "both float32"}, "time", 2206.0),
    ],
    "vision_pruning": [
        ({"method": "all tokens", "keep": 1.0, "tokens": 256.0}, "accuracy", 0.9857),
        ({"method": "random", "keep": 0.1, "tokens": 26.0}, "accuracy", 0.667),
        ({"method": "random", "keep": 0.1, "tokens": 26.0}, "standard error", 0.017),
        ({"method": "random", "keep": 0.1, "tokens": 26.0}, "accuracy, where", 0.5),
        ({"method": "random", "keep": 0.5, "tokens": 128.0}, "accuracy", 0.954),
        ({"method": "scope", "keep": 0.5, "tokens": 128.0}, "accuracy", 0.961),
    ],
    "whisper_pruning": [
        ({"method": "none", "keep": 1.0, **WHISPER, "padding": "all"}, "wer", 5.5),
        ({"method": "none", "keep": 1.0, **WHISPER}, "wer", 6.5),
        ({"method": "random", "keep": 0.5, **WHISPER, "option": "seed 0"}, "wer", 60.0),
        ({"method": "random", "keep": 0.5, **WHISPER, "option": "seed 1"}, "wer", 70.0),
        ({"method": "samp", "keep": 0.5, **WHISPER}, "wer", 20.0),
        ({"method": "samp", "keep": 0.5, **WHISPER}, "deletions", 31),
        (
            {"method": "samp", "keep": 0.5, **WHISPER, "option": "threshold 0.7"},
            "wer",
            9,
        ),
    ],
    "vision_prefill": [
        ({**PREFILL, "what": "select", "kept": 673}, "time", 0.451),
        ({**PREFILL, "what": "prefill", "kept": 673}, "time", 40.0, 150.0),
    ],
}


def test_tokens_have_a_page_and_three_tables_of_their_guide(tmp_path: Path) -> None:
    for claim, made in TOKENS.items():
        rows = []
        for case, metric, value, *more in made:
            base = more[0] if more else None
            rows.append(
                Row(case, metric, value, "?", base, base / value if base else None)
            )
        write(claim, rows, device_tag="h100", directory=tmp_path)
    pages = tables.render(tmp_path)
    assert not _lines(pages["results.md"])
    parts = pages["results_tokens.md"].split("\n## ")
    found = {part.split("\n")[0]: _lines(part) for part in parts[1:]}
    shape = "| 2691 | 3584 | 672 |"
    greedy = [
        "| tokens | channels | kept | images | all, float32 (us) |"
        " choices, mosaic_gpu (us) | PyTorch 2 loop (us) |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"{shape} 1 | 616 | 374 | 112441 |",
        f"{shape} 8 | 2206 |  |  |",
    ]
    vision = [
        "| method | 100% | 50% | 10% |",
        "| --- | ---: | ---: | ---: |",
        "| all tokens | 98.6% |  |  |",
        "| random |  | 95.4% | 66.7% |",
        "| scope |  | 96.1% |  |",
    ]
    whisper = [
        "| tokens read | padding | weights | word errors (%) |",
        "| ---: | --- | --- | ---: |",
        "|  | all | float32 | 5.50 |",
        "|  | last 50 | float32 | 6.50 |",
        "| method | 50% |",
        "| --- | ---: |",
        "| random, mean of seeds | 65.00 |",
        "| samp | 20.00 |",
        "| samp, threshold 0.7 | 9.00 |",
    ]
    assert found["Greedy selection"] == greedy
    assert found["A small vision-language model"] == vision
    assert found["Whisper"] == whisper
    assert found["Greedy selection, part by part"][3:] == [
        f"| select mosaic_gpu {shape} 1 | 374 | 0.56 |  |",
        f"| PyTorch 2 loop {shape} 1 | 112441 |  |  |",
        f"| select reference {shape} 1 | 9000 |  |  |",
        f"| both float32 {shape} 8 | 2206 |  |  |",
    ]
    assert found["Greedy selection: precision"][2:] == [
        f"| gram fast {shape} 2.5e-03 |  |",
        f"| select fast {shape}  | 75.00% |",
    ]
    questions = found["A small vision-language model, by question"]
    assert questions[3] == "| random | 10% | 26 | 66.7% | 1.7% | 50.0% |"
    assert found["Whisper, kinds of errors"][2:] == [
        "| samp | 50% |  |  | 20.0 |  | 31 |  |"
    ]
    assert found["Prefill of a vision-language model"][2:] == [
        "| select | 2691 | 673 | 64 | 0.451 |  |  |  |",
        "| prefill | 2691 | 673 | 64 | 40 | 150 | 3.75 |  |",
    ]
    own = tables.guides(tmp_path)[tables.TOKENS_GUIDE]
    assert {k: _lines(v) for k, v in own.items()} == {
        "greedy": greedy,
        "vision": vision,
        "whisper": whisper,
    }
    (tmp_path / "whisper_pruning.h100.json").unlink()
    assert "## Whisper" not in tables.render(tmp_path)["results_tokens.md"]
    assert "whisper" not in tables.guides(tmp_path)[tables.TOKENS_GUIDE]


def test_quantization_after_training_has_a_page_and_two_tables_of_its_guide(
    tmp_path: Path,
) -> None:
    def row(name: str, kl: float, section: str = "W4 g128") -> list[Row]:
        case = {"section": section, "row": name}
        text = {**case, "text": "wikitext2"}
        return [
            Row(case, "compress_time", 2.0, "s"),
            Row(text, "perplexity", 30.0, "1"),
            Row(text, "kl", kl, "nats"),
            Row(text, "top1_agreement", 0.75, "1"),
            Row({**case, "text": "heldout"}, "perplexity", 1e30, "1"),
            Row({**case, "text": "heldout"}, "kl", kl / 2, "nats"),
        ]

    original = {"section": "original", "row": "float32", "text": "wikitext2"}
    rows = [Row(original, "perplexity", 20.0, "1"), *row("rtn", 0.5)]
    bits = {"section": "W4 g128", "row": "rtn"}
    rows += [Row(bits, "bits_per_weight", 4.125, "bit"), *row("gptq", 0.25)]
    rows += row("int8", 0.125, "KV cache")
    write("ptq_quality", rows, device_tag="h100", directory=tmp_path)
    case = {"inputs": 512, "outputs": 256, "act order": True}
    times = [Row(case, "compile_time", 9.0, "s"), Row(case, "run_time", 0.125, "s")]
    write("gptq_time", times, device_tag="h100", directory=tmp_path)
    pages = tables.render(tmp_path)
    assert not _lines(pages["results.md"])
    parts = re.split(r"\n##+ ", pages["results_ptq.md"])
    found = {part.split("\n")[0]: _lines(part) for part in parts[1:]}
    assert found["W4 g128"] == [
        "| row | bit/weight | wikitext-2 perplexity | KL | top-1 |"
        " held-out perplexity | KL | top-1 | compress (s) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| float32 |  | 20.00 |  |  |  |  |  |  |",
        "| rtn | 4.125 | 30.00 | 0.5000 | 75.0% | 1.000e+30 | 0.2500 |  | 2.0 |",
        "| gptq |  | 30.00 | 0.2500 | 75.0% | 1.000e+30 | 0.1250 |  | 2.0 |",
    ]
    assert "bit/weight" not in found["KV cache"][0]
    assert found["Time of GPTQ"] == [
        "| inputs | outputs | act order | compile (s) | run (s) |",
        "| ---: | ---: | --- | ---: | ---: |",
        "| 512 | 256 | yes | 9.0 | 0.125 |",
    ]
    own = tables.guides(tmp_path)[tables.PTQ_GUIDE]
    assert _lines(own["ptq table"]) == found["W4 g128"]
    assert _lines(own["ptq sections"])[2:] == [
        "| W4 g128 | rtn | 0.5000 | gptq | 0.2500 |",
        "| KV cache | int8 | 0.1250 | int8 | 0.1250 |",
    ]
    (tmp_path / "ptq_quality.h100.json").unlink()
    assert not tables.guides(tmp_path)[tables.PTQ_GUIDE]
    assert "## Quality" not in tables.render(tmp_path)["results_ptq.md"]


def test_speculative_decoding_by_width_drafter_and_task(tmp_path: Path) -> None:
    loop = {"part": "plain", "loop": "captured"}
    wide = {"part": "width", "model": "8b", "width": 4, "batch": 1}
    rows = [
        Row(loop, "time of a token", 0.5, "ms", roofline=0.16),
        Row(loop, "kernels", 300, "1"),
        Row(wide, "time of a round", 6.0, "ms", 5.0),
        Row(wide, "break-even acceptance", 0.175, "1"),
    ]
    for task, ratio in (("chat", 1.5), ("code", 2.5), ("all", 2.0)):
        case = {"part": "speed", "batch": 1, "new": 128, "drafter": "hybrid"}
        case |= {"task": task, "prompts": 8}
        rows += [
            Row(case, "time of a token", 0.25, "ms", 0.5, ratio),
            Row(case, "tau", ratio + 1, "1"),
            Row(case, "speed-up with the prompt", ratio - 0.25, "1"),
        ]
    case = {"part": "speed", "drafter": "hybrid", "batch": 1}
    rows.append(Row(case, "kernels", 480, "1"))
    same = {"part": "equality", "drafter": "hybrid", "sampling": "greedy", "batch": 8}
    for dtype, differ in (("float32", 0), ("bfloat16", 3)):
        case = {**same, "dtype": dtype, "exact": "fast", "prompts": 200}
        rows.append(Row(case, "texts that differ", differ, "1"))
    write("speculative", rows, device_tag="x", directory=tmp_path)
    torch = {"part": "torch", "way": "eager", "torch": "2", "transformers": "5"}
    write(
        "speculative_torch",
        [Row(torch, "time of a token", 9.0, "ms")],
        device_tag="x",
        directory=tmp_path,
    )
    page = tables.render(tmp_path)["results_speculative.md"]
    lines = _lines(page)
    assert [line for line in lines if "---" not in line and "hybrid" not in line] == [
        "| loop | ms for a token | of the bandwidth | kernels | in the profile |"
        " ms in kernels | gaps |",
        "| captured | 0.5 | 16% | 300 |  |  |  |",
        "| model | batch | width | ms | of width 1 | kernels | break-even acceptance |",
        "| 8b | 1 | 4 | 6 | 1.20 |  | 17.5% |",
        "| drafter | batch | prompts | new | ms for a token | times faster |"
        " with the prompt | tau | kernels |",
        "| drafter | chat | code | all |",
        "| drafter | chat | code | all |",
        "| drafter | float32, greedy, batch 8 | bfloat16, fast, greedy, batch 8 |",
        "| way | torch | transformers | ms for a token |",
        "| eager | 2 | 5 | 9 |",
    ]
    assert [line for line in lines if "hybrid" in line] == [
        "| hybrid | 1 | 8 | 128 | 0.25 | 2.00 | 1.75 | 3.00 | 480 |",
        "| hybrid | 1.50 | 2.50 | 2.00 |",
        "| hybrid | 2.50 | 3.50 | 3.00 |",
        "| hybrid | 0 / 200 | 3 / 200 |",
    ]
    assert "speculative" not in tables.render(tmp_path)["results.md"]
