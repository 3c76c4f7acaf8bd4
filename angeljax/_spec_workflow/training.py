"""`angeljax spec train` and `text`: which drafter a configuration is for."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from angeljax import _shards
from angeljax._fields import ConfigError, choice
from angeljax.train import _yaml

if TYPE_CHECKING:
    from angeljax.train._draft_config import DraftTrainConfig


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


@dataclasses.dataclass(frozen=True)
class Written:
    """What `write` left.

    Attributes:
      paths: folders of answers, for `data`.
      tokens: of these, prompts included.
      seconds: for all of it.
    """

    paths: Sequence[Path]
    tokens: int
    seconds: float


def _config(kind: str) -> type[DraftTrainConfig]:
    if kind == "eagle3":
        from angeljax.train.eagle_config import EagleTrainConfig

        return EagleTrainConfig
    from angeljax.train.block_config import BlockTrainConfig, MTPTrainConfig

    return BlockTrainConfig if kind == "dflash" else MTPTrainConfig


def write(
    path: Path, out: Path, overrides: Sequence[str] = (), *, show: bool | None = None
) -> Written:
    """Writes the text that a training would write first, and does not train.

    Args:
      path: a YAML file of a training; its `model`, `dtype` and `generate` count.
      out: folder of the text; what is there goes on.
      overrides: `key=value`.
      show: progress.

    Returns:
      A `Written`.

    Raises:
      ValueError: a field that cannot be; one line.
    """
    from angeljax import _workflow
    from angeljax._train_workflow._draft_data import write_text

    begun = time.perf_counter()
    data = _yaml.read(path, overrides)
    kind = data.pop("kind", next(iter(KINDS)))
    try:
        choice("kind", kind, tuple(KINDS))
        config = _config(kind).from_dict(data)
        opened = _workflow.open_model(config.model, dtype=config.dtype)
        paths = write_text(config.generate, opened, out, show)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from None
    files = [file for folder in paths for file in _shards.text_files(folder)]
    tokens = sum(len(np.load(file, mmap_mode="r")) for file in files)
    return Written(paths, tokens, time.perf_counter() - begun)
