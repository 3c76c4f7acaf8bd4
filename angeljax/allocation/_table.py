"""What was measured, what was chosen, and the recipe that says so."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from angeljax.allocation import _knapsack
from angeljax.allocation._candidates import Candidate
from angeljax.allocation._patterns import patterns
from angeljax.recipe import Recipe, Rule

# Times are added up in whole nanoseconds, so that a limit is met exactly.
_NS = 1e6


class AllocationError(ValueError):
    """A budget that nothing meets, or a candidate that cannot be measured."""


@dataclasses.dataclass(frozen=True)
class Option:
    """What one candidate costs for a group of weights.

    Attributes:
      name: of the candidate: `format[:group_size][:algorithm]`, or "none".
      nbytes: of all weights of the group, scales and padding included.
      loss: what the model loses; its unit is that of the measure.
      ms: time of the group's products in milliseconds, None without a table.
      error: squared error of the group's outputs over their own square, summed over
        weights, or None where it was not measured.
    """

    name: str
    nbytes: int
    loss: float
    ms: float | None = None
    error: float | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """Weights that share a choice.

    Attributes:
      name: for tables.
      paths: of the weights.
      weights: number of their elements.
      options: in the order of `formats`, without those that cannot take the group.
      chosen: index of the option that was taken.
    """

    name: str
    paths: tuple[str, ...]
    weights: int
    options: tuple[Option, ...]
    chosen: int = 0

    @property
    def choice(self) -> Option:
        """The option that was taken."""
        return self.options[self.chosen]


@dataclasses.dataclass(frozen=True)
class Allocation:
    """Formats of all weights under a budget; made by `allocate`.

    Attributes:
      groups: what each group could have been, and what it became.
      candidates: all of `formats`.
      paths: of all leaves of the tree.
      other_nbytes: bytes of the leaves that no candidate takes.
      measure: what losses are: "kl", "linear" (both in nats) or "error".
      budget: what the budget was, for people.
      kl: measured KL divergence of the whole choice on the batches, mean over tokens,
        or None where it was not measured.
      passes: forward passes of one batch, the full model's own not counted.
      seconds: wall time of the measurements.
    """

    groups: tuple[Group, ...]
    candidates: tuple[Candidate, ...]
    paths: tuple[str, ...]
    other_nbytes: int
    measure: str
    budget: str = ""
    kl: float | None = None
    passes: int = 0
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """Predicted loss: the sum over groups."""
        return math.fsum(g.choice.loss for g in self.groups)

    @property
    def weights(self) -> int:
        """Elements of the weights that candidates may take."""
        return sum(g.weights for g in self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tree, as `angeljax.report` counts them."""
        return self.other_nbytes + sum(g.choice.nbytes for g in self.groups)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight over the weights that candidates may take."""
        return 8 * (self.nbytes - self.other_nbytes) / self.weights

    @property
    def ms(self) -> float | None:
        """Time of all products in milliseconds, None without a table."""
        times = [g.choice.ms for g in self.groups]
        return None if None in times else math.fsum(t for t in times if t is not None)

    @property
    def recipe(self) -> Recipe:
        """The choice as a recipe, one rule for each pattern of paths."""
        rules = []
        for candidate in self.candidates:
            paths = [
                path
                for group in self.groups
                if group.choice.name == candidate.name
                for path in group.paths
            ]
            if candidate.rule is None or not paths:
                continue
            for pattern in patterns(paths, self.paths):
                rule = dataclasses.replace(
                    candidate.rule, match=pattern, optional=False
                )
                rules.append(rule)
        if not rules:
            every = patterns([p for g in self.groups for p in g.paths], self.paths)
            rules = [Rule(match=pattern, format=None) for pattern in every]
        bits = f"{self.bits_per_weight:.3f}"
        found = f"predicted {self.measure} loss {self.loss:.4g}"
        if self.kl is not None:
            found += f", measured KL {self.kl:.4g} nats"
        return Recipe(
            rules=rules,
            name=f"mixed-{bits}-bits",
            description=f"Mixed formats, {bits} bits per weight and "
            f"{self.nbytes / 1e6:.3f} MB, for a budget of {self.budget}; {found}.",
        )

    def at(
        self,
        *,
        budget_mb: float | None = None,
        budget_bits: float | None = None,
        budget_ms: float | None = None,
    ) -> Allocation:
        """The best choice under another budget, from the same measurements.

        Args:
          budget_mb, budget_bits, budget_ms: as in `allocate`.

        Returns:
          An `Allocation` whose `kl` is None: nothing is run.

        Raises:
          AllocationError: nothing meets the budget.
        """
        limits, told = self._limits(budget_mb, budget_bits, budget_ms)
        timed = budget_ms is not None
        costs = [
            [
                (o.nbytes, round((o.ms or 0.0) * _NS)) if timed else (o.nbytes,)
                for o in group.options
            ]
            for group in self.groups
        ]
        losses = [[o.loss for o in group.options] for group in self.groups]
        try:
            chosen = _knapsack.solve(losses, costs, limits)
        except _knapsack.InfeasibleError as e:
            raise AllocationError(self._infeasible(told, e.least)) from None
        groups = tuple(
            dataclasses.replace(group, chosen=o)
            for group, o in zip(self.groups, chosen, strict=True)
        )
        return dataclasses.replace(self, groups=groups, budget=told, kl=None)

    def _limits(
        self, mb: float | None, bits: float | None, ms: float | None
    ) -> tuple[list[int], str]:
        """Integer limits of the groups' bytes and nanoseconds, and the budget in words.

        Raises:
          AllocationError: no budget is given, or none that makes sense.
        """
        told = []
        given = (("budget_mb", mb), ("budget_bits", bits), ("budget_ms", ms))
        for name, value in given:
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise AllocationError(f"{name} must be a positive number, not {value}")
        nbytes = sum(max(o.nbytes for o in g.options) for g in self.groups)
        if mb is not None:
            nbytes = min(nbytes, math.floor(mb * 1e6 + 1e-3) - self.other_nbytes)
            told.append(f"{mb:g} MB")
        if bits is not None:
            nbytes = min(nbytes, math.floor(bits * self.weights / 8 + 1e-3))
            told.append(f"{bits:g} bits per weight")
        limits = [nbytes]
        if ms is not None:
            if self.ms is None:
                raise AllocationError(
                    "budget_ms needs a time for every candidate: pass latency="
                )
            limits.append(math.floor(ms * _NS + 1e-3))
            told.append(f"{ms:g} ms")
        if not told:
            raise AllocationError("give budget_bits, budget_mb or budget_ms")
        return limits, " and ".join(told)

    def _infeasible(self, told: str, least: Sequence[int]) -> str:
        nbytes = least[0]
        parts = [
            f"{8 * nbytes / self.weights:.4f} bits per weight, "
            f"{(nbytes + self.other_nbytes) / 1e6:.6f} MB for the whole tree"
        ]
        if len(least) > 1:
            parts.append(f"{least[1] / _NS:.6f} ms (each by itself)")
        return (
            f"no choice of these candidates meets a budget of {told}; the least is "
            f"{' and '.join(parts)}"
        )

    def uniform(self) -> dict[str, Allocation]:
        """For each candidate that can take every group: all groups with it."""
        out = {}
        for candidate in self.candidates:
            groups = []
            for group in self.groups:
                names = [o.name for o in group.options]
                if candidate.name in names:
                    index = names.index(candidate.name)
                    groups.append(dataclasses.replace(group, chosen=index))
            if len(groups) == len(self.groups):
                out[candidate.name] = dataclasses.replace(
                    self, groups=tuple(groups), budget=candidate.name, kl=None
                )
        return out

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: totals, groups with all options, and the recipe."""
        return {
            "measure": self.measure,
            "budget": self.budget,
            "bits_per_weight": self.bits_per_weight,
            "bytes": self.nbytes,
            "ms": self.ms,
            "loss": self.loss,
            "kl": self.kl,
            "passes": self.passes,
            "seconds": self.seconds,
            "groups": [
                {**dataclasses.asdict(g), "chosen": g.choice.name} for g in self.groups
            ],
            "recipe": self.recipe.to_dict(),
        }

    def __str__(self) -> str:
        parts = [
            f"{self.bits_per_weight:.3f} bits per weight",
            f"{self.nbytes / 1e6:.3f} MB",
            f"predicted {self.measure} loss {self.loss:.4g}",
        ]
        if self.kl is not None:
            parts.append(f"measured KL {self.kl:.4g} nats")
        if self.ms is not None:
            parts.append(f"{self.ms:.4g} ms")
        return ", ".join(parts)

    def __rich__(self) -> Any:
        """A table: a row for each group with the loss of each candidate."""
        from rich.table import Table

        table = Table("group", "choice", show_footer=True)
        table.columns[0].footer = str(self)
        names = [c.name for c in self.candidates]
        for name in ("bit/weight", *names):
            table.add_column(name, justify="right")
        for group in self.groups:
            losses = {o.name: f"{o.loss:.3g}" for o in group.options}
            table.add_row(
                group.name,
                group.choice.name,
                f"{8 * group.choice.nbytes / group.weights:.3f}",
                *(losses.get(name, "") for name in names),
            )
        return table
