"""The table of post-training quantization: its rows are recipes, and a few of them run.

The model is random, so that nothing is said of quality, but the ways to a row are all
taken: data-free, one pass of calibration, layer by layer, merged rotation, KV cache.
"""

import math

import pytest

from benchmarks import ptq_quality
from benchmarks._ptq_rows import ROWS
from benchmarks._results import read

CHOSEN = (
    r"W8A8 int8: rtn, static$|W4 g128: (rtn|awq|gptq|rotated rtn)$|KV cache: int4 g32$"
)


def test_rows_are_recipes_with_names_of_their_own():
    names = [row.recipe().name for row in ROWS]
    assert len(set(names)) == len(names)


def test_smoke(tmp_path, monkeypatch):
    options = ["--smoke", "--rows", CHOSEN, "--tag", "here", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["x", *options])
    ptq_quality.main()
    rows = read(tmp_path / "ptq_quality.here.json")["rows"]
    found = {
        (r.case["section"], r.case["row"], r.metric): r.value
        for r in rows
        if r.case.get("text", "made up") == "made up"
    }
    original = found["original", "float32", "perplexity"]
    assert math.isfinite(original)
    for section, row, bits in (
        ("W8A8 int8", "rtn, static", 8.25),
        ("W4 g128", "rtn", 4.125),
        ("W4 g128", "awq", 4.125),
        ("W4 g128", "gptq", 4.125),
        ("W4 g128", "rotated rtn", 4.125),
    ):
        # One scale of 32 bits for 128 weights and one of the inputs, or one of 16 bits.
        assert found[section, row, "bits_per_weight"] == pytest.approx(bits, abs=0.01)
        assert 0 < found[section, row, "kl"] < 0.1
    assert ("KV cache", "int4 g32", "bits_per_weight") not in found
    assert 0 < found["KV cache", "int4 g32", "kl"] < found["W4 g128", "rtn", "kl"]
    assert found["W8A8 int8", "rtn, static", "kl"] < found["W4 g128", "gptq", "kl"]
    assert found["W4 g128", "gptq", "kl"] < found["W4 g128", "rtn", "kl"]
