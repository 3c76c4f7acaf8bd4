"""Which rule takes which leaf, resolved and validated before any array work."""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Any

import jax.numpy as jnp

from angeljax._leaves import Leaf, default_axis
from angeljax.algorithms import get_algorithm
from angeljax.formats import QTensor, Spec, make_spec
from angeljax.recipe import Recipe, RecipeError, Rule

# A rule without `match` leaves shorter contractions alone: a scale for fewer weights
# costs more than it saves (depthwise convolutions, small biases of scanned stacks).
MIN_CONTRACTION = 32


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What happens to one leaf: a spec, or the reason why it stays as it is."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    rule: int | None
    spec: Spec | None
    reason: str


def make_plan(leaves: list[Leaf], recipe: Recipe) -> list[Assignment]:
    """Assigns every leaf, in order.

    Raises:
      RecipeError: a leaf that its rule cannot take (named), or a rule that matches
        nothing (with near misses).
    """
    plan = [_assign(leaf, recipe) for leaf in leaves]
    for index, rule in enumerate(recipe.rules):
        if not rule.optional and all(a.rule != index for a in plan):
            raise RecipeError(_unmatched(index, rule, recipe, plan))
    return plan


def _assign(leaf: Leaf, recipe: Recipe) -> Assignment:
    value = leaf.value
    shape, dtype = tuple(jnp.shape(value)), _dtype_name(value)

    def keep(reason: str, rule: int | None = None) -> Assignment:
        return Assignment(leaf.path, shape, dtype, rule, None, reason)

    passed_over = "no rule matches"
    for index, rule in enumerate(recipe.rules):
        if rule.match is None:
            reason = _not_by_default(leaf, shape, recipe, rule)
            if reason:
                passed_over = reason
                continue
        elif not re.fullmatch(rule.match, leaf.path):
            continue
        if rule.format is None:
            return keep("rule says none", index)
        if isinstance(value, QTensor):
            raise RecipeError(f"{leaf.path} is {value.spec.label()} already")
        try:
            spec = _spec(leaf.path, shape, dtype, rule)
        except ValueError as e:
            raise RecipeError(f"{leaf.path}: {e}") from None
        return Assignment(leaf.path, shape, dtype, index, spec, "")
    return keep(passed_over)


def _spec(path: str, shape: tuple[int, ...], dtype: str, rule: Rule) -> Spec:
    assert rule.format is not None
    algorithm = get_algorithm(rule.algorithm)
    if dtype == "object":
        raise ValueError("is not an array")
    spec = make_spec(
        shape,
        dtype,
        format=rule.format,
        granularity=rule.granularity,
        group_size=rule.group_size,
        axis=default_axis(path, len(shape)) if rule.axis is None else rule.axis,
        batch_axes=rule.batch_axes,
        scale_dtype=rule.scale_dtype,
        pad=rule.pad,
        activation=rule.activation,
        rotation=rule.rotation,
        **rule.format_options(),
    )
    algorithm.check(rule.options, spec)
    return spec


def _not_by_default(
    leaf: Leaf, shape: tuple[int, ...], recipe: Recipe, rule: Rule
) -> str:
    """Why a rule without `match` leaves the leaf alone; empty if it takes it."""
    if isinstance(leaf.value, QTensor):
        return "quantized already"
    if any(re.fullmatch(p, leaf.path) for p in recipe.skip):
        return "skipped by default"
    if len(shape) < 2:
        return "fewer than 2 axes"
    if not jnp.issubdtype(_dtype_name(leaf.value), jnp.floating):
        return "not floating-point"
    axes = default_axis(leaf.path, len(shape)) if rule.axis is None else rule.axis
    axes = (axes,) if isinstance(axes, int) else axes
    k = 1
    for a in axes:
        if not -len(shape) <= a < len(shape):
            return f"has no axis {a}"
        k *= shape[a]
    if k < MIN_CONTRACTION:
        return f"contraction of {k} is shorter than {MIN_CONTRACTION}"
    return ""


def _dtype_name(value: Any) -> str:
    dtype = getattr(value, "dtype", None)
    return "object" if dtype is None else jnp.dtype(dtype).name


def _unmatched(index: int, rule: Rule, recipe: Recipe, plan: list[Assignment]) -> str:
    head = f"rule {index + 1} {rule.label()} matches no leaf"
    if rule.match is None:
        if any(a.reason == "quantized already" for a in plan):
            return f"{head}: the tree is quantized already"
        return f"{head}: the tree has no weight that the default selection takes"
    taken = [a for a in plan if re.fullmatch(rule.match, a.path)]
    if taken:
        first = taken[0].rule or 0
        return (
            f"{head} that an earlier rule has not taken: {taken[0].path} went to rule "
            f"{first + 1} {recipe.rules[first].label()}; put the special rule first"
        )
    plain = re.sub(r"[^\w/]+", " ", rule.match).strip()
    near = difflib.get_close_matches(plain, [a.path for a in plan], n=3, cutoff=0.3)
    near = near or [a.path for a in plan[:3]]
    return f"{head}; the closest paths are {', '.join(near)}"
