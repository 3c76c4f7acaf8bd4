"""Zero-shot accuracy on multiple-choice tasks: the likeliest choice is the answer.

A choice is scored by the log-likelihood of its tokens given the context, as in the LM
Evaluation Harness. Logits never leave the device; what comes back is one number and
one flag for each choice, once, at the end.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from angeljax.evaluation import _choices
from angeljax.evaluation._progress import progress_bar
from angeljax.evaluation._steps import LogitsFn, vocabulary_size
from angeljax.evaluation.encoding import EncodedTask, Encoder, encode_task
from angeljax.evaluation.examples import Task


@dataclasses.dataclass(frozen=True, eq=False)
class TaskResult:
    """What a model made of a task. Accuracies are shares from 0 to 1.

    A standard error is that of the mean over independent examples; it is None for
    fewer than two.

    Attributes:
      name: of the task.
      examples: number of examples.
      acc: share where the right choice has the highest log-likelihood.
      acc_stderr: its standard error.
      acc_norm: the same with log-likelihood per byte, which does not favour short
        choices. Bytes are counted without the blank before the choice.
      acc_norm_stderr: its standard error.
      greedy: share where greedy decoding would write the right choice: for a last word,
        the accuracy with the whole vocabulary to choose from.
      greedy_stderr: its standard error.
      chance: accuracy of guessing.
      truncated: choices whose context was cut on the left to `max_length`.
      seconds: wall time, compilation included.
      log_likelihoods: float32 `[requests]`, in nats, in the order of the task.
      is_greedy: bool `[requests]`, whether greedy decoding would write the choice.
    """

    name: str
    examples: int
    acc: float
    acc_stderr: float | None
    acc_norm: float
    acc_norm_stderr: float | None
    greedy: float
    greedy_stderr: float | None
    chance: float
    truncated: int
    seconds: float
    log_likelihoods: Float[np.ndarray, " requests"] = dataclasses.field(repr=False)
    is_greedy: Bool[np.ndarray, " requests"] = dataclasses.field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The numbers as plain values for JSON, without the arrays.

        Returns:
          A dict with the names above as keys.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: v for k, v in values.items() if not isinstance(v, np.ndarray)}

    def __str__(self) -> str:
        def percent(value: float, error: float | None) -> str:
            return f"{value:.1%}" + ("" if error is None else f" ± {error:.1%}")

        return (
            f"{self.name}: acc {percent(self.acc, self.acc_stderr)}, "
            f"acc_norm {percent(self.acc_norm, self.acc_norm_stderr)}, "
            f"chance {self.chance:.1%}, {self.examples} examples"
        )


def score_encoded(
    logits_fn: LogitsFn,
    params: Any,
    task: EncodedTask,
    *,
    max_length: int | None = None,
    tokens_per_batch: int | None = None,
    progress: bool | None = None,
) -> TaskResult:
    """Scores a model on a task that is token ids already.

    Rows are sorted by length and padded to powers of two, so that a model is compiled
    for a handful of shapes; the next task and the next params of one structure use them
    again. Choices that differ in their last token only, such as letters, share a row.

    Args:
      logits_fn: the model.
      params: its params, dense or compressed.
      task: from `encode_task` or `EncodedTask.load`.
      max_length: most tokens that the model can see. Longer contexts lose their left
        end, where a `prefix_id` stands too. None for no limit.
      tokens_per_batch: rows times length of a step. By default what keeps float32
        logits below 256 MiB; more keeps a large accelerator busier.
      progress: a progress bar on standard error; None shows it on a terminal only.

    Returns:
      Accuracies with standard errors, and the scores of every choice.

    Raises:
      ValueError: the arrays or shapes do not fit together, a token is outside the
        vocabulary, a choice does not fit into `max_length`, or the model returned NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.evaluation import Example, Task, encode_task, score_encoded
      >>> class Characters:
      ...     def encode(self, text):
      ...         return [ord(character) for character in text]
      >>> def likes_small_numbers(params, tokens):
      ...     return jnp.broadcast_to(-params * jnp.arange(128), (*tokens.shape, 128))
      >>> task = Task("sums", (Example("1+1=", ("2", "3"), label=0),))
      >>> encoded = encode_task(task, Characters())
      >>> score_encoded(likes_small_numbers, 1.0, encoded).acc
      1.0
    """
    started = time.perf_counter()
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be positive, not {max_length}")
    task.check()
    rows = _choices.make_rows(task, max_length)
    lengths = np.asarray([len(ids) for ids in rows.inputs])
    # The dearest batch comes first: what does not fit into memory fails at once.
    longest = _choices.padded_length(int(lengths.max()))
    probe = np.full((1, longest), task.tokens.max(), np.int32)
    try:
        vocabulary = vocabulary_size(logits_fn, params, probe)
    except ValueError as error:
        raise ValueError(f"task {task.name}: {error}") from None

    batches = list(_choices.plan(lengths, vocabulary, tokens_per_batch))
    outputs = []
    with progress_bar(task.name, len(batches), progress) as advance:
        for chosen, size, length in batches:
            arrays = _choices.fill(rows, chosen, size, length)
            output = _choices.score_choices(logits_fn, params, *arrays)
            outputs.append(output)
            advance(output)

    log_likelihoods = np.empty(task.requests, np.float32)
    is_greedy = np.empty(task.requests, bool)
    # The only wait for the device.
    for (chosen, _, _), (found, greedy) in zip(
        batches, jax.device_get(outputs), strict=True
    ):
        requests = rows.requests[chosen]
        used = requests >= 0
        log_likelihoods[requests[used]] = found[: len(chosen)][used]
        is_greedy[requests[used]] = greedy[: len(chosen)][used]
    broken = int(np.isnan(log_likelihoods).sum())
    if broken:
        raise ValueError(
            f"task {task.name}: the log-likelihoods of {broken} of {task.requests} "
            "choices are NaN: the model or its params are broken"
        )
    return TaskResult(
        name=task.name,
        examples=task.examples,
        **_accuracies(task, log_likelihoods, is_greedy),
        truncated=rows.truncated,
        seconds=time.perf_counter() - started,
        log_likelihoods=log_likelihoods,
        is_greedy=is_greedy,
    )


def evaluate_tasks(
    logits_fn: LogitsFn,
    params: Any,
    tokenizer: Encoder | None,
    tasks: Iterable[Task | EncodedTask],
    *,
    limit: int | None = None,
    prefix_id: int | None = None,
    max_length: int | None = None,
    tokens_per_batch: int | None = None,
    progress: bool | None = None,
) -> list[TaskResult]:
    """Scores a model on some tasks; see `encode_task` and `score_encoded`.

    All tasks are encoded, and so checked, before the first is scored.

    Args:
      logits_fn: the model.
      params: its params, dense or compressed.
      tokenizer: what turns text into ids; None if all tasks are encoded.
      tasks: from `load_task`, or encoded.
      limit: examples of a task, taken at equal steps; see `Task.limit`. None for all.
      prefix_id: as in `encode_task`.
      max_length: as in `score_encoded`.
      tokens_per_batch: as in `score_encoded`.
      progress: as in `score_encoded`.

    Returns:
      One result for each task, in order.

    Raises:
      ValueError: as `encode_task` and `score_encoded`; or a limit or no tokenizer for
        a task that needs it otherwise.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.evaluation import Example, Task, evaluate_tasks
      >>> class Characters:
      ...     def encode(self, text):
      ...         return [ord(character) for character in text]
      >>> def uniform(params, tokens):
      ...     return jnp.zeros((*tokens.shape, 128))
      >>> task = Task("sums", (Example("1+1=", ("2", "33"), label=0),))
      >>> [result] = evaluate_tasks(uniform, {}, Characters(), [task])
      >>> print(result)
      sums: acc 100.0%, acc_norm 100.0%, chance 50.0%, 1 examples
    """
    encoded = []
    for task in tasks:
        if isinstance(task, EncodedTask):
            if limit is not None:
                raise ValueError(
                    f"task {task.name} is encoded: limit it before, with Task.limit"
                )
            encoded.append(task)
        elif tokenizer is None:
            raise ValueError(f"task {task.name} is text: pass a tokenizer")
        else:
            part = task.limit(limit)
            encoded.append(encode_task(part, tokenizer, prefix_id=prefix_id))
    return [
        score_encoded(
            logits_fn,
            params,
            task,
            max_length=max_length,
            tokens_per_batch=tokens_per_batch,
            progress=progress,
        )
        for task in encoded
    ]


def _accuracies(
    task: EncodedTask, log_likelihoods: np.ndarray, is_greedy: np.ndarray
) -> dict[str, Any]:
    """Fields of the result; of equal choices the first is taken."""
    per_byte = log_likelihoods.astype(np.float64) / task.choice_bytes
    cuts = task.first_requests[1:-1]

    def hits(scores: np.ndarray) -> np.ndarray:
        best = [part.argmax() for part in np.split(scores, cuts)]
        return np.asarray(best) == task.labels

    right = task.first_requests[:-1] + task.labels
    values: dict[str, Any] = {}
    for name, hit in (
        ("acc", hits(log_likelihoods)),
        ("acc_norm", hits(per_byte)),
        ("greedy", is_greedy[right]),
    ):
        count = len(hit)
        error = hit.std(ddof=1) / np.sqrt(count) if count > 1 else None
        values[name] = float(hit.mean())
        values[f"{name}_stderr"] = None if error is None else float(error)
    values["chance"] = float((1 / np.diff(task.first_requests)).mean())
    return values
