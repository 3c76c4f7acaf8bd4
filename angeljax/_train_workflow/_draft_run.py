"""The loop that trains a drafter, and how many of its drafts are accepted."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from angeljax._train_workflow._draft_data import DraftData
from angeljax._workflow import Opened
from angeljax.models import LanguageModel
from angeljax.speculative.core import autoregressive, generate
from angeljax.speculative.drafter import Drafter
from angeljax.train import (
    Checkpoints,
    evaluation_params,
    fit,
    make_optimizer,
    make_schedule,
)
from angeljax.train._draft_config import DraftEval, DraftTrainConfig
from angeljax.train.eagle_data import MaskedTokens
from angeljax.train.metrics import Console, JsonLines, TensorBoard
from angeljax.train.optimizers import decay_at
from angeljax.train.step import LossFn

Numbers = dict[str, float]


class Measure:
    """Tokens for each forward of the target, with the drafter as it would be served.

    Args:
      options: see `DraftEval`.
      data: has the prompts.
      model, params: the target.
      drafter: of the trained parameters.
    """

    def __init__(
        self,
        options: DraftEval,
        data: DraftData,
        model: LanguageModel,
        params: Any,
        drafter: Callable[[Any], Drafter],
    ) -> None:
        self._options, self._drafter = options, drafter
        self._run = model, params, data.prompts
        self._kinds = np.asarray(data.kinds)
        self._plain: Any = None

    def __call__(self, trainable: Any) -> Numbers:
        """`eval/tau` and more; nothing without prompts."""
        if not self._run[-1]:
            return {}
        size = self._options.max_new_tokens
        drafter = self._drafter(trainable)
        out = generate(*self._run, drafter=drafter, max_new_tokens=size)
        if self._plain is None:
            plain = autoregressive(*self._run, max_new_tokens=size)
            self._plain = np.asarray(plain.tokens)
        same = np.mean(np.all(np.asarray(out.tokens) == self._plain, axis=1))
        found = {"eval/tau": out.tau, "eval/same_text": float(same)}
        lengths, rounds = np.asarray(out.lengths), np.asarray(out.stats.rounds)
        for kind in sorted(set(self._kinds) - {""}):
            rows = self._kinds == kind
            found[f"eval/tau/{kind}"] = float(lengths[rows].sum() / rounds[rows].sum())
        hits = np.asarray(out.stats.hits) / float(np.sum(rounds))
        return {**found, **{f"eval/accepted/{i}": float(h) for i, h in enumerate(hits)}}


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What the loop left.

    Attributes:
      params: the trained parameters to serve and to save.
      steps: optimizer steps in all.
      metrics: of the last interval.
      evaluation: of `Measure`.
    """

    params: Any
    steps: int
    metrics: Numbers
    evaluation: Numbers


def open_checkpoints(
    config: DraftTrainConfig, out: Path, data: MaskedTokens, more: Mapping[str, Any]
) -> Checkpoints:
    """Where the state is saved; a run with other data or options is refused.

    Args:
      config: of the training.
      out: its folder.
      data: its rows.
      more: JSON values that a resumed run must have as well, by the names that messages
        use.

    Raises:
      ValueError: the folder holds another run.
    """
    plain = config.to_dict()
    mask = hashlib.sha256(np.packbits(data.mask).tobytes()).hexdigest()
    checkpoints = Checkpoints(
        out / "checkpoints",
        every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        identity={
            "model": config.model,
            "data or order": {**data.identity(), "answers": mask},
            "number of steps": config.total_steps,
            "dtype": config.dtype,
            "optimizer": plain["optimizer"],
            "loss": plain["loss"],
            **more,
            "seed": config.seed,
        },
    )
    checkpoints.check()
    return checkpoints


def run(
    config: DraftTrainConfig,
    out: Path,
    loss: LossFn,
    start: tuple[Any, Any],
    data: DraftData,
    measure: Measure,
    checkpoints: Checkpoints,
    *,
    resume: bool,
    show: bool | None,
    logged: Mapping[str, float] | None = None,
) -> Fitted:
    """The loop over steps, the evaluation at its end, and the curve of acceptance.

    Args:
      config: of the training.
      out: its folder.
      loss: see `fit`.
      start: trainable and frozen parameters.
      data: rows and prompts.
      measure: what evaluates.
      checkpoints: see `open_checkpoints`; closed here.
      resume, show: as in `train_eagle`.
      logged: numbers that go with each evaluation.

    Raises:
      TrainingStopped: see `fit`.
    """
    # Where time ends the training the rate falls with the time; see `decay_at`.
    timed, optimizer = config.max_minutes is not None, config.optimizer
    if timed:
        optimizer = dataclasses.replace(optimizer, schedule="constant")
    steps, more = config.total_steps, dict(logged or {})
    evaluation: Numbers = {}

    def writers(start: int) -> list[Any]:
        found: list[Any] = [
            Console(steps, start, show),
            JsonLines(out / "metrics.jsonl", start),
        ]
        if config.log.tensorboard:
            found.append(TensorBoard(out / "tensorboard", start))
        return found

    def evaluate(trainable: Any, opt_state: Any, step: int) -> Numbers:
        evaluation.update(measure(evaluation_params(opt_state, trainable)))
        return {**evaluation, **more}

    try:
        result = fit(
            loss,
            start[0],
            data.rows.batch,
            frozen=start[1],
            optimizer=make_optimizer(optimizer, steps),
            steps=steps,
            key=jax.random.key(config.seed),
            accumulate=config.accumulate,
            clip=optimizer.clip,
            schedule=make_schedule(optimizer, steps),
            checkpoints=checkpoints,
            resume=resume,
            log_every=config.log.every,
            writers=writers,
            evaluate=evaluate if data.prompts else None,
            evaluate_every=config.eval.every,
            max_minutes=config.max_minutes,
            pace=functools.partial(decay_at, config.optimizer) if timed else None,
            divergence=config.divergence,
        )
    finally:
        checkpoints.close()
    best = evaluation_params(result.opt_state, result.trainable)
    if not evaluation:  # resumed after the last step
        evaluation.update(measure(best))
    _write_curve(out, {**more, "evaluation": evaluation})
    return Fitted(best, result.step, result.metrics, evaluation)


def _write_curve(out: Path, found: dict[str, Any]) -> None:
    """`acceptance.json`: place by place at the end, and over the steps."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "top1/0" in row]
    found["places"] = _places(found["evaluation"])
    found["curve"] = {
        "step": [row["step"] for row in rows],
        "tokens": [row.get("tokens") for row in rows],
        "loss": [row["loss"] for row in rows],
        "tau": [row["tau"] for row in rows],
        "top1": [_counted(row, "top1") for row in rows],
    }
    text = json.dumps(found, indent=2) + "\n"
    (out / "acceptance.json").write_text(text, encoding="utf-8")


def _places(evaluation: Numbers) -> list[Numbers]:
    """Of each place of a draft how often it and all before it were `accepted`, how
    often it was after those before it were, and `tau` of drafts that end there."""
    places: list[Numbers] = []
    tau, before = 1.0, 1.0
    for share in _counted(evaluation, "eval/accepted"):
        tau += share
        after = share / before if before else 0.0
        places.append({"accepted": share, "conditional": after, "tau": tau})
        before = share
    return places


def _counted(numbers: Mapping[str, float], name: str) -> list[float]:
    """`name/0`, `name/1` and so on."""
    found: list[float] = []
    while f"{name}/{len(found)}" in numbers:
        found.append(numbers[f"{name}/{len(found)}"])
    return found


def notes(config: DraftTrainConfig, opened: Opened, fitted: Fitted) -> dict[str, Any]:
    """Where a drafter comes from; JSON values for its file."""
    return {
        "target": config.model,
        "tokenizer": _tokenizer_hash(opened),
        "steps": fitted.steps,
        "measured": fitted.evaluation,
    }


def _tokenizer_hash(opened: Opened) -> str | None:
    if opened.tokenizer is None:
        return None
    text = json.dumps(sorted(opened.tokenizer.vocabulary.items()))
    return hashlib.sha256(text.encode()).hexdigest()
