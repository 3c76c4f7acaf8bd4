"""Losses on features, and the whole objective with a teacher of another size."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.models import DecoderConfig, LanguageModel
from angeljax.train.feature_losses import (
    hidden_loss,
    layer_pairs,
    relation_layers,
    relation_loss,
)
from angeljax.train.losses import (
    DistillOptions,
    cross_entropy,
    distillation,
    next_tokens,
)
from angeljax.train.objective import Objective
from tests.models._random_params import random_params
from tests.train import _oracle

CONFIG = DecoderConfig(
    model_type="llama",
    vocab_size=32,
    hidden_size=16,
    num_layers=1,
    intermediate_size=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    tied=True,
)
LARGER = dataclasses.replace(
    CONFIG, hidden_size=24, num_layers=2, num_kv_heads=2, tied=False
)
MASK = np.array([[False, True, True, True, True], [True] * 5])


def test_relations_match_their_definition(rng: np.random.Generator) -> None:
    b, t, heads = 2, 5, 2
    student = [rng.standard_normal((b, t, h, 4)) for h in (4, 1, 1)]
    teacher = [rng.standard_normal((b, t, h, 6)) for h in (4, 2, 2)]
    valid = rng.random((b, t)) < 0.7

    def relations(a: np.ndarray, batch: int, head: int, row: int) -> np.ndarray:
        a = a.reshape(b, t, -1)
        d = a.shape[-1] // heads
        a = a[batch, :, head * d : (head + 1) * d]
        keys = [s for s in range(row + 1) if MASK[batch, s] or s == row]
        return _oracle.log_softmax(a[keys] @ a[row] / np.sqrt(d))

    expected = 0.0
    for s, u in zip(student, teacher, strict=True):
        for n, row in np.argwhere(valid):
            for h in range(heads):
                kl = _oracle.kl(relations(u, n, h, row), relations(s, n, h, row))
                expected += kl / heads / 3
    value = jax.jit(relation_loss, static_argnames="heads")(
        tuple(map(jnp.float32, student)),
        tuple(map(jnp.float32, teacher)),
        valid,
        heads=heads,
        mask=MASK,
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="cannot be cut into 3 relation heads"):
        relation_loss(
            tuple(map(jnp.float32, student)),
            tuple(map(jnp.float32, teacher)),
            jnp.asarray(valid),
            heads=3,
        )


def test_hidden_states_match_their_definition(rng: np.random.Generator) -> None:
    s, t = rng.standard_normal((2, 2, 5, 3))
    valid = np.array(MASK)
    a, b = s[valid], t[valid]
    mse = (np.mean((a - b) ** 2, -1) / np.mean(b**2)).sum()
    cosine = (
        1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    ).sum()
    for kind, expected in (("mse", mse), ("cosine", cosine)):
        args = ([jnp.float32(s)], [jnp.float32(t)], jnp.asarray(valid))
        np.testing.assert_allclose(hidden_loss(*args, kind=kind), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="widths 3 and 2 need projections"):
        hidden_loss([jnp.float32(s)], [jnp.float32(t[..., :2])], jnp.asarray(valid))


def test_layers() -> None:
    assert layer_pairs(DistillOptions(), 3, 3) == ((0, 0), (1, 1), (2, 2))
    assert layer_pairs(DistillOptions(), 4, 2) == ((0, 0), (1, 0), (2, 0), (3, 1))
    assert relation_layers(DistillOptions(), 2, 6) == (1, 5)
    with pytest.raises(ValueError, match="layer 6 is none of the teacher's 6"):
        layer_pairs(DistillOptions(hidden_layers=((0, 6),)), 2, 6)


def test_objective_is_the_sum_of_its_terms_and_learns() -> None:
    model, teacher = LanguageModel(CONFIG), LanguageModel(LARGER, scan_layers=True)
    options = DistillOptions(
        weight=0.5, lm_weight=0.25, hidden_weight=2.0, relation_weight=3.0
    )
    objective = Objective(
        model=model, teacher=teacher, options=options, chunk_tokens=4, remat=True
    )
    params = {
        "model": random_params(model, 0),
        "projections": objective.init_projections(jax.random.key(1)),
    }
    reference = random_params(teacher, 2)
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 32, (2, 5)))
    labels = next_tokens(tokens)

    def loss(params: Any) -> Any:
        total, sums = objective(
            params["model"],
            tokens,
            labels,
            reference,
            mask=MASK,
            projections=params["projections"],
        )
        return total / sums["count"], sums

    @jax.jit
    def terms(params: Any) -> Any:
        z = model.apply(params["model"], tokens, mask=MASK)[0]
        zt = teacher.apply(reference, tokens, mask=MASK)[0]
        return cross_entropy(z, labels, MASK), distillation(z, zt, labels, MASK)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (first, sums), grads = step(params)
    ce, kd = terms(params)
    count = sums["count"]
    assert count == 7
    np.testing.assert_allclose(sums["ce"] / count, ce, rtol=1e-5)
    np.testing.assert_allclose(sums["kd"] / count, kd, rtol=1e-4)
    total = (
        0.5 * sums["kd"]
        + 0.25 * sums["ce"]
        + 2.0 * sums["hidden"]
        + 3.0 * sums["relation"]
    )
    np.testing.assert_allclose(first, total / count, rtol=1e-6)
    assert all(np.any(g) for g in jax.tree.leaves(grads))
    for _ in range(3):
        params = jax.tree.map(lambda p, g: p - 0.005 * g, params, grads)
        (last, _), grads = step(params)
    assert last < first


def test_refused() -> None:
    model = LanguageModel(CONFIG)
    other = LanguageModel(dataclasses.replace(CONFIG, vocab_size=33))
    with pytest.raises(ValueError, match="vocabulary of 32 and the teacher of 33"):
        Objective(model=model, teacher=other, options=DistillOptions())
    with pytest.raises(ValueError, match="need the teacher itself"):
        Objective(model=model, options=DistillOptions(hidden_weight=1.0))
