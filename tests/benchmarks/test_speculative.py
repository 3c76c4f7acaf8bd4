"""The benchmark of speculative decoding runs, and finds the texts the same."""

import pytest

from benchmarks import _results
from benchmarks import speculative as bench


def test_smoke(tmp_path):
    bench.main(["--smoke", "--tag", "test", "--out", str(tmp_path)])
    rows = _results.read(tmp_path / "speculative.test.json")["rows"]
    same = [row.value for row in rows if row.metric == "texts that differ"]
    assert same == [0.0]
    assert {r.case["task"] for r in rows if r.metric == "tau"} == {
        *("chat", "code", "all")
    }


def test_break_even_is_where_tau_is_the_cost():
    found = bench._break_even(1.75, 2)
    assert 1 + found + found**2 == pytest.approx(1.75)
    assert bench._break_even(9.0, 2) == 1.0
