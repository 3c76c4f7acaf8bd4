"""The multiple-choice knapsack: one option of each group, least loss under limits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Losses are scaled so that the solver's absolute gap of 1e-6 is 1e-10 of the largest.
_SCALE = 1e4


class InfeasibleError(ValueError):
    """No choice meets the limits.

    Attributes:
      least: the least that each resource can be, by itself.
    """

    def __init__(self, least: tuple[int, ...]) -> None:
        super().__init__(f"no choice meets the limits; the least are {least}")
        self.least = least


def solve(
    losses: Sequence[Sequence[float]],
    costs: Sequence[Sequence[Sequence[int]]],
    limits: Sequence[int],
) -> list[int]:
    """The options with the least sum of losses.

    An integer linear program, solved to optimality by branch and bound (HiGHS). All
    costs are integers, so that a limit is met exactly or not at all.

    Args:
      losses: group -> option -> loss.
      costs: group -> option -> integer cost of each resource.
      limits: of the sum of each resource.

    Returns:
      The number of the option of each group.

    Raises:
      InfeasibleError: there is none.
    """
    least = tuple(
        sum(min(option[r] for option in group) for group in costs)
        for r in range(len(limits))
    )
    if any(low > limit for low, limit in zip(least, limits, strict=True)):
        raise InfeasibleError(least)
    useful = [undominated(a, b) for a, b in zip(losses, costs, strict=True)]
    columns = [(g, o) for g, options in enumerate(useful) for o in options]
    picked = _milp(losses, costs, limits, columns)
    if picked is None:
        raise InfeasibleError(least)
    choice = [columns[i][1] for i in picked]
    for r, limit in enumerate(limits):
        if sum(costs[g][o][r] for g, o in enumerate(choice)) > limit:
            raise RuntimeError("the solver returned a choice above the limit")
    return choice


def undominated(losses: Sequence[float], costs: Sequence[Sequence[int]]) -> list[int]:
    """Options that no other one of the group equals or beats in everything."""
    points = [(loss, *cost) for loss, cost in zip(losses, costs, strict=True)]

    def beaten(i: int) -> bool:
        return any(
            all(a <= b for a, b in zip(other, points[i], strict=True))
            and (other != points[i] or j < i)
            for j, other in enumerate(points)
            if j != i
        )

    return [i for i in range(len(points)) if not beaten(i)]


def _milp(
    losses: Sequence[Sequence[float]],
    costs: Sequence[Sequence[Sequence[int]]],
    limits: Sequence[int],
    columns: Sequence[tuple[int, int]],
) -> list[int] | None:
    """Which columns are chosen, one of each group in order; None if nothing fits."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    n, n_groups = len(columns), len(losses)
    groups = np.array([g for g, _ in columns])
    one_each = csr_array((np.ones(n), (groups, np.arange(n))), (n_groups, n))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for r, limit in enumerate(limits):
        row = [costs[g][o][r] for g, o in columns]
        low = [min(costs[g][o][r] for o in range(len(costs[g]))) for g in groups]
        # Only what lies above the cheapest matters, in its greatest common unit.
        above = [a - b for a, b in zip(row, low, strict=True)]
        unit = math.gcd(*above) or 1
        room = (limit - sum(min(o[r] for o in group) for group in costs)) // unit
        # Halfway to the next integer: rounding decides nothing.
        scaled = np.array([a // unit for a in above], float)
        constraints.append(LinearConstraint(scaled[None], -np.inf, room + 0.5))
    loss = np.array([losses[g][o] for g, o in columns], float)
    # Only differences inside a group matter.
    lowest = np.full(n_groups, np.inf)
    np.minimum.at(lowest, groups, loss)
    loss = loss - lowest[groups]
    result = milp(
        loss * (_SCALE / (loss.max() or 1.0)),
        constraints=constraints,
        integrality=np.ones(n),
        bounds=Bounds(0, 1),
        # Its presolve writes stray lines to standard output on some instances.
        options={"mip_rel_gap": 0.0, "presolve": False},
    )
    if result.x is None:
        return None
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    ends = [*starts[1:], n]
    return [
        int(a + np.argmax(result.x[a:b])) for a, b in zip(starts, ends, strict=True)
    ]
