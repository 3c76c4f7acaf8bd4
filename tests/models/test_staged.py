"""Pruning behind a layer against a dense computation with a mask for each layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.attention import SparseAttention, selector
from angeljax.models import decode_step, generate_after, prefill_pruned, stack_layers
from angeljax.tokens import Prompt, Selection
from tests.tokens._models import MODEL, dense, params

B, L, STEPS = 2, 13, 3
SPANS = [(1, 4), (6, 9)]
AT = np.array([1, 2, 3, 6, 7, 8])


def top(hidden, *, attn, mask, keep):
    """FastV."""
    return Selection.of(
        jax.lax.top_k(jnp.where(mask, attn, -1), keep)[1], attn.shape[-1]
    )


@pytest.fixture
def case(rng):
    embeds = rng.normal(size=(B, L, 16)).astype(np.float32)
    planes = np.zeros((3, B, L, 16), np.float32)
    planes[:, :, AT] = rng.normal(size=(3, B, 6, 16))
    mask = np.ones((B, L), bool)
    mask[1, :1] = False
    return embeds, planes, mask, rng.integers(0, 24, (B, STEPS))


def most_attended(inside, where, seen, at, keep):
    """Literally: a softmax of each head over the vision keys, the mean of all heads."""
    _, q, k = inside
    out = []
    for b in range(B):
        text = max(i for i in range(L) if seen[b, i] and i not in at[b])
        total = np.zeros(len(at[b]))
        for h in range(4):
            scores = np.array([
                float(np.dot(q[b, text, h], k[b, i, h // 2])) / np.sqrt(8)
                for i in at[b]
            ])  # fmt: skip
            total += np.exp(scores) / np.exp(scores).sum() / 4
        out.append(sorted(np.array(at[b])[np.argsort(-total)[:keep]].tolist()))
    return out


def oracle(case, prunings, policy):
    """Logits of the whole sequence, and the tokens that stay after each pruning."""
    embeds, planes, mask, following = case
    new = np.asarray(MODEL.embed(params(), jnp.asarray(following)))
    long = np.concatenate([embeds, new], axis=1)
    planes = np.pad(planes, ((0, 0), (0, 0), (0, STEPS), (0, 0)))
    real = np.pad(mask, ((0, 0), (0, STEPS)), constant_values=True)
    count = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    where, seen = [np.stack([count] * 3)] * 3, [real] * 3
    at, kept = [AT.tolist()] * B, []
    for layer, keep in prunings:
        _, inside = dense(long, where, seen, planes)
        at = most_attended(jax.tree.map(np.asarray, inside[layer - 1]), where,
                           seen[layer - 1], at, keep)  # fmt: skip
        kept.append(at)
        stays = seen[layer - 1].copy()
        for b in range(B):
            stays[b, [i for i in AT if i not in at[b]]] = False
        fewer = np.maximum(np.cumsum(stays, axis=1) - 1, 0)
        later = where[0] if policy == "keep" else np.stack([fewer] * 3)
        where = [*where[:layer], *[later] * (3 - layer)]
        seen = [*seen[:layer], *[stays] * (3 - layer)]
    return dense(long, where, seen, planes)[0], kept


@pytest.mark.parametrize(
    ("prunings", "policy", "scanned"),
    [
        ([(1, 3)], "keep", False),
        ([(1, 4), (2, 2)], "compact", False),
        ([(2, 3)], "keep", True),
    ],
)
def test_prefill_and_decoding(case, prunings, policy, scanned):
    embeds, planes, mask, following = case
    want, kept = oracle(case, prunings, policy)
    model = dataclasses.replace(MODEL, scan_layers=scanned)
    tree = stack_layers(params()) if scanned else params()
    prompt = Prompt(
        embeds=jnp.asarray(embeds),
        mask=jnp.asarray(mask),
        deepstack=tuple(map(jnp.asarray, planes)),
    )
    run = functools.partial(
        prefill_pruned,
        model,
        where=SPANS,
        prune=[functools.partial(top, keep=keep) for _, keep in prunings],
        layer=[layer for layer, _ in prunings],
        room=STEPS,
        position_policy=policy,
    )
    got = jax.jit(run)(tree, prompt)
    np.testing.assert_allclose(got.logits[:, 0], want[:, L - 1], atol=2e-5)
    # Each stage has as many slots as tokens, and the tokens of the last are known.
    lengths = [L, *(L - 6 + keep for _, keep in prunings)]
    slots = [cache.positions.shape[1] for cache in got.cache.stages]
    assert slots == [length + STEPS for length in lengths]
    if len(prunings) == 1:
        rows = np.asarray(got.pruned.slots)
        for b in range(B):
            assert [i for i in rows[b] if i in AT] == kept[0][b]

    @functools.partial(jax.jit, static_argnames="last_only")
    def read(cache, tokens, last_only=False):
        return model.apply(tree, tokens, cache=cache, last_only=last_only)

    cache = got.cache
    for i in range(STEPS):
        logits, cache = read(cache, jnp.asarray(following[:, i : i + 1]))
        np.testing.assert_allclose(logits[:, 0], want[:, L + i], atol=2e-5)
    if scanned:  # several tokens at once, as in the next turn of a conversation
        logits, _ = read(got.cache, jnp.asarray(following), last_only=True)
        np.testing.assert_allclose(logits[:, 0], want[:, L + STEPS - 1], atol=2e-5)


def test_generation_after_it(case):
    embeds, _, mask, _ = case
    prompt = Prompt(embeds=jnp.asarray(embeds), mask=jnp.asarray(mask))
    first = jax.jit(
        lambda prompt: prefill_pruned(
            MODEL,
            params(),
            prompt,
            SPANS,
            functools.partial(top, keep=2),
            layer=1,
            room=3,
        )
    )(prompt)
    out = generate_after(
        MODEL, params(), first.logits, first.cache, max_new_tokens=3, eos_ids=()
    )
    token, cache = jnp.argmax(first.logits[:, -1], axis=-1), first.cache
    step = jax.jit(decode_step, static_argnums=0)
    for i in range(3):
        np.testing.assert_array_equal(out.tokens[:, i], token)
        token, cache = step(MODEL, params(), cache, token)
    with pytest.raises(ValueError, match="sampling needs a key"):
        generate_after(
            MODEL, params(), first.logits, cache, max_new_tokens=1, temperature=1.0
        )


def test_groups_and_rows_without_vision_tokens(case):
    embeds, _, mask, _ = case
    prompt = Prompt(embeds=jnp.asarray(embeds), mask=jnp.asarray(mask))
    at = jnp.array([[1, 2, 3], [L, L, L]])  # row 1 is text alone

    def note(hidden, *, attn, groups, text, mask):
        given.update(attn=attn, groups=groups, text=text, mask=mask)
        order = jnp.where(mask.any(-1, keepdims=True), jnp.array([[2, 0]]), 3)
        return Selection.of(order, 3)

    @jax.jit
    def run(prompt):
        given.clear()
        options = {"layer": 1, "room": 1, "groups": jnp.array([5, 6, 7])}
        out = prefill_pruned(MODEL, params(), prompt, at, note, **options)
        return out, dict(given)

    given = {}
    out, told = run(prompt)
    attn, groups, text, seen = (told[k] for k in ("attn", "groups", "text", "mask"))
    assert bool(jnp.isfinite(out.logits).all()) and bool(jnp.isfinite(attn).all())
    assert groups.tolist() == [[5, 6, 7]] * 2 and seen.tolist() == [[True] * 3] + [
        [False] * 3
    ]
    real = np.asarray(text != 0).any(-1)
    assert real.tolist() == [[i not in (1, 2, 3) for i in range(L)], mask[1].tolist()]
    assert out.pruned.dropped.tolist() == [1, 0]


def test_errors():
    prompt = Prompt(embeds=jnp.zeros((1, 6, 16)))

    def run(prune, layer):
        fn = functools.partial(prefill_pruned, prune=prune, layer=layer, room=1)
        jax.eval_shape(lambda: fn(MODEL, params(), prompt, (1, 4)))

    for layer in (0, 3, [], [2, 1]):
        with pytest.raises(ValueError, match="layer=.*1 to 2 of this model"):
            run(top, layer=layer)
    with pytest.raises(ValueError, match="1 prune functions for 2 layers"):
        run([top], layer=[1, 2])
    sparse = dataclasses.replace(MODEL, attention_fn=SparseAttention(selector("stem")))
    with pytest.raises(ValueError, match="needs the dense attention_fn"):
        prefill_pruned(sparse, params(), prompt, (1, 4), top, layer=1, room=1)
    with pytest.raises(ValueError, match=r"must return an .*Selection, not a int"):
        run(lambda hidden: 3, layer=1)
    with pytest.raises(ValueError, match="chose from tokens"):
        run(lambda hidden: Selection.of(jnp.zeros((1, 1), int), 4), layer=1)
