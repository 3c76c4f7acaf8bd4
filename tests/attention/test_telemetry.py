"""Density and recall against loops in numpy; the picture; the command."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.attention import SparseAttention, attention_report, plots
from angeljax.attention.telemetry import selected_blocks
from angeljax.models import DecoderConfig, LanguageModel
from tests.attention._selectors import Means
from tests.models._random_params import random_params

T = 72
MODEL = LanguageModel(
    DecoderConfig(
        model_type="llama",
        vocab_size=40,
        hidden_size=16,
        num_layers=2,
        intermediate_size=24,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
    )
)
PARAMS = random_params(MODEL, std=0.5)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, T)), jnp.int32)
OWN = SparseAttention(Means(keep=1), layers=((1, Means(keep=0)),))
report = functools.cache(lambda: attention_report(MODEL, PARAMS, TOKENS, OWN, rows=9))


def test_report_is_what_loops_find():
    found = report()
    blocks = selected_blocks(MODEL, PARAMS, TOKENS, OWN, layer=0)
    features = jax.jit(lambda p: MODEL.features(p, TOKENS, relations=(0,)))
    q, k, _ = (np.asarray(x, np.float64) for x in features(PARAMS).qkv[0])
    density, recall = np.zeros(2), np.zeros(2)
    for h in range(2):
        for b in range(2):
            for i in range(5):
                density[h] += sum(blocks[b, h, i, j] for j in range(i + 1)) / 15 / 2
            for row in range(9):
                t = int((row + 0.5) * T / 9)
                mass = np.exp(k[b, : t + 1, 0] @ q[b, t, h] / np.sqrt(8))
                kept = [blocks[b, h, t // 16, s // 16] for s in range(t + 1)]
                recall[h] += mass[kept].sum() / mass.sum() / 18
    np.testing.assert_allclose(found.density[0], density, rtol=1e-6)
    np.testing.assert_allclose(found.recall[0], recall, rtol=1e-4)
    assert (found.recall[0] < 0.99).all() and (found.density[0] < 0.9).all()
    np.testing.assert_allclose(found.recall[1], 1, rtol=1e-5)  # keeps everything
    np.testing.assert_allclose(found.density[1], 1)


def test_report_is_json_and_a_table():
    data = json.loads(json.dumps(report().to_dict()))
    assert data["tokens"] == T and data["selector"] == "Means"
    assert [row["layer"] for row in data["layers"]] == [0, 1]
    table = report().__rich__()
    assert table.row_count == 2 and table.columns[1].footer.endswith("%")


def test_picture_shows_what_is_read():
    blocks = selected_blocks(MODEL, PARAMS, TOKENS, OWN, layer=0)[0]
    figure = plots.block_mask(blocks, block_size=16, title="layer 0")
    shown = [np.asarray(axis.images[0].get_array()) for axis in figure.axes]
    np.testing.assert_array_equal(np.stack(shown) == 2, blocks)
    assert (np.triu(shown[0], 1) == 0).all()
    with pytest.raises(ValueError, match="mask must be"):
        plots.block_mask(np.zeros(3), block_size=16)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="rows=73: from 1 to the 72 tokens"):
        attention_report(MODEL, PARAMS, TOKENS, Means(), rows=73)
    with pytest.raises(ValueError, match="layer 2 is none of the model's 2"):
        attention_report(MODEL, PARAMS, TOKENS, Means(), layers=(2,))
