"""`TrainConfig`: a training described in YAML, validated before anything is loaded."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from angeljax._fields import ConfigError, build, choice, count, flag, pattern
from angeljax.recipe import Recipe
from angeljax.train._options import DistillOptions
from angeljax.train.guards import Divergence
from angeljax.train.optimizers import OptimizerConfig
from angeljax.train.sharding import AXES

DTYPES = ("bfloat16", "float32")
# YAML reads 1e-4, without a point, as text.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved.

    Attributes:
      every: steps between two checkpoints; 0 saves at the end only.
      keep: how many of the latest stay, beside the best.
    """

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        count("checkpoint.every", self.every, 0)
        count("checkpoint.keep", self.keep)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where numbers go; `metrics.jsonl` is always written.

    Attributes:
      every: steps in an interval.
      tensorboard: also write event files (needs `tensorboardX`).
    """

    every: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        count("log.every", self.every)
        flag("log.tensorboard", self.tensorboard)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out perplexity of what would be deployed, and KL to the teacher.

    Attributes:
      data: sources as in `TrainConfig.data`, not trained on; None does not evaluate.
      every: steps between two evaluations; 0 evaluates at the end only.
      tokens: the first so many; 0 for all.
      length: of a window.
      batch_size: windows in a step; None picks by memory.
    """

    data: str | tuple[str, ...] | None = None
    every: int = 0
    tokens: int = 65536
    length: int = 1024
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.data is not None:
            object.__setattr__(self, "data", _sources("eval.data", self.data))
        count("eval.every", self.every, 0)
        count("eval.tokens", self.tokens, 0)
        count("eval.length", self.length, 2)
        if self.batch_size is not None:
            count("eval.batch_size", self.batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that one training of a language model depends on.

    Attributes:
      model: where training starts, as for `angeljax compress --model`.
      data: token files and texts, see `load_tokens`; a string or a list.
      recipe: what is trained for: a shipped recipe's name, a file, or a recipe written
        out; None trains without quantization.
      steps: optimizer steps; or
      tokens: trained tokens, rounded up to whole steps.
      seq_length: tokens in a row.
      batch_size: rows in a step, all micro-batches together.
      accumulate: micro-batches in a step.
      dtype: of compute, "bfloat16" or "float32"; parameters are always trained in
        float32.
      remat: compute the inside of each layer again in the backward pass.
      scan_layers: keep the layers as one stack, which compiles faster.
      freeze: regular expressions of whole paths (`embed_tokens/embedding`) that are not
        trained.
      optimizer: see `OptimizerConfig`.
      distill: see `DistillOptions`, and `teacher`: "self", the start without
        quantization, or another model. None trains on the text alone.
      mesh: devices by axis, such as `{data: 1, fsdp: 8}`; None uses one.
      checkpoint, log, eval, divergence: see their classes.
      seed: of the order of the data and of all randomness.

    Raises:
      ConfigError: a field is out of range; one line.

    Example:
      >>> from angeljax.train import TrainConfig
      >>> config = TrainConfig.from_dict({"model": "smollm2", "tokens": 10**6,
      ...     "data": "pydoc_data.topics", "seq_length": 512, "recipe": "sherry"})
      >>> config.total_steps
      123
    """

    model: str
    data: str | tuple[str, ...]
    recipe: str | Mapping[str, Any] | None = None
    steps: int | None = None
    tokens: int | None = None
    seq_length: int = 1024
    batch_size: int = 16
    accumulate: int = 1
    dtype: str = "bfloat16"
    remat: bool = False
    scan_layers: bool = False
    freeze: tuple[str, ...] = ()
    optimizer: OptimizerConfig = OptimizerConfig()
    distill: Mapping[str, Any] | None = None
    mesh: Mapping[str, int] | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()
    divergence: Divergence = Divergence()
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(f"model must name a model, not {self.model!r}")
        object.__setattr__(self, "data", _sources("data", self.data))
        if (self.steps is None) == (self.tokens is None):
            raise ConfigError("give steps or tokens, one of them")
        for name in ("steps", "tokens"):
            if getattr(self, name) is not None:
                count(name, getattr(self, name))
        for name in ("seq_length", "batch_size", "accumulate"):
            count(name, getattr(self, name))
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"batch_size of {self.batch_size} cannot be divided into "
                f"{self.accumulate} micro-batches (accumulate)"
            )
        choice("dtype", self.dtype, DTYPES)
        flag("remat", self.remat)
        flag("scan_layers", self.scan_layers)
        if isinstance(self.freeze, str):
            object.__setattr__(self, "freeze", (self.freeze,))
        object.__setattr__(self, "freeze", tuple(self.freeze))
        for path in self.freeze:
            pattern("freeze", path)
        if self.mesh is not None:
            if not isinstance(self.mesh, Mapping) or set(self.mesh) - set(AXES):
                raise ConfigError(
                    f"mesh maps {' and '.join(AXES)} to numbers of devices, not "
                    f"{self.mesh!r}"
                )
            for name, size in self.mesh.items():
                count(f"mesh.{name}", size)
        count("seed", self.seed, 0)
        self.options()
        self.loaded_recipe()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return -(-self.tokens // (self.batch_size * self.seq_length))

    @property
    def teacher(self) -> str | None:
        """`self`, a model, or None where nothing is distilled."""
        if self.distill is None or not self.options().needs_teacher:
            return None
        return str(self.distill.get("teacher", "self"))

    def options(self) -> DistillOptions:
        """The terms of the loss; without `distill` the cross entropy alone.

        Raises:
          ConfigError: the section has an unknown or invalid field.
        """
        if self.distill is None:
            return DistillOptions(weight=0.0)
        if not isinstance(self.distill, Mapping):
            raise ConfigError(f"distill must be a mapping, not {self.distill!r}")
        teacher = self.distill.get("teacher", "self")
        if not isinstance(teacher, str) or not teacher:
            raise ConfigError(f"distill.teacher must be 'self' or a model: {teacher!r}")
        terms = {k: v for k, v in self.distill.items() if k != "teacher"}
        try:
            return DistillOptions.from_dict(terms)
        except ValueError as e:
            raise ConfigError(str(e)) from None

    def loaded_recipe(self) -> Recipe | None:
        """The recipe, read from its file if it is a name.

        Raises:
          RecipeError: there is none, or it is not valid.
        """
        if self.recipe is None:
            return None
        if isinstance(self.recipe, str):
            return Recipe.load(self.recipe)
        return Recipe.from_dict(self.recipe)

    @classmethod
    def from_dict(cls, data: Any) -> TrainConfig:
        """From plain values.

        Raises:
          ConfigError: an unknown, missing or invalid field.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"a training must be a mapping, not {data!r}")
        data = dict(data)
        for name, kind in _SECTIONS.items():
            if isinstance(data.get(name), kind):
                continue
            if data.get(name) is None:
                data.pop(name, None)
            else:
                data[name] = build(kind, data[name], name)
        missing = [name for name in ("model", "data") if name not in data]
        # An unknown field says more than the one that its typing error left out.
        known = {f.name for f in dataclasses.fields(cls)}
        if missing and not set(data) - known:
            raise ConfigError(f"a training needs the field {missing[0]!r}")
        return build(cls, data, "a training")

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` restores an equal configuration."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
        """Reads a YAML file.

        Args:
          path: the file.
          overrides: `key=value`, the key with dots (`optimizer.lr=1e-4`) and the value
            in YAML; they replace what the file says.

        Raises:
          ConfigError: one line that names the file, or the override.
        """
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as e:
            raise ConfigError(f"{path}: {e.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as e:
            raise ConfigError(
                f"{path} is not valid YAML: {' '.join(str(e).split())}"
            ) from None
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: a training must be a mapping, not {data!r}")
        for override in overrides:
            _override(data, override)
        try:
            return cls.from_dict(_numbers(data))
        except ValueError as e:
            raise ConfigError(f"{path}: {e}") from None

    def save(self, path: str | Path) -> None:
        """Writes it as YAML."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        Path(path).write_text(text, encoding="utf-8")


_SECTIONS: dict[str, Any] = {
    "optimizer": OptimizerConfig,
    "checkpoint": CheckpointConfig,
    "log": LogConfig,
    "eval": EvalConfig,
    "divergence": Divergence,
}


def _sources(where: str, value: Any) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list | tuple) or not listed:
        raise ConfigError(f"{where} must name files or data sets, not {value!r}")
    for source in listed:
        if not isinstance(source, str) or not source:
            raise ConfigError(f"{where} must name files or data sets, not {source!r}")
    return tuple(listed)


def _override(data: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not all(key.split(".")):
        raise ConfigError(f"--set takes key=value, such as steps=100, not {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: the value is not valid YAML") from None
    *sections, last = key.split(".")
    for section in sections:
        if data.get(section) is None:
            data[section] = {}
        data = data[section]
        if not isinstance(data, dict):
            raise ConfigError(f"--set {override}: {section} has no fields")
    data[last] = value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
