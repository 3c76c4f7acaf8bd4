"""Multiple-choice tasks as text, read from JSON lines."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
      context: what the model reads.
      choices: what may follow, each with the blank that separates it from the context.
      label: index of the right choice.
      line: where it stands in its file, from 1; 0 if it came from none.
    """

    context: str
    choices: tuple[str, ...]
    label: int
    line: int = 0

    def __post_init__(self) -> None:
        if not self.choices:
            raise ValueError("there are no choices")
        if not all(choice.strip() for choice in self.choices):
            raise ValueError("a choice is empty")
        if not 0 <= self.label < len(self.choices):
            raise ValueError(
                f"label {self.label} is none of the {len(self.choices)} choices"
            )


@dataclasses.dataclass(frozen=True)
class Task:
    """Some examples under one name.

    Attributes:
      name: what results are listed under.
      examples: at least one.
      source: the file they came from, for messages.
    """

    name: str
    examples: tuple[Example, ...]
    source: str = ""

    def __post_init__(self) -> None:
        if not self.examples:
            raise ValueError(f"{self.source or self.name}: there are no examples")

    def where(self, number: int) -> str:
        """File and line of an example, as a message begins."""
        example = self.examples[number]
        if self.source and example.line:
            return f"{self.source}:{example.line}"
        return f"{self.source or self.name}: example {number}"

    def limit(self, count: int | None) -> Task:
        """The task with at most `count` examples, taken at equal steps.

        The same ones every time, and from all of a file that lists its subjects one
        after another, whereas the LM Evaluation Harness takes the first ones.

        Args:
          count: how many; None for all.

        Returns:
          The task itself where it has no more than that.

        Raises:
          ValueError: `count` is not positive.

        Example:
          >>> from angeljax.evaluation import Example, Task
          >>> task = Task("t", tuple(Example(str(i), ("a", "b"), 0) for i in range(10)))
          >>> [example.context for example in task.limit(3).examples]
          ['0', '3', '6']
        """
        if count is None:
            return self
        if count < 1:
            raise ValueError(f"limit must be positive, not {count}")
        total = len(self.examples)
        if count >= total:
            return self
        chosen = tuple(self.examples[i * total // count] for i in range(count))
        return dataclasses.replace(self, examples=chosen)


def load_task(path: str | os.PathLike[str]) -> Task:
    """Reads a multiple-choice task: one JSON object a line.

    An object has `"context"`, a string; `"choices"`, a list of strings, each with the
    blank that separates it from the context; and `"label"`, the index of the right
    one. Other fields are ignored, and so are empty lines.

    Args:
      path: of the file. Its name without the ending is the name of the task.

    Returns:
      The task.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: a line is not such an object; names the file and line.

    Example:
      >>> _ = Path("sums.jsonl").write_text(
      ...     '{"context": "1+1=", "choices": ["2", "3"], "label": 0}'
      ... )
      >>> load_task("sums.jsonl").examples[0].choices
      ('2', '3')
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such task file")
    examples = []
    with path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    examples.append(_parse(line, f"{path}:{number}", number))
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not UTF-8 text") from None
    return Task(path.stem, tuple(examples), str(path))


def load_tasks(paths: Iterable[str | os.PathLike[str]]) -> list[Task]:
    """Reads task files, and every `.jsonl` file of the folders among `paths`.

    Args:
      paths: files and folders.

    Returns:
      The tasks in the order of `paths`; those of a folder by name.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: a folder has no task, two tasks have one name, or as `load_task`.

    Example:
      >>> load_tasks([])
      []
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(path.glob("*.jsonl"))
            if not found:
                raise ValueError(f"{path}: no .jsonl file in this folder")
            files += found
        else:
            files.append(path)
    tasks: dict[str, Task] = {}
    for file in files:
        task = load_task(file)
        if task.name in tasks:
            raise ValueError(
                f"{file}: {tasks[task.name].source} is a task {task.name} already"
            )
        tasks[task.name] = task
    return list(tasks.values())


def _parse(line: str, where: str, number: int) -> Example:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not a JSON object")
    context, choices, label = map(record.get, ("context", "choices", "label"))
    if not isinstance(context, str):
        raise ValueError(f"{where}: 'context' must be a string")
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise ValueError(f"{where}: 'choices' must be a list of strings")
    # bool is an int to Python, and no index.
    if not isinstance(label, int) or isinstance(label, bool):
        raise ValueError(f"{where}: 'label' must be the index of a choice")
    try:
        return Example(context, tuple(choices), label, number)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
