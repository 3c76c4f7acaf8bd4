"""The trainings of block drafters and of MTP layers, described in YAML."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from angeljax._fields import ConfigError, count, flag
from angeljax.train._draft_config import DraftTrainConfig
from angeljax.train.draft_losses import DraftLoss

__all__ = ["BlockOptions", "BlockTrainConfig", "MTPOptions", "MTPTrainConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """The network of a block drafter, and how many blocks it learns from.

    Attributes:
      mask_token: text of the token whose embedding stands where a draft is wanted, one
        that no text has; or
      mask_token_id: its id.
      num_layers: of the drafter.
      block_size: slots of a block: the last committed token and the drafts.
      intermediate_size: of its MLPs; None as in the target.
      target_layers: whose outputs it reads, from 0; None spreads as many as the drafter
        has layers.
      anchors: blocks of a row, drawn anew at each step.
    """

    mask_token: str | None = None
    mask_token_id: int | None = None
    num_layers: int = 5
    block_size: int = 16
    intermediate_size: int | None = None
    target_layers: tuple[int, ...] | None = None
    anchors: int = 64

    def __post_init__(self) -> None:
        if (self.mask_token is None) == (self.mask_token_id is None):
            raise ConfigError(
                "give block.mask_token or block.mask_token_id, one of them"
            )
        if self.mask_token_id is not None:
            count("block.mask_token_id", self.mask_token_id, 0)
        elif not isinstance(self.mask_token, str) or not self.mask_token:
            raise ConfigError(
                f"block.mask_token must be a token, not {self.mask_token!r}"
            )
        count("block.block_size", self.block_size, 2)
        for name in ("num_layers", "anchors"):
            count(f"block.{name}", getattr(self, name))
        if self.intermediate_size is not None:
            count("block.intermediate_size", self.intermediate_size)
        if self.target_layers is not None:
            object.__setattr__(self, "target_layers", tuple(self.target_layers))
            for layer in self.target_layers:
                count("block.target_layers", layer, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockTrainConfig(DraftTrainConfig):
    """Everything that the training of a block drafter depends on.

    Attributes:
      block: see `BlockOptions`.
      loss: see `DraftLoss`.

    All other fields are those of any training of a drafter; see `DraftTrainConfig`.

    Raises:
      ConfigError: a field is out of range; one line.

    Example:
      >>> from angeljax.train import BlockTrainConfig
      >>> config = BlockTrainConfig.from_dict({
      ...     "model": "smollm2", "steps": 100, "block": {"mask_token": "<reponame>"},
      ... })
      >>> config.block.block_size, config.loss.gamma
      (16, 7.0)
    """

    kind: ClassVar[str] = "dflash"
    what: ClassVar[str] = "a training of a block drafter"

    block: BlockOptions
    loss: DraftLoss = DraftLoss()

    def __post_init__(self) -> None:
        super().__post_init__()
        drafts = self.block.block_size - 1
        if self.seq_length <= drafts:
            raise ConfigError(
                f"seq_length of {self.seq_length} has no place for a block of "
                f"{drafts + 1} (block.block_size)"
            )
        _check_drafts(self.eval.num_tokens, drafts, "block.block_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MTPOptions:
    """How an MTP layer is run in training; see `MTPTask`.

    Attributes:
      steps: drafts in a row.
      on_policy: from the second step on read the layer's own likeliest token.
    """

    steps: int = 4
    on_policy: bool = False

    def __post_init__(self) -> None:
        count("mtp.steps", self.steps)
        flag("mtp.on_policy", self.on_policy)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MTPTrainConfig(DraftTrainConfig):
    """Everything that the training of an MTP layer depends on.

    Attributes:
      mtp: see `MTPOptions`.
      loss: see `DraftLoss`; the places weigh the same unless it says otherwise.

    All other fields are those of any training of a drafter; see `DraftTrainConfig`.

    Raises:
      ConfigError: a field is out of range; one line.

    Example:
      >>> from angeljax.train import MTPTrainConfig
      >>> config = MTPTrainConfig.from_dict({"model": "smollm2", "steps": 100})
      >>> config.mtp.steps, config.loss.weights
      (4, 'equal')
    """

    kind: ClassVar[str] = "mtp"
    what: ClassVar[str] = "a training of an MTP layer"

    mtp: MTPOptions = MTPOptions()
    loss: DraftLoss = DraftLoss(weights="equal")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seq_length <= self.mtp.steps:
            raise ConfigError(
                f"seq_length of {self.seq_length} leaves no place for "
                f"{self.mtp.steps} drafts (mtp.steps)"
            )


def _check_drafts(count: int | None, most: int, where: str) -> None:
    if count is not None and count > most:
        raise ConfigError(f"eval.num_tokens of {count}: at most {most} by {where}")
