"""What every method promises."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax import tokens
from angeljax.tokens import Selection, methods, prune
from tests.tokens._data import attention

B, N, D, K = 5, 20, 8, 6
# What a method needs or takes of: importance, attn, text, key.
GREEDY = "idpruner", "scope", "cdpruner", "divprune"
PREFIX = (*GREEDY, "random")
MERGES_ADJACENT = "samp", "atome", "fastadasp"
MERGES = "visionzip", "tome", "prumerge", "prumerge_plus", *MERGES_ADJACENT
# These look at the place of a token in its row.
BY_PLACE = "uniform", "random", "hiprune", "vispruner", *MERGES


def inputs() -> dict[str, Any]:
    """Five rows: full, with holes, three tokens, none, and all alike."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, N, D)).astype(np.float32)
    mask = np.ones((B, N), bool)
    mask[1, rng.permutation(N)[:7]] = False
    mask[2] = np.arange(N) % 8 == 3
    mask[3] = False
    x[4] = 1.5
    x[1, 4] = 0
    w = rng.normal(size=(B, N)).astype(np.float32)
    w[4] = 0.25
    return dict(
        embeds=x,
        mask=mask,
        importance=w,
        attn=attention(rng, B, 2, N),
        text=rng.normal(size=(B, 3, D)).astype(np.float32),
        key=jax.random.split(jax.random.key(0), B),
    )


def take(given: dict[str, Any], rows: Any) -> dict[str, Any]:
    return {name: value[rows] for name, value in given.items()}


def same(a: Selection, b: Selection) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("method", methods())
def test_contract(method):
    given = inputs()
    x, mask = given["embeds"], given["mask"]
    real = mask.sum(-1)
    found = prune(**given, keep=K, method=method)

    # K tokens, or all that there are; ascending, then unused slots.
    assert isinstance(found, Selection) and found.indices.shape == (B, K)
    assert found.indices.dtype == found.order.dtype == jnp.int32
    np.testing.assert_array_equal(found.count, np.minimum(real, K))
    for row in range(B):
        used = int(found.count[row])
        kept, order = np.asarray(found.indices[row]), np.asarray(found.order[row])
        assert np.all(np.diff(kept[:used]) > 0) and np.all(kept[used:] == N)
        assert np.all(order[used:] == N)
        np.testing.assert_array_equal(np.sort(order), kept)
        np.testing.assert_array_equal(np.flatnonzero(found.mask[row]), kept[:used])
        assert np.all(mask[row, kept[:used]])

    # Merged rows: there are some if the method merges, and none in unused slots.
    assert (found.merged is not None) == (method in MERGES)
    if found.merged is not None:
        assert found.merged.shape == (B, K, D) and found.merged.dtype == x.dtype
        assert np.all(np.isfinite(found.merged))
        assert not np.any(np.asarray(found.merged)[~np.asarray(found.used)])

    # jit is eager, and each row of a batch is itself alone.
    same(jax.jit(lambda given: prune(**given, keep=K, method=method))(given), found)
    for row in range(B):
        alone = prune(**take(given, row), keep=K, method=method)
        batched = jax.tree.map(lambda x, row=row: x[row], found)
        np.testing.assert_array_equal(alone.order, batched.order)
        if found.merged is not None:
            np.testing.assert_allclose(alone.merged, batched.merged, atol=1e-6)

    # bfloat16 is what it is in float32, and merged rows have the dtype of embeds.
    rough = given | {"embeds": jnp.asarray(x, jnp.bfloat16)}
    exact = given | {"embeds": rough["embeds"].astype(jnp.float32)}
    low = prune(**rough, keep=K, method=method)
    same_order = prune(**exact, keep=K, method=method)
    np.testing.assert_array_equal(low.order, same_order.order)
    assert low.merged is None or low.merged.dtype == jnp.bfloat16

    # What is masked does not matter.
    junk = given | {
        name: np.where(mask.reshape(B, *(1,) * (v.ndim - 2), N), v, 1e3)
        for name, v in given.items()
        if name in ("importance", "attn")
    }
    junk["embeds"] = np.where(mask[..., None], x, 1e3).astype(np.float32)
    np.testing.assert_array_equal(
        prune(**junk, keep=K, method=method).order, found.order
    )

    # A share is of the real tokens of each row.
    shares = jax.eval_shape(
        lambda given: prune(**given, keep=0.3, method=method), given
    )
    assert shares.indices.shape == (B, K) and shares.mask.shape == (B, N)

    # Tokens in another order are the same tokens (away from ties, as in row 0).
    if method not in BY_PLACE:
        shift = np.random.default_rng(1).permutation(N)
        moved = {k: np.array(v) for k, v in given.items() if k not in ("key", "text")}
        for name, value in moved.items():
            axis = 0 if name == "embeds" else -1
            value[0] = np.take(value[0], shift, axis=axis)
        other = prune(**(given | moved), keep=K, method=method)
        np.testing.assert_array_equal(shift[other.order[0]], found.order[0])


@pytest.mark.parametrize("method", PREFIX)
def test_every_prefix_is_the_choice_of_fewer(method):
    given = inputs()
    found = prune(**given, keep=K, method=method)
    same(found.truncate(2), prune(**given, keep=2, method=method))


def test_shares_of_rows_with_padding():
    given = inputs()
    found = prune(**given, keep=0.3, method="uniform")
    wanted = [tokens.keep_count(int(n), 0.3) for n in given["mask"].sum(-1)]
    np.testing.assert_array_equal(found.count, wanted)


def test_vmap_is_a_batch():
    given = inputs()
    for method in ("idpruner", "vispruner"):
        mapped = jax.vmap(lambda g, method=method: prune(**g, keep=K, method=method))
        same(mapped(given), prune(**given, keep=K, method=method))


def test_each_method_is_a_function():
    given = take(inputs(), 0)
    for method in methods():
        function = getattr(tokens, method)
        assert function.__name__ == method and "Returns:" in function.__doc__
    same(tokens.fastv(**given, keep=4), prune(**given, keep=4, method="fastv"))


X = jnp.ones((2, 6, 4))
W = jnp.ones((2, 6))
ERRORS = {
    "unknown method": (dict(method="idprune"), "unknown method 'idprune'.*idpruner"),
    "unknown option": (dict(lamda=1), "no option 'lamda': did you mean lam"),
    "no options": (dict(method="fastv", attn=W, alpha=1), "its options: none"),
    "array for an option": (dict(lam=jnp.ones(())), "lam must be a plain value"),
    "list for an option": (dict(lam=[1]), "lam must be a plain value"),
    "attention": (dict(method="scope"), "scope needs attn.*received_attention"),
    "text": (dict(method="cdpruner"), "cdpruner needs text"),
    "score": (dict(method="visionselector"), "visionselector needs importance"),
    "key": (dict(method="random"), "random needs key.*jax.random.key"),
    "old key": (dict(method="random", key=jnp.zeros(2)), "made by jax.random.key"),
    "more than N": (dict(keep=7), "keep=7"),
    "nothing": (dict(keep=0), "keep=0"),
    "NaN": (dict(keep=float("nan")), "keep=nan"),
    "boolean": (dict(keep=True), "keep=True"),
    "integers": (dict(embeds=X.astype(int)), "embeds must be floating-point"),
    "one axis": (dict(embeds=X[0, 0]), "embeds must be floating-point"),
    "no tokens": (dict(embeds=X[:, :0]), "embeds has no tokens"),
    "importance": (dict(importance=W[0]), r"importance must be .*\[2, 6\].*\[6\]"),
    "mask of numbers": (dict(mask=W), "mask must be bool"),
    "attn": (dict(attn=jnp.ones((2, 3, 5))), r"attn must be .*\[2, 3, 6\]"),
    "text width": (dict(text=jnp.ones((2, 3, 5))), r"text must be .*\[2, 3, 4\]"),
    "quota": (dict(quota="each"), "quota must be one of 'global'"),
    "no groups": (dict(quota="per_group"), "needs groups"),
    "groups": (dict(groups=W, num_groups=2), "groups must be integers"),
    "num_groups": (dict(groups=W.astype(int), quota="per_group"), "num_groups must be"),
    "too few": (
        dict(groups=W.astype(int), num_groups=2, group_keep=2),
        "group_keep=2 of 2 groups is more than the 3 tokens",
    ),
    "minimum of each": (
        dict(groups=W.astype(int), num_groups=2, group_keep=1, quota="per_group"),
        "group_keep is for",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    given, message = ERRORS[case]
    with pytest.raises(ValueError, match=message) as caught:
        prune(**({"embeds": X, "keep": 3} | given))
    assert "\n" not in str(caught.value)
