"""Sections of a `TrainConfig`."""

from __future__ import annotations

import dataclasses
from typing import Any

from angeljax._fields import ConfigError, choice, count, flag, number, pattern

MERGES = ("dense", "requantize")


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
            object.__setattr__(self, "data", sources("eval.data", self.data))
        count("eval.every", self.every, 0)
        count("eval.tokens", self.tokens, 0)
        count("eval.length", self.length, 2)
        if self.batch_size is not None:
            count("eval.batch_size", self.batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The factors that are trained on a packed tree; see `angeljax.qat.lora`.

    Attributes:
      rank: r of the addition `alpha / r A B`.
      alpha: default `2 * rank`.
      targets: regular expression for whole paths; None takes all packed leaves but
        embedding tables.
      merge: what the trained model is written as. "dense" adds the factors to the
        weights, which become arrays; "requantize" rounds the sums to the formats they
        had, which costs accuracy. What is written is what was evaluated. The factors
        are written beside it either way.
    """

    rank: int = 16
    alpha: float | None = None
    targets: str | None = None
    merge: str = "dense"

    def __post_init__(self) -> None:
        count("lora.rank", self.rank)
        if self.alpha is not None:
            number("lora.alpha", self.alpha, 0)
            if self.alpha == 0:
                raise ConfigError("lora.alpha must be > 0, not 0")
        if self.targets is not None:
            pattern("lora.targets", self.targets)
        choice("lora.merge", self.merge, MERGES)


def sources(where: str, value: Any) -> tuple[str, ...]:
    """Names of texts and files: a string, or a list of them."""
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list | tuple) or not listed:
        raise ConfigError(f"{where} must name files or data sets, not {value!r}")
    for source in listed:
        if not isinstance(source, str) or not source:
            raise ConfigError(f"{where} must name files or data sets, not {source!r}")
    return tuple(listed)
