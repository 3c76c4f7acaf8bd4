"""Word error rate of transcripts, with the text normaliser that Whisper's use."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class WordErrors:
    """Edits that turn reference texts into hypotheses, the fewest possible.

    Attributes:
      substitutions, deletions, insertions: words changed, missing and added.
      words: of the references.
    """

    substitutions: int
    deletions: int
    insertions: int
    words: int

    @property
    def errors(self) -> int:
        """All edits."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors for each word of the references; may be above 1.

        Raises:
          ValueError: the references hold no word.
        """
        if self.words == 0:
            raise ValueError("the references hold no word: there is no error rate")
        return self.errors / self.words

    def __add__(self, other: WordErrors) -> WordErrors:
        return WordErrors(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.words + other.words,
        )

    def __str__(self) -> str:
        return (
            f"{self.errors} errors in {self.words} words"
            + (f", {100 * self.rate:.2f} %" if self.words else "")
            + f" ({self.substitutions} changed, {self.deletions} missing, "
            f"{self.insertions} added)"
        )


def word_errors(reference: str, hypothesis: str) -> WordErrors:
    """Edits between two texts, word by word (Levenshtein distance).

    Args:
      reference: what was said, words apart by white space.
      hypothesis: what was heard.

    Returns:
      `WordErrors`. Where several sets of edits are as small, one with the most
      substitutions is counted.

    Example:
      >>> word_errors("the cat sat on a mat", "the cat sat a big mat").errors
      2
    """
    said, heard = reference.split(), hypothesis.split()
    # Cost, then insertions and deletions: the smallest has the most substitutions.
    above = [(j, 0, j) for j in range(len(heard) + 1)]
    for i, word in enumerate(said, 1):
        row = [(i, i, 0)]
        for j, other in enumerate(heard, 1):
            wrong = word != other
            cost, missing, added = above[j - 1]
            best = (cost + wrong, missing, added)
            cost, missing, added = above[j]
            best = min(best, (cost + 1, missing + 1, added), key=_few)
            cost, missing, added = row[j - 1]
            row.append(min(best, (cost + 1, missing, added + 1), key=_few))
        above = row
    cost, missing, added = above[-1]
    return WordErrors(cost - missing - added, missing, added, len(said))


def word_error_rate(
    references: Sequence[str],
    hypotheses: Sequence[str],
    *,
    normalize: Callable[[str], str] | None = None,
) -> WordErrors:
    """Word errors of many texts together; `.rate` is the word error rate.

    Args:
      references: what was said.
      hypotheses: what was heard, in the same order.
      normalize: applied to both, such as `english_normalizer()`; None compares the
        words as they are.

    Returns:
      The sum of `WordErrors`.

    Raises:
      ValueError: not as many hypotheses as references.

    Example:
      >>> result = word_error_rate(["a b c", "d"], ["a x c", "d"])
      >>> result.errors, result.words, result.rate
      (1, 4, 0.25)
    """
    if len(references) != len(hypotheses):
        raise ValueError(
            f"{len(references)} references and {len(hypotheses)} hypotheses: give one "
            "hypothesis for each reference"
        )
    same = normalize or str
    total = WordErrors(0, 0, 0, 0)
    for said, heard in zip(references, hypotheses, strict=True):
        total += word_errors(same(said), same(heard))
    return total


def english_normalizer(
    spelling: Mapping[str, str] | str | os.PathLike[str] | None = None,
) -> Callable[[str], str]:
    """Whisper's normaliser of English text (arXiv 2212.04356, appendix C).

    Lower case, no punctuation, numbers as digits, contractions written out, one
    spelling. It drops what stands in brackets, as a note that nobody spoke: remove the
    brackets of spoken asides first.

    Args:
      spelling: British to American words, as a mapping or as a `normalizer.json` or a
        model folder with one. Default: spelling is left as it is.

    Returns:
      A function from text to text, that of `transformers`.

    Raises:
      ValueError: the file or folder has no such mapping.

    Example:
      >>> english_normalizer()("Mr. Brown hasn't paid twenty-one dollars, um, yet.")
      'mister brown has not paid $21 yet'
    """
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    if spelling is None:
        spelling = {}
    elif not isinstance(spelling, Mapping):
        spelling = _read_spelling(Path(spelling))
    return EnglishTextNormalizer(dict(spelling))


def _few(edits: tuple[int, int, int]) -> tuple[int, int]:
    return edits[0], edits[1] + edits[2]


def _read_spelling(path: Path) -> dict[str, str]:
    file = path / "normalizer.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ValueError(f"{file}: no readable spelling mapping ({e})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file}: must be an object of words")
    return data
