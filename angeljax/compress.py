"""`compress`: a param tree and a recipe in, the same tree with QTensors out."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp

from angeljax import _leaves
from angeljax._jobs import Job, apply_transforms, make_jobs
from angeljax._plan import Assignment, make_plan
from angeljax.calibration._statistics import Statistics
from angeljax.formats import QTensor
from angeljax.recipe import Recipe

__all__ = ["compress", "plan"]


def plan(params: Any, recipe: Recipe) -> list[Assignment]:
    """Which rule takes which leaf, without doing it.

    Args:
      params: a param tree of arrays or `jax.ShapeDtypeStruct`s.
      recipe: the recipe.

    Returns:
      One entry for each leaf, in tree order: path, shape, dtype, index of the rule,
      spec (None if the leaf stays) and the reason why it stays.

    Raises:
      RecipeError: as `compress`.
    """
    leaves, _ = _leaves.flatten(params)
    return make_plan(leaves, recipe)


def compress(
    params: Any,
    recipe: Recipe,
    stats: Statistics | None = None,
    *,
    base: Any = None,
    donate: bool = False,
    progress: bool | None = None,
) -> Any:
    """Replaces weights by `QTensor`s as the recipe says.

    A pure function: the input is left as it is (unless donated) and the output depends
    on nothing else. It works under `jit`, `eval_shape` and on any tree: linen dicts,
    `nnx.State`, nested containers; boxes (`nn.Partitioned`, `nnx.Variable`) are kept.
    Leaves that are one and the same array (tied weights) stay one QTensor, except under
    `jit`, where JAX passes them as two.

    Called on concrete arrays it goes leaf by leaf, each in its own compiled function,
    and holds at most the input, the output and two leaves; it also checks every weight
    for NaN and infinity, which a traced call cannot.

    Args:
      params: the param tree.
      recipe: see `angeljax.Recipe`.
      stats: what `angeljax.calibrate` found, for recipes that need it.
      base: the params before fine-tuning, a tree like `params`, for algorithms that
        compare with them (DAQ).
      donate: delete the buffer of each leaf as soon as its QTensor is made. The caller
        must not use `params` afterwards. Only on concrete `jax.Array`s.
      progress: show a progress bar on stderr; default: if it is a terminal.

    Returns:
      The tree with QTensors in place of the leaves that a rule took.

    Raises:
      RecipeError: the recipe does not fit the tree; raised before any array work.
      StatisticsError: statistics that the recipe needs are missing or of another model.
      ValueError: a weight holds NaN or infinity (named by its path).

    Example:
      >>> import jax, angeljax as aj
      >>> params = {"dense": {"kernel": jax.numpy.ones((256, 16))}}
      >>> aj.compress(params, aj.Recipe(rules=[aj.Rule(format="int8")]))
      {'dense': {'kernel': QTensor(int8 channel [256,16] float32, 8.125 bit/weight)}}
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(
            f"recipe must be an angeljax.Recipe, not {type(recipe).__name__}: "
            "use Recipe.load(path) or Recipe(rules=[...])"
        )
    leaves, treedef = _leaves.flatten(params)
    assignments = make_plan(leaves, recipe)
    leaves, stats = apply_transforms(leaves, assignments, recipe, stats)
    jobs = make_jobs(leaves, assignments, recipe, stats, base)
    if any(isinstance(leaf.value, jax.core.Tracer) for leaf in leaves):
        values = [
            leaf.value if job is None else job.run(leaf.value)
            for leaf, job in zip(leaves, jobs, strict=True)
        ]
    else:
        values = run_jobs(leaves, jobs, donate, progress)
    return _leaves.unflatten(treedef, leaves, values)


def run_jobs(
    leaves: list[_leaves.Leaf],
    jobs: list[Job | None],
    donate: bool,
    progress: bool | None,
) -> list[Any]:
    """Each leaf quantized by its job, or as it is; concrete arrays, one by one.

    Raises:
      ValueError: a weight holds NaN or infinity, or an algorithm cannot take it.
    """
    # The last place where each array occurs, so that a tied one is not freed early.
    last_use = {id(leaf.value): i for i, leaf in enumerate(leaves)}
    done: dict[tuple[int, Any], QTensor] = {}
    values: list[Any] = []
    show = sys.stderr.isatty() if progress is None else progress
    for i, (leaf, job) in enumerate(_track(list(zip(leaves, jobs, strict=True)), show)):
        if job is None:
            values.append(leaf.value)
            continue
        key = (id(leaf.value), job.key)
        if key not in done:
            if isinstance(leaf.value, jax.ShapeDtypeStruct):
                raise TypeError(
                    f"{leaf.path} is a ShapeDtypeStruct: use "
                    "jax.eval_shape(lambda p: compress(p, recipe), params)"
                )
            # Waiting here is what bounds memory to one leaf in flight.
            if not bool(_finite(leaf.value)):
                raise ValueError(
                    f"{leaf.path} holds NaN or infinity: repair the weight or leave it "
                    "out with a rule `format: none`"
                )
            done[key] = job.run(leaf.value)
        values.append(done[key])
        if donate and last_use[id(leaf.value)] == i and hasattr(leaf.value, "delete"):
            jax.block_until_ready(done[key])
            leaf.value.delete()
    return values


@jax.jit
def _finite(w: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(w))


def _track(items: list[Any], show: bool) -> Any:
    if not show:
        return items
    from rich.console import Console
    from rich.progress import track

    return track(
        items,
        description="Compressing",
        console=Console(stderr=True),
        transient=True,
    )
