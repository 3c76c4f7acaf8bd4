"""What is to be done to each weight: its algorithm, its statistics, its options."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax._brief import brief_jit
from angeljax._leaves import Leaf, flatten
from angeljax._plan import Assignment
from angeljax.algorithms import get_algorithm
from angeljax.algorithms._base import requirements
from angeljax.algorithms.input_scale import input_scale
from angeljax.calibration._statistics import Statistics, StatisticsError, for_weight
from angeljax.formats import QTensor, Spec
from angeljax.recipe import Recipe, RecipeError, Rule

# What a rule needs that is no statistic of inputs.
BASE = "base"


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One weight: how it is quantized, and from what.

    Attributes:
      path: of the weight.
      spec: of the result.
      rule: which algorithm, with which options.
      found: its statistics; for DAQ also `base`.
    """

    path: str
    spec: Spec
    rule: Rule
    found: Mapping[str, jax.Array]

    @property
    def key(self) -> Any:
        """Equal for two jobs that give the same result for the same weight."""
        # Tied weights see other inputs in each place: with statistics they differ.
        place = self.path if self.found else ""
        rule = self.rule
        return self.spec, rule.algorithm, rule.options, rule.activation_scale, place

    def run(self, w: jax.Array) -> QTensor:
        """The weight, quantized.

        Raises:
          ValueError: the algorithm cannot; names the weight.
        """
        rule = self.rule
        try:
            q, required = _run(
                w,
                dict(self.found),
                self.spec,
                rule.algorithm,
                rule.options,
                rule.activation_scale,
            )
            for otherwise, ok in required.items():
                if not isinstance(ok, jax.core.Tracer) and not bool(ok):
                    raise ValueError(otherwise)
        except ValueError as e:
            raise ValueError(f"{self.path}: {e}") from None
        return q


@functools.partial(brief_jit, static_argnums=(2, 3, 4, 5))
def _run(
    w: jax.Array,
    found: dict[str, jax.Array],
    spec: Spec,
    algorithm: str,
    options: Any,
    activation_scale: str,
) -> tuple[QTensor, dict[str, jax.Array]]:
    with requirements() as required:
        q = get_algorithm(algorithm).quantize(w, spec, found, options)
    if activation_scale != "dynamic":
        scale = input_scale(found, spec, activation_scale)
        q = QTensor(planes={**q.planes, "input_scale": scale}, spec=spec)
    return q, required


def apply_transforms(
    leaves: list[Leaf],
    plan: list[Assignment],
    recipe: Recipe,
    stats: Statistics | None,
) -> tuple[list[Leaf], Statistics | None]:
    """The leaves, and their statistics, after the transforms of a recipe.

    Raises:
      StatisticsError: one needs statistics and there are none.
      RecipeError: the tree does not have what one needs.
    """
    if not recipe.transforms:
        return leaves, stats
    specs = {a.path: a.spec for a in plan if a.spec is not None}
    values = {leaf.path: leaf.value for leaf in leaves}
    for transform in recipe.transforms:
        if transform.needs() and stats is None:
            raise StatisticsError(
                f"transform {transform.to_dict()['name']} needs calibration: pass what "
                "angeljax.calibrate(model, params, batches, recipe) returns"
            )
        try:
            changed, stats = transform.apply(values, stats, specs)
        except ValueError as e:
            name = transform.to_dict()["name"]
            raise RecipeError(f"transform {name}: {e}") from None
        values = {**values, **changed}
    new = [dataclasses.replace(leaf, value=values[leaf.path]) for leaf in leaves]
    return new, stats


def make_jobs(
    leaves: list[Leaf],
    plan: list[Assignment],
    recipe: Recipe,
    stats: Statistics | None,
    base: Any = None,
) -> list[Job | None]:
    """A job for each leaf that a rule takes, None for the others.

    Raises:
      StatisticsError: statistics are missing, or of another model.
      ValueError: the base model is missing, or has other shapes.
    """
    few: list[str] = []
    before = {} if base is None else {x.path: x.value for x in flatten(base)[0]}
    jobs: list[Job | None] = []
    for leaf, a in zip(leaves, plan, strict=True):
        if a.spec is None or a.rule is None:
            jobs.append(None)
            continue
        rule = recipe.rules[a.rule]
        needs = tuple(k for k in rule.needs() if k != BASE)
        found: dict[str, jax.Array] = {}
        if needs and stats is None:
            raise StatisticsError(
                f"{a.path}: algorithm {rule.algorithm} with activation_scale "
                f"{rule.activation_scale} needs calibration: pass what "
                "angeljax.calibrate(model, params, batches, recipe) returns"
            )
        if needs and stats is not None:
            batch = a.shape[: len(a.shape) - len(a.spec.shape)]
            norm = _norm(leaf.value, n_batch=len(batch)) if stats.norms else None
            found = for_weight(stats, a.path, a.spec.k, batch, needs, norm)
            found = {k: v for k, v in found.items() if k in (*needs, "count")}
            few += _few_tokens(a.path, a.spec.k, found)
        if BASE in rule.needs():
            found[BASE] = _base_weight(before, base, a)
        jobs.append(Job(a.path, a.spec, rule, found))
    if few:
        more = f" (so have {len(few) - 1} other weights)" if len(few) > 1 else ""
        warnings.warn(
            f"{few[0]}{more}: its Hessian is singular and rests on damping; calibrate "
            "with more tokens",
            stacklevel=3,
        )
    return jobs


def _few_tokens(path: str, k: int, found: Mapping[str, jax.Array]) -> list[str]:
    """A line if a Hessian was found from fewer tokens than it has rows."""
    count = found.get("count")
    if "hessian" not in found or count is None or isinstance(count, jax.core.Tracer):
        return []
    least = int(np.min(np.asarray(count)))
    return [f"{path} saw {least} tokens for {k} inputs"] if least < k else []


def _base_weight(before: Mapping[str, Any], base: Any, a: Assignment) -> jax.Array:
    if base is None:
        raise ValueError(
            f"{a.path}: this algorithm compares with the model before fine-tuning: "
            "pass its params as base="
        )
    if a.path not in before or tuple(before[a.path].shape) != a.shape:
        raise ValueError(f"{a.path}: the base model has no such weight of its shape")
    return before[a.path]


@functools.partial(jax.jit, static_argnames="n_batch")
def _norm(w: jax.Array, n_batch: int) -> jax.Array:
    axes = tuple(range(n_batch, w.ndim))
    return jnp.sqrt(jnp.sum(jnp.square(w.astype(jnp.float32)), axis=axes))
