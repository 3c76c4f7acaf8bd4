"""Prefill with fewer vision tokens: what is timed, and what its rows say."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import vision_prefill as bench


def test_rows_of_tiny_shapes(monkeypatch, capsys):
    seen = {}

    def once(calls):
        seen.update({name: call() for name, call in calls.items()})
        return {name: 0.5 if name == "prefill 0.5" else 2.0 for name in calls}

    monkeypatch.setattr(bench, "alternate", once)
    rows = bench.measure(bench.TINY, (1, 4, 8), [1.0, 0.5], jnp.float32)
    assert [(r.case["what"], r.case["kept"]) for r in rows] == [
        ("vision", 8),
        ("prefill", 8),
        ("prefill", 4),
        ("select", 4),
    ]
    assert [r.ratio for r in rows] == [None, 1.0, 4.0, None]
    assert seen["vision"].shape == (8, 64)
    assert seen["select 0.5"].order.shape == (1, 4)
    logits = seen["prefill 1.0"], seen["prefill 0.5"]
    assert all(x.shape == (1, 1, 256) and jnp.isfinite(x).all() for x in logits)
    assert not jnp.allclose(*logits)  # less was read
    assert "prefill 4 of 8: 500.000 ms, 4.00x" in capsys.readouterr().out


def test_shapes_are_those_of_the_published_model():
    model = bench.QwenVL(bench.SEVEN)
    assert model.num_tokens([bench.GRID]) == [2691]
    sizes = {
        k: sum(x.size for x in jax.tree.leaves(v)) for k, v in model.abstract().items()
    }
    # The index file of Qwen2.5-VL-7B-Instruct counts 16 584 333 312 bytes of bfloat16.
    assert sum(sizes.values()) == 16_584_333_312 // 2


def test_flop_are_those_that_xla_counts():
    c, tokens = bench.TINY.text, 40
    model = bench.QwenVL(bench.TINY).language
    lowered = jax.jit(lambda p, x: model.apply(p, embeds=x, last_only=True)[0]).lower(
        model.abstract(), jax.ShapeDtypeStruct((1, tokens, c.hidden_size), jnp.float32)
    )
    counted = lowered.cost_analysis()["flops"]
    # The whole square of scores is computed, and more than products are counted.
    square = c.num_layers * 2 * tokens**2 * c.num_heads * c.head_dim
    assert bench.decoder_flops(c, tokens) + square == pytest.approx(counted, rel=0.1)
