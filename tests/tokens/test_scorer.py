"""The learned scorer: its formula, its files, DiffTopK and the training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

from angeljax.tokens import (
    ScorerTask,
    init_scorer,
    load_scorer,
    save_scorer,
    score_tokens,
    scorer_optimizer,
    soft_mask,
    soft_top_k,
    visionselector,
)
from angeljax.tokens._scorer_training import binary_cross_entropy
from angeljax.train.step import init_state, make_step
from tests.tokens import _oracles

D, H = 12, 6


@pytest.fixture
def scorer():
    found = init_scorer(jax.random.key(0), D, H, scale=1.0)
    found["q_proj"]["bias"] = jax.random.normal(jax.random.key(1), (H,))
    found["k_proj"]["bias"] = jax.random.normal(jax.random.key(2), (H,))
    return found


def published(scorer, prefix=""):
    return {
        f"{prefix}{module}.{name}": np.ascontiguousarray(np.asarray(value).T)
        for module, leaves in scorer.items()
        for name, value in zip(
            ("weight", "bias"), (leaves["kernel"], leaves["bias"]), strict=True
        )
    }


def test_collapse_is_the_quadratic_form(scorer, rng):
    x = rng.normal(size=(2, 17, D)).astype(np.float32)
    mask = rng.random((2, 17)) < 0.7
    weights = published(scorer).values()
    wq, bq, wk, bk = [np.asarray(w, np.float64) for w in weights]
    found = jax.jit(score_tokens)(scorer, x)
    masked = jax.jit(score_tokens)(scorer, x, mask)
    for b in range(2):
        want = _oracles.score(wq, bq, wk, bk, x[b].astype(np.float64))
        np.testing.assert_allclose(found[b], want, rtol=2e-5, atol=2e-5)
        want = _oracles.score(wq, bq, wk, bk, x[b][mask[b]].astype(np.float64))
        np.testing.assert_allclose(masked[b][mask[b]], want, rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="for embeddings of 12, embeds has 3"):
        score_tokens(scorer, x[..., :3])


def test_published_size():
    shapes = jax.eval_shape(lambda k: init_scorer(k, 3584), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 2 * (3584 * 1792 + 1792)


@pytest.mark.parametrize("prefix", ["", "module.visual.importance_scorer._orig_mod."])
def test_published_files_load(scorer, tmp_path, prefix):
    tensors = published(scorer, prefix)
    if prefix:  # beside the rest of a model
        tensors["model.visual.q_proj.weight"] = np.ones((2, 2), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "modeling.py").write_text("raise SystemExit('code was run')")
    found = load_scorer(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found, scorer)
    save_scorer(tmp_path / "mine.safetensors", found)
    again = load_scorer(tmp_path / "mine.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again, scorer)
    with pytest.raises(ValueError, match="2 .safetensors files"):
        load_scorer(tmp_path)


def test_bfloat16_files_load(scorer, tmp_path):
    from safetensors.flax import save_file as save

    tensors = published(scorer)
    save(
        {k: jnp.asarray(v, jnp.bfloat16) for k, v in tensors.items()},
        tmp_path / "a.safetensors",
    )
    found = load_scorer(tmp_path / "a.safetensors")["q_proj"]["kernel"]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, scorer["q_proj"]["kernel"], rtol=1e-2)


def test_other_files_are_refused(scorer, tmp_path):
    with pytest.raises(FileNotFoundError, match="nor a folder with one"):
        load_scorer(tmp_path / "nothing")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match="may run code"):
        load_scorer(tmp_path / "pytorch_model.bin")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
    with pytest.raises(ValueError, match="no readable safetensors"):
        load_scorer(file)
    tensors = published(scorer)
    save_file({**tensors, "text_proj.weight": np.ones((2, 2), np.float32)}, file)
    with pytest.raises(ValueError, match="missing none; not known text_proj.weight"):
        load_scorer(file)
    save_file({k: v for k, v in tensors.items() if k != "k_proj.bias"}, file)
    with pytest.raises(ValueError, match="missing k_proj.bias"):
        load_scorer(file)
    save_file({**tensors, "k_proj.bias": np.ones(2, np.float32)}, file)
    with pytest.raises(ValueError, match="k_proj.bias is .2., which does not go with"):
        load_scorer(file)


def test_soft_top_k(rng):
    w = np.concatenate([rng.normal(size=(4, 30)), 200 * rng.normal(size=(4, 30))])
    k = np.array([1, 6, 29, 3.5, 1, 6, 29, 12])
    found = np.asarray(jax.jit(soft_top_k)(w.astype(np.float32), k))
    np.testing.assert_allclose(found.sum(-1), k, rtol=1e-4)
    assert np.all((found >= 0) & (found <= 1))
    order = np.argsort(w, -1)
    assert np.all(np.diff(np.take_along_axis(found, order, -1), axis=-1) >= 0)
    # Scores far apart make a hard choice.
    hard = soft_top_k(jnp.arange(10) * 100.0, 3)
    np.testing.assert_allclose(hard, [0] * 7 + [1] * 3, atol=1e-6)


def test_soft_top_k_of_rows_with_padding(rng):
    w = rng.normal(size=(3, 20)).astype(np.float32)
    mask = np.stack([np.arange(20) < 20, np.arange(20) % 2 == 0, np.zeros(20, bool)])
    found = np.asarray(soft_top_k(w, 4, mask))
    np.testing.assert_allclose(found[1][mask[1]], soft_top_k(w[1][::2], 4), atol=1e-6)
    assert not np.any(found[~mask]) and np.all(np.isfinite(found))
    assert soft_top_k(jnp.ones(3, jnp.bfloat16), 2).dtype == jnp.bfloat16


def test_gradient_of_soft_top_k(rng):
    """Against central differences, in float64 by NumPy."""
    w, mix = rng.normal(size=12), rng.normal(size=12)
    mask = np.arange(12) != 5

    def soft(w):
        low, high = -w.max() - 10, -w.min() + 10
        for _ in range(200):
            middle = (low + high) / 2
            few = (1 / (1 + np.exp(-w[mask] - middle))).sum() < 4
            low, high = (middle, high) if few else (low, middle)
        return np.where(mask, 1 / (1 + np.exp(-w - low)), 0)

    want = [
        (soft(w + step) - soft(w - step)) @ mix / 2e-6 for step in 1e-6 * np.eye(12)
    ]
    found = jax.grad(lambda w: soft_top_k(w, 4, mask) @ mix.astype(np.float32))(
        jnp.asarray(w, jnp.float32)
    )
    np.testing.assert_allclose(found, want, rtol=2e-4, atol=2e-5)
    # A shift of all scores changes nothing.
    np.testing.assert_allclose(np.sum(found), 0, atol=1e-6)


def test_soft_mask(scorer, rng):
    x = jnp.asarray(rng.normal(size=(2, 15, D)), jnp.bfloat16)
    mask = jnp.arange(15) < jnp.array([[15], [7]])
    masked, soft, hard = soft_mask(scorer, x, mask)
    assert masked.dtype == jnp.bfloat16
    np.testing.assert_allclose(soft.sum(-1), [3, 1], rtol=1e-3)
    scores = score_tokens(scorer, x, mask)
    top = visionselector(x, keep=0.2, importance=scores, mask=mask)
    np.testing.assert_array_equal(hard > 0, top.mask)
    with pytest.raises(ValueError, match="keep_ratio"):
        soft_mask(scorer, x, keep_ratio=1.0)


def test_binary_cross_entropy(rng):
    s, h = rng.uniform(size=(2, 9)), rng.integers(0, 2, (2, 9))
    mask = rng.random((2, 9)) < 0.6
    want = -(h * np.log(s) + (1 - h) * np.log(1 - s))[mask].mean()
    args = jnp.asarray(s, jnp.float32), jnp.asarray(h, jnp.float32), jnp.asarray(mask)
    np.testing.assert_allclose(binary_cross_entropy(*args), want, rtol=1e-5)
    never = binary_cross_entropy(jnp.zeros(4), jnp.ones(4), jnp.ones(4, bool))
    assert 80 < never <= 100


def test_training_finds_the_tokens_that_matter():
    """A frozen reader sums the tokens; those of one direction tell the class."""
    n, classes = 20, 4
    rng = np.random.default_rng(0)
    read = rng.normal(size=(D, classes)).astype(np.float32)
    marks = 3 * rng.normal(size=(1, D)).astype(np.float32)
    x = rng.normal(size=(24, n, D)).astype(np.float32)
    label = rng.integers(0, classes, 24)
    where = np.argsort(rng.random((24, n)), 1)[:, :4]
    for row, places in enumerate(where):
        x[row, places] = marks + 2 * read.T[label[row]] + 0.3 * x[row, places]

    def host(embeds, batch, frozen):
        logits = embeds.mean(1) @ frozen
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["label"]
        ).mean()

    steps = 60
    task = ScorerTask(loss_fn=host, steps=steps)
    optimizer = scorer_optimizer(steps, lr=0.05)
    scorer = init_scorer(jax.random.key(0), D, scale=0.02)
    state = init_state(scorer, optimizer)
    step = jax.jit(make_step(task, optimizer))
    batch = {"embeds": jnp.asarray(x), "label": jnp.asarray(label)}
    seen = []
    for _ in range(steps):
        state, metrics = step(state, jnp.asarray(read), batch, jax.random.key(0))
        seen.append({name: float(value) for name, value in metrics.items()})
    assert seen[0]["gamma"] == pytest.approx(0.1)
    assert seen[-1]["gamma"] == pytest.approx(2.0)
    assert seen[-1]["kept"] == pytest.approx(0.2, abs=1e-3)
    assert seen[-1]["host_loss"] < 0.5 * seen[0]["host_loss"]
    assert seen[-1]["bce"] < 0.2 * seen[0]["bce"]

    def recall(scorer):
        scores = score_tokens(scorer, batch["embeds"])
        kept = np.asarray(visionselector(x, keep=4, importance=scores).mask)
        return np.take_along_axis(kept, where, 1).mean()

    assert recall(scorer) < 0.6
    assert recall(state.trainable) > 0.95
