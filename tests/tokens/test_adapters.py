"""Adapters within small stand-ins of the models that they are for.

Each stand-in puts images among text, counts positions and makes masks as the library
does, and reads the sequence with one layer of attention. The oracle is the same model
over the long sequence, where the pruned tokens are no valid input.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.recipe import TokensOptions
from angeljax.tokens import Selection, visionzip
from angeljax.tokens.adapters import (
    prune_paligemma,
    prune_placeholders,
    prune_soft_tokens,
)

B, N, T, D = 2, 9, 5, 8


def attend(x, mask, positions):
    """One layer: positions turn the features, softmax in one head, a residual."""
    angles = positions[..., None] / 10.0 ** np.arange(D // 2)
    a, b = np.split(np.asarray(x), 2, axis=-1)
    sin, cos = np.sin(angles), np.cos(angles)
    turned = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    scores = np.where(mask, turned @ np.swapaxes(turned, 1, 2), -1e9)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(x) + weights / weights.sum(-1, keepdims=True) @ np.asarray(x)


def paligemma(x, input_mask, mask_ar):
    """Prefix-LM mask by blocks, positions by valid inputs, as big_vision has them."""
    block = np.cumsum(mask_ar, axis=1)
    mask = block[:, None, :] <= block[:, :, None]
    valid = np.asarray(input_mask)
    mask &= valid[:, None, :] & valid[:, :, None]
    return attend(x, mask, np.maximum(np.cumsum(valid, axis=1) - 1, 0))


def test_paligemma(rng):
    x = rng.normal(size=(B, N + T, D)).astype(np.float32)
    mask = np.ones((B, N + T), bool)
    mask[1, -2:] = False
    mask_ar = np.array([[0] * N + [0, 0, 1, 1, 1]] * B)
    told = {}

    def first_loud(embeds, *, mask, text, attn):
        told.update(mask=mask, text=text, attn=attn)
        loud = jnp.where(mask, attn, -1)
        return Selection.of(jax.lax.top_k(loud, 3)[1].at[1, 2].set(N), N)

    attn = rng.random((B, N)).astype(np.float32)
    inputs = tuple(map(jnp.asarray, (x, mask, mask_ar)))
    got, short = prune_paligemma(
        inputs, first_loud, num_image_tokens=N, attn=jnp.asarray(attn)
    )
    assert [y.shape for y in got] == [(B, T + 3, D), (B, T + 3), (B, T + 3)]
    assert told["text"].shape == (B, T, D) and bool(told["mask"].all())
    assert not np.asarray(told["text"])[1, -2:].any()
    stays = mask.copy()
    for b, keep in enumerate((3, 2)):
        stays[b, :N] = False
        stays[b, np.argsort(-attn[b])[:keep]] = True
    want = paligemma(x, stays, mask_ar)
    out = paligemma(*got)
    for b in range(B):
        rows = np.asarray(got[1][b])
        assert rows.tolist() == sorted(rows.tolist(), reverse=True)  # padded at the end
        np.testing.assert_allclose(out[b][rows], want[b][stays[b]], atol=1e-5)
    assert short.next_position.tolist() == stays.sum(1).tolist()
    with pytest.raises(ValueError, match="num_image_tokens=20 must be from 1"):
        prune_paligemma(inputs, first_loud, num_image_tokens=20)


def gemma_tokens(tokens, count):
    """The placeholder of an image between its two borders, `count` times."""
    out = []
    for token in tokens:
        out += [108, 255999, *[-2] * count, 256000, 108] if token == -1 else [token]
    return out


def gemma(tokens, soft, table):
    """Soft tokens over placeholders; those of an image see each other."""
    ids = np.array([tokens])
    x = table[np.abs(ids) % len(table)].copy()
    x[ids == -2] = np.asarray(soft).reshape(-1, D)
    image = ids == -2
    starts = image & ~np.pad(image, ((0, 0), (1, 0)))[:, :-1]
    number = np.where(image, np.cumsum(starts, axis=1), 0)
    mask = np.tril(np.ones((ids.shape[1],) * 2, bool))[None]
    mask = mask | ((number[:, None] == number[:, :, None]) & (number[:, None] > 0))
    return attend(x, mask, np.arange(ids.shape[1])[None]), ids


def test_gemma(rng):
    table = rng.normal(size=(16, D)).astype(np.float32)
    soft = rng.normal(size=(1, 2, N, D)).astype(np.float32)
    fn = TokensOptions(method="divprune", keep=4).prune_fn()
    kept = prune_soft_tokens(jnp.asarray(soft), fn)
    assert kept.shape == (1, 2, 4, D)
    for m in range(2):  # each image by itself
        alone = soft[0, m][np.asarray(fn(jnp.asarray(soft[0, m])).indices)]
        np.testing.assert_array_equal(kept[0, m], alone)
    text = [2, 3, -1, 4, -1, 5]
    out, ids = gemma(gemma_tokens(text, 4), kept, table)
    want, _ = gemma(gemma_tokens(text, N), soft, table)
    assert out.shape[1] == want.shape[1] - 2 * (N - 4)
    assert (ids == -2).sum() == 8 and np.isfinite(out).all()
    # Merged rows instead of chosen ones.
    merge = functools.partial(visionzip, keep=4)
    attn = jnp.asarray(rng.random((1, 2, N)), jnp.float32)
    merged = prune_soft_tokens(jnp.asarray(soft), merge, attn=attn)
    want = merge(jnp.asarray(soft[0]), attn=attn[0]).merged
    np.testing.assert_allclose(merged[0], want)
    with pytest.raises(ValueError, match="soft tokens must be"):
        prune_soft_tokens(jnp.zeros((2, N, D)), fn)


def bonsai(images, tokens, types, table, segments):
    """Images over placeholders in order; causal, and both ways among them."""
    places = np.clip(np.cumsum(types, axis=1) - 1, 0, images.shape[1] - 1)
    rows = np.take_along_axis(np.asarray(images), places[..., None], axis=1)
    x = np.where(np.asarray(types)[..., None] == 1, rows, table[np.asarray(tokens)])
    length = x.shape[1]
    mask = np.tril(np.ones((length, length), bool))[None]
    mask = mask | ((types[:, None] == 1) & (types[:, :, None] == 1))
    mask = mask & (segments[:, None] == 1)
    return attend(x, mask, np.arange(length)[None])


def test_bonsai(rng):
    """The second row has no image: its placeholders and budget are padding."""
    table = rng.normal(size=(16, D)).astype(np.float32)
    images = rng.normal(size=(B, N, D)).astype(np.float32)
    planes = rng.normal(size=(3, B, N, D)).astype(np.float32)
    tokens = np.full((B, N + T), 0)
    tokens[0] = [3, 4, *[9] * N, 5, 6, 7]
    tokens[1, :T] = [3, 8, 5, 6, 7]
    types = (tokens == 9).astype(np.int32)
    segments = (tokens != 0).astype(np.int32)
    fn = TokensOptions(method="divprune", keep=4).prune_fn()
    rows, ids, kinds, short = prune_placeholders(
        jnp.asarray(images),
        jnp.asarray(tokens),
        jnp.asarray(types),
        fn,
        mask=jnp.asarray(segments == 1),
        extra={"segment_ids": jnp.asarray(segments)},
        deepstack=tuple(map(jnp.asarray, planes)),
    )
    assert ids.tolist() == [[3, 4, 9, 9, 9, 9, 5, 6, 7], [3, 8, 5, 6, 7, 0, 0, 0, 0]]
    assert kinds.sum(1).tolist() == [4, 0] and rows.shape == (B, 4, D)
    chosen = np.asarray(fn(jnp.asarray(images[0])).indices)
    np.testing.assert_array_equal(rows[0], images[0][chosen])
    np.testing.assert_array_equal(
        jnp.stack(short.prompt.deepstack)[:, 0], planes[:, 0][:, chosen]
    )
    left = np.asarray(short.prompt.extra["segment_ids"])
    assert left.tolist() == np.asarray(short.prompt.mask).astype(int).tolist()
    out = bonsai(rows, np.asarray(ids), np.asarray(kinds), table, left)
    # Text alone is read as before, and an image as if it had had four tokens.
    want = bonsai(images, tokens, types, table, segments)
    np.testing.assert_allclose(out[1, :T], want[1, :T], atol=1e-5)
    few = np.asarray([[3, 4, *[9] * 4, 5, 6, 7]])
    want = bonsai(images[:1, chosen], few, (few == 9) * 1, table, np.ones((1, 9), int))
    np.testing.assert_allclose(out[0], want[0], atol=1e-5)
    with pytest.raises(ValueError, match="tokens and token_types"):
        prune_placeholders(rows, ids, kinds[:, 1:], fn)
