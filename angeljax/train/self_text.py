"""Conversations that a chat model holds with itself, as text for its drafter.

A drafter must guess what its target writes, so that the best text is the target's own
(EAGLE-3, arXiv 2503.01840, section 4). The questions may be the model's as well: what
it writes after the header of a user's turn (Magpie, arXiv 2406.08464).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from angeljax._fields import ConfigError
from angeljax.models import LanguageModel, Tokenizer
from angeljax.models.config import ModelError
from angeljax.train.data import document_separator
from angeljax.train.eagle_data import places_of
from angeljax.train.generated import generate_tokens

__all__ = ["Template", "template_of", "write_conversations"]
_MARK = "0f9d1c"


@dataclasses.dataclass(frozen=True)
class Template:
    """Ids around the turns of a chat.

    Attributes:
      before: what stands before a question.
      between: what stands between a question and its answer.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]


def template_of(tokenizer: Tokenizer) -> Template | None:
    """What a tokenizer's chat template puts around a question; None without one.

    Args:
      tokenizer: of the target.
    """
    try:
        before, mark, between = tokenizer.chat(_MARK).partition(_MARK)
    except ModelError:
        return None
    if not mark or not between:
        return None
    return Template(tuple(tokenizer.encode(before)), tuple(tokenizer.encode(between)))


def write_conversations(
    folder: str | Path,
    model: LanguageModel,
    params: Any,
    tokenizer: Tokenizer,
    *,
    shards: int,
    rows: int,
    max_new_tokens: int,
    temperatures: Sequence[float] = (0.0,),
    questions: Sequence[str] | None = None,
    question_tokens: int = 96,
    question_temperature: float = 1.0,
    seed: int = 0,
    max_minutes: float | None = None,
    progress: bool | None = None,
) -> list[Path]:
    """Lets a model answer questions, or ask them first; goes on where it stopped.

    Args:
      folder: gets `questions/` and a folder for each temperature.
      model: the target.
      params: its params, compressed or not.
      tokenizer: its tokenizer; without a chat template the model writes what it likes.
      shards: files of documents in all; at least one for each temperature.
      rows: documents of a file.
      max_new_tokens: of an answer.
      temperatures: of the answers, in turn.
      questions: what is asked; None for what the model asks itself.
      question_tokens: where a question that has not ended is dropped.
      question_temperature: of these.
      seed: of the sampling.
      max_minutes: for all of it, compilation included; what is written by then is the
        text. Default no limit.
      progress: see `generate_tokens`.

    Returns:
      The folders, for `load_tokens`.

    Raises:
      ConfigError: the model asks no question that ends.
    """
    folder, template = Path(folder), template_of(tokenizer)
    begun = time.perf_counter()
    each = [len(range(i, shards, len(temperatures))) for i in range(len(temperatures))]
    if template is None:
        end, _ = document_separator(tokenizer)
        if end is None and questions is None:
            raise ConfigError(
                "generate: the model has neither a chat template nor a token between "
                "documents: name prompts"
            )
        begin = [] if end is None else [[end]]
        asked = begin if questions is None else _encoded(tokenizer, questions)
    elif questions is not None:
        asked = _encoded(tokenizer, [tokenizer.chat(line) for line in questions])
    else:
        files = generate_tokens(
            folder / "questions",
            model,
            params,
            shards=shards,
            rows=rows,
            max_new_tokens=question_tokens,
            prompts=[list(template.before)],
            seed=seed + 1,
            temperature=question_temperature,
            max_minutes=None if max_minutes is None else max_minutes / 4,
            progress=progress,
        )
        asked = _asked(files, template, model.config.eos_ids)
    folders = []
    # One program for all temperatures but greedy.
    width = max(map(len, asked))
    for i, (temperature, count) in enumerate(zip(temperatures, each, strict=True)):
        # Each temperature has questions of its own, if there are enough.
        some = asked[i :: len(temperatures)] or asked
        folders.append(folder / f"temperature-{temperature:g}")
        minutes = None
        if max_minutes is not None:
            left = max_minutes - (time.perf_counter() - begun) / 60
            minutes = max(left, 1e-6) / (len(temperatures) - i)
        generate_tokens(
            folders[-1],
            model,
            params,
            shards=count,
            rows=rows,
            max_new_tokens=max_new_tokens,
            prompts=some,
            seed=seed,
            temperature=temperature,
            width=width,
            max_minutes=minutes,
            progress=progress,
        )
    return folders


def _encoded(tokenizer: Tokenizer, lines: Sequence[str]) -> list[list[int]]:
    return [tokenizer.encode(line) for line in lines]


def _asked(
    files: Sequence[Path], template: Template, ends: Sequence[int]
) -> list[list[int]]:
    """Whole prompts of the questions that ended, each once."""
    found: dict[tuple[int, ...], None] = {}
    for file in files:
        ids = np.load(file)
        starts = places_of(ids, template.before)
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            body = ids[start + len(template.before) : stop]
            at = np.flatnonzero(np.isin(body, ends))
            if len(at) and at[0] > 0:
                body = body[: at[0]]
                found[(*template.before, *map(int, body), *template.between)] = None
    if not found:
        raise ConfigError(
            "generate: the model asked no question that ended: raise "
            "generate.question_tokens, or name generate.prompts"
        )
    return [list(prompt) for prompt in found]
