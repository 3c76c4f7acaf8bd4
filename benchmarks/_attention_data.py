"""Windows of text and prompts with answers, as arrays, for `attention_quality`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# A sentence that can be asked for: so many words are given, and so many are wanted.
GIVEN, WANTED = 8, 8
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
END = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts of one length, padded on the left, and the tokens that should follow.

    Attributes:
      tokens, mask: `[N, length]`.
      answers, wanted: `[N, most tokens]`, the latter True for real tokens.
      depths: `[N]`, where in the prompt the answer stands, from 0 to 1.
    """

    tokens: np.ndarray
    mask: np.ndarray
    answers: np.ndarray
    wanted: np.ndarray
    depths: np.ndarray

    def padded(self, most: int) -> Prompts:
        """With room for longer answers."""
        room = ((0, 0), (0, most - self.answers.shape[1]))
        return dataclasses.replace(
            self, answers=np.pad(self.answers, room), wanted=np.pad(self.wanted, room)
        )


def pack(rows: Sequence[tuple[list[int], list[int], float]], length: int) -> Prompts:
    """From token ids of prompts and answers, and depths."""
    most = max(len(answer) for _, answer, _ in rows)
    tokens = np.zeros((len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), bool)
    answers = np.zeros((len(rows), most), np.int32)
    wanted = np.zeros((len(rows), most), bool)
    for i, (prompt, answer, _) in enumerate(rows):
        if len(prompt) > length:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens, more than {length}")
        tokens[i, length - len(prompt) :] = prompt
        mask[i, length - len(prompt) :] = True
        answers[i, : len(answer)] = answer
        wanted[i, : len(answer)] = True
    depths = np.asarray([depth for *_, depth in rows])
    return Prompts(tokens, mask, answers, wanted, depths)


def needles(file: Path, tokenizer: Any, length: int) -> Prompts:
    """Prompts of a length from a file of needles in haystacks.

    Args:
      file: one JSON object a line with `length`, `depth`, `prompt` and `answer`; the
        prompt ends where the answer, after a blank, should come.
      tokenizer: of the model.
      length: most tokens of a prompt.
    """
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["length"] == length:
            answer = tokenizer.encode(" " + row["answer"], special=False)
            prompt = tokenizer.encode(row["prompt"], special=False)
            rows.append((prompt, answer, row["depth"]))
    if not rows:
        raise ValueError(f"{file} has no prompt of length {length}")
    return pack(rows, length)


def questions(
    files: Sequence[Path], tokenizer: Any, *, length: int, count: int, documents: int
) -> Prompts:
    """Questions about one of several documents, made from real text.

    The beginning of a sentence is given, and how it goes on is asked for; the sentence
    stands in one of the documents, and its beginning nowhere else in the prompt.

    Args:
      files: texts; lines of `<|endoftext|>` separate documents.
      tokenizer: of the model.
      length: most tokens of a prompt.
      count: number of prompts.
      documents: of each prompt.
    """
    texts = [
        text
        for file in files
        for text in file.read_text(encoding="utf-8").split(f"\n{END}\n")
    ]
    rng = np.random.default_rng(0)
    room = (length - 120) // documents - 10
    rows: list[tuple[list[int], list[int], float]] = []
    for attempt in range(20 * count):
        if len(rows) == count:
            break
        chosen = rng.permutation(len(texts))[:documents]
        pieces = [_piece(texts[i], tokenizer, room, rng) for i in chosen]
        asked = attempt % documents
        found = _sentence(pieces, asked, rng)
        if found is None:
            continue
        given, rest = found
        body = "\n\n".join(f"Document {i + 1}\n{p}" for i, p in enumerate(pieces))
        prompt = tokenizer.encode(
            f"{body}\n\nQuestion: In one of the documents a sentence begins with "
            f'"{given}". How does it go on?\nAnswer: {given}',
            special=False,
        )
        if len(prompt) <= length:
            answer = tokenizer.encode(f" {rest}", special=False)
            depth = body.index(given) / len(body)
            rows.append((prompt, answer, depth))
    if len(rows) < count:
        raise ValueError(f"the texts give {len(rows)} questions, not {count}")
    return pack(rows, length)


def _piece(text: str, tokenizer: Any, room: int, rng: Any) -> str:
    """Whole sentences of a document, at most `room` tokens."""
    sentences = SENTENCE.split(" ".join(text.split()))
    first = int(rng.integers(0, max(len(sentences) // 2, 1)))
    sizes = [
        len(tokenizer.encode(f" {s}", special=False)) for s in sentences[first:][:400]
    ]
    fits = int(np.searchsorted(np.cumsum(sizes), room, side="right"))
    return " ".join(sentences[first : first + fits])


def _sentence(pieces: list[str], asked: int, rng: Any) -> tuple[str, str] | None:
    """Beginning and continuation of a sentence of one piece, found nowhere else."""
    whole = " ".join(pieces)
    sentences = SENTENCE.split(pieces[asked])
    for i in rng.permutation(len(sentences)):
        words = sentences[i].split(" ")
        given = " ".join(words[:GIVEN])
        plain = all(re.fullmatch(r"[A-Za-z,;'-]+", w) for w in words[: GIVEN + WANTED])
        if len(words) >= GIVEN + WANTED and plain and whole.count(given) == 1:
            return given, " ".join(words[GIVEN : GIVEN + WANTED])
    return None


def made_up(vocab: int, length: int, count: int) -> tuple[np.ndarray, Prompts]:
    """Random windows, and prompts whose answers are random too."""
    rng = np.random.default_rng(0)
    windows = rng.integers(0, vocab, (count, length + 1)).astype(np.int32)
    rows = []
    for i in range(count):
        ids = rng.integers(0, vocab, length - i).tolist()
        rows.append((ids[:-3], ids[-3:], i / count))
    return windows, pack(rows, length)
