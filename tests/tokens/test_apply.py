"""`apply_selection` against lists that are shortened one token at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.models.cache import KVCache
from angeljax.tokens import (
    Prompt,
    Selection,
    apply_selection,
    expand_placeholders,
    placeholder_count,
    span_groups,
    token_positions,
)

B, L, N, K, D = 3, 12, 6, 3, 4
SPANS = [(1, 4), (6, 9)]  # two images
AT = [1, 2, 3, 6, 7, 8]


def make(rng, **changes):
    """A prompt with every field, and a selection with rows of 3, 1 and 2 tokens."""
    mask = np.ones((B, L), bool)
    mask[1, 0] = mask[2, 10:] = False
    cache = [rng.normal(size=(B, 2, L + 2, 3)).astype(np.float32) for _ in range(2)]
    slots = np.concatenate([np.arange(L), [-1, -1]])
    fields = {
        "embeds": rng.normal(size=(B, L, D)).astype(np.float32),
        "mask": mask,
        "positions": rng.integers(0, 50, (3, B, L)).astype(np.int32),
        "attention_mask": rng.random((B, 1, L, L)) < 0.5,
        "tokens": rng.integers(1, 90, (B, L)).astype(np.int32),
        "token_types": rng.integers(1, 4, (B, L)).astype(np.int32),
        "labels": rng.integers(1, 90, (B, L)).astype(np.int32),
        "deepstack": (
            rng.normal(size=(B, N, D)).astype(np.float32),
            rng.normal(size=(B, L, D)).astype(np.float32),
        ),
        "cache": KVCache(
            k=(jnp.asarray(cache[0]),),
            v=(jnp.asarray(cache[1]),),
            positions=jnp.asarray(np.where(mask[:, :1], slots, -1), jnp.int32),
            length=jnp.asarray(L, jnp.int32),
        ),
        "extra": {"mask_ar": rng.integers(0, 2, (B, L, 2)).astype(np.int32)},
    }
    order = jnp.array([[4, 0, 2], [3, N, N], [5, 1, N]])
    return Prompt(**{**fields, **changes}), Selection.of(order, N)


def oracle(prompt, selection, at, policy, side="right", merged=None):
    """For each row the indices that stay, then every field by indexing."""
    rows, length = [], L - (N - K)
    for b in range(B):
        stays = []
        for i in range(L):
            if not prompt.mask[b, i]:
                continue
            token = at[b].index(i) if i in at[b] else None
            if token is None or bool(selection.mask[b, token]):
                stays.append(i)
        rows.append(stays)
    out = {name: [] for name in ("embeds", "mask", "tokens", "labels", "both", "ar")}
    out |= {"positions": [], "next": [], "planes": [], "k": [], "kpos": []}
    for b, stays in enumerate(rows):
        pad = length - len(stays)

        def line(x, fill, stays=stays, pad=pad):
            x = np.asarray(x)
            body = [x[i] for i in stays]
            empty = [np.full(x.shape[1:], fill, x.dtype)] * pad
            return np.stack(empty + body if side == "left" else body + empty)

        out["embeds"].append(line(prompt.embeds[b], 0))
        if merged is not None:
            kept = [i for i in np.asarray(selection.indices[b]) if i < N]
            for slot, token in enumerate(kept):
                place = stays.index(at[b][token]) + (pad if side == "left" else 0)
                out["embeds"][-1][place] = merged[b, slot]
        out["mask"].append(line(np.ones(L, bool), False))
        out["tokens"].append(line(prompt.tokens[b], 0))
        out["labels"].append(line(prompt.labels[b], -100))
        out["ar"].append(line(prompt.extra["mask_ar"][b], 0))
        both = line(prompt.attention_mask[b, 0], False)
        out["both"].append(line(both.T, False).T[None])
        p = np.stack([line(axis[b], 0) for axis in prompt.positions])
        high = max(int(prompt.positions[:, b][:, i].max()) for i in range(L)
                   if prompt.mask[b, i])  # fmt: skip
        if policy == "compact":
            p = np.stack([line(np.zeros(L, np.int32), 0)] * 3)
            first = pad if side == "left" else 0
            p[:, first : first + len(stays)] = np.arange(len(stays))
            high = len(stays) - 1
        out["positions"].append(p)
        out["next"].append(high + 1)
        kept = [np.asarray(prompt.deepstack[0][b, i]) for i in range(N)
                if bool(selection.mask[b, i])]  # fmt: skip
        out["planes"].append(np.stack(kept + [np.zeros(D)] * (K - len(kept))))
        if prompt.cache is not None:
            k = np.swapaxes(np.asarray(prompt.cache.k[0][b]), 0, 1)
            out["k"].append(np.concatenate([line(k[:L], 0), k[L:]]))
            kpos = np.asarray(prompt.cache.positions[b])
            out["kpos"].append(np.concatenate([line(kpos[:L], -1), kpos[L:]]))
    lengths = [len(stays) for stays in rows]
    positions = np.stack(out.pop("positions"), axis=1)
    return {k: np.stack(v) for k, v in out.items() if v} | {
        "positions": positions,
        "lengths": lengths,
    }


@pytest.mark.parametrize(
    ("policy", "side"), [("keep", "right"), ("compact", "left"), ("keep", "left")]
)
def test_every_field_against_lists(rng, policy, side):
    prompt, selection = make(rng)
    merged = None
    if policy == "compact":
        merged = rng.normal(size=(B, K, D)).astype(np.float32)
        selection = Selection(
            indices=selection.indices,
            mask=selection.mask,
            order=selection.order,
            merged=jnp.asarray(merged),
        )
        prompt = make(rng, cache=None)[0]
    run = jax.jit(
        functools.partial(
            apply_selection, where=SPANS, position_policy=policy, padding_side=side
        )
    )
    got = run(selection, prompt)
    want = oracle(prompt, selection, [AT] * B, policy, side, merged)
    short = got.prompt
    np.testing.assert_array_equal(short.embeds, want["embeds"])
    np.testing.assert_array_equal(short.mask, want["mask"])
    np.testing.assert_array_equal(short.positions, want["positions"])
    np.testing.assert_array_equal(short.tokens, want["tokens"])
    np.testing.assert_array_equal(short.labels, want["labels"])
    np.testing.assert_array_equal(short.attention_mask, want["both"])
    np.testing.assert_array_equal(short.extra["mask_ar"], want["ar"])
    np.testing.assert_array_equal(short.deepstack[0], want["planes"])
    np.testing.assert_array_equal(got.next_position, want["next"])
    np.testing.assert_array_equal(got.lengths, want["lengths"])
    np.testing.assert_array_equal(
        got.dropped, np.sum(prompt.mask, 1) - np.array(want["lengths"])
    )
    np.testing.assert_array_equal(got.overflow, [0] * B)
    # DeepStack beside the sequence goes with the embeddings, and vision names rows.
    np.testing.assert_array_equal(short.deepstack[1], got.take(prompt.deepstack[1]))
    at = np.asarray(got.vision)
    for b in range(B):
        tokens = [np.asarray(prompt.tokens)[b, AT[i]] for i in range(N)
                  if bool(selection.mask[b, i])]  # fmt: skip
        assert np.asarray(short.tokens)[b, at[b][at[b] < 9]].tolist() == tokens
    if policy == "keep":
        np.testing.assert_array_equal(np.swapaxes(short.cache.k[0], 1, 2), want["k"])
        np.testing.assert_array_equal(short.cache.positions, want["kpos"])
        assert int(short.cache.length) == L - (N - K)


def test_positions_by_row_mask_and_vmap_agree(rng):
    prompt, selection = make(rng)
    spans = apply_selection(selection, prompt, SPANS)
    at = jnp.broadcast_to(jnp.array(AT, jnp.int32), (B, N))
    types = jnp.zeros((B, L), bool).at[:, jnp.array(AT)].set(True)
    axes = Prompt(
        **{name: 0 for name in ("embeds", "mask", "tokens", "token_types", "labels")},
        positions=1,
        attention_mask=0,
        deepstack=0,
        cache=KVCache(k=0, v=0, positions=0, length=None),
        extra=0,
    )
    mapped = jax.vmap(apply_selection, in_axes=(0, axes, 0))(selection, prompt, at)
    np.testing.assert_array_equal(
        jnp.swapaxes(mapped.prompt.positions, 0, 1), spans.prompt.positions
    )
    for other in (
        apply_selection(selection, prompt, at),
        apply_selection(selection, prompt, types),
        mapped,
    ):
        for name in ("embeds", "attention_mask", "deepstack", "labels", "mask"):
            a, b = getattr(other.prompt, name), getattr(spans.prompt, name)
            jax.tree.map(np.testing.assert_array_equal, a, b)
        jax.tree.map(
            np.testing.assert_array_equal, other.prompt.cache.k, spans.prompt.cache.k
        )
        np.testing.assert_array_equal(other.next_position, spans.next_position)
        np.testing.assert_array_equal(other.vision, spans.vision)


def test_rows_with_fewer_images_than_slots():
    # Row 1 has two vision tokens of four; its missing ones stand behind the end.
    at = jnp.array([[1, 2, 3, 4], [1, 2, 8, 8]])
    order = jnp.array([[0, 3], [1, 4]])
    mask = jnp.arange(8) < jnp.array([[8], [6]])
    prompt = Prompt(
        embeds=jnp.ones((2, 8, 2)), mask=mask, tokens=jnp.arange(16).reshape(2, 8)
    )
    got = apply_selection(Selection.of(order, 4), prompt, at)
    assert got.prompt.tokens.tolist() == [[0, 1, 4, 5, 6, 7], [8, 10, 11, 12, 13, 0]]
    assert got.vision.tolist() == [[1, 2], [1, 6]]
    assert got.next_position.tolist() == [8, 6]
    # Without the padding that such a row has for them its text would not fit.
    full = Prompt(embeds=prompt.embeds, tokens=prompt.tokens)
    assert apply_selection(Selection.of(order, 4), full, at).overflow.tolist() == [0, 1]
    wide = apply_selection(Selection.of(order, 4), full, at, length=7)
    assert wide.overflow.tolist() == [0, 0]
    assert wide.prompt.tokens[1].tolist() == [8, 10, 11, 12, 13, 14, 15]


def test_float_masks_stay_closed(rng):
    prompt, selection = make(rng)
    both = np.where(prompt.attention_mask[:1], 0, -np.inf).astype(np.float32)
    short = apply_selection(
        selection, Prompt(embeds=prompt.embeds, attention_mask=both), SPANS
    ).prompt
    assert short.attention_mask.shape == (B, 1, 9, 9)
    lowest = np.finfo(np.float32).min
    assert float(np.max(short.attention_mask[1, 0, 7:])) == lowest
    assert float(np.max(short.attention_mask[1, 0, :, 7:])) == lowest
    np.testing.assert_array_equal(short.attention_mask[0, 0, 0], both[0, 0, 0][
        [0, 1, 3, 4, 5, 7, 9, 10, 11]])  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask": np.ones((B, 9), bool)}, r"Prompt.mask has shape \(3, 9\)"),
        ({"mask": np.ones((B, L), np.int32)}, r"Prompt.mask must be bool"),
        ({"positions": np.zeros((2, B, L))}, r"Prompt.positions .*\[3, 3, 12\]"),
        ({"attention_mask": np.ones((B, L, L))}, r"Prompt.attention_mask has"),
        ({"deepstack": (np.ones((B, 5, D)),)}, r"Prompt.deepstack\[0\] has"),
        ({"extra": {"a": np.ones((B, 5))}}, r"Prompt.extra\['a'\] has"),
        ({"embeds": np.ones((B, L, D, 1))}, r"Prompt.embeds must be"),
    ],
)
def test_fields_that_do_not_fit_are_named(rng, fields, message):
    prompt, selection = make(rng, **fields)
    with pytest.raises(ValueError, match=message):
        apply_selection(selection, prompt, SPANS)


def test_wrong_arguments(rng):
    prompt, selection = make(rng)
    for where, message in (
        ([(1, 4), (3, 6)], "must lie in the 12 tokens"),
        ((1, 4), "spans 3 tokens and the selection has 6"),
        ((1, 15), "must lie in the 12"),
        ([], "where must be a span"),
        ([(1.0, 4)], "a span is"),
        (jnp.ones((B, 5), bool), "must end in the 12 tokens"),
        (jnp.ones((B, 5), jnp.int32), "names 5 positions"),
        (jnp.ones((2, N), jnp.int32), "where has shape"),
        (jnp.ones((B, N)), "spans, integer positions or a bool mask"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_selection(selection, prompt, where)
    for options, message in (
        ({"position_policy": "renumber"}, "use keep or compact"),
        ({"position_policy": "compact"}, "Prompt.cache holds keys that were rotated"),
        ({"padding_side": "both"}, "use left or right"),
        ({"length": 13}, "length=13 must be from 1 to the 12"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_selection(selection, prompt, SPANS, **options)
    with pytest.raises(ValueError, match="does not fit Prompt.embeds"):
        apply_selection(Selection.of(jnp.arange(3), N), prompt, SPANS)
    with pytest.raises(ValueError, match="num_tokens is needed"):
        token_positions(jnp.ones((2, 4), bool), length=4)


def test_placeholders_follow_the_counts(rng):
    prompt = [5, 9, 9, 9, 6, 9, 9, 7]
    assert expand_placeholders(prompt, 9, [1, 2]) == [5, 9, 6, 9, 9, 7]
    assert expand_placeholders(prompt, 9, 0) == [5, 6, 7]
    assert expand_placeholders([9, 9, 1], 9, [2, 1], sizes=[1, 1]) == [9, 9, 9, 1]
    for options, message in (
        (([1],), "counts has 1 entries and the prompt 2"),
        (([1, -1],), "0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            expand_placeholders(prompt, 9, *options)
    for sizes in ([2, 3], [3, 2, 1], [3, 1]):
        with pytest.raises(ValueError, match="do not add up"):
            expand_placeholders(prompt, 9, 1, sizes=sizes)
    # What a host writes before the model is what `apply_selection` makes inside it.
    tokens = jnp.array([[5, 9, 9, 9, 6, 9, 9, 7]])
    chosen = Selection.of(jnp.array([[4, 0]]), 5)
    short = apply_selection(
        chosen, Prompt(embeds=jnp.ones((1, 8, 2)), tokens=tokens), [(1, 4), (5, 7)]
    )
    assert short.prompt.tokens[0].tolist() == expand_placeholders(prompt, 9, 1)
    assert placeholder_count(short.prompt.tokens, 9).tolist() == [2]
    assert span_groups(((1, 4), (5, 7))).tolist() == [0, 0, 0, 1, 1]
