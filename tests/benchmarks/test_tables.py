"""The tables of the documentation: made from the results, all of them, and current."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks._results import Row, write


def test_pages_are_current() -> None:
    tables.main(["--check"])


def test_main_writes_and_checks(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="results.md is out of date: run python -m be"):
        tables.main(["--check"], docs=tmp_path, front=tmp_path)
    tables.main([], docs=tmp_path, front=tmp_path)
    tables.main(["--check"], docs=tmp_path, front=tmp_path)
    names = {"results.md", "results_kernels.md", "results_training.md"}
    assert {p.name for p in tmp_path.iterdir()} == names
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
    table = tables.render(tmp_path)[tables.GUIDE]
    assert (
        _lines(table)[-1]
        == "| sherry | 16.0 M | 0.001 | 1 | 31.25 |  |  |  |  |  | 2.0 |"
    )
    guide = (tables.DOCS / tables.GUIDE).read_text(encoding="utf-8")
    inside = guide.split(tables.MEASURED[0])[1].split(tables.MEASURED[1])[0]
    assert inside.count("| sherry+arenas | 15.7 M |") == 2


def test_readme_shows_what_one_token_gains() -> None:
    first, end = tables.MARKS
    text = tables.readme(f"a\n{first}\nold\n{end}\nb")
    assert text.startswith(f"a\n{first}\n| |") and text.endswith(f"|\n{end}\nb")
    assert "old" not in text and "| 4096 x 4096 |" in text
    assert tables.readme(text) == text


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
