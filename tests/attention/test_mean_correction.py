"""The mean correction against a softmax with every key written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.attention import _estimate, mean_correction
from pallas_kernels import BlockLists, block_sparse_attention

# Rows of a query block and of a key block, rows of q and of k.
ROWS, BLOCK, T, S = 16, 8, 40, 75


def _inputs(rng, kv_heads=2, heads=4):
    q = rng.standard_normal((2, T, heads, 8), np.float32)
    k, v = rng.standard_normal((2, 2, S, kv_heads, 8), np.float32)
    return tuple(map(jnp.asarray, (q, k, v)))


def _lists(rng, heads):
    """The first block, and random others: not all that hold queries of their own."""
    mask = rng.random((2, heads, -(-T // ROWS), -(-S // BLOCK))) < 0.4
    mask[..., 0] = True
    return BlockLists.from_mask(jnp.asarray(mask), block_q=ROWS, block_k=BLOCK)


def _oracle(q, k, v, lists, offset, scale, soft_cap):
    """float64, one query at a time; a block left out is as many copies of its mean."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    mask = np.asarray(lists.to_mask(-(-S // BLOCK)))
    y, lse = np.zeros(q.shape), np.zeros((2, q.shape[2], T))
    for b, h, t in np.ndindex(2, q.shape[2], T):
        keys, values = [], []
        head = h // (q.shape[2] // k.shape[2])
        for j in range(mask.shape[3]):
            inside = range(j * BLOCK, min((j + 1) * BLOCK, S))
            seen = [s for s in inside if s <= offset[b] + t]
            if mask[b, h * mask.shape[1] // q.shape[2], t // ROWS, j]:
                keys += [k[b, s, head] for s in seen]
                values += [v[b, s, head] for s in seen]
            elif len(seen) == len(inside):
                keys += [k[b, inside, head].mean(0)] * len(inside)
                values += [v[b, inside, head].mean(0)] * len(inside)
        x = np.asarray(keys) @ q[b, t, h] * scale
        x = soft_cap * np.tanh(x / soft_cap)
        lse[b, h, t] = x.max() + np.log(np.exp(x - x.max()).sum())
        y[b, t, h] = np.exp(x - lse[b, h, t]) @ np.asarray(values)
    return y, lse


def test_against_the_oracle(rng, monkeypatch):
    """Lists of the key heads, and chunks that begin and end within blocks."""
    # Two of the three query blocks at a time.
    monkeypatch.setattr(_estimate, "CHUNK_BYTES", 2 * 4 * 2 * 4 * ROWS * 10)
    q, k, v = _inputs(rng)
    lists, offset = _lists(rng, 2), (35, 13)
    options = {"scale": 0.9, "q_offset": jnp.asarray(offset), "soft_cap": 1.5}
    # Slots that are not filled yet may hold anything.
    filled = (np.arange(S) < np.asarray(offset)[:, None] + T)[..., None, None]

    @jax.jit
    def run(q, k, v):
        y, lse = block_sparse_attention(
            q, k, v, lists, return_lse=True, implementation="reference", **options
        )
        k, v = (jnp.where(filled, x, jnp.nan) for x in (k, v))
        return mean_correction(q, k, v, lists, y, lse, **options)

    y, lse = run(q, k, v)
    expected = _oracle(q, k, v, lists, offset, 0.9, 1.5)
    np.testing.assert_allclose(y, expected[0], atol=2e-6)
    np.testing.assert_allclose(lse, expected[1], atol=2e-6)


def test_blocks_of_equal_keys_are_exact_and_others_are_not_overweighed(rng):
    q, k, v = _inputs(rng)
    lists = BlockLists.from_mask(
        jnp.eye(5, dtype=bool)[None, None], block_q=BLOCK, block_k=BLOCK
    )
    whole = BlockLists.from_mask(
        jnp.tril(jnp.ones((5, 5), bool))[None, None], block_q=BLOCK, block_k=BLOCK
    )

    @jax.jit
    def run(k, v):
        sparse, dense = (
            block_sparse_attention(
                q, k, v, x, return_lse=True, implementation="reference"
            )
            for x in (lists, whole)
        )
        return mean_correction(q, k, v, lists, *sparse), sparse, dense

    k, v = k[:, :T], v[:, :T]
    fixed, _, dense = run(*(np.repeat(x[:, ::BLOCK], BLOCK, 1) for x in (k, v)))
    np.testing.assert_allclose(fixed[0], dense[0], atol=2e-6)

    # By Jensen's inequality: between what was read and all there is.
    (_, lse), (_, sparse), (_, dense) = run(k, v)
    assert (lse >= sparse).all() and (lse <= dense + 1e-5).all()
    assert (lse > sparse)[..., BLOCK:].all()


def test_gradients_padding_and_refusals(rng):
    q, k, v = _inputs(rng)
    lists = _lists(rng, 1)
    y = jnp.asarray(rng.standard_normal(q.shape), jnp.float32)
    lse = jnp.asarray(rng.standard_normal((2, 4, T)), jnp.float32)
    lse = lse.at[1, :, 30:].set(-jnp.inf)

    def loss(*x):
        y_new, lse_new = mean_correction(*x[:3], lists, *x[3:], q_offset=35)
        loss = jnp.where(jnp.isfinite(lse_new), lse_new, 0).sum() + (y_new**2).sum()
        return loss, (y_new, lse_new)

    run = jax.jit(jax.value_and_grad(loss, range(5), has_aux=True))
    x = [np.asarray(x, np.float32) for x in (q, k, v, y, lse)]
    (_, (y_new, lse_new)), slope = run(*x)
    np.testing.assert_array_equal(y_new[1, 30:], y[1, 30:])
    assert not jnp.isfinite(lse_new[1, :, 30:]).any()
    for i, g in enumerate(slope):
        assert jnp.isfinite(g).all()
        step = 0.05 * g / jnp.linalg.norm(g)  # where the loss changes most
        ends = [run(*x[:i], x[i] + s * step, *x[i + 1 :])[0][0] for s in (-1, 1)]
        np.testing.assert_allclose(ends[1] - ends[0], 2 * (g * step).sum(), rtol=1e-2)
    with pytest.raises(ValueError, match="y must be"):
        mean_correction(q, k, v, lists, y[:1], lse)
    with pytest.raises(ValueError, match="lists are for"):
        mean_correction(q[:, :8], k, v, lists, y[:, :8], lse[..., :8])
