"""Results of a training of an EAGLE-3 head: rows, and the picture of its curve."""

import json

import pytest

from benchmarks.eagle_plots import figure
from benchmarks.eagle_training import main

FOUND = {
    "curve": {
        "step": [1, 100, 200],
        "tokens": [1e6, 2e6, 3e6],
        "top1": [[0.1, 0.05], [0.4, 0.3], [0.6, 0.5]],
        "tau": [1.1, 1.6, 2.0],
    },
    "evaluation": {"eval/tau": 1.9, "eval/tau/chat": 1.7, "eval/accepted/0": 0.5},
    "coverage": 0.97,
}


def test_a_run_becomes_rows_and_a_picture(tmp_path):
    (tmp_path / "acceptance.json").write_text(json.dumps(FOUND))
    main([str(tmp_path), "--seconds", "60", "--tag", "x", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "eagle_training.x.json").read_text())["rows"]
    values = {row["metric"]: row["value"] for row in rows}
    assert values["time, text and evaluation included"] == 60
    (axes,) = figure(tmp_path).axes
    first, last = axes.lines
    assert first.get_label() == "x, draft 1" and last.get_label() == "x, draft 2"
    assert first.get_xdata() == pytest.approx([1, 2, 3])
    assert list(last.get_ydata()) == [0.05, 0.3, 0.5]
