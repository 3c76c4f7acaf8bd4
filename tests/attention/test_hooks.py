"""Foreign transformer layers, linen and nnx, with sparse attention plugged in."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.experimental import checkify

from angeljax.attention import (
    jax_attention_fn,
    linen_attention_fn,
    nnx_attention_fn,
    sparse_attention,
)
from tests.attention._selectors import Means

T = 40
ON = {"dense_below": 0, "dense_above": 1.0, "implementation": "reference"}
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, T, 16)), jnp.float32)
REAL = jnp.arange(T) >= jnp.asarray([[0], [11]])
CAUSAL = jnp.tril(jnp.ones((1, 1, T, T), bool))
PADDED = linen.combine_masks(linen.make_attention_mask(REAL, REAL), CAUSAL)


class LinenLayer(linen.Module):
    """Pre-norm attention and MLP, as one finds them in other people's code."""

    attention_fn: object = linen.dot_product_attention
    decode: bool = False

    @linen.compact
    def __call__(self, x, mask=None):
        attend = linen.MultiHeadDotProductAttention(
            num_heads=2, attention_fn=self.attention_fn, decode=self.decode
        )
        x = x + attend(linen.LayerNorm()(x), mask=mask)
        return x + linen.Dense(16)(linen.gelu(linen.Dense(24)(linen.LayerNorm()(x))))


class NnxLayer(nnx.Module):
    def __init__(self, attention_fn, rngs):
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(
            num_heads=2, in_features=16, attention_fn=attention_fn, rngs=rngs,
            decode=False,
        )  # fmt: skip

    def __call__(self, x, **options):
        return x + self.attend(self.norm(x), **options)


def test_linen_layer_that_keeps_everything_is_the_original():
    """Prompts with a mask, without one, and with padding; decoding is the original."""
    original = linen.dot_product_attention
    keep = functools.partial(linen_attention_fn, Means(keep=0), **ON)
    variables = jax.jit(LinenLayer(original, decode=True).init)(
        jax.random.key(0), X[:, :4]
    )

    @jax.jit
    def run(variables, masks):
        params = {"params": variables["params"]}
        cases = (
            (original, 0), (keep(), 0), (keep(causal=True), None),
            (original, 1), (keep(padding=True), 1),
        )  # fmt: skip
        prompts = [
            LinenLayer(fn).apply(params, X, None if i is None else masks[i])
            for fn, i in cases
        ]
        steps = [
            LinenLayer(fn, decode=True).apply(variables, X[:, :1], mutable="cache")[0]
            for fn in (original, linen_attention_fn(Means(keep=1), causal=True))
        ]
        return prompts, steps

    (want, *got, padded, got_padded), steps = run(variables, (CAUSAL, PADDED))
    for y in got:
        np.testing.assert_allclose(y, want, atol=1e-5)
    np.testing.assert_allclose(got_padded[REAL], padded[REAL], atol=1e-5)
    np.testing.assert_array_equal(*steps)


def test_nnx_layer_and_the_function_of_jax():
    layer = NnxLayer(nnx.dot_product_attention, nnx.Rngs(0))
    keep, few = (nnx_attention_fn(Means(keep=n), **ON) for n in (0, 1))
    q, k, v = jax.random.normal(jax.random.key(1), (3, 2, T, 2, 8))
    lengths, attend = jnp.asarray([T, 17]), jax_attention_fn(Means(keep=1), **ON)

    @nnx.jit
    def run(layer, x):
        found = []
        for fn in (nnx.dot_product_attention, keep, few):
            layer.attend.attention_fn = fn
            found.append(layer(x, is_causal=True))
        options = {"is_causal": True, "key_value_seq_lengths": lengths}
        return found, (
            attend(q, k, v, scale=0.2, **options),
            sparse_attention(q, k, v, few.selector, lengths=lengths, scale=0.2, **ON),
        )

    (want, kept, sparse), pair = run(layer, X)
    np.testing.assert_allclose(kept, want, atol=1e-5)
    assert jnp.abs(sparse - want).max() > 1e-3
    np.testing.assert_allclose(*pair, atol=1e-6)


def test_what_cannot_be_honoured_is_refused():
    q = jnp.ones((2, T, 2, 8))
    linen_fn = linen_attention_fn(Means(), **ON)
    jax_fn = jax_attention_fn(Means(), **ON)
    nnx_fn = nnx_attention_fn(Means(), **ON)
    for call, message in (
        (lambda: linen_fn(q, q, q), "sees all keys.*or causal=True"),
        (lambda: linen_fn(q, q, q, CAUSAL), "cannot do bias: use a mask"),
        (lambda: linen_fn(q, q, q, mask=CAUSAL, dropout_rate=0.1), "dropout"),
        (lambda: linen_fn(q, q, q, mask=CAUSAL, module=q), "no weights"),
        (lambda: linen_fn(q, q, q, mask=REAL[:, None, None]), r"\[2, 1, 1, 40\]"),
        (lambda: linen_fn(q, q, q, mask=jnp.repeat(CAUSAL, 2, 1)), "between heads"),
        (lambda: linen_fn(q, q, q, mask=CAUSAL & False), "the mask is not causal"),
        (lambda: linen_fn(q, q, q, mask=PADDED), "rows are padded pass padding=True"),
        (lambda: linen_fn(q[:, :8], q, q, mask=CAUSAL), "8 queries on 40 keys"),
        (lambda: nnx_fn(q, q, q, is_causal=True, input_positions=q), "input_positions"),
        (lambda: jax_fn(q, q, q, is_causal=True, local_window_size=3), "local_window"),
        (lambda: linen_attention_fn("stem"), "selector must be one of .* not a str"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    checked = checkify.checkify(
        jax.jit(lambda m: linen_fn(q, q, q, mask=m)), errors=checkify.user_checks
    )
    assert checked(CAUSAL)[0].get() is None
    assert "the mask is not causal" in checked(CAUSAL | True)[0].get()
