"""Methods against their published algorithms, away from ties."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax import tokens
from tests.tokens import _oracles
from tests.tokens._data import attention, row

N, ROWS = 36, 8


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(3)
    kinds = ["random", "clustered"] * (ROWS // 2)
    x = np.stack([row(rng, kind, N)[0] for kind in kinds])
    keys = rng.normal(size=(ROWS, N, 6)).astype(np.float32)
    text = rng.normal(size=(ROWS, 5, 16)).astype(np.float32)
    return x, keys, attention(rng, ROWS, N), attention(rng, ROWS, N), text


def same(found, want):
    np.testing.assert_array_equal(found.order, np.asarray(want))


@pytest.mark.parametrize("keep", [1, 11])
def test_divprune(data, keep):
    x = data[0]
    same(tokens.divprune(x, keep=keep), [_oracles.divprune(a, keep) for a in x])


@pytest.mark.parametrize(("keep", "alpha"), [(10, 1.0), (10, 0.5)])
def test_scope(data, keep, alpha):
    x, _, attn = data[:3]
    want = [_oracles.scope(a, b, keep, alpha) for a, b in zip(x, attn, strict=True)]
    same(tokens.scope(x, keep=keep, attn=attn, alpha=alpha), want)


def test_cdpruner(data):
    x, _, _, _, text = data
    near = np.einsum("bnd,bmd->bnm", _oracles.unit(x), _oracles.unit(text))
    relevance = -near.mean(-1)
    found = tokens.cdpruner(x, keep=9, text=text)
    same(found, [_oracles.cdpruner(a, b, 9) for a, b in zip(x, relevance, strict=True)])
    # Importance comes before text, and rows of zeros are no text.
    other = tokens.cdpruner(x, keep=9, importance=relevance, text=text[:, ::-1])
    same(other, found.order)
    padded = np.concatenate([text, np.zeros((ROWS, 3, 16), np.float32)], 1)
    same(tokens.cdpruner(x, keep=9, text=padded), found.order)


@pytest.mark.parametrize("keep", [2, 17])
def test_dart(data, keep):
    x, keys, _, _, text = data
    each = zip(x, keys, text, strict=True)
    want = [_oracles.dart(a, b, keep, 3, c, 2) for a, b, c in each]
    found = tokens.dart(
        x, keep=keep, keys=keys, text=text, image_pivots=3, text_pivots=2
    )
    same(found, want)


def test_dart_without_text(data):
    x = data[0]
    same(tokens.dart(x, keep=9), [_oracles.dart(a, a, 9) for a in x])
    with pytest.raises(ValueError, match="image_pivots, or text"):
        tokens.dart(x, keep=9, image_pivots=0)


@pytest.mark.parametrize(("keep", "alpha"), [(13, 0.1), (13, 1.0), (3, 1.0)])
def test_hiprune(data, keep, alpha):
    _, _, deep, middle, _ = data
    each = list(zip(middle, deep, strict=True))
    found = tokens.hiprune(
        data[0], keep=keep, attn=deep, object_attn=middle, alpha=alpha, width=9
    )
    same(found, [_oracles.hiprune(a, b, keep, alpha, 9) for a, b in each])


def test_hiprune_inside_the_image_is_the_published_one(data):
    _, _, deep, middle, _ = data
    inside = np.zeros((6, 6), np.float32)
    inside[1:-1, 1:-1] = 1
    middle = middle * inside.reshape(-1)
    found = tokens.hiprune(data[0], keep=13, attn=deep, object_attn=middle, alpha=0.4)
    for kept, a, b in zip(found.order, middle, deep, strict=True):
        assert {*kept.tolist()} == _oracles.hiprune_published(a, b, 13, 0.4, 6)


def test_hiprune_of_images_of_different_sizes(data):
    _, _, deep, middle, _ = data
    groups = np.repeat([0, 1], [20, 16])
    y, x = np.divmod(np.arange(20), 5)
    positions = np.concatenate(
        [np.stack([y, x], 1), np.stack(np.divmod(range(16), 4), 1)]
    )
    found = tokens.hiprune(
        data[0][0],
        keep=0.5,
        attn=deep[0],
        object_attn=middle[0],
        positions=positions,
        groups=groups,
        quota="per_group",
        alpha=1.0,
    )
    first = _oracles.hiprune(middle[0, :20], deep[0, :20], 10, 1.0, 5)
    second = _oracles.hiprune(middle[0, 20:], deep[0, 20:], 8, 1.0, 4)
    want = sorted([*first, *(20 + i for i in second)])
    np.testing.assert_array_equal(found.indices[:18], want)


@pytest.mark.parametrize(("keep", "ratio"), [(1, 0.5), (12, 0.5), (12, 1.0)])
def test_vispruner(data, keep, ratio):
    x, _, attn = data[:3]
    found = tokens.vispruner(x, keep=keep, attn=attn, important_ratio=ratio)
    each = zip(x, attn, strict=True)
    same(found, [_oracles.vispruner(a, b, keep, ratio) for a, b in each])


@pytest.mark.parametrize(
    ("keep", "merge"), [(1, "mean"), (13, "mean"), (13, "add"), (N, "mean")]
)
def test_visionzip(data, keep, merge):
    x, keys, attn = data[:3]
    found = tokens.visionzip(x, keep=keep, attn=attn, keys=keys, merge=merge)
    each = zip(x, keys, attn, strict=True)
    want = [_oracles.visionzip(*one, keep, merge=merge) for one in each]
    same(found, [order for order, _ in want])
    np.testing.assert_allclose(found.merged, [rows for _, rows in want], atol=1e-5)
    if keep == 13:
        only = tokens.visionzip(x, keep=keep, attn=attn, keys=keys, merge=None)
        same(only, found.order)
        assert only.merged is None


@pytest.mark.parametrize("keep", [30, 7, 1])
def test_tome(data, keep):
    x = data[0]
    sizes = np.random.default_rng(0).integers(1, 5, (ROWS, N)).astype(np.float32)
    found = tokens.tome(x, keep=keep, sizes=sizes)
    for i in range(ROWS):
        places, rows = _oracles.tome(x[i], keep, sizes[i])
        np.testing.assert_array_equal(found.indices[i], places)
        np.testing.assert_allclose(found.merged[i], rows, atol=2e-5)


def test_tome_keeps_the_weighted_mean(data):
    x = data[0]
    found = tokens.tome(x, keep=1)
    np.testing.assert_allclose(found.merged[:, 0], x.mean(1), atol=1e-5)


def test_prumerge(data):
    x, keys, attn = data[:3]
    found = tokens.prumerge(x, keep=6, attn=attn, keys=keys, neighbours=9)
    want = [
        _oracles.prumerge(a, b, c, 6, 9) for a, b, c in zip(x, keys, attn, strict=True)
    ]
    same(found, [order for order, _ in want])
    np.testing.assert_allclose(found.merged, [rows for _, rows in want], atol=1e-5)


def test_prumerge_counts_outliers(data):
    x, _, attn = data[:3]
    counts = [max(1, _oracles.outliers(a)) for a in attn]
    assert len(set(counts)) > 1
    found = tokens.prumerge(x, keep=20, attn=attn, adaptive=True, neighbours=0)
    np.testing.assert_array_equal(found.count, counts)
    more = tokens.prumerge_plus(x, keep=20, attn=attn, adaptive=True, neighbours=0)
    np.testing.assert_array_equal(more.count, np.minimum(20, 4 * np.array(counts)))


def test_prumerge_plus_spreads_the_others(data):
    x, _, attn = data[:3]
    found = tokens.prumerge_plus(x, keep=12, attn=attn, neighbours=0)
    for order, a in zip(np.asarray(found.order), attn, strict=True):
        heavy = _oracles.top(a, 3)
        rest = [i for i in range(N) if i not in heavy]
        spread = [rest[t * len(rest) // 9] for t in range(9)]
        np.testing.assert_array_equal(order, heavy + spread)


def test_selections_by_score(data):
    x, _, attn, other, _ = data
    want = [_oracles.top(a, 8) for a in attn]
    same(tokens.fastv(x, keep=8, attn=attn), want)
    same(tokens.visionselector(x, keep=8, importance=attn), want)
    heads = np.stack([attn, other], 1)
    mean = [_oracles.top((a + b) / 2, 8) for a, b in zip(attn, other, strict=True)]
    same(tokens.fastv(x, keep=8, attn=heads), mean)


def test_scores_that_are_no_numbers_count_as_the_lowest():
    x, nan = jnp.eye(5), float("nan")
    w = jnp.array([nan, 1.0, -jnp.inf, 2.0, 0.0])
    kept = tokens.visionselector(x, keep=3, importance=w)
    assert kept.order.tolist() == [3, 1, 4]
    # Real tokens all the same: before what is masked, wherever that is.
    there = jnp.array([False, True, True, False, True])
    kept = tokens.visionselector(x, keep=3, importance=w, mask=there)
    assert kept.order.tolist() == [1, 4, 2]
    kept = tokens.idpruner(x, keep=3, importance=w, lam=1.0)
    assert kept.order.tolist()[:2] == [3, 1]
    nothing = tokens.idpruner(x, keep=2, importance=jnp.full(5, nan))
    assert nothing.order.tolist() == [0, 1]


def test_random_draws_by_softmax():
    x, draws = jnp.ones((4000, 3, 1)), jax.random.key(1)
    w = jnp.broadcast_to(jnp.log(jnp.array([6.0, 3.0, 1.0])), (4000, 3))
    found = tokens.visionselector(x, keep=2, importance=w, randomize=True, key=draws)
    first = np.bincount(found.order[:, 0], minlength=3) / 4000
    np.testing.assert_allclose(first, [0.6, 0.3, 0.1], atol=0.03)
    # Without replacement: after 0, 1 is three times as likely as 2.
    second = np.asarray(found.order[:, 1])[np.asarray(found.order[:, 0]) == 0]
    np.testing.assert_allclose((second == 1).mean(), 0.75, atol=0.04)
    plain = tokens.random(x, keep=1, key=draws).order[:, 0]
    np.testing.assert_allclose(np.bincount(plain) / 4000, np.full(3, 1 / 3), atol=0.03)


def test_gradients_flow_through_merged_rows_only(data):
    x, _, attn = data[:3]

    def total(x, attn):
        return jnp.sum(tokens.visionzip(x, keep=5, attn=attn).merged ** 2)

    by_x, by_attn = jax.grad(total, argnums=(0, 1))(x[:1], attn[:1])
    assert np.all(np.any(np.asarray(by_x[0]) != 0, -1)[
        np.asarray(tokens.visionzip(x[:1], keep=5, attn=attn[:1]).mask[0])
    ])  # fmt: skip
    assert not np.any(by_attn)
    weigh = functools.partial(tokens.prumerge, keep=5)
    by_attn = jax.grad(lambda a: weigh(x[:1], attn=a).merged.sum())(attn[:1])
    assert not np.any(by_attn)
    # A member of a mean of m rows has 1 / m of the mean's gradient.
    for method, given in (("visionzip", {"attn": attn[0]}), ("tome", {})):
        one = functools.partial(tokens.prune, keep=1, method=method, **given)
        grad = jax.grad(lambda x, one=one: one(x).merged.sum())(jnp.asarray(x[0]))
        np.testing.assert_allclose(grad, np.full((N, 16), 1 / N), rtol=1e-5)


def test_prumerge_divides_scores_that_are_no_weights(data):
    """What tokens receive from all others adds up to their number, not to 1."""
    x, keys, attn = data[:3]
    one = tokens.prumerge(x, keep=6, attn=attn / attn.sum(-1, keepdims=True), keys=keys)
    many = tokens.prumerge(x, keep=6, attn=256 * attn, keys=keys)
    np.testing.assert_allclose(many.merged, one.merged, rtol=1e-5, atol=1e-5)
