"""Sparse prefill in the decoder: padding, caches, chunks, scans, generation."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from angeljax.attention import Quest, SparseAttention
from angeljax.attention.decode import Step
from angeljax.models import DecoderConfig, LanguageModel, generate, stack_layers
from angeljax.models.attention import dense_attention
from tests.attention._selectors import Means
from tests.models._random_params import random_params

DENSE = LanguageModel(
    DecoderConfig(
        model_type="llama",
        vocab_size=40,
        hidden_size=16,
        num_layers=1,
        intermediate_size=24,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
    )
)
PARAMS = random_params(DENSE, std=0.3)
# Two layers, for what differs between them.
DEEP = dataclasses.replace(
    DENSE, config=dataclasses.replace(DENSE.config, num_layers=2)
)
DEEP_PARAMS = random_params(DEEP, std=0.3)
T = 80
# Arrays of numpy: each operation on one of JAX compiles by itself.
TOKENS = np.random.default_rng(1).integers(0, 40, (2, T)).astype(np.int32)
LEFT = np.arange(T) >= np.asarray([[0], [21]])  # the second row begins later
RIGHT = LEFT[:, ::-1]


def sparse(keep: int = 1, model: LanguageModel = DENSE, **options) -> LanguageModel:
    on = {"dense_below": 0, "dense_above": 1.0, "implementation": "reference"}
    fn = SparseAttention(Means(keep=keep), **on | options)
    return dataclasses.replace(model, attention_fn=fn)


@functools.partial(jax.jit, static_argnames=("model", "slots", "start", "total"))
def _apply(model, params, tokens, mask, cache, slots=0, **place):
    if slots:
        cache = model.init_cache(tokens.shape[0], slots)
    return model.apply(params, tokens, mask=mask, cache=cache, **place)


def apply(model, params, tokens, mask=None, cache=None, **place):
    logits, cache = _apply(model, params, tokens, mask, cache, **place)
    return np.asarray(logits), cache


@functools.cache
def alone(row):
    """Logits of a row without its padding."""
    return apply(sparse(), PARAMS, TOKENS[row : row + 1, 21 * row :])[0][0]


@functools.cache
def dense(mask):
    return apply(DENSE, PARAMS, TOKENS, {"left": LEFT, "right": RIGHT}[mask])[0]


def test_keeping_every_block_is_the_dense_model():
    """Padding on the right, or on the left with a cache and a step of decoding."""
    got, _ = apply(sparse(0), PARAMS, TOKENS, RIGHT)
    np.testing.assert_allclose(got[RIGHT], dense("right")[RIGHT], atol=1e-3)
    place = {"slots": T + 3, "start": 0, "total": T}
    got, cache = apply(sparse(0), PARAMS, TOKENS[:, :-1], LEFT[:, :-1], **place)
    want = dense("left")
    np.testing.assert_allclose(got[LEFT[:, :-1]], want[:, :-1][LEFT[:, :-1]], atol=1e-3)
    got, _ = apply(sparse(0), PARAMS, TOKENS[:, -1:], None, cache)
    np.testing.assert_allclose(got[:, 0], want[:, -1], atol=1e-3)


def test_padding_does_not_change_what_a_row_selects():
    assert np.abs(alone(0) - dense("left")[0]).max() > 0.1
    for place in ({}, {"slots": T + 3}):
        got, _ = apply(sparse(), PARAMS, TOKENS, LEFT, **place)
        np.testing.assert_allclose(got[0], alone(0), atol=1e-3)
        np.testing.assert_allclose(got[1, 21:], alone(1), atol=1e-3)


@pytest.mark.parametrize("known", [True, False])
def test_chunks_are_the_prompt_in_one_piece(known):
    """The last chunk is shorter, and padded to the length of the first."""
    place = {"start": 0} if known else {}
    first, cache = apply(
        sparse(), PARAMS, TOKENS[:1, :48], slots=T + 16, total=T, **place
    )
    place = {"start": 48} if known else {}
    chunk = np.pad(TOKENS[:1, 48:], ((0, 0), (0, 16)))
    mask = np.arange(48)[None] < 32
    last, _ = apply(sparse(), PARAMS, chunk, mask, cache, total=T, **place)
    got = np.concatenate([first, last], axis=1)[0, :T]
    np.testing.assert_allclose(got, alone(0), atol=1e-3)


def test_chunks_of_padded_rows():
    """Slots with holes, rows off the grid of blocks: keeping all is still dense."""
    want = dense("left")
    got, cache = apply(sparse(0), PARAMS, TOKENS[:, :43], LEFT[:, :43], slots=T)
    real = LEFT[:, :43]
    np.testing.assert_allclose(got[real], want[:, :43][real], atol=1e-3)
    got, _ = apply(sparse(0), PARAMS, TOKENS[:, 43:], None, cache)
    np.testing.assert_allclose(got, want[:, 43:], atol=1e-3)


def test_scanned_layers_are_the_unrolled_ones():
    """A traced layer number; a layer that keeps everything; padding; hidden states."""
    model = sparse(layers=((-1, Means(keep=0)),), model=DEEP)
    scanned = dataclasses.replace(model, scan_layers=True)
    run = jax.jit(lambda p: scanned.features(p, TOKENS, mask=LEFT, hidden=(0,)))
    found = run(stack_layers(DEEP_PARAMS))
    plain = jax.jit(lambda p: model.features(p, TOKENS, hidden=(0,)))(DEEP_PARAMS)
    found, plain = jax.device_get((found, plain))
    np.testing.assert_allclose(found.final[0], plain.final[0], atol=1e-3)
    np.testing.assert_allclose(found.hidden[0][0], plain.hidden[0][0], atol=1e-3)


def test_no_mask_of_all_keys_is_made():
    def shapes(model, **place):
        fn = functools.partial(_apply, model, slots=T + 48, **place)
        jaxpr = jax.make_jaxpr(fn)(PARAMS, TOKENS, LEFT, None)
        return [v.aval.shape for e in _equations(jaxpr.jaxpr) for v in e.outvars]

    big = lambda found: [s for s in found if s[-2:] in ((T, T), (T, T + 48))]  # noqa
    assert big(shapes(DENSE))
    model = sparse(implementation="xla")
    assert not big(shapes(model, start=0)) and not big(shapes(model))


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in jaxprs_in_params(eqn.params):
            yield from _equations(sub)


def test_short_prompts_and_short_steps_are_dense():
    fn = sparse(dense_below=64, layers=((1, Means(block_size=32)),)).attention_fn
    assert fn.sparse(64, 64, 2) and not fn.sparse(63, 63, 2)
    # A chunk of a long prompt, and the checking of a few drafted tokens.
    assert fn.sparse(16, 64, 2) and not fn.sparse(15, 64, 2)
    full = dataclasses.replace(fn, selector=Means(says=1.0), dense_above=0.9)
    assert full.sparse(32, 64, 2) and not full.sparse(16, 64, 2)


def test_generation_reads_the_prompt_sparsely():
    got = generate(sparse(), PARAMS, TOKENS, LEFT, max_new_tokens=2, eos_ids=()).tokens
    first = [alone(row)[-1].argmax() for row in (0, 1)]
    np.testing.assert_array_equal(np.asarray(got)[:, 0], first)


def test_windows_are_left_dense_or_refused():
    near = dataclasses.replace(DEEP.config, windows=(0, 8))
    model = dataclasses.replace(DEEP, config=near)
    want, _ = apply(model, DEEP_PARAMS, TOKENS, LEFT)
    got, _ = apply(sparse(0, model), DEEP_PARAMS, TOKENS, LEFT)
    np.testing.assert_allclose(got[LEFT], want[LEFT], atol=1e-3)

    scanned = dataclasses.replace(model, scan_layers=True)
    with pytest.raises(ValueError, match="use scan_layers=False"):
        sparse(0, scanned).logits(stack_layers(DEEP_PARAMS), TOKENS)
    near = dataclasses.replace(near, windows=(8, 8))
    with pytest.raises(ValueError, match="every layer of this model has one"):
        sparse(0, dataclasses.replace(DEEP, config=near)).logits(DEEP_PARAMS, TOKENS)


def test_what_cannot_be_is_refused():
    def place(**options):
        return sparse().apply(PARAMS, TOKENS, **options)

    with pytest.raises(ValueError, match="start=3 needs the cache"):
        place(start=3)
    with pytest.raises(ValueError, match="total=90: a prompt is no shorter"):
        place(start=16, total=90, cache=DENSE.init_cache(2, T + 16))
    with pytest.raises(ValueError, match="layer 2: the model has 1 layers"):
        sparse(layers=((2, Means()),)).logits(PARAMS, TOKENS)
    with pytest.raises(ValueError, match="selector must be one of .* not a str"):
        SparseAttention("stem")
    with pytest.raises(ValueError, match="see angeljax.attention.hooks"):
        sparse().attention_fn(*[jnp.ones((1, 4, 1, 8))] * 3, None)
    assert dense_attention is DENSE.attention_fn


def test_quest_decodes_from_pages_of_the_cache():
    """All pages are the whole cache; few of them are not, but in the first layers."""
    every = Quest(keep_pages=5, page_size=16, dense_layers=0)
    few = dataclasses.replace(every, keep_pages=2)

    @functools.partial(jax.jit, static_argnames="models")
    def run(params, models):
        found = []
        for model in models:
            cache = model.init_cache(2, T + 3)
            assert cache.positions.shape == (2, 96) and cache.pages is not None
            before = {"mask": LEFT[:, :-1], "last_only": True, "start": 0, "total": T}
            _, cache = model.apply(params, TOKENS[:, :-1], cache=cache, **before)
            found.append(model.apply(params, TOKENS[:, -1:], cache=cache)[0][:, 0])
        return found

    whole, part = run(PARAMS, (sparse(0, decode=every), sparse(0, decode=few)))
    want = dense("left")[:, -1]
    np.testing.assert_allclose(whole, want, atol=1e-3)
    assert np.abs(part - want).max() > 0.01
    scanned = sparse(0, dataclasses.replace(DENSE, scan_layers=True), decode=few)
    (stacked,) = run(stack_layers(PARAMS), (scanned,))
    np.testing.assert_allclose(stacked, part, atol=1e-3)
    # The first layers read everything.
    q = np.ones((1, 1, 1, 8))
    step = Step(quest=Quest(dense_layers=1), mask=None, valid=None, length=1)
    assert step.at(0).attend(q, None, None, None, None, lambda: "all") == "all"
