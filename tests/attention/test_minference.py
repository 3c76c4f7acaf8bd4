"""MInference against a transcription of its rule in blocks; tables of patterns."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.attention import MInference, Place
from tests.attention._prompts import (
    DIM,
    HEADS,
    KV_HEADS,
    heaviest,
    prompt,
    softmax,
    spoil,
)

BLOCK, ROWS = 32, 400
VS = "vertical_and_slash"
HEAD_PATTERNS = (
    (VS, 70, 200), (VS, 30, 50), ("stream_llm", 40, 70), (VS, 1000, 6096),
    ("stream_llm", 0, 1), (VS, 120, 260),
)  # fmt: skip


def _oracle(q, k, start, patterns=HEAD_PATTERNS, ratio=None):
    """bool `[H, n_q, n_k]`; row i of q stands at start + i."""
    end = start + len(q)
    n_q, n_k = -(-len(q) // BLOCK), -(-end // BLOCK)
    keep = np.zeros((HEADS, n_q, n_k), bool)
    for h, (kind, a, b) in enumerate(patterns):
        column, slash = np.zeros(n_k), np.zeros(n_k)
        last = min(64, len(q))
        for row in range(len(q) - last, len(q)):
            keys = k[: start + row + 1, h // (HEADS // KV_HEADS)]
            p = softmax(keys @ q[row, h] / DIM**0.5) / last
            key = np.arange(len(p))
            np.add.at(column, key // BLOCK, p)
            # Where the key that far back of each query t of a block would lie.
            far = start + row - key[:, None]
            diagonal = -((np.arange(BLOCK) - far) // BLOCK)
            weight = np.where(diagonal < n_k, p[:, None] / BLOCK, 0)
            np.add.at(slash, np.minimum(diagonal, n_k - 1), weight)
        v, s = min(max(a, 30), end), min(max(b, 50), end)
        j = np.arange(n_k)
        columns = heaviest(column, j * BLOCK < 30, -(-v // BLOCK))
        diagonals = heaviest(slash, j * BLOCK < 100 + BLOCK - 1, -(-s // BLOCK))
        if kind == "stream_llm":
            columns = j * BLOCK < a
            column, slash = 2.0 * columns, 1 / (1 + j)
            # The nearest key of block j to a query of the block d further on.
            diagonals = np.asarray([d * BLOCK - BLOCK + 1 < b or d == 0 for d in j])
        for i in range(n_q):
            own = start // BLOCK + i
            for j in range(own + 1):
                keep[h, i, j] = columns[j] or diagonals[own - j]
            if ratio is not None:
                score = column[: own + 1] + slash[own - np.arange(own + 1)]
                j = np.arange(own + 1)
                forced = (j * BLOCK < 30) | ((own - j) * BLOCK < 100 + BLOCK - 1)
                budget = int(ratio * (own + 1) + 0.5)
                keep[h, i, : own + 1] = heaviest(score, forced, budget)
    return keep


@pytest.fixture(scope="module")
def tokens() -> Any:
    return prompt(1, rows=ROWS, batch=1, sharp=0.6)


# As one piece, and as the second of two chunks.
@pytest.mark.parametrize("ratio, start", [(0.6, 0), (None, 192)])
def test_against_the_oracle(tokens, ratio, start):
    """Layers, shards of the heads and chunks are traced."""
    q, k, v = tokens
    q, end = q[:, start:], ROWS - 7
    other = ((VS, 30, 50),) * HEADS
    selector = MInference(
        patterns=(other, HEAD_PATTERNS), block_size=BLOCK, keep_ratio=ratio
    )

    def select(q: Any, k: Any, layer: Any, head: Any, start: Any) -> Any:
        place = Place(
            layer=layer, first_head=head, q_offset=start, lengths=jnp.asarray([end])
        )
        return selector.select(q, k, k, place).to_mask(-(-ROWS // BLOCK))

    half, run, k_bad = HEADS // 2, jax.jit(select), spoil(k, (end,))
    heads = [
        run(
            q[:, :, h * half : (h + 1) * half],
            k_bad[:, :, h : h + 1],
            1,
            h * half,
            start,
        )
        for h in range(2)
    ]
    mask = np.asarray(jnp.concatenate(heads, 1))[0]
    expected = _oracle(
        np.asarray(q[0, : end - start]), np.asarray(k[0, :end]), start, ratio=ratio
    )
    np.testing.assert_array_equal(mask, expected)
    share = mask.sum((1, 2))
    if ratio is None:
        rows = np.arange(start // BLOCK, 13)
        assert (
            share[3] == (rows + 1).sum() and share[1] < share[0] < share[5] < share[3]
        )
    else:
        np.testing.assert_allclose(share / (13 * 14 / 2), selector.density(ROWS))


def test_tables(tmp_path):
    published = [
        {"0": [VS, 1000, 6096, 0.33], "1": ["stream_llm", 100, 800, 0.9]},
        {"1": [VS, 30, 800, 0.9], "0": [VS, 3500, 100, 0.9]},
    ]
    path = tmp_path / "patterns.json"
    path.write_text(json.dumps(published))
    model = SimpleNamespace(num_layers=2, num_heads=2, rope_theta=1e6)
    selector = MInference.from_json(path, model=model, block_size=64)
    assert selector.patterns == (
        ((VS, 1000, 6096), ("stream_llm", 100, 800)),
        ((VS, 3500, 100), (VS, 30, 800)),
    )
    assert hash(selector) == hash(MInference.from_json(published, block_size=64))
    finger = {"num_attention_heads": 2, "num_hidden_layers": 3, "rope_theta": 1000000}
    whole = {
        "schema_version": 1,
        "model_fingerprint": finger,
        "best_pattern": {"1": {"0": [VS, 100, 750, 1]}},
    }
    config = {"num_attention_heads": 2, "num_hidden_layers": 3, "rope_theta": 1e6}
    default = (VS, 1000, 6096)
    assert MInference.from_json(whole, model=config).patterns == (
        (default, default), ((VS, 100, 750), default), (default, default),
    )  # fmt: skip


@pytest.mark.parametrize(
    "table, model, message",
    [
        ({"schema_version": 2}, None, "schema_version 2"),
        ({"schema_version": 1}, None, "model_fingerprint"),
        ([{"0": ["block_sparse", 100, 0]}], None, "layer 0, head 0 has the kind"),
        ([{"0": [VS, "1", 2]}], None, "integers"),
        ([{"0": [VS]}], None, "head 0 must be"),
        ([{"x": [VS, 1, 2]}], None, "numbers for keys"),
        ([], None, "list of layers"),
        ([{"0": [VS, 1, 2]}], {"num_hidden_layers": 3}, "num_hidden_layers=1"),
        (
            {
                "schema_version": 1,
                "model_fingerprint": {"rope_theta": 1e4},
                "best_pattern": {},
            },
            {"rope_theta": 1e6},
            "rope_theta=10000.0",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_tables_that_do_not_fit(table, model, message):
    with pytest.raises(ValueError, match=message):
        MInference.from_json(table, model=model)


def test_options(tokens):
    q, k, v = tokens
    selector = MInference(patterns=(HEAD_PATTERNS,), block_size=BLOCK)
    with pytest.raises(ValueError, match="layer=1"):
        jax.eval_shape(lambda: selector.select(q, k, v, Place(layer=1)))
    with pytest.raises(ValueError, match="6 heads and q has 4"):
        jax.eval_shape(lambda: selector.select(q[:, :, :4], k, v, Place()))
    with pytest.raises(ValueError, match="max_blocks"):
        MInference(max_blocks=2)
    with pytest.raises(ValueError, match="same number"):
        MInference(patterns=(((VS, 1, 2),), ()))
