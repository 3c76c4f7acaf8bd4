"""The benchmark of rounds of decoding on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.decode_round import main


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = "--smoke --tag here --widths 1 8 --contexts 8 --slots 32 --loop launched"
    main([*args.split(), "--threads", "1", "--out", str(tmp_path)])
    (file,) = tmp_path.glob("decode_round.here.json")
    rows = json.loads(file.read_text())["rows"]
    times = [r for r in rows if r["metric"] == "time of a round"]
    found = [(r["case"]["width"], r["case"]["way"]) for r in times]
    assert found == [(w, way) for w in (1, 8) for way in ("layers", "fused")]
    differ = {r["case"]["way"]: r["value"] for r in rows if "differ" in r["metric"]}
    assert differ["fused"] == 0
    assert capsys.readouterr().out.count("time of a round") == 4
