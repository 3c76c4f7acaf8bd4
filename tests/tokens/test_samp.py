"""`samp` and its grouping against loops in numpy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.tokens import AttentionWeights, group_adjacent, keep_count, samp
from tests.tokens import _audio_oracles as oracle
from tests.tokens._sounds import D, N, clips, compare

NUMBER = 40
X, RECEIVED, ITSELF, MASK = clips(NUMBER)
LENGTHS = MASK.sum(1)
ATTN = AttentionWeights(received=jnp.asarray(RECEIVED), diagonal=jnp.asarray(ITSELF))


@functools.partial(jax.jit, static_argnames=("keep", "options"))
def run(x, attn, mask, threshold, *, keep=0.5, options=()):
    return samp(
        x, keep=keep, attn=attn, mask=mask, threshold=threshold, **dict(options)
    )


def budget(length, keep=0.5):
    return keep_count(int(length), keep)


# All tokens one group, some, and every token its own.
THRESHOLDS = (-1.0, 0.3, 0.6, 0.85, 1.0)


@pytest.mark.parametrize(
    "options",
    [(), (("self_similarity", True),), (("pruner", "mmr"),)],
    ids=["dpp", "self", "mmr"],
)
def test_like_the_loops(options):
    kinds, compared = set(), 0
    told = {"self_similarity": "with_self"}
    for threshold in THRESHOLDS:
        got = run(X, ATTN, MASK, threshold, options=options)
        for b in range(NUMBER):
            n = LENGTHS[b]
            x = X[b, :n].astype(float)
            groups = len(oracle.group(x, threshold)[0])
            kinds.add(np.sign(groups - budget(n)))
            kwargs = {told.get(k, k): v for k, v in options}
            want = oracle.samp(
                x, RECEIVED[b], ITSELF[b], budget(n), threshold, **kwargs
            )
            compared += compare(got, b, want)
            assert int(got.count[b]) == budget(n)
    assert kinds == {-1, 0, 1}  # merging left too many, just enough and too few
    assert compared > 190  # of 200; the others had decisions within rounding


@pytest.mark.parametrize("threshold", [-0.5, 0.5, 0.85])
def test_forms_of_grouping_agree(threshold):
    both = [
        jax.jit(functools.partial(group_adjacent, form=form))(
            X, threshold=threshold, mask=MASK
        )
        for form in ("parallel", "scan")
    ]
    for b in range(NUMBER):
        x = X[b, : LENGTHS[b]].astype(float)
        groups, scores, margin = oracle.group(x, threshold)
        if margin < 1e-5:
            continue
        first = np.full(N, N)
        for g in groups:
            first[g] = g[0]
        for got in both:
            np.testing.assert_array_equal(got.first[b], first)
            assert int(got.count[b]) == len(groups)
            want = [scores.get(i, np.inf) for i in range(N)]
            np.testing.assert_allclose(got.scores[b], want, rtol=1e-5, atol=1e-6)


def test_long_clips_are_not_compared_all_with_all():
    x = jax.ShapeDtypeStruct((1, 4097, 8), jnp.float32)
    jaxpr = str(jax.make_jaxpr(group_adjacent)(x))
    assert "scan[" in jaxpr and "4097,4097" not in jaxpr


def test_every_choice_of_the_dpp_has_the_largest_determinant(rng):
    n, count = 10, 6
    x = rng.normal(size=(8, n, D)).astype(np.float32)
    itself = rng.uniform(0.3, 1, size=(8, n)).astype(np.float32)
    got = samp(x, keep=count, importance=itself, threshold=1.0)
    for b in range(8):
        unit = x[b] / np.linalg.norm(x[b], axis=1, keepdims=True)
        kernel = itself[b][:, None] * (unit @ unit.T).astype(float) * itself[b]
        chosen = []
        for pick in np.asarray(got.order[b]):
            rest = [i for i in range(n) if i not in chosen]
            places = [np.ix_([*chosen, i], [*chosen, i]) for i in rest]
            volumes = [np.linalg.slogdet(kernel[at])[1] for at in places]
            assert pick == rest[int(np.argmax(volumes))]
            chosen.append(pick)
        sets = itertools.combinations(range(n), count)
        best = max(np.linalg.slogdet(kernel[np.ix_(s, s)])[1] for s in sets)
        assert best - np.linalg.slogdet(kernel[np.ix_(chosen, chosen)])[1] < 1.5


def test_repeated_tokens_are_kept_once_each():
    """A rank below the budget: the original runs into NaN and repeats tokens."""
    x = jnp.tile(jnp.eye(3, D), (8, 1))[None]  # 24 tokens, 3 directions
    got = samp(x, keep=12, weights="uniform", threshold=0.99)
    assert len(set(got.indices[0].tolist())) == 12
    assert np.isfinite(got.merged).all()
    one = samp(jnp.ones((1, N, D)), keep=12, weights="uniform")  # 1 group
    # All joined equally well: the first that may leave, leave.
    assert one.indices[0].tolist() == list(range(12))
    np.testing.assert_allclose(one.merged, 1, rtol=1e-6)


def test_tokens_may_stand_anywhere(rng):
    places = np.sort(rng.permutation(N)[:15])
    x = np.full((1, N, D), np.nan, np.float32)
    mask = np.zeros((1, N), bool)
    attn = [np.full((1, N), np.nan, np.float32) for _ in range(2)]
    x[0, places], mask[0, places] = X[2, :15], True
    attn[0][0, places], attn[1][0, places] = RECEIVED[2, :15], ITSELF[2, :15]
    got = run(x, tuple(attn), mask, 0.6)
    want = oracle.samp(X[2, :15].astype(float), RECEIVED[2], ITSELF[2], budget(15), 0.6)
    assert compare(got, 0, want, places=places)
    assert not (np.asarray(got.mask) & ~mask).any()


def test_nothing_to_do_is_the_identity():
    got = samp(X, keep=1.0, attn=ATTN, mask=MASK)
    np.testing.assert_array_equal(got.mask, MASK)
    np.testing.assert_array_equal(got.merged, np.where(MASK[..., None], X, 0))


def test_without_a_batch_and_under_vmap():
    got = samp(X[0], keep=0.5, attn=jax.tree.map(lambda x: x[0], ATTN))
    batched = samp(X[:1], keep=0.5, attn=jax.tree.map(lambda x: x[:1], ATTN))
    assert got.merged.shape == (N // 2, D)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[0]), got, batched)
    alone = functools.partial(samp, keep=0.5, weights="uniform", threshold=0.6)
    mapped = jax.vmap(lambda x, m: alone(x, mask=m))(X[:4], MASK[:4])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        mapped,
        alone(X[:4], mask=MASK[:4]),
    )


def test_attention_of_all_heads_and_other_weights(rng):
    attn = jax.nn.softmax(rng.normal(size=(2, 3, 2 * N, 2 * N)), axis=-1)
    x, mask = X[:2], MASK[:2]
    pooled = [oracle.pool(np.asarray(attn[b]), 2, LENGTHS[b], "max") for b in range(2)]
    received, itself = (np.stack(w) for w in zip(*pooled, strict=True))
    want = samp(x, keep=0.5, attn=(received, itself), mask=mask)
    got = samp(x, keep=0.5, attn=attn, mask=mask, relevance="max")
    np.testing.assert_array_equal(got.indices, want.indices)
    np.testing.assert_allclose(got.merged, want.merged, rtol=1e-5, atol=1e-6)
    # Importance takes the place of the diagonal, and of both without attention.
    both = samp(x, keep=0.5, importance=ITSELF[:2], mask=mask)
    pair = samp(x, keep=0.5, attn=(ITSELF[:2], ITSELF[:2]), mask=mask)
    np.testing.assert_array_equal(both.merged, pair.merged)
    over = samp(x, keep=0.5, attn=ATTN_2, importance=ITSELF[:2], mask=mask)
    pair = samp(x, keep=0.5, attn=(RECEIVED[:2], ITSELF[:2]), mask=mask)
    np.testing.assert_array_equal(over.merged, pair.merged)


ATTN_2 = RECEIVED[:2], np.ones_like(ITSELF[:2])


def test_clip_by_clip_and_a_threshold_for_each():
    # Two clips in a row of tokens, each with its own share.
    half = N // 2
    groups = np.repeat([0, 1], half)
    both = samp(
        X[0],
        keep=0.5,
        attn=(RECEIVED[0], ITSELF[0]),
        threshold=0.6,
        groups=groups,
        quota="per_group",
    )
    parts = [x[0].reshape(2, half, *x.shape[2:]) for x in (X, RECEIVED, ITSELF)]
    alone = samp(parts[0], keep=0.5, attn=(parts[1], parts[2]), threshold=0.6)
    assert int(both.count) == half
    np.testing.assert_allclose(
        both.merged[:half], alone.merged.reshape(half, D), rtol=1e-5
    )
    each = jnp.where(jnp.arange(NUMBER) < 20, 0.6, 0.85)
    mixed = run(X, ATTN, MASK, each)
    for threshold, rows in ((0.6, slice(0, 20)), (0.85, slice(20, None))):
        got = run(X, ATTN, MASK, threshold)
        np.testing.assert_array_equal(mixed.indices[rows], got.indices[rows])


def test_gradients_and_dtypes():
    def loss(x):
        chosen = samp(x, keep=0.5, attn=ATTN, mask=MASK, threshold=0.6)
        return jnp.sum(chosen.merged**2)

    gradient = jax.grad(loss)(jnp.asarray(X))
    assert np.isfinite(gradient).all() and np.abs(gradient).sum() > 0
    assert not gradient[~MASK].any()
    half = samp(X.astype(jnp.bfloat16), keep=0.5, attn=ATTN, mask=MASK)
    assert half.merged.dtype == jnp.bfloat16
    shapes = jax.eval_shape(functools.partial(samp, keep=0.5, attn=ATTN), X)
    assert shapes.merged.shape == (NUMBER, N // 2, D)


def test_roundings_of_a_share():
    x = np.ones((4, 7, 2), np.float32)
    mask = np.arange(7) < np.array([[7], [3], [1], [0]])
    count = lambda **o: samp(x, mask=mask, weights="uniform", **o).count.tolist()  # noqa: E731
    assert count(keep=0.5) == [4, 2, 1, 0]  # 3.5, 1.5, 0.5 to the even one, 1 at least
    assert count(keep=0.5, rounding="floor", least=2) == [3, 2, 1, 0]
    assert count(keep=3) == [3, 3, 1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs attn"),
        ({"attn": ATTN, "threshold": 1.5}, "threshold=1.5"),
        ({"attn": ATTN, "pruner": "topk"}, "pruner must be .* not 'topk'"),
        ({"attn": ATTN, "pruner": None}, "pruner must be .* not None"),
        ({"attn": ATTN, "rounding": "up"}, "rounding must be .* not 'up'"),
        ({"attn": ATTN, "relevance": "sum"}, "relevance must be .* not 'sum'"),
        ({"attn": ATTN, "least": 0}, "least must be"),
        ({"attn": ATTN, "weights": "plain"}, "weights must be .* not 'plain'"),
        ({"attn": ATTN, "grouping": "tree"}, "form='tree'"),
        ({"attn": ATTN, "treshold": 0.5}, "did you mean threshold"),
        ({"attn": np.ones((NUMBER, 2, N, N + 1))}, "attn must be"),
        ({"attn": (RECEIVED[:, 1:], ITSELF)}, "attn must be"),
        ({"attn": (RECEIVED, ITSELF[:, 1:])}, "diagonal must be"),
        ({"importance": ITSELF[:3]}, "importance must be"),
        ({"attn": ATTN, "mask": MASK[:, 1:]}, "mask must be"),
        ({"attn": ATTN, "keep": N + 1}, "keep=25"),
        (
            {"attn": ATTN, "groups": np.zeros((NUMBER, N), int), "least": 2}
            | {"quota": "proportional"},
            "rounding and least",
        ),
    ],
)
def test_says_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        samp(X, **{"keep": 0.5, **options})
