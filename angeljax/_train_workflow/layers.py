"""Block-wise reconstruction of a language model."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from angeljax import qat
from angeljax._fields import ConfigError
from angeljax._train_workflow import setup
from angeljax._train_workflow.run import Trained, save
from angeljax.train import TrainConfig
from angeljax.train._kept_layers import KeptLayers
from angeljax.train.blockwise import check_state, reconstruct
from angeljax.train.held_out import measure
from angeljax.train.language_model import cast
from angeljax.train.metrics import Console, JsonLines, Writers


def train(config: TrainConfig, out: Path, *, show: bool | None = None) -> Trained:
    """Trains layer by layer, evaluates, packs and saves; see `run.train`."""
    recipe = config.loaded_recipe()
    assert recipe is not None, "checked by the configuration"
    start = setup.open_for_training(config.model, config, dtype="float32")
    recipe.check_model(start.config_dict)
    student = setup.with_biases(start, recipe)
    data = setup.rows_of_text(config, student)
    wanted = config.total_steps * config.batch_size
    if wanted > data.rows:
        raise ConfigError(
            f"data: there are {data.rows} rows of {config.seq_length} tokens, and mode "
            f"blockwise is to take {wanted} at once: lower steps or tokens (and raise "
            "blockwise.epochs), or name more data"
        )
    windows = setup.held_out_text(config, student)
    options = config.reconstruction()
    # The same check as in the work, before any file: it costs no arithmetic.
    check_state(jax.eval_shape(qat.make(recipe, total_steps=1).init, student.params))
    batches = [data.batch(step)["tokens"] for step in range(config.total_steps)]
    tokens = np.concatenate(batches)[:, :-1]
    folder = out / "layers"
    KeptLayers.begin(folder, student.model, student.params, recipe, tokens, options)
    config.save(out / "config.yaml")

    count = student.model.config.num_layers
    writers = Writers([Console(count, 0, show), JsonLines(out / "metrics.jsonl")])
    try:
        done = reconstruct(
            student.model,
            student.params,
            recipe,
            tokens,
            options,
            folder=folder,
            report=lambda i, before, after: writers.write(
                i + 1, {"error_before": before, "error": after}
            ),
            progress=False,
        )
        packed = qat.finalize(done.params, done.state, dtype=config.dtype)
        evaluation: dict[str, float] = {}
        if windows is not None:
            against = start.model, cast(start.params, config.dtype)
            batch_size = config.eval.batch_size
            evaluation = measure(student.model, packed, windows, batch_size, against)
            writers.write(count, evaluation)
    finally:
        writers.close()
    path = out / "model"
    save(path, student, packed, recipe)
    metrics = {
        "error_before": float(np.mean(done.before)),
        "error": float(np.mean(done.after)),
    }
    steps = count * options.epochs * config.total_steps
    return Trained(path, steps, metrics, evaluation)
