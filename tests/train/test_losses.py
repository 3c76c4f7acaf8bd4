"""Losses against float64 numpy; whole against in chunks; what is refused."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.train._token_losses import _largest
from angeljax.train.chunked import chunked_loss, head_logits
from angeljax.train.losses import (
    LOSSES,
    DistillOptions,
    TopK,
    cross_entropy,
    distillation,
    next_tokens,
)
from tests.train import _oracle

V, K = 12, 5
LABELS = np.array([[3, -100, 0, 11], [7, 1, -100, 2]])
_mean = functools.partial(jax.jit, static_argnames=("loss", "temperature", "top_k"))(
    jax.value_and_grad(distillation)
)


@pytest.fixture(scope="module")
def logits() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return tuple(3 * rng.standard_normal((2, *LABELS.shape, V)))  # type: ignore


@pytest.mark.parametrize("loss", LOSSES)
def test_matches_its_definition(loss: str, logits: Any) -> None:
    zs, zt = logits
    tau = 1.0 if loss == "kl" else 1.7
    value, grad = _mean(
        jnp.float32(zs), jnp.float32(zt), LABELS, loss=loss, temperature=tau, top_k=K
    )
    expected = functools.partial(
        _oracle.mean, zt=zt, labels=LABELS, loss=loss, tau=tau, k=K
    )
    np.testing.assert_allclose(value, expected(zs), rtol=2e-6)
    np.testing.assert_allclose(
        grad, _oracle.gradient(expected, zs), rtol=1e-4, atol=1e-6
    )


def test_cross_entropy_matches_its_definition(logits: Any) -> None:
    zs, zt = logits
    expected = functools.partial(_oracle.mean, zt=zt, labels=LABELS, loss="ce")
    value, grad = jax.jit(jax.value_and_grad(cross_entropy))(jnp.float32(zs), LABELS)
    np.testing.assert_allclose(value, expected(zs), rtol=2e-6)
    np.testing.assert_allclose(
        grad, _oracle.gradient(expected, zs), rtol=1e-4, atol=1e-6
    )


def test_limits(logits: Any) -> None:
    zs, zt = map(jnp.float32, logits)
    run = functools.partial(_mean, temperature=1.0, top_k=K)
    for loss in ("kl", "rkl", "cakld"):
        value, grad = run(zs, zs, LABELS, loss=loss)
        assert abs(value) < 1e-6 and np.abs(grad).max() < 1e-6
    # All entries are the whole vocabulary.
    whole, _ = _mean(zs, zt, LABELS, loss="kl_top", temperature=1.0, top_k=V)
    np.testing.assert_allclose(whole, run(zs, zt, LABELS, loss="kl")[0], rtol=1e-6)
    # A teacher that is sure of the true token asks for rkl, of another for kl.
    labels = np.full(LABELS.shape, 4)
    for sure, loss in ((4, "rkl"), (5, "kl")):
        sharp = zt.at[..., sure].add(60.0)
        value, _ = run(zs, sharp, labels, loss="cakld")
        np.testing.assert_allclose(
            value, run(zs, sharp, labels, loss=loss)[0], rtol=1e-5
        )
    # Nothing to learn from, with padding that is not finite.
    value, grad = run(zs.at[0].set(jnp.nan), zt, np.full((2, 4), -100), loss="kl")
    assert value == 0 and not np.any(grad)
    # Entries that both rule out do not count.
    value, grad = run(
        zs.at[..., 3].set(-jnp.inf), zt.at[..., 3].set(-jnp.inf), labels, loss="kl"
    )
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_labels_are_the_next_tokens() -> None:
    tokens = jnp.asarray([[7, 8, 9]])
    assert next_tokens(tokens).tolist() == [[8, 9, -100]]
    mask = jnp.asarray([[True, True, False]])
    assert next_tokens(tokens, mask).tolist() == [[8, -100, -100]]


def test_largest_is_exact_with_ties(rng: np.random.Generator) -> None:
    z = np.float32(rng.standard_normal((3, 200)))
    z[0, :50] = z[0].max() + 1
    z[1] = np.round(z[1])  # both zeros, and many ties
    kept = np.asarray(jax.jit(_largest, static_argnums=1)(z, 17))
    np.testing.assert_array_equal(kept, z >= np.sort(z)[:, -17, None])


B, T, D = 2, 7, 6


def _parts(rng: np.random.Generator, tied: bool) -> Any:
    normal = lambda *shape: jnp.float32(rng.standard_normal(shape))  # noqa: E731
    head = {"embedding": normal(V, D)} if tied else {"kernel": normal(D, V)}
    labels = jnp.asarray(rng.integers(-1, V, (B, T)))
    return normal(B, T, D), head, labels, (normal(B, T, 4), {"kernel": normal(4, V)})


@pytest.mark.parametrize("loss, tied", [("cakld", True), ("kl_top", False)])
def test_chunked_is_whole(loss: str, tied: bool, rng: np.random.Generator) -> None:
    hidden, head, labels, teacher = _parts(rng, tied)
    options = DistillOptions(
        loss=loss, weight=0.7, lm_weight=0.3, temperature=2.0, top_k=K
    )

    def whole(hidden: Any, head: Any) -> Any:
        z, zt = head_logits(head, hidden), head_logits(teacher[1], teacher[0])
        kd = distillation(z, zt, labels, loss=loss, temperature=2.0, top_k=K)
        return 0.7 * kd + 0.3 * cross_entropy(z, labels)

    def chunked(hidden: Any, head: Any) -> Any:
        loss, sums = chunked_loss(
            hidden, head, labels, options, teacher=teacher, chunk_tokens=4
        )
        return loss / sums["count"], sums

    expected = jax.jit(jax.value_and_grad(whole, (0, 1)))(hidden, head)
    step = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))
    (value, sums), grads = step(hidden, head)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        grads,
        expected[1],
    )
    assert sums["count"] == (labels >= 0).sum()
    np.testing.assert_allclose(sums["loss"], 0.7 * sums["kd"] + 0.3 * sums["ce"])


def test_chunks_keep_one_chunk_of_logits_and_skip_a_frozen_head(
    rng: np.random.Generator,
) -> None:
    hidden, head, labels, teacher = _parts(rng, True)
    options = DistillOptions()

    def loss(hidden: Any, head: Any) -> Any:
        return chunked_loss(
            hidden, head, labels, options, teacher=teacher, chunk_tokens=4
        )[0]

    both = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, head))
    frozen = str(jax.make_jaxpr(jax.grad(loss))(hidden, head))
    assert f"{B},{T},{V}]" not in both  # the logits of the whole batch
    assert both.count("dot_general") == frozen.count("dot_general") + 1


def test_a_teacher_of_few_entries(logits: Any) -> None:
    zs, zt = map(jnp.float32, logits)
    log_probs = jax.nn.log_softmax(zt)
    # With all entries kept nothing is lost.
    values, ids = jax.lax.top_k(log_probs, V)
    gold = jnp.take_along_axis(log_probs, jnp.maximum(LABELS, 0)[..., None], -1)[..., 0]
    full = TopK(ids, values, jnp.zeros(LABELS.shape), gold)
    for loss in ("cakld", "kl_top"):
        run = functools.partial(_mean, loss=loss, temperature=1.0, top_k=K)
        (a, da), (b, db) = run(zs, full, LABELS), run(zs, zt, LABELS)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(da, db, rtol=1e-3, atol=2e-5)
    # With some, what is left out is one entry.
    few = TopK(ids[..., :3], values[..., :3], jnp.exp(values[..., 3:]).sum(-1), gold)
    s = np.float64(jnp.take_along_axis(jax.nn.log_softmax(zs), ids, -1))
    t = np.float64(values)
    rest = [np.log(np.exp(x[..., 3:]).sum(-1, keepdims=True)) for x in (s, t)]
    s, t = (
        np.concatenate([x[..., :3], r], -1) for x, r in zip((s, t), rest, strict=True)
    )
    each = (np.exp(t) * (t - s)).sum(-1)
    value, _ = _mean(zs, few, LABELS, loss="kl", temperature=1.0, top_k=K)
    np.testing.assert_allclose(value, each[LABELS >= 0].mean(), rtol=1e-4)


@pytest.mark.parametrize(
    "data, message",
    [
        ({"los": "kl"}, "no field 'los' .did you mean 'loss'"),
        ({"loss": "jsd"}, "distill.loss must be one of kl, rkl"),
        ({"temperature": 0}, "distill.temperature must be > 0"),
        ({"weight": -1}, "distill.weight must be a number >= 0"),
        ({"top_k": 1.5}, "distill.top_k must be an integer"),
        ({"hidden_layers": [1, 2]}, "hidden_layers holds pairs"),
        ({"weight": 0, "lm_weight": 0}, "nothing to learn"),
        (["kl"], "must be a mapping"),
    ],
)
def test_bad_options(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillOptions.from_dict(data)


def test_options_round_trip() -> None:
    options = DistillOptions.from_dict(
        {"loss": "rkl", "hidden_layers": [[0, 1]], "relation_layers": [3, 5]}
    )
    assert DistillOptions.from_dict(options.to_dict()) == options
    assert options.hidden_layers == ((0, 1),)


def test_refused(logits: Any, rng: np.random.Generator) -> None:
    zs, zt = map(jnp.float32, logits)
    with pytest.raises(ValueError, match="vocabulary of 12 and the teacher of 11"):
        distillation(zs, zt[..., :-1], LABELS)
    few = TopK(jnp.zeros((2, 4, 3), int), zt[..., :3], zt[..., 0], zt[..., 0])
    for change, message in (
        ({"loss": "mse"}, "needs all logits"),
        ({"loss": "kl", "temperature": 2.0}, "use kl_top"),
        ({"loss": "kl_top", "top_k": 4}, "3 likeliest entries are kept"),
    ):
        with pytest.raises(ValueError, match=message):
            distillation(zs, few, LABELS, **change)
    hidden, head, labels, teacher = _parts(rng, True)
    with pytest.raises(ValueError, match="there is no teacher"):
        chunked_loss(hidden, head, labels, DistillOptions())
    other = (teacher[0], {"kernel": jnp.ones((4, V + 1))})
    with pytest.raises(ValueError, match="vocabulary of 12 and the teacher of 13"):
        chunked_loss(hidden, head, labels, DistillOptions(), teacher=other)
    with pytest.raises(ValueError, match="do not go together"):
        chunked_loss(hidden, head, labels[:, 1:], DistillOptions(), teacher=teacher)
