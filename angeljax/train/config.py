"""`TrainConfig`: a training described in YAML, validated before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from angeljax._fields import ConfigError, build, choice, count, flag, pattern
from angeljax.recipe import Recipe
from angeljax.train import _yaml
from angeljax.train._amounts import check_amounts, steps_of
from angeljax.train._options import BlockwiseOptions, DistillOptions
from angeljax.train._sections import (
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    LoraConfig,
    sources,
)
from angeljax.train.guards import Divergence
from angeljax.train.optimizers import OptimizerConfig
from angeljax.train.sharding import AXES

DTYPES = ("bfloat16", "float32")
# Each with the fields that mean nothing there.
MODES: dict[str, tuple[str, ...]] = {
    "end_to_end": ("blockwise", "lora"),
    "blockwise": (
        *("lora", "accumulate", "remat", "freeze", "optimizer", "distill", "mesh"),
        *("checkpoint", "log", "divergence"),
    ),
    "lora": ("blockwise", "freeze"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that one training of a language model depends on.

    Attributes:
      model: where training starts, as for `angeljax compress --model`.
      data: token files, texts and folders of generated text, see `load_tokens`; a
        string or a list.
      recipe: what is trained for: a shipped recipe's name, a file, or a recipe written
        out; None trains without quantization.
      mode: "end_to_end" trains all weights with the loss of the model's output;
        "blockwise" trains one layer after another to give what the full-precision layer
        gave, see `angeljax.train.blockwise`; "lora" trains low-rank additions to packed
        weights, see `angeljax.qat.lora`: those of a compressed `model`, or what
        `recipe` makes of another.
      steps: optimizer steps; or
      tokens: trained tokens, rounded up to whole steps. "blockwise" takes so many once,
        and uses them for `blockwise.epochs` passes over every layer.
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
        quantization, another model, or a folder that `write_teacher` wrote for this
        text and `seq_length`. None trains on the text alone.
      blockwise: fields of `BlockwiseOptions` but `batch_size` and `seed`, which are
        those of the training.
      lora: see `LoraConfig`.
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
    mode: str = "end_to_end"
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
    blockwise: Mapping[str, Any] | None = None
    lora: LoraConfig = LoraConfig()
    mesh: Mapping[str, int] | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()
    divergence: Divergence = Divergence()
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(f"model must name a model, not {self.model!r}")
        object.__setattr__(self, "data", sources("data", self.data))
        check_amounts(self)
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
        self._check_mode()
        self.options()
        self.loaded_recipe()

    def _check_mode(self) -> None:
        choice("mode", self.mode, tuple(MODES))
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in MODES[self.mode]:
            if getattr(self, name) != defaults[name]:
                hint = f", or set mode: {name}" if name in MODES else ""
                raise ConfigError(
                    f"{name} means nothing in mode {self.mode}: leave it out{hint}"
                )
        if self.mode == "blockwise":
            self.reconstruction()
            if self.recipe is None:
                raise ConfigError("mode blockwise needs a recipe to train for")
            if self.eval.every:
                raise ConfigError(
                    "eval.every must be 0 in mode blockwise, which evaluates at the end"
                )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return steps_of(self)

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
        return DistillOptions.from_dict(terms)

    def reconstruction(self) -> BlockwiseOptions:
        """How a layer is trained in mode "blockwise".

        Raises:
          ConfigError: the section has an unknown or invalid field.
        """
        given = {} if self.blockwise is None else self.blockwise
        own = {"batch_size": self.batch_size, "seed": self.seed}
        if isinstance(given, Mapping):
            for name in own:
                if name in given:
                    raise ConfigError(
                        f"blockwise has no field {name!r}: set {name} of the training"
                    )
            given = {**given, **own}
        return build(BlockwiseOptions, given, "blockwise")

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
        return _yaml.plain(dataclasses.asdict(self))

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
        data = _yaml.read(path, overrides)
        try:
            return cls.from_dict(data)
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
    "lora": LoraConfig,
    "divergence": Divergence,
}
