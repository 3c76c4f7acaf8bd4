"""`EagleTrainConfig`: the training of an EAGLE-3 head, described in YAML."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from angeljax._fields import ConfigError, choice, count, number
from angeljax.train._draft_config import DraftTrainConfig
from angeljax.train.eagle import EagleLoss

__all__ = ["EagleTrainConfig", "ExitTargets", "HeadConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The head at the start.

    Attributes:
      vocab_size: tokens that it can propose, the most frequent of the text; None for
        all of the target's.
      intermediate_size: of its MLP; None as in the target.
      layers: of the target whose outputs it reads, from 0; None for an early, a middle
        and a late one, as engines take them.
      normalize: "channel", "layer" or "none"; see
        `angeljax.train.feature_scales`.
      norm_scale: factor on the target's final norm at the start.
    """

    vocab_size: int | None = None
    intermediate_size: int | None = None
    layers: tuple[int, ...] | None = None
    normalize: str = "channel"
    norm_scale: float = 0.15

    def __post_init__(self) -> None:
        for name in ("vocab_size", "intermediate_size"):
            if getattr(self, name) is not None:
                count(f"head.{name}", getattr(self, name))
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
            for layer in self.layers:
                count("head.layers", layer, 0)
        choice("head.normalize", self.normalize, ("channel", "layer", "none"))
        number("head.norm_scale", self.norm_scale, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitTargets:
    """Outputs of the head for `SpecExit`, learnt from thinking that is in the text.

    Attributes:
      begin, end: tokens around the thinking, as text of one token each.
      weight: of their errors, beside the loss of the drafts.
    """

    begin: str = "<think>"
    end: str = "</think>"
    weight: float = 0.1

    def __post_init__(self) -> None:
        for name in ("begin", "end"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ConfigError(f"exit.{name} must be the text of a token")
        number("exit.weight", self.weight, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EagleTrainConfig(DraftTrainConfig):
    """Everything that the training of a head depends on.

    Attributes:
      head: see `HeadConfig`.
      loss: see `EagleLoss`.
      exit: see `ExitTargets`; None trains a head that drafts and nothing else.

    All other fields are those of any training of a drafter; see `DraftTrainConfig`.

    Raises:
      ConfigError: a field is out of range; one line.

    Example:
      >>> from angeljax.train.eagle_config import EagleTrainConfig
      >>> config = EagleTrainConfig.from_dict({"model": "smollm2", "tokens": 10**6})
      >>> config.total_steps, config.loss.steps
      (62, 5)
    """

    kind: ClassVar[str] = "eagle3"
    what: ClassVar[str] = "a training of a head"

    head: HeadConfig = HeadConfig()
    loss: EagleLoss = EagleLoss()
    exit: ExitTargets | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seq_length <= self.loss.steps + 1:
            raise ConfigError(
                f"seq_length of {self.seq_length} leaves no place for "
                f"{self.loss.steps} drafts (loss.steps)"
            )
