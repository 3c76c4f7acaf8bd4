"""Trainings of block drafters and of MTP layers: from a configuration to a folder.

```
<out>/config.yaml      the configuration, overrides included
<out>/text/            what the target wrote, if no data is named
<out>/metrics.jsonl    one line for each interval and evaluation
<out>/checkpoints/     the state, to resume from
<out>/acceptance.json  how often drafts are right: by place, and over the training
<out>/block/           the drafter, for `load_block` and engines that run DFlash
<out>/mtp/             or the layer, for `load_mtp`
```
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from angeljax._fields import ConfigError
from angeljax._train_workflow import _draft_run
from angeljax._train_workflow._draft_data import DraftData, open_target, read_data
from angeljax._workflow import Opened
from angeljax.models import DecoderConfig, LanguageModel
from angeljax.speculative import (
    BlockConfig,
    BlockModel,
    MTPModel,
    save_block,
    save_mtp,
)
from angeljax.speculative.drafter import Drafter
from angeljax.train import language_model as lm
from angeljax.train._draft_config import DraftTrainConfig
from angeljax.train.block_config import BlockTrainConfig, MTPTrainConfig
from angeljax.train.block_task import BlockTask
from angeljax.train.mtp_task import MTPTask
from angeljax.train.step import LossFn


@dataclasses.dataclass(frozen=True)
class TrainedDrafter:
    """What a training left.

    Attributes:
      path: folder of the drafter.
      steps: optimizer steps in all.
      metrics: of the last interval.
      evaluation: on held-out prompts, `eval/tau` and more; empty without.
    """

    path: Path
    steps: int
    metrics: dict[str, float]
    evaluation: dict[str, float]


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What differs from drafter to drafter.

    `drafter` and `save` take trained and frozen parameters; `save` writes them to a
    folder, with notes.
    """

    loss: LossFn
    start: tuple[Any, Any]
    drafter: Callable[[Any, Any], Drafter]
    save: Callable[[Any, Any, Path, dict[str, Any]], Path]


def train_block(
    config: BlockTrainConfig,
    out: str | Path,
    *,
    resume: bool = True,
    show: bool | None = None,
) -> TrainedDrafter:
    """Writes text if there is none, trains a block drafter, measures it and saves it.

    Args:
      config: see `BlockTrainConfig`.
      out: folder; an unfinished run in it is continued.
      resume: False refuses a folder with a run in it.
      show: progress; see `angeljax.train.metrics.Console`.

    Returns:
      A `TrainedDrafter`.

    Raises:
      ValueError: something does not fit; one line. Or the training stopped: the last
        good checkpoint is kept.
    """
    out, opened = Path(out), open_target(config, Path(out), resume)
    o = config.block
    sizes = {"intermediate_size": o.intermediate_size}
    shape = BlockConfig.of(
        opened.model.config,
        mask_token_id=_mask_token(config, opened),
        num_layers=o.num_layers,
        block_size=o.block_size,
        target_layers=o.target_layers,
        **{k: v for k, v in sizes.items() if v is not None},
    )

    def parts(model: LanguageModel, params: Any, data: DraftData) -> _Parts:
        task = BlockTask(
            target=model,
            block=BlockModel(shape),
            anchors=o.anchors,
            loss_options=config.loss,
            dtype=config.dtype,
        )
        few = np.concatenate([data.rows.batch(i)["tokens"][:4] for i in range(4)])

        def drafter(trained: Any, frozen: Any) -> Drafter:
            found = task.drafter(trained, frozen)
            return dataclasses.replace(found, num_tokens=config.eval.num_tokens)

        def save(trained: Any, frozen: Any, folder: Path, notes: Any) -> Path:
            params = task.params(trained, frozen)
            return save_block(folder, task.block, params, notes=notes)

        start = task.init(params, few[:, :-1], key=jax.random.key(config.seed))
        return _Parts(task.loss, start, drafter, save)

    return _train(config, opened, shape.decoder, parts, out, "block", resume, show)


def train_mtp(
    config: MTPTrainConfig,
    out: str | Path,
    *,
    resume: bool = True,
    show: bool | None = None,
) -> TrainedDrafter:
    """Writes text if there is none, trains an MTP layer, measures it and saves it.

    Args:
      config: see `MTPTrainConfig`.
      out, resume, show: as in `train_block`.

    Returns:
      A `TrainedDrafter`.

    Raises:
      ValueError: as `train_block`.
    """
    out, opened = Path(out), open_target(config, Path(out), resume)

    def parts(model: LanguageModel, params: Any, data: DraftData) -> _Parts:
        task = MTPTask(
            target=model,
            mtp=MTPModel(model.config),
            steps=config.mtp.steps,
            on_policy=config.mtp.on_policy,
            loss_options=config.loss,
            dtype=config.dtype,
        )

        def drafter(trained: Any, frozen: Any) -> Drafter:
            return task.drafter(trained, frozen, config.eval.num_tokens)

        def save(trained: Any, frozen: Any, folder: Path, notes: Any) -> Path:
            return save_mtp(folder, task.mtp, trained["params"], notes=notes)

        start = task.init(params, key=jax.random.key(config.seed))
        return _Parts(task.loss, start, drafter, save)

    sizes = opened.model.config
    return _train(config, opened, sizes, parts, out, "mtp", resume, show)


def _train(
    config: DraftTrainConfig,
    opened: Opened,
    sizes: DecoderConfig,
    make: Callable[[LanguageModel, Any, DraftData], _Parts],
    out: Path,
    name: str,
    resume: bool,
    show: bool | None,
) -> TrainedDrafter:
    """`name` is the section of the configuration and the folder of the drafter."""
    out.mkdir(parents=True, exist_ok=True)
    data = read_data(config, opened, out, show)
    own = {**config.to_dict()[name], "sizes": json.loads(json.dumps(sizes.to_dict()))}
    checkpoints = _draft_run.open_checkpoints(config, out, data.rows, {name: own})
    config.save(out / "config.yaml")
    stacked = opened.model.scan_layers
    model = lm.ready(opened.model, config.dtype, scan_layers=stacked)
    params = lm.cast(opened.params, config.dtype)
    parts = make(model, params, data)
    frozen = parts.start[1]

    def drafter(trained: Any) -> Drafter:
        return parts.drafter(trained, frozen)

    fitted = _draft_run.run(
        config,
        out,
        parts.loss,
        parts.start,
        data,
        _draft_run.Measure(config.eval, data, model, frozen["target"], drafter),
        checkpoints,
        resume=resume,
        show=show,
    )
    notes = _draft_run.notes(config, opened, fitted)
    path = parts.save(fitted.params, frozen, out / name, notes)
    return TrainedDrafter(path, fitted.steps, fitted.metrics, fitted.evaluation)


def _mask_token(config: BlockTrainConfig, opened: Opened) -> int:
    o = config.block
    if o.mask_token is None:
        assert o.mask_token_id is not None
        return o.mask_token_id
    found = opened.need_tokenizer().vocabulary.get(o.mask_token)
    if found is None:
        raise ConfigError(
            f"block.mask_token: {config.model} has no token {o.mask_token!r}; take one "
            "of its vocabulary that no text has"
        )
    return found
