"""The cost model: what it measures, what it chooses, and that it changes no token."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.speculative import (
    Candidate,
    Draft,
    Drafter,
    Hybrid,
    NoDrafter,
    Profile,
    PromptLookup,
    TokenRecycling,
    auto_generate,
    autoregressive,
    calibrate_choice,
    candidates_of,
    choose,
    generate,
    profile,
    profile_drafter,
    profile_target,
    variants,
)
from tests.speculative._cases import PROMPTS, HashTarget, static, table

MODEL, PARAMS = HashTarget(), table()
FREE = Profile((1, 64), (1.0, 1.0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slow(Drafter):
    """Proposes what prompt lookup does, after a lot of work for nothing."""

    num_tokens: int = static(default=2)

    @property
    def width(self):
        return self.num_tokens + 1

    def draft(self, target, state, context):
        draft, _ = PromptLookup(self.num_tokens).draft(target, state, context)
        work = jnp.full((192, 192), 1 / 192) + context.last[0] * 0.0
        work = jax.lax.fori_loop(0, 2, lambda _, x: x @ work, work)
        # Nothing of it may be left out by the compiler.
        tokens = jnp.where(jnp.isnan(work).any(), -1, draft.tokens)
        return Draft(tokens), state


def test_choice_is_that_of_the_formula():
    """Against the best of all gammas by the closed form for a constant chance."""
    for alpha, slope, draft in [(0.8, 0.02, 0.1), (0.5, 0.2, 0.05), (0.3, 0.5, 0.5)]:
        found = Profile((1, 16), (1.0, 1 + 15 * slope))
        options, best = [], (1.0, 0)
        for gamma in range(1, 16):
            line = tuple(alpha ** (j + 1) for j in range(gamma))
            options.append(Candidate(PromptLookup(gamma), line, gamma * draft))
            tau = (1 - alpha ** (gamma + 1)) / (1 - alpha)
            # Prompt lookup is wide in each round here: all of them have drafts.
            gain = tau / (1 + slope * gamma + gamma * draft)
            best = max(best, (gain, gamma))
        plan = choose(found, options)
        assert plan.drafter.width - 1 == best[1]
        assert plan.speedup == pytest.approx(best[0])
        assert plan.on == (best[1] > 0)
    assert not choose(FREE, []).on
    assert not choose(FREE, [Candidate(PromptLookup(1), (0.2,))], off_below=1.3).on
    # Half of the rounds are one token wide; with two rows a quarter.
    half = Candidate(PromptLookup(3), (0.5, 0.5, 0.5), drafted=0.5)
    costs = [Profile((1, 4), (1.0, 3.0), batch=b) for b in (1, 2)]
    assert [choose(c, [half]).considered[0].cost for c in costs] == [2.0, 2.5]


def test_a_slow_drafter_is_switched_off(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prompts = [[5, 6, 7, 5, 6]]
    plain = autoregressive(MODEL, PARAMS, prompts, max_new_tokens=40)
    out, plan = auto_generate(
        MODEL, PARAMS, prompts, drafter=Slow(), max_new_tokens=40, probe_rounds=4
    )
    assert isinstance(plan.drafter, NoDrafter) and plan.drafter.width == 1
    assert all(e.cost > e.tau for e in plan.considered)
    assert (out.tokens == plain.tokens).all()
    # The probe's rounds and those after it, each counted once.
    assert int(out.stats.rounds[0]) + int(out.stats.accepted[0]) == 40

    # Measured once: the second time all comes from the folder, as plain JSON.
    files = sorted((tmp_path / "angeljax" / "speculative").iterdir())
    documents = [json.loads(f.read_text()) for f in files]
    assert len(files) == 3 and all(min(d["seconds"]) > 0 for d in documents)
    monkeypatch.setattr(profile, "_seconds", None)
    slots = documents[0]["key"]["slots"]
    kept = profile_target(MODEL, PARAMS, (1, 2, 3), slots=slots)
    assert kept.widths == (1, 2, 3) and kept.slots == slots
    assert profile_drafter(MODEL, PARAMS, Slow(), slots=slots) > kept.seconds[0]
    with pytest.raises(TypeError):  # other widths are not in it
        profile_target(MODEL, PARAMS, (1, 5), slots=slots)
    files[0].write_text("{")
    with pytest.raises(TypeError):  # damaged: measured again
        profile_target(MODEL, PARAMS, (1, 2, 3), slots=slots)
        profile_drafter(MODEL, PARAMS, Slow(1), slots=slots)
        profile_drafter(MODEL, PARAMS, Slow(2), slots=slots)


@pytest.mark.parametrize(
    "drafter",
    [PromptLookup(7), TokenRecycling(8), Hybrid(TokenRecycling(15), PromptLookup(7))],
    ids=["chain", "tree", "hybrid"],
)
def test_no_token_changes_with_the_width(drafter):
    plain = autoregressive(MODEL, PARAMS, PROMPTS, max_new_tokens=30)
    some = variants(drafter)
    assert some[-1] is drafter and len(some) > 1
    assert [d.width for d in some] == sorted({d.width for d in some})
    # The first is the cheapest by far, and so it is chosen.
    costs = [0.0] + [100.0] * (len(some) - 1)
    told = {row: [] for row in range(len(PROMPTS))}
    out, plan = auto_generate(
        MODEL,
        PARAMS,
        PROMPTS,
        drafter=drafter,
        max_new_tokens=30,
        profile=FREE,
        costs=costs,
        probe_rounds=3,
        off_below=0.0,
        on_tokens=lambda row, new: told[row].extend(new),
    )
    assert plan.drafter == some[0]
    assert (out.tokens == plain.tokens).all()
    assert [told[r] for r in told] == out.tokens.tolist()


def test_fewer_drafts_are_judged_from_many():
    """A chain's prefix is as good as measured; a tree's smaller self is close."""
    prompts, new = [PROMPTS[0], PROMPTS[3]], 60
    for drafter, close in [(PromptLookup(5), 0.15), (TokenRecycling(15), 0.35)]:
        run = {"max_new_tokens": new, "exact": "same_width"}
        out = generate(MODEL, PARAMS, prompts, drafter=drafter, **run)
        some = variants(drafter)[:-1]
        for one in candidates_of(drafter, out.stats, some, [0.0] * len(some))[-1:]:
            real = generate(MODEL, PARAMS, prompts, drafter=one.drafter, **run)
            assert 1 + sum(one.survival) == pytest.approx(real.tau, rel=close)
    whole = candidates_of(drafter, out.stats, [drafter], [0.0])[0]
    assert 1 + sum(whole.survival) == pytest.approx(out.tau, rel=0.05)


def test_the_best_kind_is_chosen_by_prompts(monkeypatch):
    monkeypatch.setattr(
        "angeljax.speculative.auto.draft_costs", lambda *a, **_: [0.0] * len(a[3])
    )
    plan = calibrate_choice(
        MODEL,
        PARAMS,
        [[5, 6, 7, 5, 6]],
        [PromptLookup(3), TokenRecycling(8)],
        max_new_tokens=40,
        profile=FREE,
    )
    assert len(plan.considered) == len(variants(PromptLookup(3))) + 2
    assert plan.best == max(plan.considered, key=lambda e: e.speedup)
    with pytest.raises(ValueError, match="no drafters"):
        calibrate_choice(MODEL, PARAMS, PROMPTS, [])


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="ascend from 1"):
        Profile((2, 4), (1.0, 1.0))
    with pytest.raises(ValueError, match="as many times"):
        Profile((1, 4), (1.0,))
    with pytest.raises(ValueError, match="at least 1"):
        profile_target(MODEL, PARAMS, (1, 2), batch=0)
    with pytest.raises(ValueError, match="give the widest"):
        auto_generate(
            MODEL,
            PARAMS,
            PROMPTS,
            drafter=PromptLookup(1),
            smaller=[PromptLookup(4)],
            max_new_tokens=4,
        )
    found = Profile((1, 4, 8), (2.0, 3.0, 4.0))
    np.testing.assert_allclose(
        [found.cost(w) for w in (1, 4, 6, 16)], [1, 1.5, 1.75, 4]
    )
