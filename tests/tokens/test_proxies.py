"""Importance without training, and the numbers of `diagnostics`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax import tokens
from angeljax.tokens import Selection
from tests.tokens import _oracles


@pytest.fixture
def qk(rng):
    return rng.normal(size=(2, 2, 24, 3, 4)).astype(np.float32)


def test_received_attention(qk):
    q, k = qk
    found = jax.jit(lambda q, k: tokens.received_attention(q, k, merge_unit=4))(q, k)
    want = [_oracles.received_attention(a, b, 4) for a, b in zip(q, k, strict=True)]
    np.testing.assert_allclose(found, want, rtol=1e-5)

    # Padding neither gives nor receives.
    mask = np.arange(24) < np.array([[24], [16]])
    found = tokens.received_attention(q, k, mask=mask)
    want = _oracles.received_attention(q[1, :16], k[1, :16], 1)
    np.testing.assert_allclose(found[1], [*want, *[0] * 8], rtol=1e-5)
    np.testing.assert_allclose(found.sum(-1), [24, 16], rtol=1e-5)

    mean = np.broadcast_to(q.mean(1, keepdims=True), q.shape)
    found = tokens.received_attention(q, k, mean_query=True)
    want = [_oracles.received_attention(a, b, 1) for a, b in zip(mean, k, strict=True)]
    np.testing.assert_allclose(found * 24, want, rtol=1e-5)
    with pytest.raises(ValueError, match="merge_unit=5 must divide the 24"):
        tokens.received_attention(q, k, merge_unit=5)
    with pytest.raises(ValueError, match="q and k must be"):
        tokens.received_attention(q, k[..., :2])


def test_attention_of_one_query(rng):
    q = rng.normal(size=(2, 6, 4)).astype(np.float32)
    k = rng.normal(size=(2, 9, 3, 4)).astype(np.float32)
    mask = np.arange(9) < np.array([[9], [5]])
    found = tokens.last_token_attention(q, k, mask=mask)
    for b, size in enumerate((9, 5)):
        total = np.zeros(size)
        for h in range(6):  # two query heads share a key head
            weight = np.exp(k[b, :size, h // 2] @ q[b, h] / 2)
            total += weight / weight.sum() / 6
        np.testing.assert_allclose(found[b], [*total, *[0] * (9 - size)], rtol=1e-5)
    none = tokens.cls_attention(q, k, mask=np.zeros((2, 9), bool))
    assert not np.any(none)


def test_text_relevance_and_norms(rng):
    x, t = rng.normal(size=(2, 5, 8)), rng.normal(size=(2, 3, 8))
    x, t = x.astype(np.float32), t.astype(np.float32)
    t[1, 2] = 0  # padding
    found = tokens.text_relevance(x, t)
    for b, size in enumerate((3, 2)):
        want = -(_oracles.unit(x[b]) @ _oracles.unit(t[b, :size]).T).mean(1)
        np.testing.assert_allclose(found[b], want, atol=1e-6)
    for order in (1, 2):
        want = np.linalg.norm(x, order, -1)
        found = tokens.norm_importance(x, order=order)
        np.testing.assert_allclose(found, want, rtol=1e-5)
    with pytest.raises(ValueError, match="order must be 1 or 2"):
        tokens.norm_importance(x, order=3)


def test_diagnostics(rng):
    x = rng.normal(size=(2, 8, 4)).astype(np.float32)
    w = rng.normal(size=(2, 8)).astype(np.float32)
    mask = np.arange(8) < np.array([[8], [5]])
    chosen = Selection.of(jnp.array([[5, 1, 0], [4, 2, 8]]), 8)
    other = Selection.of(jnp.array([[1, 0, 2, 3], [4, 2, 8, 8]]), 8)
    found = tokens.diagnostics(chosen, x, importance=w, mask=mask, reference=other)
    for b, (kept, size) in enumerate((([5, 1, 0], 8), ([4, 2], 5))):
        cos = _oracles.unit(x[b, :size]) @ _oracles.unit(x[b, kept]).T
        v = w[b, :size] - w[b, :size].min()
        best = np.sort(v)[::-1][: len(kept)].sum()
        np.testing.assert_allclose(found["kept"][b], len(kept) / size, rtol=1e-5)
        np.testing.assert_allclose(found["coverage"][b], cos.max(1).mean(), rtol=1e-5)
        np.testing.assert_allclose(
            found["importance"][b], v[kept].sum() / best, rtol=1e-4
        )
    np.testing.assert_allclose(found["jaccard"], [2 / 5, 1])
    nothing = Selection.of(jnp.full((1, 2), 8), 8)
    empty = tokens.diagnostics(nothing, x[:1], mask=np.zeros((1, 8), bool))
    assert empty["kept"] == 0 and empty["coverage"] == 0
