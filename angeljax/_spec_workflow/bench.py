"""`angeljax spec bench`: several drafters on the same prompts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from angeljax._draft_options import DraftOptions
from angeljax._spec_workflow.answers import shared_slots
from angeljax._spec_workflow.setup import Ready
from angeljax.speculative import (
    Drafter,
    Generated,
    NoDrafter,
    Plan,
    autoregressive,
    divergences,
    generate_as,
    sampling_of,
)
from angeljax.speculative._check import bucket

PLAIN = "plain decoding"


@dataclasses.dataclass(frozen=True)
class Line:
    """One drafter on all prompts.

    Attributes:
      drafter: as it was named.
      tau: tokens of a round, over all prompts.
      ms: milliseconds of a token of one row, the reading of the prompt included.
      speedup: over plain decoding.
      differ: texts that are not those of plain decoding; None under the rejection
        rule, whose texts are others.
      gap: where they part, the largest advantage of one token over the other.
      drafted: generations in which drafts stayed on; None where none chooses.
      widths: of these, tokens of a round.
    """

    drafter: str
    tau: float
    ms: float
    speedup: float
    differ: int | None
    gap: float
    drafted: int | None = None
    widths: tuple[int, ...] = ()


@dataclasses.dataclass
class _Sum:
    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    rounds: int = 0
    differ: int = 0
    gap: float = 0.0
    plans: list[Plan] = dataclasses.field(default_factory=list)

    def add(self, seconds: float, out: Generated, plan: Plan | None) -> None:
        lengths = np.asarray(out.lengths)
        self.seconds += seconds
        self.steps += int(lengths.max())
        self.tokens += int(lengths.sum())
        self.rounds += int(np.sum(out.stats.rounds))
        self.plans += [] if plan is None else [plan]

    @property
    def ms(self) -> float:
        return 1e3 * self.seconds / max(self.steps, 1)


@dataclasses.dataclass
class _Group:
    """Prompts that are read at once, and their plain texts by program."""

    run: tuple[Any, Any, list[list[int]]]
    drafters: Mapping[str, tuple[DraftOptions, Drafter]]
    common: Mapping[str, Any]
    kept: dict[NoDrafter, Generated] = dataclasses.field(default_factory=dict)

    def generate(self, name: str) -> tuple[Generated, Plan | None]:
        """The text of a drafter, all of it there."""
        plan = None
        if name == PLAIN:
            out = self.kept[NoDrafter()] = autoregressive(*self.run, **self.common)
        else:
            how, drafter = self.drafters[name]
            out, plan = generate_as(how, *self.run, drafter=drafter, **self.common)
        jax.block_until_ready(out.tokens)
        return out, plan

    def plain(self, name: str) -> Generated:
        """What the text of a drafter must be."""
        how, drafter = self.drafters[name]
        exact = how.exact == "same_width" and drafter.tree is None
        # Of one width and the same layers handed over it is the same program.
        like = NoDrafter.like(drafter) if exact else NoDrafter()
        if like not in self.kept:
            self.kept[like] = autoregressive(*self.run, width=like, **self.common)
        return self.kept[like]


def bench(
    ready: Ready,
    prompts: Sequence[Sequence[int]],
    drafters: Mapping[str, tuple[DraftOptions, Drafter]],
    *,
    max_new_tokens: int,
    batch: int = 1,
    report: Callable[[str], None] | None = None,
) -> list[Line]:
    """Times whole generations of each drafter against plain decoding.

    Every program runs once before it is timed. Sampling must be the same for all.

    Args:
      ready: the target.
      prompts: tokens of each.
      drafters: by what they are called.
      max_new_tokens: of each prompt.
      batch: prompts at a time; those that fill no batch are repeated from the front.
      report: is told which prompts are under way.

    Returns:
      Plain decoding, and a line for each drafter.

    Raises:
      ValueError: as `generate`, or different samplings.
    """
    options = [o for o, _ in drafters.values()]
    if len({o.sampling for o in options}) > 1:
        raise ValueError(
            "the drafters sample differently: name temperature, top-p, top-k, rule and "
            "seed for all of them"
        )
    sampling = sampling_of(options[0].sampling)
    slots = shared_slots(prompts, max_new_tokens, [d for _, d in drafters.values()])
    rows = [*prompts, *prompts[: -len(prompts) % batch]]
    while len(rows) % batch:  # fewer prompts than a batch has rows
        rows += prompts[: batch - len(rows) % batch]
    sums = {name: _Sum() for name in (PLAIN, *drafters)}
    rejection = sampling.rule == "rejection" and not sampling.greedy
    common: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "sampling": sampling,
        "slots": slots,
    }
    seen: set[int] = set()
    for first in range(0, len(rows), batch):
        if report is not None:
            report(f"prompts {first + 1} to {first + batch} of {len(rows)}")
        run = ready.model, ready.params, [list(r) for r in rows[first : first + batch]]
        group = _Group(run, drafters, common)
        # Prompts of one bucket share the program that reads them.
        size = bucket(max(map(len, run[2])))
        for name, total in sums.items():
            if size not in seen:
                group.generate(name)
            start = time.perf_counter()
            out, plan = group.generate(name)
            total.add(time.perf_counter() - start, out, plan)
            if name == PLAIN or rejection:
                continue
            plain = group.plain(name)
            apart = divergences(*run, plain, out, sampling=sampling)
            apart = [d for d in apart if first + d.row < len(prompts)]
            total.differ += len(apart)
            total.gap = max([total.gap, *(d.gap for d in apart)])
        seen.add(size)
    base = sums[PLAIN].ms
    return [
        _line(name, total, base, None if rejection and name != PLAIN else total.differ)
        for name, total in sums.items()
    ]


def _line(name: str, total: _Sum, base: float, differ: int | None) -> Line:
    on = [plan for plan in total.plans if plan.on]
    return Line(
        drafter=name,
        tau=total.tokens / max(total.rounds, 1),
        ms=total.ms,
        speedup=base / total.ms,
        differ=differ,
        gap=total.gap,
        drafted=len(on) if total.plans else None,
        widths=tuple(sorted({plan.drafter.width for plan in on})),
    )


def table(lines: Sequence[Line], prompts: int) -> Any:
    """A `rich` table with one row for each drafter."""
    from rich.table import Table

    out = Table("drafter")
    for name in ("tau", "ms per token", "speed-up", "texts that differ"):
        out.add_column(name, justify="right")
    out.add_column("choice")
    for line in lines:
        differ = "other texts" if line.differ is None else f"{line.differ} of {prompts}"
        if line.differ:
            differ += f", gap {line.gap:.2g}"
        choice = ""
        if line.drafted is not None:
            widths = ", ".join(map(str, line.widths))
            choice = f"on in {line.drafted}" + (f", width {widths}" if widths else "")
        out.add_row(
            line.drafter,
            f"{line.tau:.2f}",
            f"{line.ms:.2f}",
            f"{line.speedup:.2f}x",
            "" if line.drafter == PLAIN else differ,
            choice,
        )
    return out
