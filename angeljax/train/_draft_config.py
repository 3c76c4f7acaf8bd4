"""What the trainings of all drafters have in common, described in YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, get_args, get_type_hints

import yaml

from angeljax._fields import ConfigError, build, choice, count, flag, number
from angeljax.train import _yaml
from angeljax.train._amounts import check_amounts, steps_of
from angeljax.train._sections import CheckpointConfig, LogConfig, sources
from angeljax.train.config import DTYPES
from angeljax.train.document_tasks import check_tasks
from angeljax.train.guards import Divergence
from angeljax.train.optimizers import OptimizerConfig

__all__ = ["DraftEval", "DraftTrainConfig", "SelfText"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfText:
    """Text that the target writes itself, where `data` names none.

    A chat model writes the questions too, from the header of a user's turn on (Magpie,
    arXiv 2406.08464), and then answers them. Prompts with long passages need
    `documents`.

    Attributes:
      shards: files of documents, dealt out over the temperatures.
      rows: documents of a file.
      batch: documents that are sampled at a time. Where one ends the next of its file
        begins, so that `rows` should be several times as many. None samples a file as
        one batch, which goes on until its longest document ends.
      max_new_tokens: where an answer that has not ended is cut off.
      temperatures: of the answers; 0 is greedy.
      prompts: a text file with one question a line; None lets the model ask.
      question_tokens: where a question that has not ended is dropped.
      question_temperature: of the questions.
      question_starts: what the questions begin with, in turn; "" leaves it to the
        model.
      documents: token files, texts and folders of them, see `load_tokens`; passages of
        them are asked about. None: no such prompts.
      document_share: which share of the prompts these are.
      document_tokens: about how long the passages are, the least and the most.
      tasks: what is asked about them, templates with `{text}`; None for those of
        `angeljax.train.document_tasks`.
      seed: of the sampling.
      max_minutes: for all of it; what is written by then is the text. None: no limit.
    """

    shards: int = 16
    rows: int = 256
    max_new_tokens: int = 512
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    prompts: str | None = None
    question_tokens: int = 96
    question_temperature: float = 1.0
    question_starts: tuple[str, ...] = ("",)
    documents: str | tuple[str, ...] | None = None
    document_share: float = 0.5
    document_tokens: tuple[int, int] = (64, 320)
    tasks: tuple[str, ...] | None = None
    batch: int | None = None
    seed: int = 0
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        for name in ("shards", "rows", "max_new_tokens", "question_tokens"):
            count(f"generate.{name}", getattr(self, name))
        count("generate.seed", self.seed, 0)
        _minutes("generate.max_minutes", self.max_minutes)
        if isinstance(self.temperatures, int | float):
            object.__setattr__(self, "temperatures", (self.temperatures,))
        object.__setattr__(self, "temperatures", tuple(self.temperatures))
        if not self.temperatures:
            raise ConfigError("generate.temperatures: name at least one")
        for value in (*self.temperatures, self.question_temperature):
            number("generate.temperatures", value, 0)
        if self.batch is not None:
            count("generate.batch", self.batch)
        self._check_documents()
        if self.shards < len(self.temperatures):
            raise ConfigError(
                f"generate.shards of {self.shards} for {len(self.temperatures)} "
                "temperatures: each needs one"
            )

    def _check_documents(self) -> None:
        for name in ("question_starts", "tasks"):
            value = getattr(self, name)
            value = (value,) if isinstance(value, str) else value
            if value is not None:
                object.__setattr__(self, name, tuple(value))
                if not value or not all(isinstance(x, str) for x in value):
                    raise ConfigError(f"generate.{name} must name texts")
        check_tasks(self.tasks or ())
        if self.documents is not None:
            object.__setattr__(
                self, "documents", sources("generate.documents", self.documents)
            )
        number("generate.document_share", self.document_share, 0, 1)
        least_most = self.document_tokens
        if not isinstance(least_most, list | tuple) or len(least_most) != 2:
            raise ConfigError(
                f"generate.document_tokens must be [least, most], not {least_most!r}"
            )
        object.__setattr__(self, "document_tokens", tuple(least_most))
        for value in least_most:
            count("generate.document_tokens", value, 8)
        if least_most[0] >= least_most[1]:
            raise ConfigError(
                f"generate.document_tokens: {least_most[0]} must be below "
                f"{least_most[1]}"
            )


def _minutes(where: str, value: Any) -> None:
    if value is None:
        return
    number(where, value, 0)
    if value == 0:
        raise ConfigError(f"{where} is 0: leave it out for no limit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftEval:
    """Tokens for each forward of the target, on text that is held out.

    Attributes:
      source: a text file with one prompt a line, or a `.jsonl` file whose objects have
        `turns`, `prompt` or `question`; they are put into the chat template. None takes
        prompts from the end of the text, which is then not trained on.
      prompts: how many; 0 does not evaluate.
      prompt_tokens: of each at most: longer ones of a `source` are left out, and of the
        text it is the end that counts.
      max_new_tokens: written after each.
      num_tokens: drafts of a round; None takes what the drafter is trained for, and 4
        for an EAGLE head.
      every: steps between two evaluations; 0 evaluates at the end only.
    """

    source: str | None = None
    prompts: int = 32
    prompt_tokens: int = 128
    max_new_tokens: int = 128
    num_tokens: int | None = None
    every: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "max_new_tokens"):
            count(f"eval.{name}", getattr(self, name))
        if self.num_tokens is not None:
            count("eval.num_tokens", self.num_tokens)
        for name in ("prompts", "every"):
            count(f"eval.{name}", getattr(self, name), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftTrainConfig:
    """Everything that the training of a drafter depends on, whatever it is.

    Attributes:
      model: the target, as for `angeljax generate --model`, compressed or not: train
        for what will be served.
      data: token files, texts and folders of generated text, see `load_tokens`; None
        lets the target write, see `generate`.
      generate: see `SelfText`.
      answers_only: learn from answers alone, which the chat template shows; without a
        template all text counts.
      steps: optimizer steps; or
      tokens: trained tokens, rounded up to whole steps.
      max_minutes: of training, compilation included; the learning rate then falls with
        the time, and `steps` or `tokens` are only a limit. None: no limit.
      seq_length: tokens in a row.
      batch_size: rows in a step, all micro-batches together.
      accumulate: micro-batches in a step.
      scan_layers: run the layers of the target as a loop, which compiles once for all
        of them; False for a target whose layers differ in format.
      dtype: of compute, "bfloat16" or "float32"; the drafter is trained in float32.
      optimizer: see `OptimizerConfig`.
      checkpoint, log, eval, divergence: see their classes.
      seed: of the order of the data and of the start.

    Raises:
      ConfigError: a field is out of range; one line.
    """

    # Of drafters, as in the section `draft` of a recipe; and what messages call it.
    kind: ClassVar[str]
    what: ClassVar[str] = "a training of a drafter"

    model: str
    data: str | tuple[str, ...] | None = None
    generate: SelfText = SelfText()
    answers_only: bool = True
    steps: int | None = None
    tokens: int | None = None
    max_minutes: float | None = None
    seq_length: int = 1024
    batch_size: int = 16
    accumulate: int = 1
    scan_layers: bool = False
    dtype: str = "bfloat16"
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    eval: DraftEval = DraftEval()
    divergence: Divergence = Divergence()
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(f"model must name a model, not {self.model!r}")
        if self.data is not None:
            object.__setattr__(self, "data", sources("data", self.data))
        check_amounts(self)
        choice("dtype", self.dtype, DTYPES)
        flag("answers_only", self.answers_only)
        flag("scan_layers", self.scan_layers)
        _minutes("max_minutes", self.max_minutes)
        count("seed", self.seed, 0)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return steps_of(self)

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """From plain values; `kind` may be among them.

        Raises:
          ConfigError: an unknown, missing or invalid field.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"a training must be a mapping, not {data!r}")
        data = dict(data)
        choice("kind", data.pop("kind", cls.kind), (cls.kind,))
        types, fields = get_type_hints(cls), dataclasses.fields(cls)
        for field in fields:
            name, kind = field.name, _section(types[field.name])
            if kind is None:
                continue
            if data.get(name) is None:
                data.pop(name, None)
            elif not isinstance(data[name], kind):
                data[name] = build(kind, data[name], name)
        needed = [f.name for f in fields if f.default is dataclasses.MISSING]
        missing = [name for name in needed if name not in data]
        # An unknown field says more than the one that its typing error left out.
        if missing and not set(data) - {f.name for f in fields}:
            raise ConfigError(f"a training needs the field {missing[0]!r}")
        return build(cls, data, cls.what)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` restores an equal configuration."""
        return {"kind": self.kind, **_yaml.plain(dataclasses.asdict(self))}

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Reads a YAML file.

        Args:
          path: the file.
          overrides: `key=value`, the key with dots and the value in YAML.

        Raises:
          ConfigError: one line that names the file, or the override.
        """
        data = _yaml.read(path, overrides)
        try:
            return cls.from_dict(data)
        except ValueError as e:
            raise ConfigError(f"{path}: {e}") from None

    def save(self, path: str | Path) -> None:
        """Writes it as YAML."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        Path(path).write_text(text, encoding="utf-8")


def _section(hint: Any) -> type | None:
    """The class of a field that is a section, `Class` or `Class | None`."""
    for kind in (hint, *get_args(hint)):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return kind
    return None
