"""Layer by layer, against a loop of `calibrate` and `compress` over partial trees."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax.models import DecoderConfig, LanguageModel
from tests.models._random_params import random_params

CONFIG = DecoderConfig(
    model_type="llama", vocab_size=64, hidden_size=32, num_layers=3,
    intermediate_size=64, num_heads=2, num_kv_heads=1, head_dim=16,
    windows=(0, 3, 0),
)  # fmt: skip
MODEL = LanguageModel(CONFIG)
STATIC = aj.Recipe(
    rules=[aj.Rule(format="int4", activation="int8", activation_scale="amax")]
)
TOKENS = np.random.default_rng(0).integers(0, 64, (5, 6)).astype(np.int32)
MASK = np.arange(6) < np.asarray([[6], [4], [6], [2], [5]])
BATCHES = [
    {"tokens": TOKENS[:3], "mask": MASK[:3]},
    {"tokens": TOKENS[3:], "mask": MASK[3:]},
]


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL, std=0.3)


@pytest.fixture(scope="module")
def done(params: Any) -> Any:
    return aj.compress_sequential(MODEL, params, STATIC, BATCHES)


def by_hand(params: Any, recipe: aj.Recipe, batches: Any) -> Any:
    """Layer i from statistics of the model whose layers before are quantized."""
    partial = {**params, "layers": dict(params["layers"])}
    for i in range(CONFIG.num_layers):
        stats = aj.calibrate(MODEL, partial, batches, recipe)
        whole = aj.compress(partial, recipe, stats)
        partial["layers"][i] = whole["layers"][i]
    return partial


def same(a: Any, b: Any, *, exact: bool = False) -> None:
    """The same tree: codes equal, scales but for rounding."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert x.dtype == y.dtype
        if exact or not jnp.issubdtype(x.dtype, jnp.floating):
            assert np.array_equal(x, y), path
        else:
            np.testing.assert_allclose(x, y, rtol=2e-5, err_msg=str(path))


def test_equals_a_loop_of_calibrate_and_compress(params: Any, done: Any) -> None:
    same(done, by_hand(params, STATIC, BATCHES))
    # It is not what one pass over the full-precision model gives.
    stats = aj.calibrate(MODEL, params, BATCHES, STATIC)
    once = aj.compress(params, STATIC, stats)
    scale = lambda t: t["layers"][2]["mlp"]["down_proj"]["kernel"].planes["input_scale"]  # noqa: E731
    assert not np.allclose(scale(done), scale(once), rtol=1e-3)
    full = aj.compress_sequential(MODEL, params, STATIC, BATCHES, inputs="full")
    same(full, once)
