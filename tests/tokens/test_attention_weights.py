"""Attention of frames summed up for tokens, against loops over its cells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.tokens import attention_weights, pool_attention
from tests.tokens import _audio_oracles as oracle

FRAMES, HEADS, DIM = 24, 3, 8


@pytest.mark.parametrize("relevance", ["mean", "max"])
@pytest.mark.parametrize("pool", [1, 2, 4])
def test_like_the_cells(rng, pool, relevance):
    q, k = rng.normal(size=(2, 2, FRAMES, HEADS, DIM)).astype(np.float32)
    lengths = np.array([FRAMES, 16]) // pool
    mask = np.arange(FRAMES) < (lengths * pool)[:, None]
    scores = np.einsum("bthd,bshd->bhts", q, k) * DIM**-0.5
    scores = np.where(mask[:, None, None], scores, -np.inf)
    attn = np.asarray(jax.nn.softmax(scores, axis=-1))
    want = [
        oracle.pool(attn[b].astype(float), pool, lengths[b], relevance)
        for b in range(2)
    ]
    got = pool_attention(attn, pool, mask=mask[:, ::pool], relevance=relevance)
    # Two whole blocks of queries and a part of one.
    parts = jax.jit(
        lambda q, k, m: attention_weights(
            q, k, pool=pool, mask=m, relevance=relevance, block=10
        )
    )(q, k, mask)
    for b, (received, itself) in enumerate(want):
        n = lengths[b]
        for x in (got, parts):
            np.testing.assert_allclose(x.received[b], received, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(x.diagonal[b, :n], itself[:n], rtol=1e-5)
    alone = pool_attention(attn[1], pool, mask=mask[1, ::pool], relevance=relevance)
    np.testing.assert_array_equal(alone.received, got.received[1])


def test_never_holds_the_attention_of_all_frames():
    """No array of frames times frames: that is what the blocks are for."""
    frames = 1024
    x = jax.ShapeDtypeStruct((1, frames, 4, 16), jnp.float32)
    jaxpr = str(jax.make_jaxpr(lambda q, k: attention_weights(q, k, block=64))(x, x))
    assert f"{frames},{frames}" not in jaxpr and f"64,{frames}" in jaxpr


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: pool_attention(a, 5), "pool=5"),
        (lambda a: pool_attention(a, 2, relevance="sum"), "relevance='sum'"),
        (lambda a: pool_attention(a[0, 0], 2), "attn must be"),
        (lambda a: pool_attention(a, 2, mask=np.ones((1, 8), bool)), "mask must be"),
        (lambda a: attention_weights(a, a[:, :1]), "q and k must both be"),
        (lambda a: attention_weights(a, a, pool=3), "pool=3"),
    ],
)
def test_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.ones((1, 8, 8, 8), np.float32))
