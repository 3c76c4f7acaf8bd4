"""Draft trees: shape, masks, the walk, and that what is kept is what a chain leaves."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.models.cache import Held, write
from angeljax.models.rows import RowCache, hold_rows, settle_rows
from angeljax.speculative import (
    Draft,
    Drafter,
    DynamicTree,
    Tree,
    autoregressive,
    cache_slots,
    chain,
    chain_mask,
    generate,
    grow_tree,
    key_positions,
    tree_mask,
)
from angeljax.speculative.tree import ancestors, climb, walk
from tests.speculative._cases import PROMPTS, HashTarget, TreeOracle, table, tiny, whole

TOY = HashTarget()
BUSHY = (-1, 0, 0, 0, 1, 1, 2, 4, 4, 7)


def random_parents(rng, nodes: int) -> tuple[int, ...]:
    return (-1, *(int(rng.integers(0, j)) for j in range(1, nodes)))


def upwards(parents, node: int) -> list[int]:
    """A node and all above it, one by one."""
    line = [node]
    while parents[line[-1]] >= 0:
        line.append(parents[line[-1]])
    return line


def test_ancestors_and_masks_by_climbing(rng):
    trees = [random_parents(rng, 9) for _ in range(6)] + [chain(9).parents]
    depth = max(Tree(p).depth for p in trees)
    assert depth == 8
    many = ancestors(climb(jnp.asarray(trees), depth))
    starts = jnp.asarray(rng.integers(0, 7, size=len(trees)))
    masks = tree_mask(many, starts, 20)
    for row, parents in enumerate(trees):
        tree, start = Tree(parents), int(starts[row])
        np.testing.assert_array_equal(many[row], tree.ancestors)
        for node in range(9):
            line = upwards(parents, node)
            assert tree.depths[node] == len(line) - 1
            assert set(np.flatnonzero(tree.ancestors[node])) == set(line)
            sees = set(range(start)) | {start + above for above in line}
            assert set(np.flatnonzero(masks[row, 0, node])) == sees
    at = starts[:, None] + jnp.arange(9)
    np.testing.assert_array_equal(masks[-1], chain_mask(at, 20)[-1])


def test_the_walk_by_following_all_children(rng):
    rows = 64
    parents = np.asarray([random_parents(rng, 8) for _ in range(rows)])
    tokens = rng.integers(0, 3, size=(rows, 8))
    tokens[rng.random((rows, 8)) < 0.1] = -1
    chosen = rng.integers(0, 3, size=(rows, 8))
    lines = climb(jnp.asarray(parents), 7)
    path, count = jax.jit(walk)(lines, tokens, chosen)
    longest, several = 0, 0
    for row in range(rows):
        ways, best = [[0]], [0]
        while ways:
            line = ways.pop()
            if (len(line), -line[-1]) > (len(best), -best[-1]):
                best = line
            below = [
                [*line, j]
                for j in range(8)
                if parents[row, j] == line[-1]
                and tokens[row, j] == chosen[row, line[-1]]
            ]
            several += len(below) > 1
            ways += below
        assert count[row] == len(best) - 1
        assert path[row].tolist() == best + [best[-1]] * (8 - len(best))
        longest = max(longest, len(best))
    assert longest > 3 and several > 3


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_entries_are_put_in_place_by_the_next_write(rng, rows, stacked):
    shape = (2, rows, 2, 12, 4) if stacked else (rows, 2, 12, 4)
    old = rng.standard_normal(shape).astype(np.float32)
    new = rng.standard_normal((rows, 2, 2, 4)).astype(np.float32)
    starts = rng.integers(0, 4, size=rows)
    path = np.asarray([[0, 2, 4], [0, 1, 1], [0, 3, 3]])[:rows]
    valid = np.asarray([2, 0, 3])[:rows]
    want = old.copy()
    for r in range(rows):
        for j in range(valid[r]):
            want[..., r, :, starts[r] + j, :] = old[
                ..., r, :, starts[r] + path[r, j], :
            ]
    cache = RowCache(*((x,) if not stacked else x for x in [jnp.asarray(old)] * 2))
    held = hold_rows(cache, starts, jnp.asarray(path), jnp.asarray(valid))
    slots = jnp.asarray(starts + valid)
    settled = jax.tree.leaves(settle_rows(held, slots).v)[0]
    for r in range(rows):
        end = starts[r] + valid[r]
        got = np.asarray(settled[..., r, :, :end, :])
        np.testing.assert_array_equal(got, want[..., r, :, :end, :])
        for t in range(2):
            at = (1, r) if stacked else (r,)
            want[(*at, slice(None), end + t)] = new[r, t]
    some = jax.tree.leaves(held.held.k)[0]
    some = Held(jnp.asarray(old), some[1] if stacked else some, jnp.asarray(valid))
    stored, seen = write(some, jnp.asarray(new), slots, 1 if stacked else None)
    part = np.asarray(stored[1] if stacked else stored)
    whole_of = want[1] if stacked else want
    np.testing.assert_array_equal(np.swapaxes(seen, 1, 2), part)
    for r in range(rows):
        end = starts[r] + valid[r] + 2
        np.testing.assert_array_equal(part[r, :, :end], whole_of[r, :, :end])


@pytest.mark.parametrize(("dynamic", "rows"), [(False, 4), (True, 1)])
def test_trees_change_the_speed_only(dynamic, rows):
    prompts = PROMPTS[:rows]
    want = autoregressive(TOY, table(), prompts, max_new_tokens=40)
    drafter = TreeOracle(whole(prompts, want), BUSHY, dynamic=dynamic)
    got = generate(TOY, table(), prompts, drafter=drafter, max_new_tokens=40)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert got.tau > 1.3


def test_a_decoder_reads_a_tree_and_keeps_one_path():
    model, params = tiny()
    # A window is shorter than the deepest path: distances follow the tree.
    config = dataclasses.replace(model.config, windows=(4, 0))
    model = dataclasses.replace(model, config=config)
    want = autoregressive(model, params, PROMPTS, max_new_tokens=24)
    drafter = TreeOracle(whole(PROMPTS, want), BUSHY, 32)
    got = generate(model, params, PROMPTS, drafter=drafter, max_new_tokens=24)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert got.tau > 1.3


def test_logits_of_each_path_are_those_of_a_chain(rng):
    model, params = tiny()
    tree, before = Tree(random_parents(rng, 10)), 6
    text = rng.integers(0, 32, size=(1, before))
    tokens = rng.integers(0, 32, size=(1, 10))
    slots = 20

    @jax.jit
    def read(cache, tokens, positions, start, mask):
        return model.read_rows(
            params, cache, tokens, positions=positions, slots=start, mask=mask
        )

    at = jnp.arange(before)[None]
    cache = read(
        model.init_rows(1, slots), text, at, jnp.asarray([0]), chain_mask(at, slots)
    ).cache
    start = jnp.asarray([before])
    positions = before + jnp.asarray([tree.depths])
    mask = tree_mask(jnp.asarray(tree.ancestors)[None], start, slots)
    got = model.head_rows(params, read(cache, tokens, positions, start, mask).final)
    alone, ends = np.zeros((10, slots), np.int32), []
    for node in range(10):
        line = upwards(tree.parents, node)[::-1]
        ends.append(before + len(line) - 1)
        alone[node, : ends[-1] + 1] = np.concatenate([text[0], tokens[0, line]])
    want = jax.jit(model.logits)(params, alone)[jnp.arange(10), jnp.asarray(ends)]
    np.testing.assert_allclose(got[0], want, atol=1e-5, rtol=1e-5)


def grown_by_hand(first, after, branches, levels, nodes):
    """EAGLE-2's rule with lists: (path of tokens) of each kept node, in order."""

    def best(log_probs, path, score):
        order = np.argsort(-log_probs, kind="stable")[:branches]
        return [((*path, int(t)), score + log_probs[t]) for t in order]

    level = best(first, (), 0.0)
    every = list(level)
    for _ in range(levels):
        below = [c for path, score in level for c in best(after(path), path, score)]
        every += below
        level = sorted(below, key=lambda c: -c[1])[:branches]
    every.sort(key=lambda c: -c[1])
    return {path for path, _ in every[: nodes - 1]}


def test_a_grown_tree_has_the_nodes_of_the_rule(rng):
    vocab, branches, levels, nodes = 12, 3, 3, 14
    table = np.log(rng.dirichlet(np.ones(vocab), size=(vocab, vocab)))
    first = np.log(rng.dirichlet(np.ones(vocab), size=2))

    def read(frontier, before):
        # What follows depends on the last two tokens: on the parent too.
        mine = jnp.take_along_axis(before, frontier.parents, axis=1)
        return jnp.asarray(table)[mine, frontier.tokens] - 2.5, frontier.tokens

    # Logits as well as logarithms of probabilities.
    tokens, parents, _ = grow_tree(
        jnp.asarray(first) + 4.0,
        read,
        jnp.zeros((2, branches), jnp.int32),
        branches=branches,
        levels=levels,
        nodes=nodes,
    )
    for row in range(2):
        Tree(tuple(parents[row].tolist()))  # parents before children
        every = [None, *tokens[row].tolist()]
        paths = {
            tuple(every[j] for j in upwards(parents[row].tolist(), node)[-2::-1])
            for node in range(1, nodes)
        }
        want = grown_by_hand(
            first[row],
            lambda path: table[path[-2] if len(path) > 1 else 0, path[-1]],
            branches,
            levels,
            nodes,
        )
        assert paths == want and max(map(len, paths)) > 2
    with pytest.raises(ValueError, match="a tree of 2 to 31"):
        grow_tree(jnp.asarray(first), read, None, branches=3, levels=3, nodes=32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grown(Drafter):
    """The target itself grows a tree behind the committed text, in its own cache."""

    width = property(lambda self: 2 + 2 * 4 + 1)
    tree = property(lambda self: DynamicTree(self.width, 3))
    reach = property(lambda self: 1 + 2 * 2)

    def draft(self, target, state, context):
        model, slots = target.model, cache_slots(context.cache)
        n, columns = context.lengths, jnp.arange(4)

        def logits_of(cache, tokens, positions, start, mask, keys):
            rows = model.read_rows(
                target.params,
                cache,
                tokens,
                positions=positions,
                slots=start,
                mask=mask,
                key_positions=keys,
            )
            logits = model.head_rows(target.params, rows.final)
            return logits, rows.cache

        at = n[:, None] - 1
        first, cache = logits_of(
            context.cache, context.last[:, None], at, n - 1, chain_mask(at, slots), None
        )

        def read(frontier, cache):
            positions = jnp.broadcast_to(n[:, None] + frontier.level, (len(n), 2))
            keys = key_positions(n[:, None] + columns // 2, n, slots)
            mask = tree_mask(frontier.seen, n, slots)
            start = n + 2 * frontier.level
            return logits_of(cache, frontier.tokens, positions, start, mask, keys)

        tokens, parents, cache = grow_tree(
            first[:, 0], read, cache, branches=2, levels=2, nodes=self.width
        )
        return Draft(tokens, parents, cache=cache), state


def test_a_tree_grown_in_the_cache_of_the_target():
    want = autoregressive(TOY, table(), PROMPTS, max_new_tokens=24)
    got = generate(TOY, table(), PROMPTS, drafter=Grown(), max_new_tokens=24)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    # All that was found is kept, so that the target's own choices are among it.
    assert got.tau == 4


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Tree(()), "node 0 is the root"),
        (lambda: Tree((0, 0)), "node 0 is the root"),
        (lambda: Tree((-1, 0, 2)), "node 2 has parent 2"),
        (lambda: DynamicTree(4, 4), "a depth from 1 to 3"),
    ],
)
def test_trees_that_cannot_be(make, says):
    with pytest.raises(ValueError, match=says):
        make()
