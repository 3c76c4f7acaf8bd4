"""Text to calibrate on: documents packed into a stream, and rows cut out of it."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

__all__ = ["calibration_tokens"]


def calibration_tokens(
    tokenizer: Any,
    source: str | os.PathLike[str] | None = None,
    *,
    rows: int = 128,
    length: int = 2048,
    seed: int = 0,
    allow_fewer: bool = False,
) -> np.ndarray:
    """Rows of token ids for `calibrate` and `compress_sequential`.

    Documents are put one after another, each with the special tokens of its start, and
    the stream is cut into rows that do not overlap, of which some are drawn without
    replacement. Every row is full.

    Args:
      tokenizer: `encode(text, special=True) -> ids`, as `angeljax.models.Tokenizer`.
      source: what `angeljax.evaluation.load_documents` reads: a `.txt` or `.jsonl` file
        (also with `.xz`), a dataset `name[:config][:split]`; default: the Python
        language reference, which every Python has (too short for 128 x 2048).
      rows: how many.
      length: tokens in each.
      seed: of the choice of rows; the same seed gives the same rows.
      allow_fewer: give all rows that there are where the text is too short.

    Returns:
      int32 `[rows, length]`.

    Raises:
      ValueError: the text is too short (says how many rows there are), or a number is
        not positive.
      FileNotFoundError: no such file.

    Example:
      >>> from angeljax.calibration import calibration_tokens
      >>> class Letters:
      ...     def encode(self, text, *, special=False):
      ...         return [ord(c) for c in text]
      >>> calibration_tokens(Letters(), rows=4, length=64).shape
      (4, 64)
    """
    from angeljax.evaluation import load_documents

    for name, value in (("rows", rows), ("length", length)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a positive integer, not {value!r}")
    parts = [
        np.asarray(tokenizer.encode(text, special=True), np.int32)
        for text in load_documents(source)
        if text.strip()
    ]
    stream = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    there = len(stream) // length
    if there == 0 or (there < rows and not allow_fewer):
        raise ValueError(
            f"{os.fspath(source or 'the default text')} has {len(stream)} tokens, "
            f"which are {there} rows of {length}, not {rows}: use more text, fewer or "
            "shorter rows" + (", or allow fewer" if there else "")
        )
    order = np.random.default_rng(seed).permutation(there)[:rows]
    return stream[: there * length].reshape(there, length)[order]
