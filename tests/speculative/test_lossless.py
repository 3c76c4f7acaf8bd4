"""Whatever drafts, the text is that of plain decoding, token by token.

Every drafter of the library, chosen greedily and drawn, alone and in a batch. Float32,
so that two ways to add the same numbers do not part at a tie.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

import angeljax as aj
from angeljax.models import LanguageModel
from angeljax.speculative import (
    BlockConfig,
    BlockDrafter,
    BlockModel,
    DraftModel,
    EagleConfig,
    EagleDrafter,
    EagleTree,
    Hybrid,
    MTPDrafter,
    MTPModel,
    PromptLookup,
    Sampling,
    SelfDrafter,
    TokenRecycling,
    autoregressive,
    generate,
    init_eagle,
)
from tests.models._random_params import random_params
from tests.speculative._cases import PROMPTS, Oracle, TreeOracle, tiny, whole

NEW = 16
# Of different lengths, one of a single token.
EIGHT = [*PROMPTS, [7, 7, 7], [1, 2], [30, 2, 11, 30, 2, 11], [12] * 9]
RULES = {"greedy": Sampling(), "drawn": Sampling(temperature=0.8, seed=3)}


def recycling():
    return TokenRecycling(nodes=8, weights=(0.5, 0.2, 0.1))


def int4_copy():
    rule = aj.Rule(format="int4", group_size=16)
    small = aj.compress(tiny()[1], aj.Recipe(rules=[rule]))
    return SelfDrafter(small, num_tokens=3)


def draft_model():
    config = dataclasses.replace(tiny()[0].config, num_layers=1, head_dim=4)
    model = LanguageModel(config)
    return DraftModel(model, random_params(model, seed=3, std=0.3), 3)


def eagle(growth):
    model, params = tiny()
    config = EagleConfig.of(model.config, draft_vocab_size=20)
    ids = np.sort(np.random.default_rng(0).permutation(32)[:20])
    key = jax.random.key(1)
    head = init_eagle(config, key, target=params, ids=ids, norm_scale=1.0, std=0.2)
    return EagleDrafter(config, head, 3, growth)


def block():
    sizes = {"num_layers": 1, "block_size": 4, "mask_token_id": 31}
    model = BlockModel(BlockConfig.of(tiny()[0].config, **sizes))
    return BlockDrafter(model, random_params(model, std=0.3))


def mtp():
    model = MTPModel(tiny()[0].config)
    return MTPDrafter(model, random_params(model, seed=2, std=0.3))


DRAFTERS = {
    "prompt lookup": lambda: PromptLookup(3),
    "recycling": recycling,
    "hybrid": lambda: Hybrid(recycling(), PromptLookup(3)),
    "layer skip": lambda: SelfDrafter(num_tokens=3, layers=(1,)),
    "int4 copy": int4_copy,
    "draft model": draft_model,
    "eagle chain": lambda: eagle(None),
    "eagle tree": lambda: eagle(EagleTree(8, 3, 2)),
    # Grown or flat, as there are matches of one token and of more.
    "eagle hybrid": lambda: Hybrid(eagle(EagleTree(8, 3, 2)), PromptLookup(5), 2),
    "block": block,
    "mtp": mtp,
}
# Those that know the text and are right at some places: as chains, and in trees.
KNOWING = {
    "chain": lambda text: Oracle(text, 3, 32, luck=60),
    "tree": lambda text: TreeOracle(text, (-1, 0, 0, 1, 1, 2), 32),
    "dynamic tree": lambda text: TreeOracle(text, (-1, 0, 0, 1, 1), 32, dynamic=True),
}
# Two cases for each drafter, and all four for a chain and a tree: every case compiles
# programs of its own.
DIAGONAL = ("greedy", 8), ("drawn", 1)
WHOLE = "prompt lookup", "eagle hybrid"
CASES = [
    *((name, *case) for name in (*DRAFTERS, *KNOWING) for case in DIAGONAL),
    *((name, *case) for name in WHOLE for case in (("greedy", 1), ("drawn", 8))),
]
assert set(WHOLE) <= set(DRAFTERS)


@functools.cache
def made(name):
    return DRAFTERS[name]()


@functools.cache
def plain(rule, rows):
    sampling = RULES[rule]
    return autoregressive(*tiny(), EIGHT[:rows], max_new_tokens=NEW, sampling=sampling)


@pytest.mark.parametrize(("name", "rule", "rows"), CASES)
def test_the_text_is_that_of_plain_decoding(name, rule, rows):
    prompts, want = EIGHT[:rows], plain(rule, rows)
    know = KNOWING.get(name)
    drafter = made(name) if know is None else know(whole(prompts, want))
    got = generate(
        *tiny(), prompts, drafter=drafter, max_new_tokens=NEW, sampling=RULES[rule]
    )
    np.testing.assert_array_equal(got.tokens, want.tokens)
    drafted, rounds = np.asarray(got.stats.drafted), np.asarray(got.stats.rounds)
    assert drafted.sum() > 0
    if name in ("block", "mtp"):
        # A prompt of a single token leaves the first round of MTP without drafts.
        none = [name == "mtp" and len(prompt) == 1 for prompt in prompts]
        np.testing.assert_array_equal(drafted, 3 * (rounds - none))
    if rule == "drawn" and rows == 8:
        # The noise is shared, so that drafts of untrained drafters are accepted too.
        least = {"int4 copy": 2, "prompt lookup": 1, "recycling": 1.1, "hybrid": 1.1}
        assert got.tau > least.get(name, 1.2)
