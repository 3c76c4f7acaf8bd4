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
from angeljax.models import DecoderConfig, LanguageModel, generate, stack_layers
from angeljax.models.attention import dense_attention
from tests.attention._selectors import Means
from tests.models._random import random_params

DENSE = LanguageModel(
    DecoderConfig(
        model_type="llama",
        vocab_size=40,
        hidden_size=16,
        num_layers=2,
        intermediate_size=24,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
    )
)
PARAMS = random_params(DENSE, std=0.3)
T = 80
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 40, (2, T)), jnp.int32)
LEFT = jnp.arange(T) >= jnp.asarray([[0], [21]])  # the second row begins later


def sparse(keep: int = 1, model: LanguageModel = DENSE, **options) -> LanguageModel:
    on = {"dense_below": 0, "dense_above": 1.0, "implementation": "reference"}
    fn = SparseAttention(Means(keep=keep), **on | options)
    return dataclasses.replace(model, attention_fn=fn)


@functools.partial(jax.jit, static_argnames=("model", "slots", "start", "total"))
def apply(model, params, tokens, mask=None, cache=None, slots=0, **place):
    if slots:
        cache = model.init_cache(tokens.shape[0], slots)
    return model.apply(params, tokens, mask=mask, cache=cache, **place)


ALONE = [apply(sparse(), PARAMS, TOKENS[i : i + 1, 21 * i :])[0][0] for i in range(2)]


def test_keeping_every_block_is_the_dense_model():
    """Padding on either side, an empty cache, and the decoding that follows."""
    want, cache = apply(DENSE, PARAMS, TOKENS, LEFT, slots=T + 3)
    got, filled = apply(sparse(0), PARAMS, TOKENS, LEFT, slots=T + 3, start=0)
    np.testing.assert_allclose(got[LEFT], want[LEFT], atol=1e-3)
    again, _ = apply(sparse(0), PARAMS, TOKENS, LEFT, slots=T + 3)  # start not said
    np.testing.assert_allclose(again[LEFT], want[LEFT], atol=1e-3)
    token = TOKENS[:, :1]
    want, _ = apply(DENSE, PARAMS, token, None, cache)
    got, _ = apply(sparse(0), PARAMS, token, None, filled)
    np.testing.assert_allclose(got, want, atol=1e-3)

    right = jnp.flip(LEFT, -1)
    want, _ = apply(DENSE, PARAMS, TOKENS, right)
    got, _ = apply(sparse(0), PARAMS, TOKENS, right)
    np.testing.assert_allclose(got[right], want[right], atol=1e-3)


def test_padding_does_not_change_what_a_row_selects():
    dense, _ = apply(DENSE, PARAMS, TOKENS)
    assert jnp.abs(ALONE[0] - dense[0]).max() > 0.1
    for place in ({}, {"slots": T + 3, "start": 0}, {"slots": T + 3}):
        got, _ = apply(sparse(), PARAMS, TOKENS, LEFT, **place)
        np.testing.assert_allclose(got[0], ALONE[0], atol=1e-3)
        np.testing.assert_allclose(got[1, 21:], ALONE[1], atol=1e-3)


@pytest.mark.parametrize("known", [True, False])
def test_chunks_are_the_prompt_in_one_piece(known):
    """The last chunk is shorter, and its rows are padded to the length of the others"""
    model, cache, done = sparse(), DENSE.init_cache(2, T + 40), []
    for start in (0, 32, 64):
        chunk = TOKENS[:, start : start + 32]
        mask = None
        if start == 64:
            chunk = jnp.pad(chunk, ((0, 0), (0, 16)))
            mask = jnp.arange(32) < 16
            mask = jnp.broadcast_to(mask, (2, 32))
        place = {"start": start} if known else {}
        y, cache = apply(model, PARAMS, chunk, mask, cache, total=T, **place)
        done.append(y)
    got = jnp.concatenate(done, axis=1)[:, :T]
    want, _ = apply(model, PARAMS, TOKENS)
    np.testing.assert_allclose(got, want, atol=1e-3)


def test_chunks_of_padded_rows_and_a_second_turn():
    """Slots with holes, rows off the grid of blocks: keeping all is still dense."""
    pieces = TOKENS[:, :40], TOKENS[:, 40:41], TOKENS[:, 41:80]
    masks = LEFT[:, :40], None, None
    cache, filled = (DENSE.init_cache(2, T) for _ in range(2))
    for chunk, mask in zip(pieces, masks, strict=True):
        want, cache = apply(DENSE, PARAMS, chunk, mask, cache)
        got, filled = apply(sparse(0), PARAMS, chunk, mask, filled)
        real = slice(None) if mask is None else mask
        np.testing.assert_allclose(got[real], want[real], atol=1e-3)


def test_scanned_layers_and_layers_of_their_own():
    """A traced layer number; one layer that keeps everything."""
    own = ((-1, Means(keep=0)),)
    want, _ = apply(sparse(layers=own), PARAMS, TOKENS)
    assert jnp.abs(want[0] - ALONE[0]).max() > 0.01
    stacked = stack_layers(PARAMS)
    scanned = sparse(layers=own, model=dataclasses.replace(DENSE, scan_layers=True))
    got, _ = apply(scanned, stacked, TOKENS, LEFT, slots=T, start=0)
    np.testing.assert_allclose(got[0], want[0], atol=1e-3)
    features = jax.jit(lambda p: scanned.features(p, TOKENS, mask=LEFT, hidden=(0,)))
    found = features(stacked)
    unrolled = jax.jit(lambda p: sparse(layers=own).features(p, TOKENS, hidden=(0,)))
    plain = unrolled(PARAMS)
    np.testing.assert_allclose(found.final[0], plain.final[0], atol=1e-3)
    np.testing.assert_allclose(found.hidden[0][0], plain.hidden[0][0], atol=1e-3)


def test_no_mask_of_all_keys_is_made():
    def shapes(model, **place):
        fn = functools.partial(apply, model, slots=T + 48, **place)
        jaxpr = jax.make_jaxpr(fn)(PARAMS, TOKENS, LEFT)
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
    want, cache = apply(DENSE, PARAMS, TOKENS)
    got, _ = apply(sparse(dense_below=T + 1), PARAMS, TOKENS)
    np.testing.assert_array_equal(got, want)
    _, cache = apply(DENSE, PARAMS, TOKENS, slots=T + 8)
    want, _ = apply(DENSE, PARAMS, TOKENS[:, :5], None, cache)
    got, _ = apply(sparse(), PARAMS, TOKENS[:, :5], None, cache)
    np.testing.assert_array_equal(got, want)


def test_generation_reads_the_prompt_sparsely():
    make = functools.partial(generate, params=PARAMS, max_new_tokens=3, eos_ids=())
    dense = make(DENSE, tokens=TOKENS, mask=LEFT).tokens
    np.testing.assert_array_equal(
        make(sparse(0), tokens=TOKENS, mask=LEFT).tokens, dense
    )
    got = make(sparse(), tokens=TOKENS, mask=LEFT).tokens
    first = [jnp.argmax(y[-1]) for y in ALONE]
    np.testing.assert_array_equal(got[:, 0], first)
    assert (got != dense).any()


def test_windows_are_left_dense_or_refused():
    near = dataclasses.replace(DENSE.config, windows=(0, 8))
    model = dataclasses.replace(DENSE, config=near)
    want, _ = apply(model, PARAMS, TOKENS, LEFT)
    got, _ = apply(sparse(0, model), PARAMS, TOKENS, LEFT)
    np.testing.assert_allclose(got[LEFT], want[LEFT], atol=1e-3)

    scanned = dataclasses.replace(model, scan_layers=True)
    with pytest.raises(ValueError, match="use scan_layers=False"):
        sparse(0, scanned).logits(stack_layers(PARAMS), TOKENS)
    near = dataclasses.replace(near, windows=(8, 8))
    with pytest.raises(ValueError, match="every layer of this model has one"):
        sparse(0, dataclasses.replace(DENSE, config=near)).logits(PARAMS, TOKENS)


def test_what_cannot_be_is_refused():
    def place(**options):
        return sparse().apply(PARAMS, TOKENS, **options)

    with pytest.raises(ValueError, match="start=3 needs the cache"):
        place(start=3)
    with pytest.raises(ValueError, match="total=90: a prompt is no shorter"):
        place(start=16, total=90, cache=DENSE.init_cache(2, T + 16))
    with pytest.raises(ValueError, match="layer 2: the model has 2 layers"):
        sparse(layers=((2, Means()),)).logits(PARAMS, TOKENS)
    with pytest.raises(ValueError, match="selector must be one of .* not a str"):
        SparseAttention("stem")
    with pytest.raises(ValueError, match="see angeljax.attention.hooks"):
        sparse().attention_fn(*[jnp.ones((1, 4, 1, 8))] * 3, None)
    assert dense_attention is DENSE.attention_fn


@pytest.mark.parametrize("scan", [False, True])
def test_quest_decodes_from_pages_of_the_cache(scan):
    """All pages are the whole cache; few of them are not, but for the first layer."""
    params = stack_layers(PARAMS) if scan else PARAMS
    base = dataclasses.replace(DENSE, scan_layers=scan)

    def logits(model):
        _, cache = apply(model, params, TOKENS, LEFT, slots=T + 3, start=0, total=T)
        if model.attention_fn is not dense_attention:
            assert cache.positions.shape == (2, 96) and cache.pages is not None
        y, cache = apply(model, params, TOKENS[:, :1], None, cache)
        return apply(model, params, TOKENS[:, 1:2], None, cache)[0]

    want = logits(base)
    # The option alone would leave a cache of 96 slots without pages.
    every = Quest(keep_pages=5, page_size=16, dense_layers=0)
    few = dataclasses.replace(every, keep_pages=2)
    fn = sparse(0, base, decode=few).attention_fn
    got = logits(dataclasses.replace(base, attention_fn=fn))
    assert jnp.abs(got - want).max() > 0.01
    for quest in (every, dataclasses.replace(few, dense_layers=2)):
        got = logits(sparse(0, base, decode=quest))
        if quest is every:
            # 5 of the 6 pages: the row of 59 tokens has no more, the other may differ.
            np.testing.assert_allclose(got[1], want[1], atol=1e-3)
        else:
            np.testing.assert_allclose(got, want, atol=1e-3)
