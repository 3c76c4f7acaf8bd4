"""SpecExit: the rule against a transcription, and where a text is cut."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.speculative import (
    Context,
    EagleConfig,
    EagleDrafter,
    EagleTree,
    ExitRule,
    Sampling,
    SpecExit,
    Verified,
    autoregressive,
    exit_signals,
    generate,
    init_eagle,
)
from tests.speculative._cases import PROMPTS, tiny

END, BREAKS, BEGIN = (29, 30), (3, 4), 28
WINDOW, ROWS, PLACES, ROUNDS = 4, 6, 3, 40


@functools.cache
def small():
    model, params = tiny()
    config = EagleConfig.of(model.config)
    key = jax.random.key(1)
    head = init_eagle(config, key, target=params, norm_scale=1.0, std=0.2, exit=True)
    wide = 0.2 * jax.random.normal(key, head["exit"]["kernel"].shape)
    return config, {**head, "exit": {"kernel": wide}}


class Row:
    """The rule, one row and one round at a time, as it is written down."""

    def __init__(self, rule):
        self.rule, self.thinking, self.forced = rule, rule.begin is None, 0
        self.scores, self.average = [], None

    def steer(self, read, text, accepted):
        rule, read = self.rule, read[: accepted + 1]
        if rule.begin is not None and rule.begin in read and self.forced == 0:
            self.thinking = True
        if rule.end[0] in read:
            if self.thinking and self.forced == 0:
                self.forced = -1
            self.thinking = False
        if 0 < self.forced < len(rule.end):
            self.forced += 1
            return [rule.end[self.forced - 1], *text[1:]], 0
        places = [i for i, token in enumerate(read) if token in rule.breaks]
        if not self.thinking or not places:
            return text, accepted
        exits = self.holds()
        if rule.smoothing == "paragraph_mean":
            self.scores = self.scores[-1:]
        if not exits:
            return text, accepted
        self.thinking, self.forced = False, 1
        at = places[0]
        return [*text[:at], rule.end[0], *text[at + 1 :]], at

    def value(self):
        some = self.scores[-self.rule.window :]
        if not some:
            return None
        if self.rule.smoothing == "ewma":
            return self.average
        if self.rule.smoothing == "momentum":
            if len(some) < self.rule.window:
                return None
            steps = [b - a for a, b in zip(some, some[1:], strict=False)]
            return some[-1] + sum(steps) / len(steps)
        return sum(some) / len(some)

    def holds(self):
        value, rule = self.value(), self.rule
        if value is None:
            return False
        conditions = []
        if rule.confidence is not None:
            conditions.append(value[0] > rule.confidence)
        if rule.progress is not None:
            conditions.append(value[1] > rule.progress)
        if rule.remaining is not None:
            conditions.append(value[2] < rule.remaining)
        return all(conditions)

    def update(self, raw, emitted):
        if not self.thinking or not emitted:
            return
        rows = [
            [1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b)), math.exp(c)]
            for a, b, c in raw[:emitted]
        ]
        mean = np.mean(rows, axis=0)
        self.scores.append(mean)
        a = self.rule.alpha
        old = self.average
        self.average = mean if old is None else a * mean + (1 - a) * old


@pytest.mark.parametrize(
    ("smoothing", "begin", "limits"),
    [
        ("ewma", None, (0.5, 0.45, 1.5)),
        ("momentum", None, (0.5, None, None)),
        ("mean", BEGIN, (None, 0.5, 1.4)),
        ("paragraph_mean", None, (0.52, 0.45, None)),
    ],
)
def test_the_rule_by_hand(rng, smoothing, begin, limits):
    config, head = small()
    names = "confidence", "progress", "remaining"
    rule = ExitRule(
        end=END,
        breaks=BREAKS,
        begin=begin,
        smoothing=smoothing,
        alpha=0.3,
        window=WINDOW,
        **dict(zip(names, limits, strict=True)),
    )
    # The head's part of it is not looked at here.
    drafter = SpecExit(EagleDrafter(config, head, PLACES - 1), rule)
    state = drafter.init(jax_target(), ROWS, 16)
    rows = [Row(rule) for _ in range(ROWS)]
    kernel = np.asarray(head["exit"]["kernel"], np.float64)
    exits = 0
    update = jax.jit(lambda state, *x: drafter.update(None, state, verified(*x)))
    steer = jax.jit(drafter.steer)
    for _ in range(ROUNDS):
        read, text = rng.choice(
            [3, 4, 5, 6, 7, 8, 9, 28, 29],
            p=[*[0.1] * 2, *[0.15] * 4, 0.1, 0.05, 0.05],
            size=(2, ROWS, PLACES),
        )
        accepted = rng.integers(0, PLACES, size=ROWS)
        hidden = rng.normal(size=(3, ROWS, PLACES, 16)).astype(np.float32)
        got, cut, state = steer(state, *map(jnp.asarray, (read, text, accepted)))
        for i, row in enumerate(rows):
            want, at = row.steer(list(read[i]), list(text[i]), int(accepted[i]))
            exits += row.forced == 1 and want[at] == END[0] and at <= accepted[i]
            assert (got[i].tolist(), int(cut[i])) == (want, at)
        # A row that is finished emits nothing.
        emitted = np.where(rng.random(ROWS) < 0.1, 0, np.asarray(cut) + 1)
        state = update(state, jnp.asarray(emitted), tuple(map(jnp.asarray, hidden)))
        for i, row in enumerate(rows):
            raw = np.concatenate([h[i] for h in hidden], axis=-1) @ kernel
            row.update(raw.tolist(), int(emitted[i]))
    assert exits >= 2  # the case shows something


def jax_target():
    from types import SimpleNamespace

    return SimpleNamespace(model=SimpleNamespace(dtype=jnp.float32))


def verified(emitted, hidden):
    nothing = jnp.zeros((ROWS, PLACES), jnp.int32)
    context = Context(nothing, emitted, None, emitted > 0)
    flags = nothing == 0
    path = nothing
    return Verified(
        context, emitted, emitted, nothing, flags, nothing, path, hidden, None
    )


def rounds_of(drafter, prompt, count):
    """The tokens of each round."""
    model, params = tiny()
    found = []
    generate(
        model,
        params,
        [prompt],
        drafter=drafter,
        max_new_tokens=count,
        on_tokens=lambda row, tokens: found.append(tokens),
        rounds_per_call=1,
    )
    return found


@pytest.mark.parametrize("growth", [None, EagleTree(12, 3, 2)])
def test_the_text_is_cut_where_the_rule_says(growth):
    model, params = tiny()
    config, head = small()
    drafter, prompt, count = EagleDrafter(config, head, 3, growth), PROMPTS[3], 24
    plain = rounds_of(drafter, prompt, count)
    text = [token for tokens in plain for token in tokens]
    stop = text[9]  # some paragraph's end
    end = tuple(sorted(set(range(32)) - {*text, *prompt})[:2])
    rule = ExitRule(
        end=end, breaks=(stop,), confidence=None, progress=None, remaining=1e9
    )
    # All signals hold after the first round: what counts is the first break that a
    # later one has read.
    cut, before = None, 0
    for number, tokens in enumerate(plain):
        read = [text[before - 1] if before else prompt[-1], *tokens[:-1]]
        if number and stop in read:
            cut = before + read.index(stop)
            break
        before += len(tokens)
    assert cut is not None and text[cut - 1] == stop and cut <= count - len(end)
    want = [*text[:cut], *end]
    rest = autoregressive(
        model, params, [[*prompt, *want]], max_new_tokens=count - len(want)
    )
    want += rest.tokens[0].tolist()
    exits = SpecExit(drafter, rule)
    out = generate(model, params, [prompt], drafter=exits, max_new_tokens=count)
    assert out.tokens[0].tolist() == want != text


def test_a_rule_that_never_holds_leaves_the_text():
    model, params = tiny()
    config, head = small()
    rule = ExitRule(end=END, breaks=tuple(range(16)), confidence=1.0)
    drafter = SpecExit(EagleDrafter(config, head, 3), rule)
    sampling = Sampling(temperature=0.8)
    options = {"max_new_tokens": 16, "sampling": sampling}
    got = generate(model, params, PROMPTS, drafter=drafter, **options)
    want = autoregressive(model, params, PROMPTS, **options)
    np.testing.assert_array_equal(got.tokens, want.tokens)


def test_signals_and_rules_that_cannot_be(rng):
    model, params = tiny()
    config, head = small()
    features = [rng.normal(size=(2, 16)).astype(np.float32) for _ in range(3)]
    kernel = np.asarray(head["exit"]["kernel"])
    raw = np.concatenate(features, axis=-1) @ kernel
    want = np.concatenate([1 / (1 + np.exp(-raw[:, :2])), np.exp(raw[:, 2:])], axis=1)
    got = exit_signals(kernel, [jnp.asarray(x) for x in features])
    np.testing.assert_allclose(got, want, rtol=1e-5)
    base = {"end": (5,), "breaks": (3,)}
    cases = [
        ({"end": ()}, "end must name tokens"),
        ({"breaks": (-1,)}, "breaks must name tokens"),
        ({"smoothing": "median"}, "smoothing must be one of"),
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"window": 1}, "window must be at least 2"),
        ({"confidence": None, "progress": None, "remaining": None}, "name a limit"),
    ]
    for change, says in cases:
        with pytest.raises(ValueError, match=says):
            ExitRule(**{**base, **change})
    bare = {k: v for k, v in head.items() if k != "exit"}
    for drafter, says in [
        (SpecExit(EagleDrafter(config, bare), ExitRule(**base)), "outputs 'exit'"),
        (
            SpecExit(EagleDrafter(config, head), ExitRule(end=(99,), breaks=(3,))),
            "names token 99 and the target has 32",
        ),
    ]:
        with pytest.raises(ValueError, match=says):
            generate(model, params, [[1]], drafter=drafter, max_new_tokens=4)
