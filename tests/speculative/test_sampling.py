"""Choices: position-keyed, the law of the rejection rule, and what filters keep."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.models import filter_logits
from angeljax.speculative import (
    Draft,
    Drafter,
    PromptLookup,
    Sampling,
    Tree,
    autoregressive,
    generate,
)
from angeljax.speculative.sampling import acceptance, residual
from tests.speculative._cases import (
    PROMPTS,
    HashTarget,
    Oracle,
    TreeOracle,
    table,
    whole,
)

TOY = HashTarget()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TableDrafter(Drafter):
    """Draws a chain from a table of its own, by the last token alone."""

    table: Any
    num_tokens: int = dataclasses.field(default=3, metadata={"static": True})

    @property
    def width(self) -> int:
        return self.num_tokens + 1

    def draft(self, target, state, context):
        token, drawn = context.last, []
        for j in range(self.num_tokens):
            at = (context.lengths + j)[:, None]
            new, log_q = target.sampler.draft(self.table[token][:, None], at)
            token = new[:, 0]
            drawn.append((new, log_q))
        tokens, log_q = zip(*drawn, strict=True)
        log_q = None if log_q[0] is None else jnp.concatenate(log_q, axis=1)
        return Draft(jnp.concatenate(tokens, axis=1), log_probs=log_q), state


@pytest.mark.parametrize("filtered", [False, True])
def test_sampled_text_does_not_depend_on_the_drafter(filtered):
    sampling = Sampling(temperature=1.0)
    if filtered:
        sampling = Sampling(temperature=0.5, top_k=6, top_p=0.9, seed=(3, 1, 4, 1))
    want = autoregressive(TOY, table(), PROMPTS, max_new_tokens=24, sampling=sampling)
    text = whole(PROMPTS, want)
    drafters = [Oracle(text, 5, luck=60), TreeOracle(text, (-1, 0, 0, 1, 1, 2))]
    if filtered:
        drafters = [PromptLookup(3), TableDrafter(table(seed=3)[:16])]
    for drafter in drafters:
        got = generate(
            TOY,
            table(),
            PROMPTS,
            drafter=drafter,
            max_new_tokens=24,
            sampling=sampling,
        )
        np.testing.assert_array_equal(got.tokens, want.tokens)


def test_a_row_with_a_seed_of_its_own_does_not_depend_on_its_place():
    sample = functools.partial(Sampling, temperature=1.0)
    run = functools.partial(autoregressive, TOY, table(), max_new_tokens=8)
    both = run([[1, 2], [1, 2]], sampling=sample(seed=(5, 7))).tokens
    turned = run([[1, 2], [1, 2]], sampling=sample(seed=(7, 5))).tokens
    np.testing.assert_array_equal(both, turned[::-1])
    assert (both[0] != both[1]).any()


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.8}]
)
def test_probabilities_are_those_of_the_filters_of_generate(options, rng):
    logits = jnp.asarray(3 * rng.normal(size=(2, 3, 16)), jnp.float32)
    kept = filter_logits(logits / 0.7, **options)
    sampler = Sampling(temperature=0.7, **options).sampler(2)
    got = sampler.probabilities(logits)
    np.testing.assert_allclose(got, jax.nn.softmax(kept, axis=-1), atol=1e-6)
    # The nucleus within a few candidates, if they hold it.
    if options == {"top_p": 0.6}:
        few = Sampling(temperature=0.7, top_p=0.6, candidates=8).sampler(2)
        np.testing.assert_allclose(few.probabilities(logits), got, atol=1e-6)
        positions = jnp.arange(6).reshape(2, 3)
        np.testing.assert_array_equal(
            few.choose(logits, positions), sampler.choose(logits, positions)
        )


def chi_square(counts: np.ndarray, law: np.ndarray) -> float:
    """Standard deviations that the statistic is above its mean; zeros must be zeros."""
    possible = law > 1e-9
    assert not counts[~possible].any()
    expected = law[possible] * counts.sum()
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = possible.sum() - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


def law_of_plain_sampling(prompt: list[int], length: int, sampling: Sampling):
    """Probability of each text, one factor after another, in numpy."""
    vocab = 4
    model, logits = HashTarget(vocab), np.asarray(table(vocab), np.float64)

    def next_law(text):
        z = logits[model.row_of(text)] / sampling.temperature
        p = np.exp(z - z.max())
        p /= p.sum()
        if sampling.top_k is not None:
            p = np.where(p >= np.sort(p)[-sampling.top_k], p, 0)
        return p / p.sum()

    law = np.zeros((vocab,) * length)
    for text in itertools.product(range(vocab), repeat=length):
        p, so_far = 1.0, list(prompt)
        for token in text:
            p *= next_law(so_far)[token]
            so_far.append(token)
        law[text] = p
    return law


@pytest.mark.parametrize(
    ("rule", "drafted", "top_k"),
    [
        ("coupled", "drawn", None),
        ("rejection", "drawn", 2),
        ("rejection", "looked up", None),
    ],
)
def test_the_law_of_the_text_is_that_of_plain_sampling(rule, drafted, top_k):
    rows, length = 8192, 3
    sampling = Sampling(temperature=0.8, top_k=top_k, rule=rule, seed=4)
    if drafted == "drawn":
        drafter = TableDrafter(table(4, seed=8)[:4], num_tokens=2)
    else:
        drafter = PromptLookup(2)
    prompt = [1, 2, 3, 1, 2]
    out = generate(
        HashTarget(4),
        table(4),
        [prompt] * rows,
        drafter=drafter,
        max_new_tokens=length,
        sampling=sampling,
    )
    counts = np.zeros((4,) * length)
    np.add.at(counts, tuple(np.asarray(out.tokens).T), 1)
    law = law_of_plain_sampling(prompt, length, sampling)
    assert chi_square(counts, law) < 4
    assert float(out.stats.accepted.mean()) > (0.5 if drafted == "drawn" else 0.3)
    # The test would see a law that is a little off.
    off = np.roll(law, 1, axis=-1)
    assert chi_square(counts, 0.85 * law + 0.15 * off + 1e-5) > 4


def test_accepted_and_replaced_drafts_add_up_to_the_target(rng):
    """All outcomes of three tokens, with a draft of two tokens that lacks one id."""
    p = rng.dirichlet(np.ones(4), size=(4, 4, 4)).astype(np.float32)
    q = rng.dirichlet(np.ones(4), size=(4, 4, 4)).astype(np.float32)
    q[..., 2] = 0
    q /= q.sum(-1, keepdims=True)
    p[1, 2], q[1, 2] = q[1, 2], q[1, 2]  # equal: nothing is left to replace from

    def rows(before):
        return p[before], q[before]

    def law(text: tuple[int, ...], left: int, drafts: int) -> np.ndarray:
        """[4, ...] probabilities of the next `left` tokens."""
        if not left:
            return np.ones(())
        out = np.zeros((4,) * left)
        target, draft = rows(text[-3:])
        if not drafts:
            for token in range(4):
                out[token] += target[token] * law((*text, token), left - 1, 2)
            return out
        accept = np.asarray(acceptance(target, draft))
        rest = np.asarray(residual(target, draft))
        for token in range(4):
            out[token] += (
                draft[token] * accept[token] * law((*text, token), left - 1, drafts - 1)
            )
            refused = draft[token] * (1 - accept[token])
            for other in range(4):
                after = law((*text, other), left - 1, 2)
                out[other] += refused * rest[other] * after
        return out

    def plain(text: tuple[int, ...], left: int) -> np.ndarray:
        if not left:
            return np.ones(())
        target = rows(text[-3:])[0]
        return np.stack([target[t] * plain((*text, t), left - 1) for t in range(4)])

    got, want = law((0, 1, 2), 3, 2), plain((0, 1, 2), 3)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert abs(got.sum() - 1) < 1e-5


def test_shared_noise_makes_a_drafter_agree_more_than_chance():
    # Acceptance of the coupled rule is (1 - TV) / (1 + TV) or more.
    rng, rows = np.random.default_rng(5), 4096
    p = rng.normal(size=16)
    q = p + 0.4 * rng.normal(size=16)
    prob = [np.exp(z) / np.exp(z).sum() for z in (p, q)]
    tv = 0.5 * np.abs(prob[0] - prob[1]).sum()
    sampler = Sampling(temperature=1.0).sampler(1)
    at = jnp.arange(rows)[None]
    a, b = (
        sampler.choose(jnp.broadcast_to(jnp.asarray(z), (1, rows, 16)), at)
        for z in (p, q)
    )
    agree = float((a == b).mean())
    assert agree > (1 - tv) / (1 + tv) - 0.02
    assert agree > float(prob[0] @ prob[1]) + 0.3  # independent draws
    # A part of the vocabulary has the same noise.
    ids = jnp.asarray([1, 4, 5, 9])
    part = jnp.broadcast_to(jnp.asarray(p)[ids], (1, rows, 4))
    same = sampler.choose(part, at, ids=ids)
    inside = jnp.isin(a, ids)
    np.testing.assert_array_equal(same[inside], a[inside])
    # Each token as often as it should be.
    counts = np.bincount(np.asarray(a)[0], minlength=16)
    assert chi_square(counts, prob[0]) < 4


def test_a_tree_cannot_be_rejected_from():
    drafter = TreeOracle(jnp.zeros((1, 30), int), (-1, 0, 0))
    sampling = Sampling(temperature=1.0, rule="rejection")
    with pytest.raises(ValueError, match="is for chains"):
        generate(
            TOY, table(), [[1]], drafter=drafter, max_new_tokens=4, sampling=sampling
        )
    assert drafter.tree == Tree((-1, 0, 0))
