"""Hidden states inside a decoder: the same as what the logits come from."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.models import DecoderConfig, LanguageModel, stack_layers
from tests.models._random_params import random_params

CONFIG = DecoderConfig(
    model_type="llama",
    vocab_size=32,
    hidden_size=16,
    num_layers=3,
    intermediate_size=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    tied=True,
)
TOKENS = jnp.asarray([[5, 9, 1, 30, 2, 7]])


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(LanguageModel(CONFIG))


def _close(a: Any, b: Any) -> None:
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b
    )


def test_stacked_and_apart_agree_and_give_the_logits(params: Any) -> None:
    apart, stacked = LanguageModel(CONFIG), LanguageModel(CONFIG, scan_layers=True)
    wanted: Any = {"hidden": (2, 0, 2), "relations": (1,)}

    def both(params: Any) -> Any:
        a = apart.features(params, TOKENS, **wanted)
        b = stacked.features(stack_layers(params), TOKENS, remat=True, **wanted)
        logits = apart.bind(params).head(a.final), apart.logits(params, TOKENS)
        return a, b, logits

    a, b, logits = jax.jit(both)(params)
    _close(a, b)
    _close(*logits)
    _close(a.hidden[0], a.hidden[2])
    assert [x.shape for x in a.qkv[0]] == [(1, 6, 2, 8), (1, 6, 1, 8), (1, 6, 1, 8)]
    module = apart.bind(params)
    _close(module.norm(a.hidden[0]), a.final)  # the last layer is what the norm reads


def test_recomputed_gradients_are_the_same(params: Any) -> None:
    model = LanguageModel(CONFIG, scan_layers=True)
    stack = stack_layers(params)

    def loss(params: Any, remat: bool) -> jax.Array:
        f = model.features(params, TOKENS, hidden=(1,), remat=remat)
        return jnp.square(f.final).mean() + jnp.square(f.hidden[0]).mean()

    plain, again = jax.jit(
        lambda p: (jax.grad(loss)(p, False), jax.grad(loss)(p, True))
    )(stack)
    _close(plain, again)


def test_a_layer_that_is_not_there(params: Any) -> None:
    with pytest.raises(ValueError, match="layer 3 is none of the model's 3"):
        LanguageModel(CONFIG).features(params, TOKENS, hidden=(3,))
