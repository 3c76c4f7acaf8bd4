"""Multiple-choice examples as token ids: all that scoring needs, as plain arrays.

Tokenisation runs on the host and needs a tokenizer; scoring runs on the device and
needs neither. The arrays go from one to the other in memory or as an `.npz` file.
"""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from angeljax.evaluation.examples import Task


class Encoder(Protocol):
    """What tokenisation needs: `angeljax.models.Tokenizer`, or one of your own."""

    def encode(self, text: str, /) -> Sequence[int]:
        """Ids of a text, without the special tokens that may stand around one."""


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedTask:
    """A task as token ids. A request is one choice with its context.

    Requests of one example follow each other. Request `i` has the ids
    `tokens[offsets[i] : offsets[i + 1]]`, of which those from `choice_starts[i]` on
    belong to the choice.

    Attributes:
      name: of the task.
      tokens: int32 `[tokens]`, the ids of all requests.
      offsets: int64 `[requests + 1]`.
      choice_starts: int32 `[requests]`, at least 1: nothing predicts a first token.
      choice_bytes: int32 `[requests]`, bytes of the choice in UTF-8 without the blank
        that separates it from the context.
      first_requests: int32 `[examples + 1]`; example `j` has the requests from
        `first_requests[j]` up to `first_requests[j + 1]`.
      labels: int32 `[examples]`, the right choice of each example.
    """

    name: str
    tokens: Int[np.ndarray, " tokens"]
    offsets: Int[np.ndarray, " requests_and_one"]
    choice_starts: Int[np.ndarray, " requests"]
    choice_bytes: Int[np.ndarray, " requests"]
    first_requests: Int[np.ndarray, " examples_and_one"]
    labels: Int[np.ndarray, " examples"]

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self.labels)

    @property
    def requests(self) -> int:
        """Number of choices over all examples."""
        return len(self.choice_starts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the arrays as one `.npz` file, without pickle.

        Args:
          path: of the file; must end in `.npz`.

        Raises:
          ValueError: the name has another ending.
          OSError: it cannot be written.
        """
        if Path(path).suffix != ".npz":
            raise ValueError(f"{os.fspath(path)}: the name must end in .npz")
        arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        part = Path(path).with_suffix(".part")
        try:
            with part.open("wb") as file:
                np.savez_compressed(file, **arrays)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EncodedTask:
        """Reads what `save` wrote, and checks it.

        Args:
          path: of the file.

        Returns:
          The task.

        Raises:
          FileNotFoundError: nothing is there.
          ValueError: it is another kind of file, or its arrays do not fit together.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        try:
            # Opened here: np.load forgets to close a file that it cannot read.
            with open(path, "rb") as file:
                archive = np.load(file, allow_pickle=False)
                arrays: dict[str, Any] = {name: archive[name] for name in names}
        except (LookupError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as e:
            reason = str(e).strip().split("\n")[0]
            message = f"{os.fspath(path)}: not an encoded task: {reason}"
            raise ValueError(message) from None
        arrays["name"] = str(arrays["name"])
        task = cls(**arrays)
        try:
            task.check()
        except ValueError as e:
            raise ValueError(f"{os.fspath(path)}: {e}") from None
        return task

    def check(self) -> None:
        """Whether the arrays fit together.

        Raises:
          ValueError: they do not; names the array.
        """

        def steps(offsets: np.ndarray, end: int, least: int) -> bool:
            return bool(
                offsets.ndim == 1
                and len(offsets) > 1
                and offsets[0] == 0
                and offsets[-1] == end
                and (np.diff(offsets) >= least).all()
            )

        if not steps(self.offsets, len(self.tokens), least=2):
            raise ValueError("offsets must go from 0 to the end, by 2 tokens at least")
        if len(self.offsets) != self.requests + 1:
            raise ValueError("offsets must be one more than choice_starts")
        lengths = np.diff(self.offsets)
        if ((self.choice_starts < 1) | (self.choice_starts >= lengths)).any():
            raise ValueError("choice_starts must lie inside their requests")
        if self.choice_bytes.shape != lengths.shape or (self.choice_bytes < 1).any():
            raise ValueError("choice_bytes must be one positive number a request")
        if not steps(self.first_requests, self.requests, least=1):
            raise ValueError("first_requests must go from 0 to the last request")
        counts = np.diff(self.first_requests)
        if self.labels.shape != counts.shape:
            raise ValueError("labels must be one number an example")
        if ((self.labels < 0) | (self.labels >= counts)).any():
            raise ValueError("labels must be numbers of choices")
        if self.tokens.min() < 0:
            raise ValueError("tokens must not be negative")


def encode_task(
    task: Task, tokenizer: Encoder, *, prefix_id: int | None = None
) -> EncodedTask:
    """Turns the examples of a task into token ids.

    As in the LM Evaluation Harness, context and choice are encoded together, so that
    the tokenizer may treat the text between them as it would anywhere; the context is
    encoded once more by itself, and as many tokens as that takes are the context's.
    What is left is the choice. Blanks at the end of a context count to the choice,
    where tokenizers of the byte-pair kind expect them.

    Args:
      task: from `load_task`.
      tokenizer: what turns text into ids; see `Encoder`.
      prefix_id: an id to put before every context: the BOS of models that expect one.
        Needed for an empty context, for nothing predicts a first token.

    Returns:
      Arrays of ids.

    Raises:
      ValueError: a context is empty and there is no `prefix_id`, or a choice has no
        token of its own; names the file and line.

    Example:
      >>> from angeljax.evaluation import Example, Task, encode_task
      >>> class Characters:
      ...     def encode(self, text):
      ...         return [ord(character) for character in text]
      >>> task = Task("sums", (Example("1+1=", ("2", "33"), label=0),))
      >>> encoded = encode_task(task, Characters())
      >>> encoded.offsets.tolist(), encoded.choice_starts.tolist()
      ([0, 5, 11], [4, 4])
    """
    prefix = [] if prefix_id is None else [prefix_id]
    requests: list[list[int]] = []
    starts, sizes = [], []
    for number, example in enumerate(task.examples):
        context = example.context.rstrip()
        blanks = example.context[len(context) :]
        before = list(tokenizer.encode(context)) if context else []
        if not prefix and not before:
            raise ValueError(
                f"{task.where(number)}: the context is empty: pass a prefix_id, such "
                "as the id of the BOS or end-of-text token"
            )
        for choice in example.choices:
            ids = list(tokenizer.encode(context + blanks + choice))
            if len(ids) <= len(before):
                raise ValueError(
                    f"{task.where(number)}: the tokenizer leaves no token for the "
                    f"choice {choice!r} after its context"
                )
            requests.append(prefix + ids)
            starts.append(len(prefix) + len(before))
            sizes.append(len(choice.removeprefix(" ").encode()))
    return EncodedTask(
        name=task.name,
        tokens=np.concatenate([np.asarray(ids, np.int32) for ids in requests]),
        offsets=np.cumsum([0, *map(len, requests)], dtype=np.int64),
        choice_starts=np.asarray(starts, np.int32),
        choice_bytes=np.asarray(sizes, np.int32),
        first_requests=np.cumsum(
            [0, *(len(e.choices) for e in task.examples)], dtype=np.int32
        ),
        labels=np.asarray([e.label for e in task.examples], np.int32),
    )
