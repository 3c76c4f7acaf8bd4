"""Requests about passages of given documents, to be answered by a chat model.

What a model asks itself is short. Answers to requests that bring a text along quote it,
and a drafter learns to copy from far above only where training text does so.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence

import numpy as np

from angeljax._fields import ConfigError
from angeljax.models import Tokenizer
from angeljax.train.data import document_separator

__all__ = ["TASKS", "check_tasks", "document_requests", "kind_of"]

_PROSE = (
    # Summaries.
    "Sum this up: {text}",
    "Summarize the following text.\n\n{text}",
    "{text}\n\nSummarize the above in a few sentences.",
    "Give a summary of the passage below, three sentences long.\n\n{text}",
    "Write a one-paragraph summary of this article:\n\n{text}",
    "TL;DR\n\n{text}",
    "{text}\n\nWhat is this text about? Answer in one or two sentences.",
    "Shorten the following text to half its length:\n\n{text}",
    "Make this text shorter without losing what is important.\n\n{text}",
    "List the key points of the following text.\n\n{text}",
    "{text}\n\nGive me the main points as a bulleted list.",
    "Extract five facts from this passage:\n\n{text}",
    # Questions with passages.
    "{text}\n\nWhat is the main subject of this passage?",
    "{text}\n\nWho or what is described here, and how?",
    "{text}\n\nWhat happens, and why?",
    "{text}\nWhat does the text say about its most important person or thing?",
    "{text}\nWhat is the reason that is given?",
    "{text}\n\nAnswer from the passage alone: where and when does this take place?",
    "Answer the question by the context.\n\nContext: {text}\n\nQuestion: What is the "
    "first thing that is mentioned, and what is said about it?",
    "Use the passage below to answer.\n\nPassage: {text}\n\nQuestion: What does the "
    "author want to say?\nAnswer:",
    "Read the text and quote the sentence that matters most.\n\n{text}",
    "Write three questions about this text, each with its answer.\n\n{text}",
    "{text}\n\nIs this true? Explain with the words of the text.",
    # Other words for the same.
    "Rewrite the following text in simpler words.\n\n{text}",
    "Paraphrase: {text}",
    "Rewrite this passage in modern English:\n\n{text}",
    "Rewrite the text below as an email to a friend.\n\n{text}",
    "Correct the spelling and grammar of the following text. Return the whole text.\n\n"
    "{text}",
    "Proofread this and give me the corrected version:\n\n{text}",
    "Explain this to a child.\n\n{text}",
    "Turn this text into a dialogue:\n\n{text}",
    # What is in it.
    "List all names of people and places in this text.\n\n{text}",
    "Extract the names, dates and numbers from the text below as JSON.\n\n{text}",
    "{text}\n\nWhich keywords describe this text? Give ten.",
    "Suggest a title for the following text and say why.\n\n{text}",
    "Give this passage a headline:\n\n{text}",
    "Is the tone of the following text positive, negative or neutral? Explain.\n\n"
    "{text}",
    # On and on.
    "Continue the following text.\n\n{text}",
    "{text}\n\nWrite the next paragraph.",
    "Repeat the following text word for word.\n\n{text}",
    # Into other languages.
    "Translate the following text into German.\n\n{text}",
    "Translate English to German: {text}",
    "Translate to French: {text}",
    "Translate the following text into Spanish.\n\n{text}",
)
_CODE = (
    "Explain the following code.\n\n{text}",
    "What does this do?\n\n```\n{text}\n```",
    "{text}\n\nExplain this step by step.",
    "Add comments to this code:\n\n```\n{text}\n```",
    "Find mistakes in the following and write it again without them.\n\n{text}",
    "Rewrite this so that it is easier to read.\n\n```\n{text}\n```",
    "Write a Python function for what is described here.\n\n{text}",
    "Summarize what this documentation says.\n\n{text}",
    "{text}\n\nGive a short example of how to use this.",
    "Complete what follows and return all of it.\n\n{text}",
)
_GERMAN = (
    "Translate from German: {text}",
    "Translate the following text from German to English.\n\n{text}",
    "Translate to English: {text}",
    "{text}\n\nWhat does this mean in English?",
    "Give an English translation of this German text:\n\n{text}",
    "Summarize the following German text in English.\n\n{text}",
    "Fasse den folgenden Text zusammen.\n\n{text}",
    "Repeat the following text word for word.\n\n{text}",
)
# What is asked about a passage, by its kind; see `kind_of`.
TASKS = {"prose": _PROSE, "code": _CODE, "german": _GERMAN}
_ENDS = re.compile(
    r"(?<=[.!?…])(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)"
    r"[\"'”’»)\]]*\s+(?=\S)|\n\s*\n"
)
_WORD = re.compile(r"[^\W\d_]+")
_OFTEN = frozenset(
    "der die das und ist nicht ein eine zu den mit auf dem für sich von im wird "
    "werden oder auch es sie er als wie".split()
)
_SIGNS = re.compile(r"[{}()\[\]<>=;_#*&|\\/+]")
# Tokens of a document whose place in its text is known, one of so many.
_RUN = 64
# Passages that are read before it is said that a source has none.
_TRIES = 64


def kind_of(text: str) -> str:
    """Which of the `TASKS` suit a passage: "prose", "code" or "german".

    Example:
      >>> from angeljax.train.document_tasks import kind_of
      >>> kind_of("Er sagte, dass die Leute nicht mit dem Zug kommen.")
      'german'
      >>> kind_of("for (i = 0; i < n; i++) { sum += x[i]; }")
      'code'
    """
    words = _WORD.findall(text.lower())
    if sum(word in _OFTEN for word in words) > len(words) // 6:
        return "german"
    return "code" if len(_SIGNS.findall(text)) > len(text) // 25 else "prose"


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuses templates without `{text}`, with a ConfigError."""
    for i, task in enumerate(tasks):
        if not isinstance(task, str) or "{text}" not in task:
            raise ConfigError(f"generate.tasks: {task!r}, number {i}, lacks {{text}}")


def document_requests(
    tokenizer: Tokenizer,
    ids: np.ndarray,
    count: int,
    *,
    tokens: tuple[int, int] = (64, 320),
    tasks: Sequence[str] | None = None,
    seed: int = 0,
) -> list[str]:
    """Requests about passages, each of whole sentences; a function of the arguments.

    Places and lengths are drawn evenly, so that long documents give more passages than
    short ones and all of a text is used.

    Args:
      tokenizer: of the ids.
      ids: documents with the tokenizer's separator between them, `[tokens]`; see
        `load_tokens`.
      count: how many.
      tokens: about how long passages are, the least and the most.
      tasks: templates with `{text}`, taken at random; None takes those of `TASKS` that
        suit the passage.
      seed: of what is drawn.

    Returns:
      Texts for user's turns.

    Raises:
      ConfigError: a template has no `{text}`, or the documents no such passages.

    Example:
      >>> from angeljax.models import load_model
      >>> from angeljax.train import load_tokens
      >>> from angeljax.train.document_tasks import document_requests
      >>> tokenizer = load_model("smollm2").tokenizer  # doctest: +SKIP
      >>> ids = load_tokens("manual.txt", tokenizer)  # doctest: +SKIP
      >>> document_requests(tokenizer, ids, 1)  # doctest: +SKIP
      ['Sum this up: ...']
    """
    check_tasks(tasks or ())
    rng = np.random.default_rng([seed, 0xD0C5])
    found: list[str] = []
    for text in _passages(tokenizer, ids, count, tokens, rng):
        suited = TASKS[kind_of(text)] if tasks is None else tasks
        found.append(suited[int(rng.integers(len(suited)))].replace("{text}", text))
    return found


def _passages(
    tokenizer: Tokenizer,
    ids: np.ndarray,
    count: int,
    tokens: tuple[int, int],
    rng: np.random.Generator,
) -> Iterator[str]:
    least, most = tokens
    separator, _ = document_separator(tokenizer)
    ends = np.flatnonzero(ids == (-1 if separator is None else separator))
    starts = np.append(0, ends + 1)
    ends = np.append(ends, len(ids))

    @functools.cache
    def document(number: int) -> tuple[str, np.ndarray]:
        """Its text, and where each run of tokens begins in it, about."""
        some = ids[starts[number] : ends[number]]
        text = tokenizer.decode(some.tolist())
        # A letter of several tokens is counted twice where a run cuts it.
        runs = [some[i : i + _RUN].tolist() for i in range(0, len(some), _RUN)]
        marks = np.cumsum([0] + [len(tokenizer.decode(run)) for run in runs])
        return text, marks * len(text) / max(marks[-1], 1)

    marked = [mark for mark in tokenizer.special.values() if mark]
    given = tried = 0
    while given < count:
        if tried >= _TRIES * (given + 1):
            raise ConfigError(
                f"generate.documents: {given} passages of {least} to {most} tokens "
                f"in {tried} places: lower generate.document_tokens, or name other text"
            )
        tried += 1
        place, length = int(rng.integers(len(ids))), int(rng.integers(least, most + 1))
        number = int(np.searchsorted(ends, place))
        text, marks = document(number)
        size = ends[number] - starts[number]
        at = np.minimum(np.arange(len(marks)) * _RUN, size)
        first = place - starts[number]
        length = min(length, int(size - first))
        begin, stop = np.interp([first, first + length], at, marks).astype(int)
        # A sentence may be left out before it, and one behind.
        some = text[begin : 2 * stop - begin]
        passage = _whole_sentences(some, stop - begin, begin == 0)
        if passage is None or any(mark in passage for mark in marked):
            continue  # nobody but the template ends a turn
        if len(passage) * length < least * (stop - begin):
            continue
        given += 1
        yield passage


def _whole_sentences(text: str, most: int, first: bool) -> str | None:
    """Sentences from the first that begins here, as many as `most` characters hold."""
    bounds = list(_ENDS.finditer(text))
    if not first:
        if not bounds:
            return None
        begin, bounds = bounds[0].end(), bounds[1:]
    else:
        begin = 0
    inside = [b.start() for b in bounds if b.start() - begin <= most]
    if not inside:
        return None
    # The mark that closes a quotation belongs to its sentence.
    stop = inside[-1]
    while stop < len(text) and text[stop] in "\"'”’»)]":
        stop += 1
    return text[begin:stop].strip() or None
