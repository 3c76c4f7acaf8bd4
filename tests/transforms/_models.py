"""Small models for the tests of transforms, with features that stand out."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import angeljax as aj
from angeljax.models import DecoderConfig, LanguageModel

KINDS = ("hessian", "abs_sum", "amax_channel")
CONFIG = DecoderConfig(
    model_type="qwen3", vocab_size=64, hidden_size=32, num_layers=2,
    intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8,
    attention_bias=True, output_bias=True, mlp_bias=True, qk_norm=True,
)  # fmt: skip
MODEL = LanguageModel(CONFIG)
SCANNED = LanguageModel(CONFIG, scan_layers=True)
TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, 64)


def make_params(model: LanguageModel = MODEL) -> dict[str, Any]:
    """Random weights, norms and biases, none of them one or zero."""
    leaves, treedef = jax.tree.flatten(model.init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    new = []
    for w in leaves:
        x = rng.normal(size=w.shape) * (0.25 if w.ndim > 1 else 0.3)
        if w.ndim == 1:
            x = np.exp(x) * np.where(rng.random(w.shape) < 0.1, 8.0, 1.0)
        new.append(jnp.asarray(x, jnp.float32))
    return jax.tree.unflatten(treedef, new)


@functools.cache
def measured() -> tuple[Any, aj.Statistics]:
    """Params of `MODEL` and the statistics of all of its weights."""
    params, plain = make_params(), aj.Recipe(rules=[aj.Rule(format="int8")])
    return params, aj.calibrate(MODEL, params, [TOKENS], plain, statistics=KINDS)


def stacked(stats: aj.Statistics) -> aj.Statistics:
    """Statistics of the same model with its layers as one stack."""
    layers: dict[str, Any] = {}
    for path in stats:
        _, number, rest = path.split("/", 2)
        layers.setdefault(f"layers/{rest}", []).append((int(number), stats[path]))
    ordered = {p: [f for _, f in sorted(x, key=lambda e: e[0])]
               for p, x in layers.items()}  # fmt: skip
    return aj.Statistics(
        {p: jax.tree.map(lambda *a: jnp.stack(a), *f) for p, f in ordered.items()}
    )


@functools.partial(jax.jit, static_argnums=0)
def logits(model: LanguageModel, params: Any) -> jax.Array:
    """Of `TOKENS`."""
    return model.logits(params, TOKENS)


def same_logits(
    model: LanguageModel, one: Any, other: Any, model2: LanguageModel | None = None
) -> None:
    """Both trees compute the same function, to float32."""
    a = logits(model, one)
    b = logits(model2 or model, other)
    assert float(jnp.std(a)) > 0.1
    np.testing.assert_allclose(b, a, atol=1e-4, rtol=0)
