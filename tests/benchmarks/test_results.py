"""The results file: its fields, its checks, and that it appears whole or not at all."""

import datetime
import json
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest

from benchmarks import _results
from benchmarks._results import Row, read, write

FIELDS = ["claim", "device", "versions", "commit", "date", "command", "rows"]
ROW_FIELDS = ["case", "metric", "value", "unit", "baseline", "ratio", "roofline"]


def test_document_has_the_agreed_fields(tmp_path):
    row = Row({"m": 16}, "time", np.float32(2.0), "us", baseline=4.0, ratio=2.0)
    path = write("formats", [row], directory=tmp_path)
    assert path == tmp_path / "formats.json"
    document = json.loads(path.read_text())
    assert list(document) == FIELDS
    assert [list(row) for row in document["rows"]] == [ROW_FIELDS]
    assert document["rows"][0]["value"] == 2.0
    assert document["rows"][0]["roofline"] is None
    assert document["versions"]["jax"]
    datetime.date.fromisoformat(document["date"])


def test_read_returns_what_was_written(tmp_path):
    rows = [Row({"case": i}, "kl", i / 3, "nats") for i in range(3)]
    path = write("ptq_quality", rows, device_tag="h100", directory=tmp_path)
    assert path.name == "ptq_quality.h100.json"
    assert read(path)["rows"] == rows


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_a_row_holds_numbers_only(value):
    with pytest.raises((ValueError, TypeError)):
        Row({}, "kl", value, "nats")


def test_names_and_rows_are_checked(tmp_path):
    row = Row({}, "kl", 0.0, "nats")
    with pytest.raises(ValueError, match="no rows"):
        write("formats", [], directory=tmp_path)
    with pytest.raises(ValueError, match="plain word"):
        write("../formats", [row], directory=tmp_path)
    with pytest.raises(ValueError, match="plain word"):
        write("formats", [row], device_tag="a/b", directory=tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write("formats", [Row({}, "kl", 1.0, "nats")], directory=tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(_results.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write("formats", [Row({}, "kl", 2.0, "nats")], directory=tmp_path)
    assert read(path)["rows"][0].value == 1.0
    assert os.listdir(tmp_path) == ["formats.json"]


def test_commit_can_be_named(monkeypatch):
    monkeypatch.setenv("ANGELJAX_COMMIT", "abc123")
    assert _results._commit() == "abc123"


def test_command_is_relative_to_the_repository(monkeypatch):
    script = str(Path(_results.ROOT, "benchmarks", "formats.py"))
    monkeypatch.setitem(sys.modules, "__main__", type(sys)("__main__"))
    monkeypatch.setattr(sys, "argv", [script, "--case", "a b"])
    assert _results._command() == "python benchmarks/formats.py --case 'a b'"
    monkeypatch.setattr(sys, "argv", ["/elsewhere/secret/run.py"])
    assert _results._command() == "python run.py"


def test_command_names_the_module(monkeypatch):
    main = type(sys)("__main__")
    main.__spec__ = ModuleSpec("benchmarks.formats", loader=None)
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["/elsewhere/benchmarks/formats.py", "--fast"])
    assert _results._command() == "python -m benchmarks.formats --fast"
