"""Models, data and teacher of a training, checked before the first file is written."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from angeljax import _leaves, _shards, _workflow
from angeljax._fields import ConfigError
from angeljax._workflow import Opened
from angeljax.compress import compress, plan
from angeljax.evaluation import Windows
from angeljax.formats import QTensor
from angeljax.models import LanguageModel
from angeljax.recipe import Recipe
from angeljax.train import PackedTokens, TrainConfig, load_tokens
from angeljax.train import language_model as lm
from angeljax.train.losses import check_teacher, check_vocabularies
from angeljax.train.teacher import TeacherRows, read_teacher


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Whom a student learns from: nobody, a model, or predictions on disk."""

    model: LanguageModel | None = None
    params: Any = None
    rows: TeacherRows | None = None


def open_for_training(source: str, config: TrainConfig, *, dtype: str) -> Opened:
    """A model as the training runs it."""
    from angeljax.models import stack_layers

    opened = _workflow.open_model(source, dtype=dtype)
    params, stacked = opened.params, opened.model.scan_layers
    if config.scan_layers and not stacked:
        params, stacked = stack_layers(params), True
    model = lm.ready(opened.model, config.dtype, scan_layers=stacked)
    return dataclasses.replace(opened, model=model, params=params)


def rows_of_text(config: TrainConfig, student: Opened) -> PackedTokens:
    """The text that is trained on."""
    return PackedTokens(
        load_tokens(config.data, student.tokenizer),
        length=config.seq_length,
        batch_size=config.batch_size,
        seed=config.seed,
        vocab_size=student.model.config.vocab_size,
    )


def held_out_text(config: TrainConfig, student: Opened) -> Windows | None:
    """The text that is evaluated on, if any."""
    from angeljax.evaluation import windows

    if config.eval.data is None:
        return None
    try:
        ids = load_tokens(config.eval.data, student.tokenizer)
    except ConfigError as e:
        raise ConfigError(f"eval.{e}") from None
    ids = ids[: config.eval.tokens] if config.eval.tokens else ids
    if int(ids.max()) >= student.model.config.vocab_size:
        raise ConfigError("eval.data: the ids come from another tokenizer")
    return windows(ids.astype(np.int32), min(config.eval.length, len(ids)))


def with_biases(student: Opened, recipe: Recipe | None) -> Opened:
    """Biases of zeros where the recipe's dead-zone bias needs one and there is none."""
    from angeljax.models import add_biases
    from angeljax.models.biases import part_of

    if recipe is None or not any(r.qat and r.qat.tequila for r in recipe.rules):
        return student
    paths = {leaf.path for leaf in _leaves.flatten(student.params)[0]}
    parts = set()
    for leaf in plan(student.params, recipe):
        rule = None if leaf.rule is None else recipe.rules[leaf.rule]
        if leaf.spec is None or rule is None or not (rule.qat and rule.qat.tequila):
            continue
        bias = leaf.path.rpartition("/")[0] + "/bias"
        part = part_of(leaf.path)
        if bias not in paths and part is not None:
            parts.add(part)
    if not parts:
        return student
    model, params = add_biases(student.model, student.params, parts=parts)
    return dataclasses.replace(student, model=model, params=params)


def with_packed_weights(
    config: TrainConfig, student: Opened, recipe: Recipe | None
) -> Opened:
    """The compressed tree that LoRA adds to."""
    if _is_packed(student.params):
        if recipe is not None:
            raise ConfigError(
                f"recipe: {config.model} is compressed already; leave it out to train "
                "on its weights"
            )
        return student
    if recipe is None:
        raise ConfigError(
            f"mode lora adds to packed weights, and {config.model} has none: name a "
            "recipe, or a compressed model"
        )
    params = compress(student.params, recipe, progress=False)
    return dataclasses.replace(student, params=params, recipe=recipe)


def find_teacher(config: TrainConfig, student: Opened, data: PackedTokens) -> Teacher:
    """Whom `distill.teacher` names, checked against the student and its text.

    Args:
      config: of the training.
      student: as it was opened, before it is changed for the training.
      data: the text.
    """
    name = config.teacher
    if name is None:
        return Teacher()
    vocabulary = student.model.config.vocab_size
    if name == "self":
        if config.mode == "lora" and _is_packed(student.params):
            raise ConfigError(
                f"distill.teacher: self is {config.model} itself, compressed as it is; "
                "name the model that it came from"
            )
        return Teacher(student.model, student.params)
    if _shards.kind_of(name) is not None:
        rows = read_teacher(
            name, ids=data.ids, length=config.seq_length, vocab_size=vocabulary
        )
        check_teacher(rows.rows(np.zeros(1, np.int64)), vocabulary, config.options())
        return Teacher(rows=rows)
    opened = open_for_training(name, config, dtype=config.dtype)
    check_vocabularies(vocabulary, opened.model.config.vocab_size)
    mine, other = student.tokenizer, opened.tokenizer
    if mine is not None and other is not None and mine.vocabulary != other.vocabulary:
        token = next(
            t
            for t in {**mine.vocabulary, **other.vocabulary}
            if mine.vocabulary.get(t) != other.vocabulary.get(t)
        )
        raise ConfigError(
            f"distill.teacher {name} has another vocabulary than the model: "
            f"token {token!r} is {other.vocabulary.get(token)} there and "
            f"{mine.vocabulary.get(token)} here; choose a teacher with this tokenizer"
        )
    return Teacher(opened.model, opened.params)


def identity(
    config: TrainConfig, student: Opened, data: PackedTokens, teacher: Teacher
) -> dict[str, Any]:
    """What a resumed run must have as well, by the names that messages use."""
    recipe = config.loaded_recipe()
    plain = config.to_dict()
    named: Any = config.teacher
    if teacher.rows is not None:
        named = {"predictions of": teacher.rows.model, "top_k": teacher.rows.top_k}
    found = {
        "recipe": None if recipe is None else recipe.to_dict(),
        "data or order": data.identity(),
        "number of steps": config.total_steps,
        "model": config.model,
        "dtype": config.dtype,
        "optimizer": plain["optimizer"],
        "distillation": {**config.options().to_dict(), "teacher": named},
        "set of frozen leaves": plain["freeze"],
        "layout of layers": {"scan_layers": student.model.scan_layers},
    }
    if config.mode == "lora":
        found["lora"] = plain["lora"]
    return found


def _is_packed(params: Any) -> bool:
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QTensor))
    return any(isinstance(x, QTensor) for x in leaves)
