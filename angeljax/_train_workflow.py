"""What `angeljax train` does: from a configuration to a compressed checkpoint.

```
<out>/config.yaml      the configuration, overrides included
<out>/metrics.jsonl    one line for each interval and evaluation
<out>/checkpoints/     the state, to resume from
<out>/tensorboard/     event files, if asked for
<out>/model/           the trained model, packed; what `angeljax generate` takes
```
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax import _workflow
from angeljax._workflow import Opened
from angeljax.train import (
    Checkpoints,
    ConfigError,
    HeldOut,
    LMTask,
    PackedTokens,
    TrainConfig,
    evaluation_params,
    fit,
    load_tokens,
    make_mesh,
    make_optimizer,
    make_schedule,
)
from angeljax.train import language_model as lm
from angeljax.train.losses import check_vocabularies
from angeljax.train.metrics import Console, JsonLines, TensorBoard, peak_flops
from angeljax.train.objective import Objective


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run left.

    Attributes:
      path: folder of the packed model.
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
    task: LMTask
    trainable: Any
    frozen: Any
    data: PackedTokens
    held_out: Any
    mesh: jax.sharding.Mesh


def train(
    config: TrainConfig, out: Path, *, resume: bool = True, show: bool | None = None
) -> Trained:
    """Trains, evaluates, packs and saves.

    Args:
      config: see `TrainConfig`.
      out: folder; an unfinished run in it is continued.
      resume: False refuses a folder with a run in it.
      show: progress; see `Console`.

    Raises:
      ValueError: something does not fit; one line, before anything is written. Or the
        training stopped: the last good checkpoint is kept.
    """
    steps = config.total_steps
    folder = out / "checkpoints"
    if not resume and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{out} holds a run: choose another --out, or --resume")
    if config.log.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError(
            "log.tensorboard needs tensorboardX: pip install 'angeljax[train]'"
        )
    schedule = make_schedule(config.optimizer, steps)
    setup = _set_up(config)
    task, frozen = setup.task, setup.frozen
    checkpoints = Checkpoints(
        folder,
        every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        identity=_identity(config, setup),
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
            setup.data.batch,
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
            flops=lm.training_flops(task.objective, config.seq_length),
            peak=None if peak is None else peak * setup.mesh.size,
        )
    finally:
        checkpoints.close()
    kept = evaluation_params(result.opt_state, result.trainable)
    if setup.held_out is not None and not evaluation:  # resumed after the last step
        evaluation.update(setup.held_out(kept))
    params, state = task.latent(kept, frozen)
    path = out / "model"
    _workflow.save_model(
        path,
        setup.student,
        _packed(task, params, state),
        config.loaded_recipe(),
        overwrite=True,
    )
    return Trained(path, result.step, result.metrics, evaluation)


def _packed(task: LMTask, params: Any, state: Any) -> Any:
    dtype = jnp.dtype(task.dtype)
    if state is not None:
        from angeljax import qat

        return qat.finalize(params, state, dtype=dtype)
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        params,
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
    student = _open(config.model, config, dtype="float32")
    vocabulary = student.model.config.vocab_size
    data = PackedTokens(
        load_tokens(config.data, student.tokenizer),
        length=config.seq_length,
        batch_size=config.batch_size,
        seed=config.seed,
        vocab_size=vocabulary,
    )
    teacher, teacher_params = _teacher(config, student)
    objective = Objective(
        model=student.model,
        options=config.options(),
        teacher=teacher,
        remat=config.remat,
    )
    quantizers = None
    if recipe is not None:
        from angeljax import qat

        recipe.check_model(student.config_dict)
        quantizers = qat.make(recipe, total_steps=config.total_steps)
    task = LMTask(objective, quantizers, config.dtype)
    trainable, frozen = task.init(
        student.params,
        teacher=teacher_params,
        freeze=config.freeze,
        key=jax.random.key(config.seed),
    )
    held_out = None
    if config.eval.data is not None:
        held_out = HeldOut(
            task, frozen, _windows(config, student), config.eval.batch_size
        )
    # The parameters live on in `trainable`; nothing else needs them.
    student = dataclasses.replace(student, params=None)
    return _Setup(student, task, trainable, frozen, data, held_out, mesh)


def _open(source: str, config: TrainConfig, *, dtype: str) -> Opened:
    from angeljax.models import stack_layers

    opened = _workflow.open_model(source, dtype=dtype)
    params, stacked = opened.params, opened.model.scan_layers
    if config.scan_layers and not stacked:
        params, stacked = stack_layers(params), True
    model = lm.ready(opened.model, config.dtype, scan_layers=stacked)
    return dataclasses.replace(opened, model=model, params=params)


def _teacher(config: TrainConfig, student: Opened) -> tuple[Any, Any]:
    """Architecture and parameters, or two times None."""
    if config.teacher is None:
        return None, None
    if config.teacher == "self":
        return student.model, student.params
    opened = _open(config.teacher, config, dtype=config.dtype)
    check_vocabularies(student.model.config.vocab_size, opened.model.config.vocab_size)
    mine, other = student.tokenizer, opened.tokenizer
    if mine is not None and other is not None and mine.vocabulary != other.vocabulary:
        token = next(
            t
            for t in {**mine.vocabulary, **other.vocabulary}
            if mine.vocabulary.get(t) != other.vocabulary.get(t)
        )
        raise ConfigError(
            f"distill.teacher {config.teacher} has another vocabulary than the model: "
            f"token {token!r} is {other.vocabulary.get(token)} there and "
            f"{mine.vocabulary.get(token)} here; choose a teacher with this tokenizer"
        )
    return opened.model, opened.params


def _windows(config: TrainConfig, student: Opened) -> Any:
    from angeljax.evaluation import windows

    assert config.eval.data is not None
    try:
        ids = load_tokens(config.eval.data, student.tokenizer)
    except ConfigError as e:
        raise ConfigError(f"eval.{e}") from None
    ids = ids[: config.eval.tokens] if config.eval.tokens else ids
    if int(ids.max()) >= student.model.config.vocab_size:
        raise ConfigError("eval.data: the ids come from another tokenizer")
    cut = windows(ids.astype(np.int32), min(config.eval.length, len(ids)))
    return cut


def _identity(config: TrainConfig, setup: _Setup) -> dict[str, Any]:
    """What a resumed run must have as well, by the names that messages use."""
    recipe = config.loaded_recipe()
    plain = config.to_dict()
    return {
        "recipe": None if recipe is None else recipe.to_dict(),
        "data or order": setup.data.identity(),
        "number of steps": config.total_steps,
        "model": config.model,
        "dtype": config.dtype,
        "optimizer": plain["optimizer"],
        "distillation": {**config.options().to_dict(), "teacher": config.teacher},
        "set of frozen leaves": plain["freeze"],
        "layout of layers": {"scan_layers": setup.student.model.scan_layers},
    }
