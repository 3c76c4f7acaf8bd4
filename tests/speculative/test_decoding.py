"""Speculative text is the text of plain decoding, whatever is drafted."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.models import LanguageModel, stack_layers
from angeljax.models import generate as plain
from angeljax.speculative import (
    Draft,
    Drafter,
    NoDrafter,
    PromptLookup,
    Sampling,
    Target,
    autoregressive,
    core,
    decode,
    divergences,
    generate,
    prefill,
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


def greedy_by_hand(prompt: list[int], count: int, stops: tuple[int, ...] = ()):
    rows, text = np.asarray(table()), list(prompt)
    for _ in range(count):
        text.append(int(rows[TOY.row_of(text)].argmax()))
        if text[-1] in stops:
            break
    return text[len(prompt) :]


def test_plain_decoding_is_what_a_loop_in_python_does():
    out = autoregressive(TOY, table(), PROMPTS, max_new_tokens=12)
    for prompt, tokens in zip(PROMPTS, np.asarray(out.tokens), strict=True):
        assert tokens.tolist() == greedy_by_hand(prompt, 12)
    assert out.lengths.tolist() == [12] * 4 and out.tau == 1


@pytest.mark.parametrize(("rows", "gamma"), [(4, 1), (4, 3), (4, 7), (1, 3)])
def test_drafts_change_the_speed_only(gamma, rows):
    prompts = PROMPTS[:rows]
    want = autoregressive(TOY, table(), prompts, max_new_tokens=24)
    text = whole(prompts, want)
    tau = {}
    for luck in (100, 60, 0):
        drafter = Oracle(text, gamma, luck=luck)
        got = generate(TOY, table(), prompts, drafter=drafter, max_new_tokens=24)
        np.testing.assert_array_equal(got.tokens, want.tokens)
        tau[luck] = got.tau
    assert tau[100] == gamma + 1 and tau[0] == 1
    assert 1 < tau[60] < gamma + 1
    lookup = generate(
        TOY, table(), prompts, drafter=PromptLookup(gamma), max_new_tokens=24
    )
    np.testing.assert_array_equal(lookup.tokens, want.tokens)


@pytest.mark.parametrize(("scan", "windows"), [(False, ()), (True, (3, 0))])
def test_a_decoder_gives_the_text_of_models_generate(scan, windows):
    model, params = tiny()
    config = dataclasses.replace(model.config, windows=windows)
    model = dataclasses.replace(model, config=config, scan_layers=scan)
    params = stack_layers(params) if scan else params
    prompts = [PROMPTS[0], PROMPTS[0][::-1]]
    want = plain(model, params, jnp.asarray(prompts), max_new_tokens=16)
    drafter = Oracle(whole(prompts, want), 3, 32, luck=70)
    got = generate(model, params, prompts, drafter=drafter, max_new_tokens=16)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert got.tau > 1.5


def test_the_program_of_one_width_is_the_same_with_and_without_drafts():
    model, params = tiny()
    sampling = Sampling(temperature=1.0)
    options = {"max_new_tokens": 16, "sampling": sampling}
    want = autoregressive(model, params, PROMPTS, width=4, **options)
    drafter = Oracle(whole(PROMPTS, want), 3, 32, luck=70)
    got = generate(
        model, params, PROMPTS, drafter=drafter, exact="same_width", **options
    )
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert got.tau > 1.5


def test_rows_end_where_plain_decoding_ends_them():
    # Each token of the text in turn ends it: as the first of a run, inside, as bonus.
    want = autoregressive(TOY, table(), PROMPTS, max_new_tokens=24)
    text = whole(PROMPTS, want)
    drafter = Oracle(text, 3)
    for stop in sorted(set(np.asarray(want.tokens[:, :12]).ravel().tolist())):
        got = generate(
            TOY,
            table(),
            PROMPTS,
            drafter=drafter,
            max_new_tokens=24,
            stop_tokens=(stop, 99),
        )
        for row, prompt in enumerate(PROMPTS):
            expected = greedy_by_hand(prompt, 24, (stop,))
            n = int(got.lengths[row])
            assert got.tokens[row, :n].tolist() == expected
            assert (got.tokens[row, n:] == stop).all()  # the padding


@pytest.mark.parametrize("count", [1, 5])
def test_the_limit_cuts_an_accepted_run(count):
    want = autoregressive(TOY, table(), PROMPTS, max_new_tokens=24)
    drafter = Oracle(whole(PROMPTS, want), 7)
    # The smallest cache that will do; the array of prompts is wider than it.
    slots = max(map(len, PROMPTS)) + count + 7
    prompts = whole(PROMPTS, want)
    got = generate(
        TOY,
        table(),
        prompts,
        list(map(len, PROMPTS)),
        drafter=drafter,
        max_new_tokens=count,
        slots=slots,
    )
    np.testing.assert_array_equal(got.tokens, want.tokens[:, :count])
    assert got.stats.rounds.tolist() == [1] * 4


def test_what_is_rejected_is_never_seen():
    model, params = tiny()
    want = autoregressive(model, params, PROMPTS, max_new_tokens=12)
    drafter = Oracle(whole(PROMPTS, want), 3, 32, luck=60)
    target = Target(model, params, Sampling().sampler(4))
    sizes = jnp.asarray([len(p) for p in PROMPTS])
    tokens = np.zeros((4, 10), np.int32)
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    state = prefill(target, drafter, tokens, sizes, sizes + 12, slots=32)

    @jax.jit
    def spoil(state):
        """Something large in every slot that holds no token."""
        dead = jnp.arange(32) >= state.lengths[:, None] - 1
        cache = jax.tree.map(
            lambda x: jnp.where(dead[:, None, :, None], 1e4, x), state.cache
        )
        junk = jnp.arange(33) >= state.lengths[:, None]
        tokens = jnp.where(junk, 31, state.tokens)
        return dataclasses.replace(state, cache=cache, tokens=tokens)

    rounds = 0
    while state.active.any():
        state = decode(target, drafter, spoil(state), jnp.zeros(0, int), jnp.int32(1))
        rounds += 1
    assert 3 < rounds < 12
    for row, n in enumerate(sizes):
        got = state.tokens[row, n : n + 12]
        np.testing.assert_array_equal(got, want.tokens[row])


def test_one_program_for_all_prompts_of_a_bucket():
    options = {"drafter": PromptLookup(3), "max_new_tokens": 6}
    generate(TOY, table(), [[1, 2, 3]], **options)

    def programs():
        pieces = decode, core._read_prompt, core._first_state
        return [piece._cache_size() for piece in pieces]

    before = programs()
    generate(TOY, table(seed=1), [[4] * 50], **options)
    generate(TOY, table(), [[7, 8]], **options | {"max_new_tokens": 9})
    assert programs() == before


def test_nothing_passes_between_host_and_device_inside():
    target = Target(TOY, table(), Sampling(temperature=0.5).sampler(1))
    sizes, limits, none = jnp.asarray([3]), jnp.asarray([9]), jnp.zeros(0, int)
    tokens, rounds, drafter = jnp.asarray([[1, 2, 3]]), jnp.int32(9), PromptLookup(2)
    with jax.transfer_guard("disallow"):
        state = prefill(target, drafter, tokens, sizes, limits, slots=16)
        cache = state.cache["tokens"]
        state = decode(target, drafter, state, none, rounds)
        jax.block_until_ready(state)
    assert cache.is_deleted()  # it was written in place
    assert state.lengths.tolist() == [9]


def test_a_loop_holds_one_cache():
    # What else it needs does not grow with the layers.
    small, _ = tiny()
    extra = []
    for layers in (2, 32):
        config = dataclasses.replace(small.config, num_layers=layers)
        model = LanguageModel(config, scan_layers=True)
        target = Target(model, model.abstract(), Sampling().sampler(2))
        drafter = TreeOracle(jnp.zeros((2, 32), int), (-1, 0, 0, 1), 32)
        sizes = jnp.asarray([3, 4])
        state = jax.eval_shape(
            functools.partial(prefill, slots=2048),
            *(target, drafter, jnp.zeros((2, 8), int), sizes, sizes + 8),
        )
        compiled = decode.lower(
            target, drafter, state, jnp.zeros(0, int), jnp.int32(4)
        ).compile()
        extra.append(compiled.memory_analysis().temp_size_in_bytes)
    cache = sum(x.size * 4 for x in jax.tree.leaves(state.cache))
    assert extra[1] - extra[0] < cache / 32


def test_a_round_without_drafts_is_one_token_wide():
    widths = []

    class Watched(HashTarget):
        def read_rows(self, params, cache, tokens, **rest):
            jax.debug.callback(lambda n: widths.append(int(n)), tokens.shape[1])
            return super().read_rows(params, cache, tokens, **rest)

    want = autoregressive(TOY, table(), [[1, 2]], max_new_tokens=9)
    for exact in ("fast", "same_width"):
        widths.clear()
        got = generate(
            Watched(),
            table(),
            [[1, 2]],
            drafter=PromptLookup(3, min_ngram=3),
            max_new_tokens=9,
            exact=exact,
        )
        jax.effects_barrier()
        np.testing.assert_array_equal(got.tokens, want.tokens)
        expected = {1, 64} if exact == "fast" else {4, 64}
        assert set(widths) == expected and not got.stats.drafted.any()


def test_where_two_texts_part_and_how_close_it_was():
    sampling = Sampling(temperature=0.9, top_k=8)
    options = {"max_new_tokens": 12, "sampling": sampling}
    one = autoregressive(TOY, table(), PROMPTS, **options)
    assert divergences(TOY, table(), PROMPTS, one, one, sampling=sampling) == []
    # Each row of the logits moves a little: what parts was close, by their scores.
    other = table() + 0.3 * table(seed=9)
    two = autoregressive(TOY, other, PROMPTS, **options)
    found = divergences(TOY, table(), PROMPTS, one, two, sampling=sampling)
    assert len(found) >= 2
    for at in found:
        text = PROMPTS[at.row] + one.tokens[at.row, : at.index].tolist()
        same = two.tokens[at.row, : at.index].tolist()
        assert text[len(PROMPTS[at.row]) :] == same
        pair = int(one.tokens[at.row, at.index]), int(two.tokens[at.row, at.index])
        assert at.tokens == pair and pair[0] != pair[1]
        row = TOY.row_of(text)
        moved = (other - table())[row] / sampling.temperature
        change = float(moved[pair[1]] - moved[pair[0]])
        assert 0 < at.gap < change or at.gap == np.inf
    assert any(at.gap < 2 for at in found)
    short = dataclasses.replace(one, lengths=one.lengths.at[1].set(3))
    cut = divergences(TOY, table(), PROMPTS, one, short, sampling=sampling)
    assert [(at.row, at.index, at.gap) for at in cut] == [(1, 3, np.inf)]


def test_tokens_arrive_call_by_call():
    want = autoregressive(TOY, table(), PROMPTS, max_new_tokens=24)
    drafter, seen = Oracle(whole(PROMPTS, want), 3), [[], [], [], []]
    got = generate(
        TOY,
        table(),
        PROMPTS,
        drafter=drafter,
        max_new_tokens=24,
        rounds_per_call=2,
        on_tokens=lambda row, new: seen[row].append(new),
    )
    assert all(list(map(len, parts)) == [8, 8, 8] for parts in seen)
    assert [sum(parts, []) for parts in seen] == got.tokens.tolist()


def test_stop_strings_end_a_row_with_the_token_that_completes_them():
    want = autoregressive(TOY, table(), PROMPTS, max_new_tokens=24)

    def detokenize(tokens):
        return "".join(chr(ord("a") + t) for t in tokens)

    strings = [detokenize(row[5:7]) for row in want.tokens.tolist()[:2]]
    drafter, seen = Oracle(whole(PROMPTS, want), 3), [[], [], [], []]
    got = generate(
        TOY,
        table(),
        PROMPTS,
        drafter=drafter,
        max_new_tokens=24,
        rounds_per_call=1,
        stop_strings=strings,
        detokenize=detokenize,
        on_tokens=lambda row, new: seen[row].extend(new),
    )
    for row, tokens in enumerate(want.tokens.tolist()):
        text = detokenize(tokens)
        ends = [text.find(s) + len(s) for s in strings if s in text]
        n = min(ends, default=24)
        assert int(got.lengths[row]) == n and seen[row] == tokens[:n]
    assert got.lengths[0] <= 7 and got.lengths[1] <= 7


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Careless(Drafter):
    """Says one thing and does another."""

    count: int = dataclasses.field(default=4, metadata={"static": True})

    width = property(lambda self: 4)

    def draft(self, target, state, context):
        shape = len(context.lengths), self.count
        parents = None if self.count == 4 else jnp.zeros((shape[0], 4), int)
        return Draft(jnp.zeros(shape, int), parents), state


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 16]]}, "token 16 in a prompt: the model has 16"),
        ({"prompts": np.ones((2, 3))}, "must be integers"),
        ({"drafter": Careless()}, "must draft \\(1, 3\\) tokens, not \\(1, 4\\)"),
        ({"drafter": Careless(3)}, "parents where its tree is a DynamicTree"),
        ({"prompts": np.ones((2, 3), int), "lengths": [3, 4]}, "none above 3"),
        ({"prompts": [[1] * 990]}, "exceed the context of 1000"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"exact": "bitwise"}, "use 'fast' or 'same_width'"),
        ({"slots": 16}, "need 17"),
        ({"rounds_per_call": 0}, "rounds_per_call must be"),
        ({"stop_strings": ["x"]}, "need detokenize"),
        ({"stop_strings": "x"}, "a sequence of strings"),
        ({"drafter": NoDrafter(0)}, "width is at least 1"),
        ({"sampling": Sampling(seed=[1, 2])}, "2 seeds for 1 rows"),
    ],
)
def test_what_cannot_be_is_refused(change, says):
    given = {"prompts": [[1, 2]], "drafter": PromptLookup(3), "max_new_tokens": 12}
    given |= change
    with pytest.raises(ValueError, match=says):
        generate(TOY, table(), **given)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -1.0}, "temperature must be >= 0"),
        ({"temperature": float("nan")}, "temperature must be >= 0"),
        ({"top_k": 0}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"candidates": 0}, "candidates must be"),
        ({"rule": "typical"}, "use 'coupled' or 'rejection'"),
    ],
)
def test_sampling_options_out_of_range(options, says):
    with pytest.raises(ValueError, match=says):
        Sampling(**options)


def test_plain_decoding_reads_like_a_drafter() -> None:
    model, params = tiny()
    watched = NoDrafter(3, (0,))
    assert NoDrafter.like(watched) == watched
    seen = autoregressive(model, params, [[1, 2, 3]], max_new_tokens=5, width=watched)
    plain = autoregressive(model, params, [[1, 2, 3]], max_new_tokens=5, width=3)
    assert np.array_equal(seen.tokens, plain.tokens)
    with pytest.raises(ValueError, match="layer"):
        wrong = NoDrafter(3, (99,))
        autoregressive(model, params, [[1]], max_new_tokens=5, width=wrong)
