"""What each drafter proposes, against loops in Python; the text stays the target's."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax.models import LanguageModel, stack_layers
from angeljax.speculative import (
    Drafter,
    DraftModel,
    Hybrid,
    PromptLookup,
    Sampling,
    SelfDrafter,
    Target,
    TokenRecycling,
    autoregressive,
    chain_mask,
    decode,
    generate,
    lookup,
    prefill,
    rank_tree,
    successors,
)
from tests.speculative._cases import (
    PROMPTS,
    HashTarget,
    Oracle,
    TreeOracle,
    table,
    tiny,
    whole,
)

TOY = HashTarget()


def found_by_hand(text, count, longest, shortest):
    for size in range(min(longest, len(text) - 1), shortest - 1, -1):
        tail = text[-size:]
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == tail:
                after = text[start + size :]
                return [after[j % len(after)] for j in range(count)], size
    return [-1] * count, 0


@pytest.mark.parametrize(("longest", "shortest"), [(3, 1), (4, 2), (1, 1)])
def test_lookup_by_hand(longest, shortest, rng):
    rows, size = 200, 24
    tokens = rng.integers(0, 4, size=(rows, size)).astype(np.int32)
    lengths = rng.integers(1, size + 1, size=rows).astype(np.int32)
    got, matched = jax.jit(
        lambda t, n: lookup(t, n, count=5, max_ngram=longest, min_ngram=shortest)
    )(tokens, lengths)
    want = [
        found_by_hand(row[:n].tolist(), 5, longest, shortest)
        for row, n in zip(tokens, lengths, strict=True)
    ]
    np.testing.assert_array_equal(got, [drafts for drafts, _ in want])
    np.testing.assert_array_equal(matched, [size for _, size in want])
    assert 0.3 < (matched > 0).mean() < 1


def test_the_tree_of_ranks_has_the_likeliest_nodes():
    weights = (0.5, 0.2, 0.1)
    tree, ranks = rank_tree(14, weights)
    score = [1.0]
    for parent, rank in zip(tree.parents[1:], ranks[1:], strict=True):
        score.append(score[parent] * weights[rank])
    assert score == sorted(score, reverse=True)
    # All products of weights, by brute force.
    every = [1.0]
    level = [1.0]
    for _ in range(6):
        level = [s * w for s in level for w in weights]
        every += level
    np.testing.assert_allclose(score, sorted(every, reverse=True)[:14])


def test_recycling_drafts_through_its_table_and_learns():
    model, params = tiny()
    start = successors(model, params, count=3, chunk=12)
    alone = jax.jit(model.logits)(params, jnp.arange(32)[:, None])[:, 0]
    np.testing.assert_array_equal(start, jax.lax.top_k(alone, 3)[1])
    drafter = TokenRecycling(nodes=9, weights=(0.5, 0.2, 0.1), table=start)
    want = autoregressive(model, params, PROMPTS, max_new_tokens=24)
    got = generate(model, params, PROMPTS, drafter=drafter, max_new_tokens=24)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert got.tau > 1.2


def test_what_recycling_drafts_by_hand(rng):
    known = rng.integers(-1, 16, size=(16, 3)).astype(np.int32)
    drafter = TokenRecycling(nodes=12, weights=(0.5, 0.2, 0.1), table=known)
    tree, ranks = rank_tree(12, drafter.weights)
    context = _Last(jnp.asarray([3, 7]))
    got, _ = drafter.draft(None, jnp.asarray(known), context)
    for row, last in enumerate((3, 7)):
        nodes = [last]
        for parent, rank in zip(tree.parents[1:], ranks[1:], strict=True):
            above = nodes[parent]
            nodes.append(-1 if above < 0 else int(known[above, rank]))
        assert got.tokens[row].tolist() == nodes[1:]


@dataclasses.dataclass
class _Last:
    last: jax.Array


def test_hybrid_takes_both():
    prompts = [[1, 2, 3, 4, 5, 6, 1, 2, 3], [7, 8, 9]]
    drafter = Hybrid(
        TokenRecycling(nodes=8, weights=(0.5, 0.2)), PromptLookup(4, min_ngram=2)
    )
    want = autoregressive(TOY, table(), PROMPTS, max_new_tokens=24)
    got = generate(TOY, table(), PROMPTS, drafter=drafter, max_new_tokens=24)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    known = jnp.asarray(np.arange(32).reshape(16, 2) % 16)

    @dataclasses.dataclass
    class Text(_Last):
        tokens: jax.Array
        lengths: jax.Array

    tokens = np.zeros((2, 12), np.int32)
    tokens[0, :9], tokens[1, :3] = prompts
    context = Text(jnp.asarray([3, 9]), jnp.asarray(tokens), jnp.asarray([9, 3]))
    draft, _ = drafter.draft(None, known, context)
    tree = drafter.drafter.draft(None, known, context)[0].tokens
    # Found: a chain, then the likeliest nodes of the tree, below the same root.
    assert draft.tokens[0].tolist() == [4, 5, 6, 1, *tree[0, :3].tolist()]
    parents = drafter.drafter.tree.parents
    moved = [0 if p == 0 else p + 4 for p in parents[1:4]]
    assert draft.parents[0].tolist() == [-1, 0, 1, 2, 3, *moved]
    assert draft.tokens[1].tolist() == tree[1].tolist()
    assert draft.parents[1].tolist() == list(parents)


def test_a_copy_that_shares_the_cache_is_always_right():
    model, params = tiny()
    want = autoregressive(model, params, PROMPTS, max_new_tokens=16)
    drafter = SelfDrafter(params, 3)
    got = generate(model, params, PROMPTS, drafter=drafter, max_new_tokens=16)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert got.tau == 4


def test_some_layers_of_a_stack():
    model, params = tiny()
    want = autoregressive(model, params, PROMPTS, max_new_tokens=16)
    model = dataclasses.replace(model, scan_layers=True)
    params, drafter = stack_layers(params), SelfDrafter(num_tokens=3, layers=(1,))
    got = generate(model, params, PROMPTS, drafter=drafter, max_new_tokens=16)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert 1 < got.tau < 4
    # What is drafted is what these layers say, after what all have read.
    one = dataclasses.replace(drafter, num_tokens=1)
    target = Target(model, params, Sampling().sampler(1))
    n = jnp.asarray([5])
    state = prefill(target, one, jnp.asarray(PROMPTS[:1]), n, n + 3, slots=8)
    draft, _ = jax.jit(one.draft)(target, (), state.context)
    at = n[:, None] - 1
    rows = model.read_rows(
        params,
        state.cache,
        jnp.asarray(PROMPTS[:1])[:, 4:],
        positions=at,
        slots=n - 1,
        mask=chain_mask(at, 8),
        layers=(1,),
    )
    logits = model.head_rows(params, rows.final)
    assert int(draft.tokens[0, 0]) == int(logits.argmax())


def test_a_compressed_copy_under_the_rejection_rule():
    model, params = tiny()
    rule = aj.Rule(format="int4", group_size=16)
    small = aj.compress(params, aj.Recipe(rules=[rule]))
    out = generate(
        model,
        params,
        PROMPTS,
        drafter=SelfDrafter(small, num_tokens=3),
        max_new_tokens=24,
        sampling=Sampling(temperature=0.7, rule="rejection"),
    )
    assert out.tau > 2


def test_a_draft_model_with_its_own_cache():
    model, params = tiny()
    want = autoregressive(model, params, PROMPTS, max_new_tokens=16)
    # The target itself is never wrong, also right after a whole run was accepted, and
    # with a prompt of one token.
    got = generate(
        model, params, PROMPTS, drafter=DraftModel(model, params, 3), max_new_tokens=16
    )
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert got.tau == 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recorder(Drafter):
    """Writes down what it is handed, by position, and drafts as another does."""

    other: Drafter

    width = property(lambda self: self.other.width)
    tree = property(lambda self: self.other.tree)
    hidden = property(lambda self: (1, 0))
    top_k = property(lambda self: 3)

    def init(self, target, batch, slots):
        hidden = tuple(jnp.zeros((batch, slots, 16)) for _ in self.hidden)
        return hidden, jnp.zeros((batch, slots, 3), jnp.int32)

    def prefill(self, target, state, prompt):
        hidden, top = state
        count = prompt.tokens.shape[1]
        put = [
            s.at[:, :count].set(h) for s, h in zip(hidden, prompt.hidden, strict=True)
        ]
        logits = target.model.head_rows(target.params, prompt.final)
        return tuple(put), top.at[:, :count].set(jax.lax.top_k(logits, 3)[1])

    def draft(self, target, state, context):
        return self.other.draft(target, (), context)[0], state

    def update(self, target, state, verified):
        hidden, top = state
        start = verified.context.lengths - verified.emitted - 1
        row = jnp.arange(verified.path.shape[1])
        at = jnp.where(row < verified.emitted[:, None], start[:, None] + row, 10**6)
        rows = jnp.arange(len(start))[:, None]
        put = [
            s.at[rows, at].set(h, mode="drop")
            for s, h in zip(hidden, verified.hidden, strict=True)
        ]
        ids = jnp.take_along_axis(verified.top_ids, verified.path[..., None], axis=1)
        return tuple(put), top.at[rows, at].set(ids, mode="drop")


@pytest.mark.parametrize(("scan", "tree"), [(False, False), (True, True)])
def test_what_a_drafter_is_handed(scan, tree):
    model, params = tiny()
    model = dataclasses.replace(model, scan_layers=scan)
    params = stack_layers(params) if scan else params
    want = autoregressive(model, params, PROMPTS, max_new_tokens=16)
    text = whole(PROMPTS, want)
    other = TreeOracle(text, (-1, 0, 0, 1, 1, 2), 32) if tree else Oracle(text, 3, 32)
    target = Target(model, params, Sampling().sampler(4))
    sizes = jnp.asarray([len(p) for p in PROMPTS])
    tokens, drafter = text[:, : sizes.max()], Recorder(other)
    state = prefill(target, drafter, tokens, sizes, sizes + 16, slots=40)
    state = decode(target, drafter, state, jnp.zeros(0, int), jnp.int32(99))
    (second, first), top = state.drafter
    truth = jax.jit(lambda t: model.features(params, t, hidden=(0, 1)).hidden)(text)
    likely = jax.lax.top_k(jax.jit(model.logits)(params, text), 3)[1]
    for row, n in enumerate(state.lengths - 1):
        for got, right in zip((first, second), truth, strict=True):
            np.testing.assert_allclose(got[row, :n], right[row, :n], atol=1e-5)
        np.testing.assert_array_equal(top[row, :n], likely[row, :n])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PromptLookup(0), "num_tokens must be"),
        (lambda: PromptLookup(2, max_ngram=1, min_ngram=2), "in order"),
        (lambda: TokenRecycling(nodes=1), "nodes must be"),
        (lambda: TokenRecycling(weights=(1.0,)), "between 0 and 1"),
        (lambda: Hybrid(TokenRecycling(nodes=4)), "at most 3"),
        (lambda: SelfDrafter(num_tokens=0), "num_tokens must be"),
    ],
)
def test_drafters_that_cannot_be(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_drafters_that_do_not_fit_the_target():
    model, params = tiny()
    other = LanguageModel(dataclasses.replace(model.config, vocab_size=31, head_dim=4))
    cases = [
        (SelfDrafter(num_tokens=2), "needs params or layers"),
        (SelfDrafter(num_tokens=2, layers=(2,)), "some of the model's 2"),
        (SelfDrafter(params, 2, model=other), "vocab_size=31 and the target 32"),
        (DraftModel(other, {}, 2), "must share a tokenizer"),
        (TokenRecycling(table=jnp.zeros((4, 8), int)), "must be (32, 8), not (4, 8)"),
    ]
    for drafter, says in cases:
        with pytest.raises(ValueError) as e:
            generate(model, params, [[1]], drafter=drafter, max_new_tokens=4)
        assert says in str(e.value)
