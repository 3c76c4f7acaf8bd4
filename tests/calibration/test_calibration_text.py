"""Rows of calibration text: full, without repetition, the same for the same seed."""

from __future__ import annotations

import lzma
from typing import Any

import numpy as np
import pytest

from angeljax.calibration import calibration_tokens


class Letters:
    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return [1] * special + [ord(c) for c in text]


def test_rows_of_packed_documents(tmp_path: Any) -> None:
    file = tmp_path / "text.jsonl.xz"
    lines = '{"text": "abcd"}\n{"text": " "}\n{"text": "efghi"}\n'
    file.write_bytes(lzma.compress(lines.encode()))
    got = calibration_tokens(Letters(), file, rows=3, length=3)
    # A mark before each document, the last two letters fill no row.
    stream = np.asarray([1, *b"abcd", 1, *b"efg"]).reshape(3, 3)
    assert got.dtype == np.int32
    assert sorted(got.tolist()) == sorted(stream.tolist())


def test_seeds_and_replacement() -> None:
    one, same, other = (
        calibration_tokens(Letters(), rows=64, length=32, seed=s) for s in (0, 0, 1)
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    whole = calibration_tokens(Letters(), rows=10**6, length=4096, allow_fewer=True)
    assert len(whole) > 100
    assert len({row.tobytes() for row in whole}) == len(whole)


def test_too_little_text(tmp_path: Any) -> None:
    file = tmp_path / "text.txt"
    file.write_text("abcdefgh")
    with pytest.raises(ValueError, match="has 9 tokens, which are 2 rows of 4, not 3"):
        calibration_tokens(Letters(), file, rows=3, length=4)
    with pytest.raises(ValueError, match="0 rows"):
        calibration_tokens(Letters(), file, length=10, allow_fewer=True)
    with pytest.raises(ValueError, match="rows must be"):
        calibration_tokens(Letters(), file, rows=0)
