"""What training asks of a decoder: causal attention, remat, hidden states and head."""

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


def gradients(model):
    def loss(params, tokens):
        hidden = model.hidden(params, tokens)
        return jnp.mean(jnp.square(model.head(params, hidden)))

    return jax.jit(jax.value_and_grad(loss))


def test_remat_and_causal_attention_change_nothing():
    plain = LanguageModel(dataclasses.replace(CONFIG, num_layers=1))
    params = plain.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 24)
    want, grads = gradients(plain)(params, tokens)
    assert want > 0
    other = dataclasses.replace(
        plain, remat=True, attention_fn=causal_attention, scan_layers=True
    )
    params, grads = stack_layers(params), stack_layers(grads)
    fn = gradients(other)
    assert "remat" in str(fn.trace(params, tokens).jaxpr)
    got, again = fn(params, tokens)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4),
        again,
        grads,
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
