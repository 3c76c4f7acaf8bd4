"""Conversations that a chat model holds with itself, as text for its drafter.

A drafter must guess what its target writes, so that the best text is the target's own
(EAGLE-3, arXiv 2503.01840, section 4). The questions may be the model's as well: what
it writes after the header of a user's turn (Magpie, arXiv 2406.08464). Or they bring a
passage of given documents along, which the answers quote.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from angeljax import _shards
from angeljax._fields import ConfigError
from angeljax.models import LanguageModel, Tokenizer
from angeljax.models.config import ModelError
from angeljax.train.data import document_separator
from angeljax.train.document_tasks import TASKS, document_requests
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
    question_starts: Sequence[str] = ("",),
    documents: np.ndarray | None = None,
    document_share: float = 0.5,
    document_tokens: tuple[int, int] = (64, 320),
    tasks: Sequence[str] | None = None,
    batch: int | None = None,
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
      question_starts: what these begin with, in turn; "" leaves it to the model.
      documents: ids to ask about; see `document_requests`.
      document_share: which share of the prompts asks about them.
      document_tokens, tasks: see `document_requests`.
      batch: documents at a time; see `generate_tokens`.
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
    share = 0.0 if documents is None else document_share
    about = _mixed(rows * max(each), share, seed)
    requests: list[np.ndarray] = []
    if documents is not None:
        texts = document_requests(
            tokenizer,
            documents,
            int(sum(about[: rows * count].sum() for count in each)),
            tokens=document_tokens,
            tasks=tasks,
            seed=seed,
        )
        around = () if template is None else (*template.before, *template.between)
        words = _encoded(tokenizer, tasks or sum(TASKS.values(), ()))
        most = len(around) + max(map(len, words)) + document_tokens[1]
        requests = _short(_encoded(tokenizer, _chats(tokenizer, texts)), most)
    width = max(map(len, requests), default=1)
    asked: Sequence[Any] = []
    if share == 1:
        pass
    elif template is None:
        end, _ = document_separator(tokenizer)
        if end is None and questions is None:
            raise ConfigError(
                "generate: the model has neither a chat template nor a token between "
                "documents: name prompts"
            )
        begin = [] if end is None else [[end]]
        asked = begin if questions is None else _encoded(tokenizer, questions)
    elif questions is not None:
        asked = _encoded(tokenizer, _chats(tokenizer, questions))
    else:
        starts = [
            [*template.before, *tokenizer.encode(start)] for start in question_starts
        ]
        # With `batch`, the programs of the answers.
        most = max(map(len, starts)) + question_tokens + len(template.between)
        width = max(width, most)
        files = _questions(
            folder,
            max_minutes,
            model=model,
            params=params,
            shards=max(1, round(shards * (1 - share))),
            rows=rows,
            max_new_tokens=question_tokens,
            prompts=starts,
            batch=batch,
            width=None if batch is None else width,
            room=None if batch is None else max(question_tokens, max_new_tokens),
            seed=seed + 1,
            temperature=question_temperature,
            progress=progress,
        )
        asked = _asked(files, template, model.config.eos_ids)
    folders = []
    # One program for all temperatures; without `batch`, for all but greedy.
    width = max(width if batch is not None else 1, *map(len, (*asked, *requests)))
    given = 0
    for i, (temperature, count) in enumerate(zip(temperatures, each, strict=True)):
        # Each temperature has questions of its own, if there are enough.
        some = asked[i :: len(temperatures)] or asked
        if requests:
            here = about[: rows * count]
            some = _woven(here, requests[given : given + int(here.sum())], some)
            given += int(here.sum())
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
            batch=batch,
            width=width,
            room=None if batch is None else max(question_tokens, max_new_tokens),
            seed=seed,
            temperature=temperature,
            max_minutes=minutes,
            progress=progress,
        )
    return folders


def _mixed(count: int, share: float, seed: int) -> np.ndarray:
    """bool `[count]`: which prompts ask about documents."""
    return np.random.default_rng([seed, 0x51AE]).random(count) < share


def _short(requests: Sequence[np.ndarray], most: int) -> list[np.ndarray]:
    """Others in place of the few that are far longer than they were meant to be."""
    fits = [r for r in requests if len(r) <= most]
    if not fits:
        raise ConfigError(
            f"generate.documents: no passage makes a prompt of up to {most} tokens"
        )
    return [
        r if len(r) <= most else fits[i % len(fits)] for i, r in enumerate(requests)
    ]


def _woven(
    about: np.ndarray, requests: Sequence[Any], questions: Sequence[Any]
) -> list[Any]:
    """One list of both, questions again and again if there are too few."""
    first, second, n = iter(requests), 0, len(questions)
    found = []
    for is_request in about:
        if is_request:
            found.append(next(first))
        else:
            found.append(questions[second % n])
            second += 1
    return found


def _questions(
    folder: Path, max_minutes: float | None, **options: Any
) -> Sequence[Path]:
    """Files of questions that the model asks."""
    path = folder / "questions"
    # Where time ended them, and answers have begun, they stay what they are.
    if max_minutes is not None and any(folder.glob("temperature-*/manifest.json")):
        return _shards.text_files(path)
    minutes = None
    if max_minutes is not None:
        # With `batch`, the answers' programs are compiled in this time as well.
        minutes = max_minutes / (4 if options["batch"] is None else 2)
    return generate_tokens(path, max_minutes=minutes, **options)


def _chats(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Each as a user's turn, by the template; without one as it is."""
    try:
        before, _, after = tokenizer.chat(_MARK).partition(_MARK)
        plain = all(tokenizer.chat(x) == before + x + after for x in texts[:1])
    except ModelError:
        return list(texts)
    if not plain:
        return [tokenizer.chat(text) for text in texts]
    # A template takes a millisecond, and there may be a hundred thousand.
    return [before + text + after for text in texts]


def _encoded(tokenizer: Tokenizer, lines: Sequence[str]) -> list[np.ndarray]:
    return [np.asarray(ids, np.int32) for ids in tokenizer.encode_batch(lines)]


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
