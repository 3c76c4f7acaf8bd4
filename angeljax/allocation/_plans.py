"""Which candidate can take which leaf."""

from __future__ import annotations

import math
from collections.abc import Sequence

from angeljax._leaves import Leaf
from angeljax._plan import Assignment, make_plan
from angeljax.allocation._candidates import Candidate
from angeljax.recipe import Recipe, RecipeError

Plans = list[list[Assignment] | None]


def plans(
    leaves: Sequence[Leaf], candidates: Sequence[Candidate], skip: Sequence[str]
) -> Plans:
    """The plan of each candidate as the only rule of a recipe; None to keep.

    Raises:
      RecipeError: a candidate cannot take a leaf that it matches, or takes none.
    """
    out: Plans = []
    for candidate in candidates:
        if candidate.rule is None:
            out.append(None)
            continue
        plan = make_plan(list(leaves), Recipe(rules=[candidate.rule], skip=skip))
        if all(a.spec is None for a in plan):
            raise RecipeError(f"candidate {candidate.name} takes no leaf of the tree")
        out.append(plan)
    return out


def weights_of(by_candidate: Plans) -> list[int]:
    """Indices of the leaves that a candidate takes, in tree order."""
    taken = {
        i
        for plan in by_candidate
        if plan is not None
        for i, a in enumerate(plan)
        if a.spec is not None
    }
    return sorted(taken)


def product_shape(by_candidate: Plans, i: int) -> tuple[int, int]:
    """Inputs and outputs of the products of a weight that a candidate takes."""
    specs = [plan[i].spec for plan in by_candidate if plan is not None]
    spec = next(spec for spec in specs if spec is not None)
    return spec.k, math.prod(spec.shape) // spec.k
