"""Causal attention: what the decoder runs with it, and where it does not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.models import (
    DecoderConfig,
    LanguageModel,
    causal_attention,
    stack_layers,
)

CONFIG = DecoderConfig(
    model_type="llama",
    vocab_size=24,
    hidden_size=16,
    num_layers=2,
    intermediate_size=24,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)


def test_causal_attention_changes_nothing():
    """Gradients as well; by remat and a scan over layers, as a training runs it."""
    model = LanguageModel(dataclasses.replace(CONFIG, num_layers=1))
    params = model.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 24)

    def loss(model):
        def run(params):
            final = model.features(params, tokens, remat=True).final
            return jnp.sum(jnp.square(final) * jnp.arange(16))

        return jax.jit(jax.value_and_grad(run))

    want, grads = loss(model)(params)
    model = dataclasses.replace(model, attention_fn=causal_attention, scan_layers=True)
    got, again = loss(model)(stack_layers(params))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4),
        again,
        stack_layers(grads),
    )


def test_causal_attention_is_for_full_rows_only():
    """Padding, a window and a cache need the mask: dense attention takes over."""
    model = LanguageModel(CONFIG)
    causal = dataclasses.replace(model, attention_fn=causal_attention)
    params = model.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 24)
    mask = jnp.arange(6)[None] >= jnp.array([[0], [3]])
    want = jax.jit(lambda p: model.apply(p, tokens, mask=mask)[0])(params)
    got = jax.jit(lambda p: causal.apply(p, tokens, mask=mask)[0])(params)
    np.testing.assert_array_equal(got, want)

    near = dataclasses.replace(CONFIG, windows=(2, 2))
    windowed = dataclasses.replace(model, config=near)
    want = jax.jit(lambda p: windowed.logits(p, tokens))(params)
    windowed = dataclasses.replace(windowed, attention_fn=causal_attention)
    got = jax.jit(lambda p: windowed.logits(p, tokens))(params)
    np.testing.assert_array_equal(got, want)
