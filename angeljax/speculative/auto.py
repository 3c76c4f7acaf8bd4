"""Which drafter, and how many drafts: the choice that costs the least for each token.

With v(W) the time of a round of W tokens over that of one token, C the time of the
draft on the same scale, and tau the tokens that a round leaves, speculation is faster
by tau / (v(W) + C). tau follows from how often the first j drafts were all right, which
a few rounds with the largest draft tell for all smaller ones. Where nothing is faster,
nothing is drafted. The choice decides about speed alone: greedily, and with the coupled
rule, the tokens are those of `autoregressive` whatever is chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from angeljax.speculative._check import bucket
from angeljax.speculative._round import State, Stats, depth_of
from angeljax.speculative.core import GREEDY, Generated, Run, begin, generate
from angeljax.speculative.drafter import Drafter, NoDrafter, TargetModel
from angeljax.speculative.hybrid import Hybrid
from angeljax.speculative.profile import (
    WIDTHS,
    Profile,
    profile_drafter,
    profile_target,
)
from angeljax.speculative.recycling import TokenRecycling
from angeljax.speculative.sampling import Sampling
from angeljax.speculative.tree import Tree

CHAINS = (1, 2, 3, 4, 5, 7, 11, 15, 23, 31)
TREES = (4, 8, 15, 16, 24, 31, 32, 48, 63, 64)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A drafter, and what is known of it.

    Attributes:
      drafter: any.
      survival: for each j the share of rounds in which the first j + 1 drafts in a row
        were accepted; its sum is the number of drafts that a round adds.
      draft_cost: time of the draft over that of a round of one token.
      drafted: share of rounds with any draft; the others are one token wide, if the
        drafter is `optional`.
    """

    drafter: Drafter
    survival: tuple[float, ...]
    draft_cost: float = 0.0
    drafted: float = 1.0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What is expected of a candidate.

    Attributes:
      drafter: of the candidate.
      tau: tokens of a round.
      cost: time of a round over that of a round of one token without drafts.
    """

    drafter: Drafter
    tau: float
    cost: float

    @property
    def speedup(self) -> float:
        """How many times faster than plain decoding."""
        return self.tau / self.cost


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `choose` decided.

    Attributes:
      best: the fastest; with `NoDrafter(1)` where speculation would lose.
      considered: all candidates, in the given order.
    """

    best: Estimate
    considered: tuple[Estimate, ...] = ()

    @property
    def drafter(self) -> Drafter:
        """The drafter to decode with."""
        return self.best.drafter

    @property
    def on(self) -> bool:
        """Whether anything is drafted."""
        return self.drafter.width > 1

    @property
    def speedup(self) -> float:
        """How many times faster than plain decoding; 1 where nothing is drafted."""
        return self.best.speedup


def choose(
    profile: Profile, candidates: Sequence[Candidate], *, off_below: float = 1.0
) -> Plan:
    """The candidate with the greatest expected speed-up, or none of them.

    Args:
      profile: of the target.
      candidates: any number.
      off_below: expected speed-ups up to this are not worth it.

    Returns:
      A `Plan`.

    Example:
      >>> from angeljax.speculative import Candidate, Profile, PromptLookup, choose
      >>> profile = Profile((1, 8), (0.010, 0.014))
      >>> few = Candidate(PromptLookup(2), (0.6, 0.4))
      >>> many = Candidate(PromptLookup(7), (0.6, 0.4, 0.2, 0.1, 0.05, 0.0, 0.0))
      >>> plan = choose(profile, [few, many])
      >>> plan.drafter.num_tokens, round(plan.speedup, 2)
      (2, 1.79)
      >>> slow = Candidate(PromptLookup(2), (0.6, 0.4), draft_cost=1.5)
      >>> choose(profile, [slow]).on
      False
    """
    found = tuple(_estimate(profile, candidate) for candidate in candidates)
    plain = Estimate(NoDrafter(1), 1.0, 1.0)
    best = max(found, key=lambda e: e.speedup, default=plain)
    return Plan(best if best.speedup > off_below else plain, found)


def _estimate(profile: Profile, candidate: Candidate) -> Estimate:
    width, share = candidate.drafter.width, candidate.drafted
    wide = profile.cost(width)
    if candidate.drafter.optional:
        # A row with a draft makes the round wide for all of them.
        share = 1 - (1 - share) ** profile.batch
        wide = share * wide + (1 - share)
    cost = wide + candidate.draft_cost
    return Estimate(candidate.drafter, 1 + sum(candidate.survival), cost)


def variants(drafter: Drafter) -> list[Drafter]:
    """The same drafter with fewer drafts, and itself as the last.

    Their states have the same form, so that decoding can go on from one to another.

    Args:
      drafter: chains with a field `num_tokens`, `TokenRecycling` and `Hybrid` of it
        have smaller variants; others have none but themselves.

    Returns:
      Drafters by ascending width.
    """
    fewer: list[Drafter] = []
    if isinstance(drafter, Hybrid):
        line = drafter.lookup.num_tokens
        for tree in variants(drafter.drafter)[:-1]:
            count = min(line, tree.width // 2)
            lookup = dataclasses.replace(drafter.lookup, num_tokens=count)
            fewer.append(Hybrid(tree, lookup))  # type: ignore[arg-type]
    elif isinstance(drafter, TokenRecycling):
        sizes = [n for n in TREES if n < drafter.nodes]
        fewer += [dataclasses.replace(drafter, nodes=n) for n in sizes]
    elif drafter.tree is None and hasattr(drafter, "num_tokens"):
        sizes = [n for n in CHAINS if n < drafter.num_tokens]
        new: Any = dataclasses.replace
        fewer += [new(drafter, num_tokens=n) for n in sizes]
    return [*fewer, drafter]


def survival(stats: Stats) -> tuple[float, ...]:
    """How often the first drafts in a row were accepted.

    Args:
      stats: of some rounds.

    Returns:
      The share of rounds in which the first 1, 2, ... were, depth by depth.
    """
    rounds = max(int(jnp.sum(stats.rounds)), 1)
    return tuple(float(h) / rounds for h in np.asarray(stats.hits))


def candidates_of(
    drafter: Drafter,
    stats: Stats,
    smaller: Sequence[Drafter],
    draft_costs: Sequence[float],
) -> list[Candidate]:
    """What rounds with the largest draft say about smaller ones.

    Drafts of a chain do not depend on how many follow. In a tree of fewer nodes a depth
    is reached less often, in proportion to the ranks that are left at it.

    Args:
      drafter: with which the rounds were made.
      stats: of these rounds.
      smaller: drafters to judge, such as its `variants`.
      draft_costs: of each; see `Candidate`.

    Returns:
      A candidate for each.
    """
    measured = survival(stats)
    rounds = max(int(jnp.sum(stats.rounds)), 1)
    proposed = int(jnp.sum(stats.drafted)) / max(drafter.width - 1, 1)
    drafted = min(proposed / rounds, 1.0)
    whole = _reached(drafter)
    found = []
    for one, cost in zip(smaller, draft_costs, strict=True):
        line = measured[: depth_of(one)]
        if whole is not None and (part := _reached(one)) is not None:
            ratio = [p / w if w else 1.0 for p, w in zip(part, whole, strict=False)]
            ratio += [0.0] * len(line)
            if isinstance(one, Hybrid):
                # The line that was found is kept whole as far as it goes.
                count = one.lookup.num_tokens
                ratio = [1.0 if j < count else r for j, r in enumerate(ratio)]
            line = tuple(s * min(r, 1.0) for s, r in zip(line, ratio, strict=False))
        found.append(Candidate(one, tuple(line), cost, drafted))
    return found


def _reached(drafter: Drafter) -> list[float] | None:
    """How often the ranks of a tree reach each depth, were they independent."""
    recycling = drafter.drafter if isinstance(drafter, Hybrid) else drafter
    if not isinstance(recycling, TokenRecycling):
        return None
    tree: Tree = recycling.tree
    _, ranks = recycling.ranked
    chance = [1.0]
    total = [0.0] * tree.depth
    for node in range(1, tree.nodes):
        chance.append(chance[tree.parents[node]] * recycling.weights[ranks[node]])
        total[tree.depths[node] - 1] += chance[node]
    return total


def draft_costs(
    model: TargetModel,
    params: Any,
    profile: Profile,
    drafters: Sequence[Drafter],
    *,
    cache: bool = True,
) -> list[float]:
    """Time of each draft over that of a round of one token.

    The first and the last are measured; those between are on the line between them, by
    depth.

    Args:
      model, params: the target.
      profile: of it.
      drafters: of one kind, by ascending width.
      cache: as in `profile_target`.

    Returns:
      One number for each.
    """
    ends = []
    for drafter in (drafters[0], drafters[-1])[: len(drafters)]:
        seconds = profile_drafter(
            model,
            params,
            drafter,
            batch=profile.batch,
            slots=profile.slots,
            cache=cache,
        )
        over = seconds / profile.seconds[0] - profile.cost(drafter.width)
        ends.append(max(over, 0.0))
    if len(drafters) == 1:
        return ends
    depths = [depth_of(d) for d in drafters]
    return np.interp(depths, [depths[0], depths[-1]], ends).tolist()


def auto_generate(
    model: TargetModel,
    params: Any,
    prompts: Any,
    lengths: Any = None,
    *,
    drafter: Drafter,
    max_new_tokens: int,
    smaller: Sequence[Drafter] | None = None,
    profile: Profile | None = None,
    costs: Sequence[float] | None = None,
    probe_rounds: int = 16,
    off_below: float = 1.0,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    detokenize: Callable[[list[int]], str] | None = None,
    on_tokens: Callable[[int, list[int]], None] | None = None,
    rounds_per_call: int | None = None,
    slots: int | None = None,
    cache: bool = True,
) -> tuple[Generated, Plan]:
    """`generate`, with as many drafts as the first rounds say is fastest, or none.

    Args:
      model, params, prompts, lengths, max_new_tokens, sampling, stop_tokens,
        stop_strings, detokenize, on_tokens, rounds_per_call, slots: as in `generate`.
      drafter: with the largest draft to consider; the first rounds are its own.
      smaller: other drafters to consider, whose state is of the same form, by ascending
        width; default its `variants`.
      profile: of the target; default measured, once for each machine.
      costs: of the drafts of `smaller`, as `draft_costs` gives them; default measured.
      probe_rounds: how many rounds are watched before the choice.
      off_below: see `choose`.
      cache: as in `profile_target`.

    Returns:
      What `generate` returns, and the plan.

    Raises:
      ValueError: as `generate`.

    Example:
      >>> import jax
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> from angeljax.speculative import Profile, PromptLookup
      >>> from angeljax.speculative import auto_generate, autoregressive
      >>> config = DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=1,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... )
      >>> model = LanguageModel(config)
      >>> run = model, model.init(jax.random.key(0)), [[5, 6, 7, 5, 6]]
      >>> slow = Profile((1, 2), (0.010, 0.090))  # two tokens cost as much as nine
      >>> out, plan = auto_generate(
      ...     *run, drafter=PromptLookup(1), max_new_tokens=40, profile=slow, costs=[0]
      ... )
      >>> plain = autoregressive(*run, max_new_tokens=40)
      >>> plan.on, bool((out.tokens == plain.tokens).all())
      (False, True)
    """
    if probe_rounds < 1:
        raise ValueError(f"probe_rounds must be at least 1, not {probe_rounds}")
    smaller = variants(drafter) if smaller is None else list(smaller)
    if wide := [d for d in smaller if d.width > drafter.width]:
        raise ValueError(
            f"the drafter is {drafter.width} wide and one of smaller {wide[0].width}: "
            "give the widest as drafter"
        )
    run, state = begin(
        model,
        params,
        prompts,
        lengths,
        drafter=drafter,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens,
        stop_strings=stop_strings,
        detokenize=detokenize,
        on_tokens=on_tokens,
        rounds_per_call=rounds_per_call,
        exact="fast",
        slots=slots,
    )
    if profile is None:
        profile = _profile(model, params, drafter, run, max_new_tokens, cache)
    if costs is None:
        costs = draft_costs(model, params, profile, smaller, cache=cache)
    state = run.advance(drafter, state, probe_rounds)
    known = candidates_of(drafter, state.stats, smaller, costs)
    plan = choose(profile, known, off_below=off_below)
    if not np.any(state.active):
        return run.result(state), plan
    depth, hits = depth_of(plan.drafter), state.stats.hits
    state = run.finish(plan.drafter, _handed(state, plan, depth))
    rest = jnp.zeros_like(hits).at[:depth].set(state.stats.hits)
    stats = dataclasses.replace(state.stats, hits=hits + rest)
    return run.result(dataclasses.replace(state, stats=stats)), plan


def _profile(
    model: TargetModel,
    params: Any,
    drafter: Drafter,
    run: Run,
    max_new_tokens: int,
    cache: bool,
) -> Profile:
    widths = {w for w in WIDTHS if w < drafter.width} | {drafter.width}
    slots = bucket(int(run.sizes.max())) + bucket(max_new_tokens + drafter.width)
    sizes, batch = sorted(widths), len(run.sizes)
    return profile_target(model, params, sizes, batch=batch, slots=slots, cache=cache)


def _handed(state: State, plan: Plan, depth: int) -> State:
    """The state for another drafter of the same kind, or for none."""
    memory = state.drafter if plan.on else ()
    stats = dataclasses.replace(state.stats, hits=jnp.zeros(depth, jnp.int32))
    return dataclasses.replace(state, drafter=memory, stats=stats)


def calibrate_choice(
    model: TargetModel,
    params: Any,
    prompts: Any,
    drafters: Sequence[Drafter],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    profile: Profile | None = None,
    off_below: float = 1.0,
    cache: bool = True,
) -> Plan:
    """The best of several kinds of drafters, by a set of prompts like those to come.

    Each generates the text of the prompts once with its largest draft; smaller ones are
    judged from that.

    Args:
      model, params: the target.
      prompts: a sequence of token sequences.
      drafters: one of each kind, with the largest draft to consider.
      max_new_tokens: of each prompt.
      sampling: as it will be.
      profile: of the target; default measured for the batch that `prompts` are.
      off_below: see `choose`.
      cache: as in `profile_target`.

    Returns:
      A `Plan`.

    Raises:
      ValueError: as `generate`.
    """
    if not drafters:
        raise ValueError("no drafters to choose from")
    if profile is None:
        top = max(d.width for d in drafters)
        longest = max(len(p) for p in prompts)
        profile = profile_target(
            model,
            params,
            sorted({*(w for w in WIDTHS if w < top), top}),
            batch=len(prompts),
            slots=bucket(longest) + bucket(max_new_tokens + top),
            cache=cache,
        )
    known: list[Candidate] = []
    for drafter in drafters:
        out = generate(
            model,
            params,
            prompts,
            drafter=drafter,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
        )
        some = variants(drafter)
        costs = draft_costs(model, params, profile, some, cache=cache)
        known += candidates_of(drafter, out.stats, some, costs)
    return choose(profile, known, off_below=off_below)
