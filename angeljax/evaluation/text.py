"""Text to evaluate on, and how it is cut into windows."""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
from jaxtyping import Bool, Int

DEFAULT_TEXT = "pydoc_data.topics"
"""The Python language reference: English prose that every Python carries."""

_SEPARATOR = "\n\n"


class Windows(NamedTuple):
    """A token stream cut into windows of equal length.

    Attributes:
      tokens: int32 `[windows, length]`; the last window is padded on the right, where
        a causal model cannot see it.
      score_mask: bool `[windows, length]`; True where a token is predicted and counts.
        Never True at position 0, which nothing precedes.
    """

    tokens: Int[np.ndarray, "windows length"]
    score_mask: Bool[np.ndarray, "windows length"]


def load_text(source: str | os.PathLike[str] | None = None) -> str:
    """Returns the text that `source` names.

    Documents are joined by a blank line, as the perplexity tables of the quantization
    papers do with wikitext.

    Args:
      source: one of
        None or "pydoc_data.topics": the Python language reference (490 kB in Python
        3.12; another Python version has another text, and other perplexities);
        the path of a `.jsonl` file: the field `text` of every line;
        the path of any other file: its content as UTF-8;
        either of them compressed, with `.xz` behind its name;
        `name[:config][:split]`: column `text` of a dataset, e.g.
        "wikitext:wikitext-2-raw-v1:test"; `name::train` skips the config, and the
        split is "test" where none is named. Needs the network or a filled cache.

    Returns:
      The text, not empty.

    Raises:
      FileNotFoundError: if `source` looks like a path and nothing is there.
      ValueError: if there is no text, or a line or dataset has no field `text`.

    Example:
      >>> load_text()[:36]
      'The "assert" statement\\n*************'
    """
    text = _SEPARATOR.join(load_documents(source))
    if not text.strip():
        raise ValueError(f"{os.fspath(source or DEFAULT_TEXT)}: the text is empty")
    return text


def load_documents(source: str | os.PathLike[str] | None = None) -> Iterable[str]:
    """The documents that `source` names, one by one; a text file is one document.

    Args:
      source: as in `load_text`.

    Returns:
      An iterable of texts.

    Raises:
      FileNotFoundError, ValueError: as `load_text`, some of it while iterating.

    Example:
      >>> from angeljax.evaluation import load_documents
      >>> next(iter(load_documents()))[:22]
      'The "assert" statement'
    """
    if source is None or source == DEFAULT_TEXT:
        return _topics()
    if Path(source).is_file():
        path = Path(source)
        return _jsonl(path) if ".jsonl" in path.suffixes else _plain(path)
    if _looks_like_a_path(source):
        raise FileNotFoundError(f"{os.fspath(source)}: no such text file")
    return _dataset(str(source))


def windows(
    token_ids: Sequence[int] | Int[np.ndarray, " tokens"],
    length: int,
    stride: int | None = None,
    *,
    pad_id: int = 0,
    drop_last: bool = False,
) -> Windows:
    """Cuts a stream of tokens into windows and says which tokens each one scores.

    Every token of the stream is scored exactly once, except the first, which nothing
    precedes. A window scores what no earlier window did: with `stride` below
    `length - 1` its first `length - stride` tokens are context only, and a smaller
    stride gives each scored token more context for more compute.

    `stride=length` is the one exception: windows do not overlap, and the first token
    of each goes unscored. That, with `drop_last=True`, is the protocol behind the
    published tables (length 2048 over the concatenated wikitext-2).

    Args:
      token_ids: the stream, `[tokens]`.
      length: tokens in a window, at least 2.
      stride: tokens from one window's start to the next, from 1 to `length`;
        `length - 1` by default, the least compute that scores every token.
      pad_id: what fills the last window.
      drop_last: leave out a last window that the stream does not fill.

    Returns:
      The windows and their score masks.

    Raises:
      ValueError: if `length` or `stride` is out of range, or nothing is left to score.

    Example:
      >>> tokens, score_mask = windows([5, 6, 7, 8, 9], length=4, stride=2)
      >>> tokens.tolist()
      [[5, 6, 7, 8], [7, 8, 9, 0]]
      >>> score_mask.astype(int).tolist()
      [[0, 1, 1, 1], [0, 0, 1, 0]]
    """
    stream = np.asarray(token_ids, dtype=np.int32)
    if stream.ndim != 1:
        raise ValueError(f"token_ids must be one stream, not of shape {stream.shape}")
    if length < 2:
        raise ValueError(f"length must be at least 2, not {length}")
    stride = length - 1 if stride is None else stride
    if not 1 <= stride <= length:
        raise ValueError(f"stride must be between 1 and length={length}, not {stride}")

    if len(stream) < 2:
        raise ValueError(f"{len(stream)} tokens leave nothing to score")
    # One window, then one more per stride until the end of the stream is covered.
    uncovered = max(len(stream) - length, 0)
    count = 1 + (uncovered // stride if drop_last else -(-uncovered // stride))
    starts = stride * np.arange(count)[:, None]
    positions = starts + np.arange(length)
    inside = positions < len(stream)
    tokens = np.where(inside, stream[np.minimum(positions, len(stream) - 1)], pad_id)

    # Where the previous window ended; for the first window the stream's second token.
    scored_before = np.where(starts == 0, 1, starts - stride + length)
    score_mask = inside & (positions >= scored_before)
    score_mask[:, 0] = False
    if drop_last and len(stream) < length:
        raise ValueError(f"{len(stream)} tokens do not fill a window of {length}")
    return Windows(tokens.astype(np.int32), score_mask)


def _topics() -> Iterator[str]:
    from pydoc_data import topics

    for name in sorted(topics.topics):
        yield topics.topics[name]


def _open(path: Path) -> TextIO:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _plain(path: Path) -> Iterator[str]:
    try:
        with _open(path) as file:
            yield file.read()
    except (EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _jsonl(path: Path) -> Iterator[str]:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error.msg}") from None
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise ValueError(f"{path}:{number}: no string field 'text'")
            yield text


def _looks_like_a_path(source: str | os.PathLike[str]) -> bool:
    if not isinstance(source, str):
        return True
    suffix = Path(source).suffix.lower()
    return suffix in {".txt", ".jsonl", ".json", ".md", ".xz"} or source.startswith(
        (".", "/", "~")
    )


def _dataset(source: str) -> Iterable[str]:
    name, config, split, *rest = [*source.split(":"), "", ""]
    if any(rest) or not name:
        raise ValueError(f"{source}: write a dataset as name[:config][:split]")
    # Takes more than a second to import, and most evaluations never need it.
    import datasets

    try:
        rows = datasets.load_dataset(name, config or None, split=split or "test")
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{source}: no file, and no dataset: {reason}") from error
    if "text" not in rows.column_names:
        names = ", ".join(rows.column_names)
        raise ValueError(f"{source}: no column 'text' among {names}")
    return rows["text"]
