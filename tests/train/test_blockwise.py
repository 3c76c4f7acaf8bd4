"""Layer by layer: every layer gets closer, and so does the end of the model."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax.models import DecoderConfig, LanguageModel, stack_layers
from angeljax.train._blockwise_run import BlockwiseRun
from angeljax.train.blockwise import BlockwiseOptions, reconstruct
from tests.models._random_params import random_params

CONFIG = DecoderConfig(
    model_type="llama",
    vocab_size=32,
    hidden_size=32,
    num_layers=2,
    intermediate_size=64,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    tied=True,
)
RECIPE = aj.Recipe(
    rules=[
        aj.Rule(match=".*/mlp/.*", format="seq2", qat={"scale": "learned"}),
        aj.Rule(format="sherry"),
    ]
)
TOKENS = np.random.default_rng(0).integers(0, 32, (8, 6)).astype(np.int32)
OPTIONS = BlockwiseOptions(
    epochs=8, learning_rate=3e-3, scale_learning_rate=3e-3, final_ratio=0.1
)


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(LanguageModel(CONFIG), std=0.16)


@pytest.fixture(scope="module")
def traced() -> Any:
    """How often a layer was traced."""
    count = []
    block = BlockwiseRun._block
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            BlockwiseRun, "_block", lambda *a: (count.append(1), block(*a))[1]
        )
        yield count


@pytest.fixture(scope="module")
def done(params: Any, traced: Any) -> Any:
    return reconstruct(LanguageModel(CONFIG), params, RECIPE, TOKENS, OPTIONS)


def test_closer_layer_by_layer(params: Any, done: Any, traced: Any) -> None:
    model = LanguageModel(CONFIG)
    # Output with and without quantization, and the error: once, for both layers.
    assert len(traced) == 3
    assert len(done.before) == 2
    assert all(a < 0.9 * b for b, a in zip(done.before, done.after, strict=True))
    qat = aj.qat.make(RECIPE, total_steps=1)
    logits = jax.jit(model.logits)
    full = logits(params, TOKENS)

    def error(params: Any, state: Any) -> float:
        fake = qat.apply(params, state, 1)
        return float(np.mean(np.square(logits(fake, TOKENS) - full)))

    assert error(done.params, done.state) < 0.9 * error(params, qat.init(params))
    # What is not quantized is not trained.
    for name in ("attn_norm", "mlp_norm"):
        for i in range(2):
            np.testing.assert_array_equal(
                done.params["layers"][i][name]["scale"],
                params["layers"][i][name]["scale"],
            )
    packed = aj.qat.finalize(done.params, done.state)
    fake = qat.apply(done.params, done.state, 1)
    leaf = packed["layers"][1]["mlp"]["up_proj"]["kernel"]
    assert isinstance(leaf, aj.QTensor)
    np.testing.assert_array_equal(
        leaf.dequantize(), fake["layers"][1]["mlp"]["up_proj"]["kernel"]
    )


def test_a_stack_and_targets_of_quantized_inputs(params: Any, done: Any) -> None:
    options = dataclasses.replace(OPTIONS, host=False, targets="quantized")
    model, stacked = LanguageModel(CONFIG, scan_layers=True), stack_layers(params)
    stack = reconstruct(model, stacked, RECIPE, TOKENS, options)
    # The first layer has the same inputs and targets as in layers apart.
    np.testing.assert_allclose(stack.before[0], done.before[0], rtol=1e-5)
    np.testing.assert_allclose(stack.after[0], done.after[0], rtol=1e-2)
    assert jax.tree.map(jnp.shape, stack.params) == jax.tree.map(jnp.shape, stacked)
    for path, planes in stack.state.learned.items():
        first = done.state.learned[path.replace("layers/", "layers/0/")]
        np.testing.assert_allclose(planes["scale"][0], first["scale"], rtol=1e-2)
    # Its error is not part of what the second has to mend.
    assert stack.after[1] < stack.before[1] < done.before[1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"epochs": 0}, "blockwise.epochs must be an integer >= 1"),
        ({"learning_rate": -1.0}, "blockwise.learning_rate must be a number >= 0"),
        ({"targets": "half"}, "must be one of full, quantized"),
    ],
)
def test_bad_options(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockwiseOptions(**change)


def test_refused(params: Any) -> None:
    model = LanguageModel(CONFIG)
    with pytest.raises(ValueError, match="batches of 4"):
        reconstruct(model, params, RECIPE, TOKENS[:7])
    with pytest.raises(ValueError, match="vocabulary of 32"):
        reconstruct(model, params, RECIPE, TOKENS + 30)
    only = aj.Recipe(rules=[aj.Rule(match="embed.*", format="int8")])
    with pytest.raises(ValueError, match="takes no weight of a layer"):
        reconstruct(model, params, only, TOKENS)
