"""`sparse_attention`: selection and kernel together, and when it is dense instead."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.attention import Place, SparseAttention, sparse_attention
from angeljax.attention.sparse import thresholds, worthwhile
from pallas_kernels import BlockLists
from tests.attention._selectors import Means, attention

SPARSE = Means()
LONG = 8.0
ALL = Means(keep=0)
ON = {"dense_below": 0, "dense_above": 1.0, "implementation": "reference"}


def arrays(t=80, s=None, batch=2, heads=2, kv_heads=1, dim=8, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = (batch, t, heads, dim), *[(batch, s or t, kv_heads, dim)] * 2
    return [(rng.normal(size=x) * 1.5).astype(dtype) for x in shapes]


def run(q, k, v, chosen=SPARSE, **options):
    """Compiled: one operation at a time takes longer than all together."""
    call = functools.partial(sparse_attention, selector=chosen, **ON | options)
    return jax.device_get(jax.jit(call)(q, k, v))


@functools.cache
def plain():
    """`run` of the arrays of most tests, with logsumexp."""
    return run(*arrays(), return_lse=True)


def selected(q, k, v, **place):
    """bool `[B, H, num_q_blocks, num_k_blocks]`."""
    blocks = -(-k.shape[1] // SPARSE.block_size)
    select = lambda *x: SPARSE.select(*x, Place(**place)).to_mask(blocks)  # noqa: E731
    return np.asarray(jax.jit(select)(q, k, v))


def test_it_is_attention_on_the_blocks_that_were_selected():
    q, k, v = arrays()
    got, _ = plain()
    blocks = selected(q, k, v)
    assert 0 < blocks.sum() < np.tril(np.ones((5, 5))).sum() * 4
    want = [attention(q[b], k[b], v[b], blocks[b], 16) for b in range(2)]
    np.testing.assert_allclose(got, np.stack(want), atol=1e-5)


def test_fp8_rounds_what_is_attended_to_and_not_what_selects():
    q, k, v = arrays(dim=32)
    got, lse = run(q, k, v, kv_dtype="float8_e4m3fn", return_lse=True)
    want, want_lse = run(q, k, v, return_lse=True)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 0.01 < error < 0.08
    np.testing.assert_allclose(lse, want_lse, atol=0.5)
    with pytest.raises(ValueError, match="kv_dtype must be None or 'float8_e4m3fn'"):
        SparseAttention(SPARSE, kv_dtype="int8")


def test_every_block_is_dense_attention_and_so_are_its_gradients():
    q, k, v = arrays(t=40)
    weight = np.cos(np.arange(q.size).reshape(q.shape))

    def sparse(*args):
        return sparse_attention(*args, ALL, scale=0.5, **ON)

    def dense(*args):
        return jax.nn.dot_product_attention(*args, is_causal=True, scale=0.5)

    def value_and_grads(fn):
        loss = lambda *args: (jnp.sum(weight * (y := fn(*args))), y)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    (_, got), grads = value_and_grads(sparse)
    (_, want), expected = value_and_grads(dense)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for got, want in zip(grads, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("offset", [32, 37])
def test_a_chunk_is_the_end_of_the_whole(offset):
    """On the grid of blocks, and off it, where the first block has fewer queries."""
    q, k, v = arrays()
    got = run(q[:, offset:], k, v, q_offset=offset, return_lse=True)
    if offset == 32:
        want = plain()
        np.testing.assert_allclose(got[0], want[0][:, offset:], atol=1e-6)
        np.testing.assert_allclose(got[1], want[1][..., offset:], atol=1e-6)
    filled = np.concatenate([q[:, offset : offset + 1]] * 5 + [q[:, offset:]], axis=1)
    first = filled if offset == 37 else q[:, 32:]
    blocks = selected(first, k, v, q_offset=32)
    want = [attention(q[b, offset:], k[b], v[b], blocks[b], 16, offset) for b in (0, 1)]
    np.testing.assert_allclose(got[0], np.stack(want), atol=1e-5)


def test_padding_on_the_right_gives_zeros():
    q, k, v = arrays()
    lengths = np.asarray([80, 50])
    got = run(q, k, v, lengths=lengths)
    alone = run(q[1:, :50], k[1:, :50], v[1:, :50])
    np.testing.assert_allclose(got[1:, :48], alone[:, :48], atol=1e-6)
    assert not got[1, 50:].any() and got[0, 50:].all()
    dense = run(q, k, v, lengths=lengths, dense_below=81, implementation=None)
    want = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(dense[1, :50], want[1, :50], atol=1e-6)
    assert not dense[1, 50:].any()


def test_it_is_dense_where_sparsity_gains_nothing():
    q, k, v = arrays()
    dense = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    assert np.abs(plain()[0] - dense).max() > 0.1
    full = dataclasses.replace(SPARSE, says=0.95)
    for got in (
        run(q, k, v, dense_below=81, implementation=None),
        run(q, k, v, full, dense_above=0.93, implementation=None),
        # With an offset the kernel does it, and with logsumexp.
        run(q, k, v, full, dense_above=0.9, q_offset=np.asarray([0, 0])),
        run(q, k, v, full, dense_above=0.9, return_lse=True)[0],
    ):
        np.testing.assert_allclose(got, dense, atol=1e-5)
    assert worthwhile(full, 10**6, 1, dense_above=0.95) == [True]
    assert worthwhile(full, 10**6, 1) == [False]
    limits = thresholds()
    assert worthwhile(SPARSE, limits.dense_below - 1, 3) == [False] * 3
    assert worthwhile(SPARSE, limits.dense_below, 3) == [True] * 3


def test_a_traced_layer_takes_the_branch_of_its_number():
    @dataclasses.dataclass(frozen=True)
    class FirstDense(Means):
        def density(self, total, *, layer=0, num_layers=1):
            return 1.0 if layer == 0 else 0.3

    q, k, v = arrays()
    mixed = jax.jit(
        lambda layer: sparse_attention(
            q, k, v, FirstDense(), layer=layer, num_layers=2,
            **ON | {"dense_above": 0.9},
        )
    )  # fmt: skip
    dense = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(mixed(0), dense, atol=1e-5)
    np.testing.assert_allclose(mixed(1), plain()[0], atol=1e-5)


def test_a_selector_sees_queries_of_the_usual_scale():
    """Doubling the scale is doubling the queries, for what is selected too."""

    @dataclasses.dataclass(frozen=True)
    class Sized(Means):
        """Keeps three blocks where queries are long, else two."""

        def select(self, q, k, v, place):
            few = super().select(q, k, v, place).to_mask(5)
            more = dataclasses.replace(SPARSE, keep=3).select(q, k, v, place).to_mask(5)
            mask = jnp.where(jnp.abs(q).max() > LONG, more, few)
            return BlockLists.from_mask(mask, block_q=16, block_k=16)

    q, k, v = arrays()
    got = run(q, k, v, Sized(), scale=2 * 8**-0.5)
    np.testing.assert_allclose(got, run(2 * q, k, v, Sized()), atol=1e-5)
    assert np.abs(q).max() < LONG < np.abs(2 * q).max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selector": "stem"}, "a str has not: use angeljax.attention.selector"),
        ({"total": 0}, "total must be at least 1"),
        ({"dense_above": 3.0}, "dense_above must be a share"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"q": jnp.ones((80, 2, 8))}, r"must be \[B, T, heads, D\], not \[80, 2, 8\]"),
        ({"k": jnp.ones((2, 80, 3, 8))}, "must be alike"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    q, k, v = arrays()
    given = {"q": q, "k": k, "v": v, "selector": SPARSE, **ON} | change
    with pytest.raises(ValueError, match=message):
        sparse_attention(**given)
