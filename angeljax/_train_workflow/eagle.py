"""Training of an EAGLE-3 head: from a configuration to a folder that engines load.

```
<out>/config.yaml    the configuration, overrides included
<out>/text/          what the target wrote, if no data is named
<out>/metrics.jsonl  one line for each interval and evaluation
<out>/acceptance.json  how often drafts are right: place by place, and over the training
<out>/checkpoints/   the state, to resume from
<out>/head/          the head, for `load_eagle`, SGLang and vLLM
```
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from angeljax._fields import ConfigError
from angeljax._train_workflow import _draft_run
from angeljax._train_workflow._draft_data import open_target, read_data
from angeljax._workflow import Opened
from angeljax.speculative import EagleConfig, EagleDrafter, init_eagle, save_eagle
from angeljax.train import language_model as lm
from angeljax.train._feature_scales import feature_scales
from angeljax.train.eagle import EagleTask
from angeljax.train.eagle_config import EagleTrainConfig
from angeljax.train.eagle_data import draft_vocabulary, thinking_targets


@dataclasses.dataclass(frozen=True)
class TrainedHead:
    """What a training left.

    Attributes:
      path: folder of the head.
      steps: optimizer steps in all.
      coverage: share of the text that the draft vocabulary has.
      metrics: of the last interval.
      evaluation: on held-out prompts, `eval/tau` and more; empty without.
    """

    path: Path
    steps: int
    coverage: float
    metrics: dict[str, float]
    evaluation: dict[str, float]


def train_eagle(
    config: EagleTrainConfig,
    out: str | Path,
    *,
    resume: bool = True,
    show: bool | None = None,
) -> TrainedHead:
    """Writes text if there is none, trains a head, measures it and saves it.

    Args:
      config: see `EagleTrainConfig`.
      out: folder; an unfinished run in it is continued.
      resume: False refuses a folder with a run in it.
      show: progress; see `angeljax.train.metrics.Console`.

    Returns:
      A `TrainedHead`.

    Raises:
      ValueError: something does not fit; one line. Or the training stopped: the last
        good checkpoint is kept.
    """
    out = Path(out)
    opened = open_target(config, out, resume)
    sizes = opened.model.config
    if config.head.vocab_size is not None and config.head.vocab_size > sizes.vocab_size:
        raise ConfigError(
            f"head.vocab_size of {config.head.vocab_size}: {config.model} has "
            f"{sizes.vocab_size} tokens"
        )
    head_config = EagleConfig.of(
        sizes,
        draft_vocab_size=config.head.vocab_size,
        intermediate_size=config.head.intermediate_size,
        target_layers=config.head.layers,
    )
    out.mkdir(parents=True, exist_ok=True)

    def more(ids: np.ndarray) -> dict[str, np.ndarray] | None:
        return _thinking(config, opened, ids)

    data = read_data(config, opened, out, show, more)
    rows = data.rows
    chosen, coverage = None, 1.0
    if head_config.draft_vocab_size != sizes.vocab_size:
        size = head_config.draft_vocab_size
        chosen, coverage = draft_vocabulary(rows.ids, rows.mask, size, sizes.vocab_size)
    own = json.loads(json.dumps(dataclasses.asdict(head_config)))
    plain = config.to_dict()
    own = {"exit": plain["exit"], "head": {**plain["head"], **own}}
    checkpoints = _draft_run.open_checkpoints(config, out, rows, own)
    config.save(out / "config.yaml")

    stacked = opened.model.scan_layers
    model = lm.ready(opened.model, config.dtype, scan_layers=stacked)
    params = lm.cast(opened.params, config.dtype)
    few = [rows.batch(i)["tokens"][:4, :-1] for i in range(4)]
    scales = feature_scales(
        model, params, head_config.target_layers, few, kind=config.head.normalize
    )
    head = init_eagle(
        head_config,
        jax.random.key(config.seed),
        target=opened.params,
        ids=chosen,
        norm_scale=config.head.norm_scale,
        exit=config.exit is not None,
    )
    weight = 0.0 if config.exit is None else config.exit.weight
    task = EagleTask(model, head_config, config.loss, config.dtype, weight)
    trainable, frozen = task.init(params, head, scales)

    def drafter(trainable: Any) -> EagleDrafter:
        head = lm.cast(task.head(trainable, frozen), config.dtype)
        return EagleDrafter(head_config, head, config.eval.num_tokens or 4)

    fitted = _draft_run.run(
        config,
        out,
        task.loss,
        (trainable, frozen),
        data,
        _draft_run.Measure(config.eval, data, model, frozen["target"], drafter),
        checkpoints,
        resume=resume,
        show=show,
        logged={"coverage": coverage},
    )
    path = save_eagle(
        out / "head",
        head_config,
        task.head(fitted.params, frozen),
        notes={**_draft_run.notes(config, opened, fitted), "coverage": coverage},
    )
    return TrainedHead(path, fitted.steps, coverage, fitted.metrics, fitted.evaluation)


def _thinking(
    config: EagleTrainConfig, opened: Opened, ids: np.ndarray
) -> dict[str, np.ndarray] | None:
    """What the outputs for `SpecExit` learn, if the head has them."""
    if config.exit is None:
        return None
    found = []
    for name in ("begin", "end"):
        text = getattr(config.exit, name)
        token = opened.need_tokenizer().token_id(text)
        if token is None:
            raise ConfigError(f"exit.{name}: {config.model} has no token {text!r}")
        found.append(token)
    progress, remaining = thinking_targets(ids, *found)
    if not remaining.any():
        raise ConfigError(
            f"exit: the text has no thinking from {config.exit.begin!r} to "
            f"{config.exit.end!r}"
        )
    return {"progress": progress, "remaining": remaining}
