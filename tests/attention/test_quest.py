"""Quest: bounds of pages, decode loops, and what is read where little is kept."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.attention import init_pages, quest_attention, update_pages
from angeljax.attention.quest import page_bounds, select_pages
from angeljax.models import DecoderConfig, init_cache
from angeljax.models.cache import write

PAGE, SLOTS, B, H, KV, D = 4, 32, 2, 6, 2, 8


def _keys(rng, tokens=SLOTS, dtype=jnp.float32):
    """k and v of new tokens `[B, T, Hkv, D]`."""
    return [
        jnp.asarray(rng.standard_normal((B, tokens, KV, D)), dtype) for _ in range(2)
    ]


def _oracle(q, k, v, length, keep, per, valid, soft_cap=None):
    """One head at a time: the bound of each page, the best pages, their keys."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    y, pages = np.zeros(q.shape), SLOTS // PAGE
    for b in range(B):
        real = [s for s in range(length[b]) if valid[b, s]]
        newest = (length[b] - 1) // PAGE

        def chosen(scores: Any, newest: int = newest) -> set[int]:
            order = [p for p in np.argsort(-scores, kind="stable") if p != newest]
            return {newest, *order[: keep - 1]}

        bound = np.full((H, pages), -np.inf)
        for h in range(H):
            for p in {s // PAGE for s in real}:
                keys = k[b, [s for s in real if s // PAGE == p], h // (H // KV)]
                sides = q[b, 0, h] * keys.min(0), q[b, 0, h] * keys.max(0)
                bound[h, p] = np.maximum(*sides).sum()
        for h in range(H):
            group = h // (H // KV) * (H // KV)
            heads = bound[group : group + H // KV]
            near = (heads - heads.max(1, keepdims=True)).max(0)
            taken = chosen(near if per == "kv_head" else bound[h])
            keys = [s for s in real if s // PAGE in taken]
            x = k[b, keys, h // (H // KV)] @ q[b, 0, h] * D**-0.5
            if soft_cap is not None:
                x = soft_cap * np.tanh(x / soft_cap)
            p = np.exp(x - x.max())
            y[b, 0, h] = p @ v[b, keys, h // (H // KV)] / p.sum()
    return y


def test_bounds_hold_and_are_tight(rng):
    """For bfloat16 keys, written by pieces of any length from any slot."""
    k, _ = _keys(rng, dtype=jnp.bfloat16)
    valid = jnp.asarray(rng.random((B, SLOTS)) < 0.8)
    pages = init_pages(
        jax.ShapeDtypeStruct((B, SLOTS, KV, D), k.dtype), page_size=PAGE,
        layout="slots_first",
    )  # fmt: skip
    update = jax.jit(lambda p, k, slot, ok: update_pages(p, k, slot, valid=ok))
    for start, end in ((0, 15), (15, 30), (30, 32)):
        part = slice(start, end)
        bad = jnp.where(valid[:, part, None, None], k[:, part], jnp.nan)
        pages = update(pages, bad, start, valid[:, part])
    by_page = np.asarray(k, np.float32).swapaxes(1, 2).reshape(B, KV, -1, PAGE, D)
    real = np.asarray(valid).reshape(B, 1, -1, PAGE, 1)
    lowest = -float(jnp.finfo(jnp.bfloat16).max)
    np.testing.assert_array_equal(
        np.asarray(pages.high, np.float32), np.where(real, by_page, lowest).max(3)
    )
    q = jnp.asarray(rng.standard_normal((B, 1, H, D)), jnp.float32)
    bounds = jax.jit(page_bounds)
    product = np.einsum("bngd,bnpsd->bngps", q.reshape(B, KV, -1, D), by_page)
    product = np.where(real[..., 0][:, :, None], product, -np.inf)
    assert (np.asarray(bounds(q, pages)) >= product.max(-1) - 1e-5).all()
    # A page of one key, seen alone, is bounded by it.
    none = jnp.zeros_like(valid).at[:, 9].set(True)
    pages = update(init_pages(jnp.zeros((B, KV, SLOTS, D), k.dtype), page_size=PAGE),
                   k[:, :15], 0, none[:, :15])  # fmt: skip
    found = np.asarray(bounds(q, pages))
    exact = np.einsum("bngd,bnd->bng", q.reshape(B, KV, -1, D), by_page[:, :, 2, 1])
    np.testing.assert_allclose(found[..., 2], exact, rtol=1e-5)
    assert np.isneginf(np.delete(found, 2, -1)).all()


@pytest.mark.parametrize("per", ["kv_head", "query_head"])
def test_a_decode_loop_against_the_oracle(rng, per):
    """A prompt with padding on the left, then tokens, in the decoder's own cache."""
    config = DecoderConfig(
        model_type="llama", vocab_size=8, hidden_size=16, num_layers=2,
        intermediate_size=8, num_heads=H, num_kv_heads=KV, head_dim=D,
    )  # fmt: skip
    stacked = per == "kv_head"
    cache = init_cache(config, B, SLOTS, jnp.float32, stacked=stacked)
    layer = 1 if stacked else None
    stores = [cache.k, cache.v] if stacked else [cache.k[1], cache.v[1]]
    k, v = _keys(rng)
    q = jnp.asarray(2 * rng.standard_normal((B, SLOTS, H, D)), jnp.float32)
    valid = np.ones((B, SLOTS), bool)
    valid[1, :6] = False
    pages = init_pages(stores[0], page_size=PAGE)
    prompt = 17

    @jax.jit
    def decode(stores, pages):
        def take(state, tokens, slot):
            stores, pages = state
            k, v, valid = tokens
            stores = [
                write(x, new, slot, layer)[0]
                for x, new in zip(stores, (k, v), strict=True)
            ]
            return stores, update_pages(pages, k, slot, valid=valid, layer=layer)

        def step(state, slot):
            part = [
                jax.lax.dynamic_slice_in_dim(x, slot, 1, 1)
                for x in (k, v, jnp.asarray(valid), q)
            ]
            state = take(state, part[:3], slot)
            y = quest_attention(
                part[3], *state[0], state[1], keep_pages=3, length=slot + 1, per=per,
                valid=jnp.asarray(valid), layer=layer, soft_cap=4.0,
            )  # fmt: skip
            return state, y

        state = take(
            (stores, pages), (k[:, :prompt], v[:, :prompt], valid[:, :prompt]), 0
        )
        return jax.lax.scan(step, state, jnp.arange(prompt, SLOTS))[1]

    found = decode(stores, pages)
    for i, y in enumerate(found):
        at, length = prompt + i, [prompt + i + 1] * B
        expected = _oracle(q[:, at : at + 1], k, v, length, 3, per, valid, 4.0)
        np.testing.assert_allclose(y, expected, atol=2e-6)


@pytest.mark.parametrize("layout", ["heads_first", "slots_first"])
def test_all_pages_are_dense_to_the_bit(rng, layout):
    k, v = _keys(rng)
    q = jnp.asarray(rng.standard_normal((B, 1, H, D)), jnp.float32)
    length = jnp.asarray([SLOTS, 10])
    # Slots that are not filled may hold anything.
    filled = (jnp.arange(SLOTS) < length[:, None])[..., None, None]
    bad = [jnp.where(filled, x, jnp.nan) for x in (k, v)]

    @jax.jit
    def run(q, stores, k):
        if layout == "heads_first":
            stores = [x.swapaxes(1, 2) for x in stores]
        pages = init_pages(stores[0], page_size=PAGE, layout=layout)
        pages = update_pages(pages, k, 0)
        newest = select_pages(q, pages, keep_pages=1, length=length)
        return newest, quest_attention(
            q, *stores, pages, keep_pages=99, length=length, layout=layout
        )

    @jax.jit
    def dense(q, k, v):
        s = jnp.einsum(
            "bngd,bsnd->bngs", q.reshape(B, KV, -1, D), k, precision="highest"
        )
        s = jnp.where(filled[:, None, None, :, 0, 0], s * D**-0.5, -jnp.inf)
        p = jnp.exp(s - s.max(-1, keepdims=True))
        y = jnp.einsum("bngs,bsnd->bngd", p, v, precision="highest")
        return (y / p.sum(-1, keepdims=True)).reshape(q.shape)

    newest, y = run(q, bad, k)
    np.testing.assert_array_equal(y, dense(q, k, v))
    assert newest.tolist() == [[[7]] * KV, [[2]] * KV]


def test_refusals():
    k = jnp.zeros((B, KV, SLOTS, D))
    pages, q = init_pages(k, page_size=PAGE), jnp.zeros((B, 1, H, D))

    def run(q=q, k=k, **options):
        options = {"keep_pages": 2, "length": 4, **options}
        return jax.eval_shape(lambda: quest_attention(q, k, k, pages, **options))

    for call, message in (
        (lambda: init_pages(k, page_size=5), "page_size=5 must divide the 32 slots"),
        (lambda: init_pages(k, layout="x"), "layout='x'"),
        (lambda: init_pages(k[0]), "four axes"),
        (lambda: update_pages(pages, q, 0), r"k is \[2, 1, 6, 8\]"),
        (lambda: update_pages(pages, k, 0, layer=1), "layer=1"),
        (lambda: run(keep_pages=0), "keep_pages"),
        (lambda: run(per="head"), "per='head'"),
        (lambda: run(q=q[:, :, :5]), "multiple of 2 heads"),
        (lambda: run(k=k[:, :, :16]), "not of one cache"),
        (lambda: run(layer=0), "layer=0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
