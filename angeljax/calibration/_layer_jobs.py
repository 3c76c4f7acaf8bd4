"""What is measured of the weights of one layer, and how they are quantized then."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from angeljax import _leaves
from angeljax._jobs import BASE, apply_transforms, make_jobs
from angeljax._leaves import Leaf
from angeljax._plan import Assignment, make_plan
from angeljax.calibration import _measure
from angeljax.calibration._layer_run import Tap
from angeljax.calibration._statistics import Statistics
from angeljax.calibration.calibrate import ALWAYS, batch_of
from angeljax.recipe import Recipe, RecipeError

PAIRED = "mismatch"
# (leaves as they are now, which of them to look at) -> their statistics.
Measure = Callable[[list[Leaf], list[int]], Statistics]


@dataclasses.dataclass(frozen=True)
class LayerJobs:
    """A recipe, taken apart for one layer after another.

    Attributes:
      recipe: without the transforms that need no statistics.
      plan: path in the whole tree -> what happens to the leaf.
      subsets: regular expressions of paths inside a layer, or none.
      donate: free weights that are quantized.
    """

    recipe: Recipe
    plan: Mapping[str, Assignment]
    subsets: tuple[str, ...]
    donate: bool

    def needs(self, a: Assignment) -> tuple[str, ...]:
        """Statistics that the rule of a leaf reads."""
        if a.spec is None or a.rule is None:
            return ()
        needs = self.recipe.rules[a.rule].needs()
        return tuple(kind for kind in needs if kind != BASE)

    def measures(self, a: Assignment, *, inside: bool) -> bool:
        """Whether a leaf is to be looked at; transforms look at all inside layers."""
        if a.spec is None:
            return False
        return bool(self.needs(a)) or (inside and bool(self.recipe.transforms))

    def tap(self, index: int, a: Assignment, *, inside: bool) -> Tap:
        """What is measured of a leaf in a pass over the model's own inputs."""
        assert a.spec is not None
        needs = {*ALWAYS, *self.needs(a)}
        if inside:
            needs |= {kind for t in self.recipe.transforms for kind in t.needs()}
        if "ema" in needs:
            needs.add("batches")
        kinds = tuple(k for k in _measure.SHAPES if k in needs and k != PAIRED)
        return Tap(index, a.spec, batch_of(a), kinds)

    def assignments(self, leaves: list[Leaf], *, stacked: bool) -> list[Assignment]:
        """What happens to the leaves of one layer.

        Raises:
          RecipeError: layers of a stack share scales.
        """
        found = [self.plan[leaf.path] for leaf in leaves]
        return [_of_one(a) for a in found] if stacked else found

    def transform(
        self, leaves: list[Leaf], plan: list[Assignment], measure: Measure
    ) -> tuple[list[Leaf], Statistics | None]:
        """The leaves after the transforms, and the statistics of all of them."""
        if not self.recipe.transforms:
            return leaves, None
        look = [n for n, a in enumerate(plan) if a.spec is not None]
        if not look:
            return leaves, None
        return apply_transforms(leaves, plan, self.recipe, measure(leaves, look))

    def quantize(
        self,
        leaves: list[Leaf],
        plan: list[Assignment],
        measure: Measure,
        base: Any = None,
    ) -> list[Leaf]:
        """The leaves of one layer after transforms and algorithms.

        Args:
          leaves, plan: of the layer.
          measure: measures some of the leaves as they are when it is called.
          base: params before fine-tuning with the same paths.
        """
        from angeljax.compress import run_jobs

        leaves, stats = self.transform(leaves, plan, measure)
        if any(PAIRED in self.needs(a) for a in plan):
            stats = None  # it is not of the transformed weights
        for group in self._groups(leaves):
            look = [n for n in group if self.needs(plan[n])]
            if look and stats is None:
                stats = measure(leaves, look)
            some = [leaves[n] for n in group]
            jobs = make_jobs(some, [plan[n] for n in group], self.recipe, stats, base)
            values = run_jobs(some, jobs, self.donate, progress=False)
            leaves = list(leaves)
            for n, value in zip(group, values, strict=True):
                leaves[n] = dataclasses.replace(leaves[n], value=value)
            stats = None
        return leaves

    def _groups(self, leaves: list[Leaf]) -> list[list[int]]:
        """Numbers of leaves that are quantized together, in order."""
        left = list(range(len(leaves)))
        groups = []
        for pattern in self.subsets:
            # A path inside the layer is the end of a whole path.
            whole = re.compile(f"(.*/)?(?:{pattern})")
            some = [n for n in left if whole.fullmatch(leaves[n].path)]
            left = [n for n in left if n not in some]
            groups.append(some)
        return [group for group in (*groups, left) if group]


def split_transforms(recipe: Recipe) -> tuple[Recipe | None, Recipe]:
    """A recipe's transforms for the whole tree, and the recipe for each layer.

    Raises:
      RecipeError: one without statistics comes after one that needs them.
    """
    before = [t for t in recipe.transforms if not t.needs()]
    within = [t for t in recipe.transforms if t.needs()]
    if [*before, *within] != list(recipe.transforms):
        late = next(
            t for t in before if list(recipe.transforms).index(t) >= len(before)
        )
        raise RecipeError(
            f"transform {late.to_dict()['name']} is for the whole tree and goes before "
            "those that need statistics, which are applied layer by layer: put it first"
        )
    whole = dataclasses.replace(recipe, transforms=before) if before else None
    return whole, dataclasses.replace(recipe, transforms=within)


def plan_and_transform(
    params: Any, recipe: Recipe, whole: Recipe | None
) -> tuple[Any, dict[str, Assignment]]:
    """The tree after transforms that need no statistics, and what happens to it.

    Raises:
      RecipeError: the recipe does not fit the tree.
    """
    leaves, treedef = _leaves.flatten(params)
    plan = make_plan(leaves, recipe)
    if whole is not None:
        leaves, _ = apply_transforms(leaves, plan, whole, None)
        params = _leaves.unflatten(treedef, leaves, [leaf.value for leaf in leaves])
    return params, {a.path: a for a in plan}


def _of_one(a: Assignment) -> Assignment:
    """What happens to one layer of a stack."""
    if a.spec is not None and len(a.spec.shape) >= len(a.shape):
        raise RecipeError(
            f"{a.path}: layer by layer each layer of a stack has scales of its own: "
            "leave batch_axes out"
        )
    return dataclasses.replace(a, shape=a.shape[1:])
