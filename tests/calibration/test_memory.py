"""Memory of layer-by-layer compression, against sizes worked out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import angeljax as aj
from angeljax.calibration import estimate_memory
from angeljax.models import DecoderConfig, LanguageModel
from tests.models._random_params import random_params

LLAMA_70B = DecoderConfig(
    model_type="llama", vocab_size=128256, hidden_size=8192, num_layers=80,
    intermediate_size=28672, num_heads=64, num_kv_heads=8, head_dim=128,
)  # fmt: skip
GPTQ = aj.Recipe(rules=[aj.Rule(format="int4", group_size=128, algorithm="gptq")])


def test_gptq_of_a_70b_model_fits_a_card_of_80_gb() -> None:
    model = LanguageModel(LLAMA_70B, jnp.dtype("bfloat16"))
    found = estimate_memory(
        model, model.abstract(jnp.bfloat16), GPTQ, rows=128, length=2048
    )
    d, f, kv = 8192, 28672, 1024
    weights = 2 * d * d + 2 * d * kv + 3 * d * f
    assert found.weights == 2 * (weights + 2 * d)  # and two norms
    # q, k, v, o, gate and up read d features, down reads f.
    hessians = 4 * (6 * d**2 + f**2)
    assert 0 <= found.statistics - hessians < 1e6
    assert found.solving == 4 * 3 * (f**2 + d * f)
    assert found.outside == 2 * (2 * 128256 * d + d)
    assert found.waiting == 128 * 2048 * (2 * d + 4)
    # Four bits, and a scale for 128 of them.
    assert found.packed / (weights / 8) == pytest.approx(4.125, rel=0.01)
    assert found.finished == 80 * found.packed
    # On the device: 29 GB of 80 with activations on the host.
    assert found.device(host=True) == pytest.approx(29e9, rel=0.02)
    assert found.device(host=False) == pytest.approx(68.6e9, rel=0.02)


@pytest.mark.parametrize("scanned", [False, True])
def test_what_is_left_is_as_large_as_estimated(scanned: bool) -> None:
    config = DecoderConfig(
        model_type="llama", vocab_size=64, hidden_size=32, num_layers=2,
        intermediate_size=64, num_heads=2, num_kv_heads=1, head_dim=16,
    )  # fmt: skip
    model = LanguageModel(config, scan_layers=scanned)
    params = random_params(model)
    recipe = aj.Recipe(rules=[aj.Rule(format="int4", group_size=32)])
    found = estimate_memory(model, params, recipe, rows=4, length=8)
    done = aj.compress(params, recipe)
    assert found.finished == sum(x.nbytes for x in jax.tree.leaves(done["layers"]))
    assert found.statistics == 0
