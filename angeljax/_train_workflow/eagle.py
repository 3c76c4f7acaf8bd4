"""Training of an EAGLE-3 head: from a configuration to a folder that engines load.

```
<out>/config.yaml    the configuration, overrides included
<out>/text/          what the target wrote, if no data is named
<out>/metrics.jsonl  one line for each interval and evaluation
<out>/acceptance.json  how often each step was right, over the training
<out>/checkpoints/   the state, to resume from
<out>/head/          the head, for `load_eagle`, SGLang and vLLM
```
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from angeljax import _workflow
from angeljax._fields import ConfigError
from angeljax._train_workflow.prompts import read_prompts
from angeljax._workflow import Opened
from angeljax.models import stack_layers
from angeljax.speculative import EagleConfig, EagleDrafter, init_eagle, save_eagle
from angeljax.speculative.core import autoregressive, generate
from angeljax.train import (
    Checkpoints,
    evaluation_params,
    fit,
    load_tokens,
    make_optimizer,
    make_schedule,
)
from angeljax.train import language_model as lm
from angeljax.train._feature_scales import feature_scales
from angeljax.train.eagle import EagleTask
from angeljax.train.eagle_config import EagleTrainConfig
from angeljax.train.eagle_data import (
    MaskedTokens,
    answer_mask,
    draft_vocabulary,
    thinking_targets,
)
from angeljax.train.metrics import Console, JsonLines, TensorBoard
from angeljax.train.optimizers import decay_at
from angeljax.train.self_text import template_of, write_conversations


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
    out, steps = Path(out), config.total_steps
    kept = out / "checkpoints"
    if not resume and kept.is_dir() and any(kept.iterdir()):
        raise ValueError(f"{out} holds a run: choose another folder, or resume it")
    # Where time ends the training the rate falls with the time; see `decay_at`.
    timed, optimizer = config.max_minutes is not None, config.optimizer
    if timed:
        optimizer = dataclasses.replace(optimizer, schedule="constant")
    schedule = make_schedule(optimizer, steps)
    opened = _workflow.open_model(config.model, dtype=config.dtype)
    opened = _stacked(opened) if config.scan_layers else opened
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
    kinds: list[str] = []
    prompts: list[np.ndarray] = []
    if config.eval.source is not None and config.eval.prompts:
        e = config.eval
        prompts, kinds = read_prompts(
            config.eval.source, opened.need_tokenizer(), e.prompts, e.prompt_tokens
        )
    ids, mask = _text(config, opened, out, show)
    if config.eval.source is None:
        ids, mask, prompts = _held_out(config, ids, mask)
    data = MaskedTokens(
        ids,
        mask,
        _thinking(config, opened, ids),
        length=config.seq_length,
        batch_size=config.batch_size,
        seed=config.seed,
        vocab_size=sizes.vocab_size,
    )
    chosen, coverage = None, 1.0
    if head_config.draft_vocab_size != sizes.vocab_size:
        size = head_config.draft_vocab_size
        chosen, coverage = draft_vocabulary(ids, mask, size, sizes.vocab_size)
    checkpoints = Checkpoints(
        kept,
        every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        identity=_identity(config, head_config, data),
    )
    checkpoints.check()
    config.save(out / "config.yaml")

    stacked = opened.model.scan_layers
    model = lm.ready(opened.model, config.dtype, scan_layers=stacked)
    params = lm.cast(opened.params, config.dtype)
    few = [data.batch(i)["tokens"][:4, :-1] for i in range(4)]
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
    measure = _Measure(config, task, frozen, prompts, kinds)

    def writers(start: int) -> list[Any]:
        found: list[Any] = [
            Console(steps, start, show),
            JsonLines(out / "metrics.jsonl", start),
        ]
        if config.log.tensorboard:
            found.append(TensorBoard(out / "tensorboard", start))
        return found

    evaluation: dict[str, float] = {}

    def evaluate(trainable: Any, opt_state: Any, step: int) -> dict[str, float]:
        evaluation.update(measure(evaluation_params(opt_state, trainable)))
        return {**evaluation, "coverage": coverage}

    try:
        result = fit(
            task.loss,
            trainable,
            data.batch,
            frozen=frozen,
            optimizer=make_optimizer(optimizer, steps),
            steps=steps,
            key=jax.random.key(config.seed),
            accumulate=config.accumulate,
            clip=optimizer.clip,
            schedule=schedule,
            checkpoints=checkpoints,
            resume=resume,
            log_every=config.log.every,
            writers=writers,
            evaluate=evaluate if len(prompts) else None,
            evaluate_every=config.eval.every,
            max_minutes=config.max_minutes,
            pace=functools.partial(decay_at, config.optimizer) if timed else None,
            divergence=config.divergence,
        )
    finally:
        checkpoints.close()
    best = evaluation_params(result.opt_state, result.trainable)
    if len(prompts) and not evaluation:  # resumed after the last step
        evaluation.update(measure(best))
    path = save_eagle(
        out / "head",
        head_config,
        task.head(best, frozen),
        notes={
            "target": config.model,
            "tokenizer": _tokenizer_hash(opened),
            "coverage": coverage,
            "steps": result.step,
            "measured": evaluation,
        },
    )
    _write_curve(out, config, coverage, evaluation)
    return TrainedHead(path, result.step, coverage, result.metrics, evaluation)


def _stacked(opened: Opened) -> Opened:
    if opened.model.scan_layers:
        return opened
    try:
        params = jax.jit(stack_layers)(opened.params)
    except ValueError as e:
        raise ConfigError(f"scan_layers: {opened.source}: {e}") from None
    model = dataclasses.replace(opened.model, scan_layers=True)
    return dataclasses.replace(opened, model=model, params=params)


def _write_curve(
    out: Path, config: EagleTrainConfig, coverage: float, evaluation: dict[str, float]
) -> None:
    """`acceptance.json`: the curve over the steps, and what was measured last."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "top1/0" in row]
    places = range(config.loss.steps)
    curve = {
        "step": [row["step"] for row in rows],
        "tokens": [row.get("tokens") for row in rows],
        "loss": [row["loss"] for row in rows],
        "tau": [row["tau"] for row in rows],
        "top1": [[row[f"top1/{k}"] for k in places] for row in rows],
    }
    found = {"coverage": coverage, "evaluation": evaluation, "curve": curve}
    text = json.dumps(found, indent=2) + "\n"
    (out / "acceptance.json").write_text(text, encoding="utf-8")


def _text(
    config: EagleTrainConfig, opened: Opened, out: Path, show: bool | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Token ids, and which of them are answers; None for all."""
    data: Any = config.data
    if data is None:
        g = config.generate
        lines = None
        if g.prompts is not None:
            from angeljax._train_workflow.data import _lines

            lines = _lines(Path(g.prompts))
        data = write_conversations(
            out / "text",
            opened.model,
            opened.params,
            opened.need_tokenizer(),
            shards=g.shards,
            rows=g.rows,
            max_new_tokens=g.max_new_tokens,
            temperatures=g.temperatures,
            questions=lines,
            question_tokens=g.question_tokens,
            question_temperature=g.question_temperature,
            seed=g.seed,
            max_minutes=g.max_minutes,
            progress=show,
        )
    ids = load_tokens(data, opened.tokenizer)
    template = None if opened.tokenizer is None else template_of(opened.tokenizer)
    if not config.answers_only or template is None:
        return ids, None
    ends = list(opened.model.config.eos_ids)
    tokenizer, first = opened.need_tokenizer(), template.before[0]
    if not tokenizer.decode([first]):  # of no text: it begins what follows a cut
        ends.append(first)
    mask = answer_mask(ids, template.between, ends)
    if not mask.any():
        raise ConfigError(
            "data: no answer stands in the text by the model's chat template: set "
            "answers_only to false"
        )
    return ids, mask


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


def _held_out(
    config: EagleTrainConfig, ids: np.ndarray, mask: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None, list[np.ndarray]]:
    """The text to train on, and prompts from a part of it that is not trained on.

    A prompt ends where an answer begins, or anywhere if there is no mask.
    """
    e = config.eval
    if not e.prompts:
        return ids, mask, []
    starts: Any
    size = e.prompt_tokens
    if mask is None:
        first = len(ids) - e.prompts * size
        starts = first + size * np.arange(1, e.prompts + 1)
    else:
        starts = np.flatnonzero(mask[1:] & ~mask[:-1]) + 1
        # Few answers: leave most of them to be trained on.
        starts = starts[-e.prompts :]
        first = int(starts[0]) - size
    if first < len(ids) // 2:
        raise ConfigError(
            f"eval.prompts: {e.prompts} of up to {size} tokens take more than half of "
            f"the text of {len(ids)} tokens: lower them, or name more data"
        )
    prompts = [ids[max(s - size, 0) : s].astype(np.int32) for s in starts]
    return ids[:first], None if mask is None else mask[:first], prompts


class _Measure:
    """Tokens for each forward of the target, with the head as it would be served."""

    def __init__(
        self,
        config: EagleTrainConfig,
        task: EagleTask,
        frozen: Any,
        prompts: Any,
        kinds: list[str],
    ) -> None:
        self._eval, self._task, self._frozen = config.eval, task, frozen
        self._prompts, self._kinds = prompts, np.asarray(kinds)
        self._plain: Any = None

    def __call__(self, trainable: Any) -> dict[str, float]:
        e, task, params = self._eval, self._task, self._frozen["target"]
        head = task.head(trainable, self._frozen)
        run = task.model, params, self._prompts
        drafter = EagleDrafter(task.config, lm.cast(head, task.dtype), e.num_tokens)
        out = generate(*run, drafter=drafter, max_new_tokens=e.max_new_tokens)
        if self._plain is None:
            plain = autoregressive(*run, max_new_tokens=e.max_new_tokens)
            self._plain = np.asarray(plain.tokens)
        rounds = float(np.sum(out.stats.rounds))
        same = np.mean(np.all(np.asarray(out.tokens) == self._plain, axis=1))
        hits = np.asarray(out.stats.hits, np.float64) / rounds
        found = {"eval/tau": out.tau, "eval/same_text": float(same)}
        lengths, each = np.asarray(out.lengths), np.asarray(out.stats.rounds)
        for kind in sorted(set(self._kinds) - {""}):
            rows = self._kinds == kind
            found[f"eval/tau/{kind}"] = float(lengths[rows].sum() / each[rows].sum())
        return {**found, **{f"eval/accepted/{i}": float(h) for i, h in enumerate(hits)}}


def _identity(
    config: EagleTrainConfig, head: EagleConfig, data: MaskedTokens
) -> dict[str, Any]:
    """What a resumed run must have as well, by the names that messages use."""
    plain = config.to_dict()
    mask = hashlib.sha256(np.packbits(data.mask).tobytes()).hexdigest()
    return {
        "model": config.model,
        "data or order": {**data.identity(), "answers": mask},
        "number of steps": config.total_steps,
        "dtype": config.dtype,
        "optimizer": plain["optimizer"],
        "loss": plain["loss"],
        "exit": plain["exit"],
        "head": {**plain["head"], **json.loads(json.dumps(dataclasses.asdict(head)))},
        "seed": config.seed,
    }


def _tokenizer_hash(opened: Opened) -> str | None:
    if opened.tokenizer is None:
        return None
    text = json.dumps(sorted(opened.tokenizer.vocabulary.items()))
    return hashlib.sha256(text.encode()).hexdigest()
