"""`angeljax spec profile`: what wide rounds cost, and which drafts pay."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from angeljax._spec_workflow.setup import Ready
from angeljax.speculative import (
    Drafter,
    Profile,
    draft_costs,
    profile_target,
    variants,
)

ACCEPTANCES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Pays:
    """What pays most where each draft is right with one and the same chance.

    Attributes:
      acceptance: the chance.
      drafts: of a chain; 0 where plain decoding is faster.
      speedup: over plain decoding.
    """

    acceptance: float
    drafts: int
    speedup: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What was measured.

    Attributes:
      profile: of the target.
      drafter: whose cost is counted; empty if drafts are taken to cost nothing.
      costs: by the width of a round, what the drafts cost, on the scale of a round of
        one token.
      pays: for some chances.
    """

    profile: Profile
    drafter: str
    costs: tuple[tuple[int, float], ...]
    pays: tuple[Pays, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        profile = self.profile
        rounds = [
            {
                "width": width,
                "ms": 1e3 * seconds,
                "cost": profile.cost(width),
                "break_even": break_even(profile.cost(width), width - 1),
            }
            for width, seconds in zip(profile.widths, profile.seconds, strict=True)
        ]
        return {
            "device": profile.device,
            "batch": profile.batch,
            "slots": profile.slots,
            "rounds": rounds,
            "drafter": self.drafter or None,
            "draft_costs": [{"width": w, "cost": c} for w, c in self.costs],
            "pays": [dataclasses.asdict(p) for p in self.pays],
        }


def measure(
    ready: Ready,
    widths: Sequence[int],
    *,
    batch: int,
    slots: int,
    name: str = "",
    drafter: Drafter | None = None,
    cache: bool = True,
) -> Report:
    """Times rounds of some widths, and a drafter's drafts.

    Args:
      ready: the target.
      widths: tokens read at once.
      batch: rows.
      slots: of the cache.
      name: what the drafter is called.
      drafter: its cost counts in what pays; None takes drafts to cost nothing.
      cache: see `profile_target`.

    Returns:
      A `Report`.

    Raises:
      ValueError: a number that cannot be, or a drafter whose drafts are no chain.
    """
    run = ready.model, ready.params
    profile = profile_target(*run, widths, batch=batch, slots=slots, cache=cache)
    costs: list[tuple[int, float]] = []
    if drafter is not None:
        if drafter.tree is not None:
            raise ValueError(
                f"{name} drafts a tree, and what pays is told for chains: leave it "
                "out, or use `spec bench`"
            )
        some = variants(drafter)
        found = draft_costs(*run, profile, some, cache=cache)
        costs = [(d.width, c) for d, c in zip(some, found, strict=True)]
    pays = [what_pays(profile, chance, costs) for chance in ACCEPTANCES]
    return Report(profile, name, tuple(costs), tuple(pays))


def what_pays(
    profile: Profile, acceptance: float, costs: Sequence[tuple[int, float]] = ()
) -> Pays:
    """The chain that pays most if drafts are right with this chance, each.

    Args:
      profile: of the target.
      acceptance: the chance that a draft is right if those before it are.
      costs: (width, cost of the drafts) of the chains to consider; default those of
        all widths up to the largest that was measured, at no cost.

    Returns:
      A `Pays`.
    """
    chains = costs or [(w, 0.0) for w in range(2, profile.widths[-1] + 1)]
    best = Pays(acceptance, 0, 1.0)
    for width, cost in chains:
        tau = _tau(acceptance, width - 1)
        speedup = tau / (profile.cost(width) + cost)
        if speedup > best.speedup:
            best = Pays(acceptance, width - 1, speedup)
    return best


def break_even(cost: float, drafts: int) -> float | None:
    """The chance of each draft at which drafts that cost nothing just pay.

    Args:
      cost: of a round of `drafts + 1` tokens, on the scale of a round of one.
      drafts: of a chain.

    Returns:
      A chance; None if they never do, 0 if they always do.
    """
    if cost <= 1:
        return 0.0
    if cost > drafts + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _tau(middle, drafts) < cost else (low, middle)
    return high


def _tau(acceptance: float, drafts: int) -> float:
    return sum(acceptance**j for j in range(drafts + 1))


def tables(report: Report) -> list[Any]:
    """`rich` tables: rounds by their width, and what pays."""
    from rich.table import Table

    rounds = Table("tokens read")
    for name in ("ms of a round", "times one token", "pays from acceptance"):
        rounds.add_column(name, justify="right")
    for row in report.to_dict()["rounds"]:
        even = row["break_even"]
        shown = "never" if even is None else f"{even:.2f}"
        rounds.add_row(
            str(row["width"]),
            f"{row['ms']:.3f}",
            f"{row['cost']:.2f}",
            "" if row["width"] == 1 else shown,
        )
    pays = Table("acceptance of a draft")
    for name in ("drafts that pay most", "speed-up"):
        pays.add_column(name, justify="right")
    for line in report.pays:
        drafts = str(line.drafts) if line.drafts else "none"
        pays.add_row(f"{line.acceptance:.2f}", drafts, f"{line.speedup:.2f}x")
    return [rounds, pays]
