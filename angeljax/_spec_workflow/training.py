"""`angeljax spec train`: which kind of drafter a configuration is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from angeljax._fields import ConfigError, choice
from angeljax.train import _yaml


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a training left.

    Attributes:
      kind: of drafter.
      path: folder of the drafter.
      steps: optimizer steps in all.
      metrics: of the last interval, and others by name.
      evaluation: on held-out prompts; empty without.
    """

    kind: str
    path: Path
    steps: int
    metrics: Mapping[str, float]
    evaluation: Mapping[str, float]


def _eagle(data: dict[str, Any], out: Path, resume: bool, show: bool | None) -> Trained:
    from angeljax._train_workflow.eagle import train_eagle
    from angeljax.train.eagle_config import EagleTrainConfig

    config = EagleTrainConfig.from_dict(data)
    done = train_eagle(config, out, resume=resume, show=show)
    metrics = {**done.metrics, "coverage": done.coverage}
    return Trained("eagle3", done.path, done.steps, metrics, done.evaluation)


def _block(data: dict[str, Any], out: Path, resume: bool, show: bool | None) -> Trained:
    from angeljax._train_workflow.block import train_block
    from angeljax.train.block_config import BlockTrainConfig

    config = BlockTrainConfig.from_dict(data)
    done = train_block(config, out, resume=resume, show=show)
    return Trained("dflash", done.path, done.steps, done.metrics, done.evaluation)


def _mtp(data: dict[str, Any], out: Path, resume: bool, show: bool | None) -> Trained:
    from angeljax._train_workflow.block import train_mtp
    from angeljax.train.block_config import MTPTrainConfig

    config = MTPTrainConfig.from_dict(data)
    done = train_mtp(config, out, resume=resume, show=show)
    return Trained("mtp", done.path, done.steps, done.metrics, done.evaluation)


# The methods of `draft` that are trained here, the default first.
KINDS: dict[str, Callable[..., Trained]] = {
    "eagle3": _eagle,
    "dflash": _block,
    "mtp": _mtp,
}


def train(
    path: Path,
    out: Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool = True,
    show: bool | None = None,
) -> Trained:
    """Trains the drafter that a file describes; its field `kind` says which.

    Args:
      path: a YAML file.
      out: folder of the run.
      overrides: `key=value`.
      resume: False refuses a folder with a run in it.
      show: progress.

    Returns:
      A `Trained`.

    Raises:
      ValueError: a field that cannot be, or the training stopped; one line.
    """
    data = _yaml.read(path, overrides)
    kind = data.pop("kind", next(iter(KINDS)))
    try:
        choice("kind", kind, tuple(KINDS))
        return KINDS[kind](data, out, resume, show)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from None
