"""`idpruner` against the published algorithm, and what follows from its formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.tokens import distinctiveness, idpruner, keep_count, soft_top_k
from tests.tokens import _oracles
from tests.tokens._data import KINDS, row

# Tokens, share that goes, options, rows of each kind.
CASES = [
    (1, 0.9, {}, 2),
    (2, 0.5, {}, 4),
    (7, 0.0, {}, 6),
    (10, 0.75, {}, 6),
    (23, 0.6, {}, 8),
    (36, 0.75, {"lam": 0.0}, 6),
    (36, 0.75, {"lam": 1.0}, 4),
    (36, 0.75, {"parallel": 4}, 6),
]
assert sum(len(KINDS) * case[-1] for case in CASES) > 200


@pytest.mark.parametrize(("n", "drop", "options", "each"), CASES)
def test_picks_of_the_published_algorithm(rng, n, drop, options, each):
    rows = [row(rng, kind, n) for kind in KINDS for _ in range(each)]
    x, w = (np.stack(part) for part in zip(*rows, strict=True))
    keep = keep_count(n, drop_ratio=drop)
    assert keep == _oracles.keep_of(drop, n)
    found = idpruner(x, keep=keep, importance=w, **options)
    for i, (embeds, importance) in enumerate(rows):
        want = _oracles.idpruner(embeds, importance, keep, **options)
        np.testing.assert_array_equal(found.order[i], want, f"row {i}")


def test_uneven_lambda(rng):
    rows = [row(rng, kind, 36) for kind in ("random", "clustered") for _ in range(9)]
    x, w = (np.stack(part) for part in zip(*rows, strict=True))
    found = idpruner(x, keep=12, importance=w, lam=0.3)
    want = [_oracles.idpruner(a, b, 12, lam=0.3) for a, b in rows]
    np.testing.assert_array_equal(found.order, want)


def test_scale_of_importance_and_embeddings_does_not_matter(rng):
    x, w = row(rng, "random", 24)
    found = idpruner(x, keep=8, importance=w)
    sizes = rng.uniform(0.1, 9, (24, 1))
    other = idpruner(x * sizes.astype(np.float32), keep=8, importance=7 * w - 3)
    np.testing.assert_array_equal(found.order, other.order)


def test_transform_is_difftopk_of_a_fifth(rng):
    x, w = row(rng, "clustered", 30)
    soft = soft_top_k(jnp.asarray(3 * w), 0.2 * 30)
    found = idpruner(x, keep=9, importance=3 * w, importance_transform="soft_topk")
    np.testing.assert_array_equal(
        found.order, _oracles.idpruner(x, np.asarray(soft), 9)
    )


def test_centring_and_distinctiveness(rng):
    x, w = row(rng, "clustered", 30)
    found = idpruner(x, keep=9, importance=w, center=True)
    np.testing.assert_array_equal(found.order, _oracles.idpruner(x - x.mean(0), w, 9))

    far = np.array([1 - np.mean(_oracles.unit(x) @ u) for u in _oracles.unit(x)])
    np.testing.assert_allclose(distinctiveness(x), far, atol=1e-6)
    found = idpruner(x, keep=9, importance=w, center=True, distinctiveness=True)
    both = sum((s - s.min()) / (np.ptp(s) + 1e-6) for s in (w, far)) / 2
    want = _oracles.idpruner(x - x.mean(0), both.astype(np.float32), 9)
    np.testing.assert_array_equal(found.order, want)


def test_a_row_ends_where_scores_fall_below_the_threshold(rng):
    x, w = row(rng, "random", 30)
    full = _oracles.idpruner(x, w, 20)
    v = (w - w.min()) / (np.ptp(w) + 1e-6)
    sim = _oracles.unit(x) @ _oracles.unit(x).T
    scores = [
        0.5 * v[i] - 0.5 * sim[i, full[:t]].max() for t, i in enumerate(full) if t
    ]
    assert np.all(np.diff(scores) <= 1e-6)
    threshold = float(scores[7] + scores[8]) / 2
    found = jax.jit(
        lambda x: idpruner(x, keep=20, importance=w, stop_threshold=threshold)
    )(x)
    assert found.count == 9 and found.indices.shape == (20,)
    np.testing.assert_array_equal(found.order[:9], full[:9])
    # The first choice always stays.
    assert idpruner(x, keep=20, importance=w, stop_threshold=9.0).count == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [("lam", 1.5), ("lam", True), ("lam", float("nan")), ("importance_transform", "x")],
)
def test_options_out_of_range(option, value):
    with pytest.raises(ValueError, match=option):
        idpruner(jnp.ones((4, 2)), keep=2, **{option: value})
