"""Budgets shared out among images, frames and clips."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.tokens import keep_count, prune
from angeljax.tokens._quota import apportion
from tests.tokens import _oracles
from tests.tokens._data import attention, row

D = 16
# Tokens of three groups in a row, mixed up, and one of no group.
GROUPS = np.stack(
    [
        np.random.default_rng(i).permutation(np.repeat([0, 1, 2, -1], sizes))
        for i, sizes in enumerate([(9, 9, 1, 1), (1, 9, 9, 1)])
    ]
)
B, N = GROUPS.shape


def inputs():
    rng = np.random.default_rng(5)
    x = np.stack([row(rng, "random", N, D)[0] for _ in range(B)])
    w = rng.normal(size=(B, N)).astype(np.float32)
    return dict(embeds=x, importance=w, attn=attention(rng, B, N))


@pytest.mark.parametrize(
    ("method", "keep"),
    [("idpruner", 0.4), ("vispruner", 0.4), ("visionzip", 0.4), ("tome", 3)],
)
def test_per_group_is_every_group_alone(method, keep):
    given = inputs()
    quota = dict(groups=GROUPS, quota="per_group")
    found = prune(**given, **quota, keep=keep, method=method)
    for b in range(B):
        want, rows = [], []
        for g in range(3):
            members = np.flatnonzero(GROUPS[b] == g)
            one = {name: value[b][members] for name, value in given.items()}
            number = min(keep, len(members)) if isinstance(keep, int) else keep
            alone = prune(**one, keep=number, method=method)
            want += members[np.asarray(alone.indices)].tolist()
            if alone.merged is not None:
                rows += list(np.asarray(alone.merged))
        used = int(found.count[b])
        assert used == len(want)
        np.testing.assert_array_equal(found.indices[b, :used], sorted(want))
        if rows:
            rows = np.stack(rows)[np.argsort(want)]
            np.testing.assert_allclose(found.merged[b, :used], rows, atol=1e-5)


def test_per_group_of_traced_groups():
    given = inputs()
    want = prune(**given, groups=GROUPS, quota="per_group", keep=0.4)

    @jax.jit
    def choose(groups):
        return prune(**given, groups=groups, quota="per_group", keep=0.4, num_groups=3)

    found = choose(jnp.asarray(GROUPS))
    np.testing.assert_array_equal(found.mask, want.mask)
    np.testing.assert_array_equal(found.count, want.count)
    # The first choices of all groups come before the second ones.
    first = GROUPS[0][np.asarray(found.order[0, :3])]
    assert {*first.tolist()} == {0, 1, 2}


def test_rounding_of_many_small_groups_fits():
    groups = np.repeat(np.arange(7), 2)
    found = prune(jnp.ones((14, 2)), keep=0.1, groups=groups, quota="per_group")
    assert found.count == 7 and np.all(np.diff(found.indices) == 2)


def test_random_groups_draw_apart():
    x, groups = jnp.ones((24, 2)), np.repeat([0, 1, 2], 8)
    given = dict(keep=4, method="random", groups=groups, quota="per_group")
    found = prune(x, key=jax.random.key(0), **given)
    assert found.count == 12
    drawn = {tuple(np.asarray(found.indices)[i * 4 : i * 4 + 4] % 8) for i in range(3)}
    assert len(drawn) > 1


def test_proportional_shares_follow_importance():
    given = inputs()
    w = given["attn"]
    found = prune(**given, groups=GROUPS, quota="proportional", keep=0.5)
    for b in range(B):
        real = GROUPS[b] >= 0
        total = keep_count(int(real.sum()), 0.5)
        assert found.count[b] == total
        score = (w[b] - w[b][real].min()) / (np.ptp(w[b][real]) + 1e-6)
        sizes = np.array([(GROUPS[b] == g).sum() for g in range(3)])
        weight = np.array([score[GROUPS[b] == g].sum() for g in range(3)])
        want = _oracles.shares(total, weight + 1e-6 * sizes, sizes, 1)
        kept = GROUPS[b][np.asarray(found.mask[b])]
        np.testing.assert_array_equal(np.bincount(kept, minlength=3), want)
        for g in range(3):  # each group's own choice of so many
            members = np.flatnonzero(GROUPS[b] == g)
            alone = _oracles.idpruner(
                given["embeds"][b][members], given["importance"][b][members], want[g]
            )
            np.testing.assert_array_equal(
                np.flatnonzero(found.mask[b] & (GROUPS[b] == g)),
                np.sort(members[alone]),
            )


def test_apportion():
    rng = np.random.default_rng(0)
    split = jax.jit(jax.vmap(apportion, in_axes=(0, 0, 0, None)), static_argnums=3)
    size = rng.integers(0, 12, (300, 6))
    size[:, 0] = 12
    weight = rng.uniform(0, 1, (300, 6)) ** 4 * size + 1e-6 * size
    count = rng.integers(6, size.sum(1) + 1)
    for least in (1, 2):
        count = np.maximum(count, np.minimum(size, least).sum(1))
        args = jnp.asarray(count), jnp.asarray(weight, jnp.float32), jnp.asarray(size)
        found = np.asarray(split(*args, least))
        want = [
            _oracles.shares(*one, least)
            for one in zip(count, weight, size, strict=True)
        ]
        np.testing.assert_array_equal(found, want)


def test_apportion_at_the_edges():
    def split(count, weight, size, least=1):
        args = jnp.array(count), jnp.array(weight, jnp.float32), jnp.array(size)
        return one(*args, least).tolist()

    one = jax.jit(apportion, static_argnums=3)

    # Equal weights: the remainder goes to the first.
    assert split(7, [1, 1, 1], [9, 9, 9]) == [3, 2, 2]
    # Too few for one each: the heaviest groups.
    assert split(2, [1, 3, 2, 0], [9, 9, 9, 0]) == [0, 1, 1, 0]
    assert split(4, [1, 3, 2], [9, 9, 9], 2) == [1, 2, 1]
    # Everything, nothing, and a group that is full.
    assert split(6, [5, 1, 0], [3, 3, 0]) == [3, 3, 0]
    assert split(0, [5, 1, 1], [3, 3, 3]) == [0, 0, 0]
    assert split(10, [1000, 1, 1], [4, 9, 9]) == [4, 3, 3]


def test_minimum_of_each_group_under_a_global_budget():
    """Rows in which the free choice has none, one, two ... tokens of group 1."""
    rng = np.random.default_rng(1)
    rows, n, least = 12, 20, 2
    groups = np.stack(
        [rng.permutation(np.repeat([0, 1, 2, -1], (9, 9, 1, 1))) for _ in range(rows)]
    )
    x = np.stack([row(rng, "random", n, D)[0] for _ in range(rows)])
    w = rng.normal(size=(rows, n)) - (groups == 1) * np.linspace(3, 0, rows)[:, None]
    given = dict(embeds=x, importance=w.astype(np.float32), groups=groups, keep=8)
    free = prune(**given)
    found = prune(**given, group_keep=least)
    seen, apart = set(), False
    for b in range(rows):
        order = np.asarray(free.order[b]).tolist()
        added, have = [], [sum(groups[b][i] == g for i in order) for g in range(3)]
        seen.add(have[1])
        own = _oracles.idpruner(x[b][groups[b] == 1], w[b][groups[b] == 1], least)
        own = np.flatnonzero(groups[b] == 1)[own]
        apart |= have[1] == least and not {*own.tolist()} <= {*order}
        # Added: the first choices of the group alone.
        for g in range(3):
            members = np.flatnonzero(groups[b] == g)
            missing = min(least, len(members)) - have[g]
            alone = _oracles.idpruner(
                x[b][members], w[b][members], min(least, len(members))
            )
            new = [i for i in members[alone].tolist() if i not in order]
            added += new[: max(missing, 0)]
        # Gone: the last choices of groups that have more.
        left = list(order)
        for i in reversed(order):
            mine = [j for j in left if groups[b][j] == groups[b][i]]
            if len(left) + len(added) > 8 and len(mine) > least:
                left.remove(i)
        assert {*np.flatnonzero(found.mask[b]).tolist()} == {*left, *added}
        assert found.count[b] == 8
    # A group that has enough keeps what it has, though alone it would choose others.
    assert {0, 1, 2} <= seen and apart


def test_minimum_wins_over_the_share_of_a_short_row():
    x, groups = jnp.ones((2, 12, 4)), np.repeat([[0, 1, 2]], 4, axis=1)
    mask = np.ones((2, 12), bool)
    mask[1] = groups[0] != 0
    mask[1, 4:7] = False
    groups = np.concatenate([groups, groups])
    found = prune(x, keep=0.5, mask=mask, groups=groups, group_keep=2)
    np.testing.assert_array_equal(found.count, [6, 3])


def test_merging_methods_take_no_minimum():
    with pytest.raises(ValueError, match="proportional"):
        prune(**inputs(), groups=GROUPS, keep=8, method="tome", group_keep=1)
    found = prune(
        **inputs(), groups=GROUPS, keep=8, method="tome", quota="proportional"
    )
    assert np.all(found.count == 8)
