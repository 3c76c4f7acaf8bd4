"""Trainings with a loop over steps: end to end, and LoRA on packed weights."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from angeljax import _workflow
from angeljax._fields import ConfigError
from angeljax._train_workflow import setup as parts
from angeljax._workflow import Opened
from angeljax.formats import QTensor
from angeljax.recipe import Recipe
from angeljax.train import (
    Checkpoints,
    HeldOut,
    LMTask,
    LoraTask,
    TrainConfig,
    evaluation_params,
    fit,
    make_mesh,
    make_optimizer,
    make_schedule,
)
from angeljax.train.metrics import Console, JsonLines, TensorBoard, peak_flops
from angeljax.train.objective import Objective


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run left.

    Attributes:
      path: folder of the trained model.
      steps: optimizer steps in all.
      metrics: of the last interval.
      evaluation: of the deployed model, empty without held-out data.
    """

    path: Path
    steps: int
    metrics: dict[str, float]
    evaluation: dict[str, float]


@dataclasses.dataclass(frozen=True)
class _Setup:
    """Everything that is checked before the first file is written."""

    student: Opened
    recipe: Recipe | None
    task: LMTask
    trainable: Any
    frozen: Any
    batches: Callable[[int], Any]
    identity: dict[str, Any]
    held_out: HeldOut | None
    mesh: jax.sharding.Mesh


def train(
    config: TrainConfig, out: Path, *, resume: bool = True, show: bool | None = None
) -> Trained:
    """Trains, evaluates and saves.

    Args:
      config: see `TrainConfig`.
      out: folder; an unfinished run in it is continued.
      resume: False refuses a folder with a run in it.
      show: progress; see `Console`.

    Raises:
      ValueError: something does not fit; one line, before anything is written. Or the
        training stopped: the last good checkpoint is kept.
    """
    for kept in ("checkpoints", "layers"):
        folder = out / kept
        if not resume and folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{out} holds a run: choose another --out, or --resume")
    if config.log.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError(
            "log.tensorboard needs tensorboardX: pip install 'angeljax[train]'"
        )
    if config.mode == "blockwise":
        from angeljax._train_workflow import layers

        return layers.train(config, out, show=show)
    return _train(config, out, resume, show)


def _train(config: TrainConfig, out: Path, resume: bool, show: bool | None) -> Trained:
    steps = config.total_steps
    schedule = make_schedule(config.optimizer, steps)
    setup = _set_up(config)
    task, frozen = setup.task, setup.frozen
    checkpoints = Checkpoints(
        out / "checkpoints",
        every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        identity=setup.identity,
    )
    checkpoints.check()
    config.save(out / "config.yaml")
    evaluation: dict[str, float] = {}

    def writers(start: int) -> list[Any]:
        found: list[Any] = [
            Console(steps, start, show),
            JsonLines(out / "metrics.jsonl", start),
        ]
        if config.log.tensorboard:
            found.append(TensorBoard(out / "tensorboard", start))
        return found

    def evaluate(trainable: Any, opt_state: Any, step: int) -> dict[str, float]:
        assert setup.held_out is not None
        evaluation.update(setup.held_out(evaluation_params(opt_state, trainable)))
        return dict(evaluation)

    peak = peak_flops(jax.devices()[0].device_kind)
    try:
        result = fit(
            task.loss,
            setup.trainable,
            setup.batches,
            frozen=frozen,
            optimizer=make_optimizer(config.optimizer, steps),
            steps=steps,
            key=jax.random.key(config.seed),
            accumulate=config.accumulate,
            clip=config.optimizer.clip,
            mesh=setup.mesh,
            schedule=schedule,
            checkpoints=checkpoints,
            resume=resume,
            log_every=config.log.every,
            writers=writers,
            evaluate=None if setup.held_out is None else evaluate,
            evaluate_every=config.eval.every,
            divergence=config.divergence,
            flops=task.flops(config.seq_length),
            peak=None if peak is None else peak * setup.mesh.size,
        )
    finally:
        checkpoints.close()
    kept = evaluation_params(result.opt_state, result.trainable)
    if setup.held_out is not None and not evaluation:  # resumed after the last step
        evaluation.update(setup.held_out(kept))
    if isinstance(task, LoraTask):
        from angeljax.qat.lora import save_lora

        save_lora(out / "adapter", kept["lora"], overwrite=True)
    path = out / "model"
    save(path, setup.student, task.packed(kept, frozen), setup.recipe)
    return Trained(path, result.step, result.metrics, evaluation)


def save(path: Path, student: Opened, params: Any, recipe: Recipe | None) -> None:
    """Writes the model, with the recipe if there is anything packed in it."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QTensor))
    packed = any(isinstance(x, QTensor) for x in leaves)
    _workflow.save_model(
        path, student, params, recipe if packed else None, overwrite=True
    )


def _set_up(config: TrainConfig) -> _Setup:
    mesh = make_mesh({"data": 1} if config.mesh is None else config.mesh)
    rows = config.batch_size // config.accumulate
    if rows % mesh.size:
        raise ConfigError(
            f"micro-batches of {rows} rows cannot be divided over {mesh.size} devices: "
            "change batch_size, accumulate or mesh"
        )
    recipe = config.loaded_recipe()
    opened = parts.open_for_training(config.model, config, dtype="float32")
    if recipe is not None:
        recipe.check_model(opened.config_dict)
    data = parts.rows_of_text(config, opened)
    teacher = parts.find_teacher(config, opened, data)
    student = opened
    if config.mode == "lora":
        student = parts.with_packed_weights(config, opened, recipe)
        recipe = student.recipe
    else:
        student = parts.with_biases(opened, recipe)
    objective = Objective(
        model=student.model,
        options=config.options(),
        teacher=teacher.model,
        remat=config.remat,
    )
    task: LMTask
    if config.mode == "lora":
        task = LoraTask(objective, None, config.dtype, config.lora)
    else:
        quantizers = None
        if recipe is not None:
            from angeljax import qat

            quantizers = qat.make(recipe, total_steps=config.total_steps)
        task = LMTask(objective, quantizers, config.dtype)
    trainable, frozen = task.init(
        student.params,
        teacher=teacher.params,
        freeze=config.freeze,
        key=jax.random.key(config.seed),
    )
    windows = parts.held_out_text(config, student)
    held_out = None
    if windows is not None:
        held_out = HeldOut(task, frozen, windows, config.eval.batch_size)
    predictions = teacher.rows

    def batches(step: int) -> dict[str, Any]:
        batch: dict[str, Any] = dict(data.batch(step))
        if predictions is not None:
            batch["teacher"] = predictions.rows(data.picked(step))
        return batch

    return _Setup(
        # The parameters live on in `trainable`; nothing else needs them.
        student=dataclasses.replace(student, params=None),
        recipe=recipe,
        task=task,
        trainable=trainable,
        frozen=frozen,
        batches=batches,
        identity=parts.identity(config, student, data, teacher),
        held_out=held_out,
        mesh=mesh,
    )
