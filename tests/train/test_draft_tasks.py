"""Trainings of block drafters and MTP layers: their losses, and what they lead to."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.speculative import (
    BlockConfig,
    BlockModel,
    MTPModel,
    autoregressive,
    generate,
)
from angeljax.train import (
    BlockTask,
    DraftLoss,
    MTPTask,
    OptimizerConfig,
    fit,
    make_optimizer,
)
from tests.models._random_params import random_params
from tests.speculative import _numpy as by_hand
from tests.speculative._cases import PROMPTS, tiny


def block_model(**options):
    sizes = {"num_layers": 2, "block_size": 4, "mask_token_id": 31, **options}
    return BlockModel(BlockConfig.of(tiny()[0].config, **sizes))


@functools.cache
def text():
    """Two rows of tokens, which are answers, and what the target makes of them."""
    model, params = tiny()
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 31, size=(2, 12)).astype(np.int32)
    mask = np.asarray([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0], [0, 1, 0, 0] + [1] * 8])
    found = jax.jit(lambda t: model.features(params, t, hidden=(0, 1)))(tokens[:, :-1])
    hidden, final = by_hand.wide((found.hidden, found.final))
    return tokens, mask.astype(bool), hidden, final


def close(got, want):
    loss, metrics = got
    got = {"loss": loss, **metrics}
    assert set(got) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-4, err_msg=name)


@pytest.mark.parametrize(
    ("loss", "weights"),
    [
        *(("ce", w) for w in ("exponential", "equal", "continuation")),
        *((name, "exponential") for name in ("kl", "tv", "lk_alpha", "lk_hybrid")),
        ("block_tv", "equal"),
    ],
)
def test_losses_by_hand(loss, weights, rng):
    z, target = rng.normal(size=(2, 3, 4, 6)).astype(np.float32)
    labels = rng.integers(0, 6, (3, 4))
    options = DraftLoss(loss=loss, weights=weights, gamma=2.0, eta=1.5)
    counts = np.asarray([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], np.float32)
    got = options(*map(jnp.asarray, (z, labels, target, counts)))
    for row in range(3):
        draft = z[row], labels[row], target[row], counts[row]
        want = by_hand.draft_loss(options, *draft)
        np.testing.assert_allclose(got[row], want, rtol=1e-4)
    everything = options(*map(jnp.asarray, (z, labels, target)))
    np.testing.assert_allclose(everything[0], got[0], rtol=1e-6)
    assert everything[1] > got[1] > got[2] == 0


@pytest.mark.parametrize(("loss", "masked"), [("ce", False), ("lk_hybrid", True)])
def test_the_loss_of_blocks_by_hand(loss, masked):
    model, params = tiny()
    block = block_model(target_layers=(1, 0))
    task = BlockTask(
        target=model, block=block, loss_options=DraftLoss(loss=loss), dtype="float32"
    )
    tokens, mask, hidden, final = text()
    # More anchors than there are places: all of them, whatever the key.
    batch = {"tokens": tokens, **({"mask": mask} if masked else {})}
    trainable = {"params": random_params(block, std=0.3)}
    scale = np.linspace(0.5, 2, 32).astype(np.float32)
    frozen = {"target": params, "scale": scale}
    got = jax.jit(task.loss)(trainable, frozen, batch, 0, jax.random.key(0))
    ours, theirs = by_hand.wide((trainable["params"], params))
    head = theirs["lm_head"]["kernel"]
    drafts: list = [[], [], [], []]
    for row, line in enumerate(tokens):
        features = np.concatenate([hidden[1][row], hidden[0][row]], axis=-1) * scale
        for anchor in range(len(line) - 3):
            x = by_hand.block_hidden(
                block.config,
                ours,
                theirs["embed_tokens"]["embedding"],
                features,
                line,
                anchor,
            )
            after = slice(anchor + 1, anchor + 4)
            drafts[0].append(np.asarray(x) @ head)
            drafts[1].append(line[after])
            drafts[2].append(final[row, anchor : anchor + 3] @ head)
            drafts[3].append(mask[row, after] if masked else np.ones(3))
    close(got, by_hand.mean_loss(task.loss_options, *drafts))


@pytest.mark.parametrize(("loss", "masked"), [("ce", False), ("kl", True)])
def test_the_loss_of_chains_by_hand(loss, masked):
    """With a mask also on policy: steps after the first read what they drafted."""
    model, params = tiny()
    mtp = MTPModel(model.config)
    task = MTPTask(
        target=model,
        mtp=mtp,
        steps=3,
        on_policy=masked,
        loss_options=DraftLoss(loss=loss, weights="equal"),
        dtype="float32",
    )
    tokens, mask, _, final = text()
    batch = {"tokens": tokens, **({"mask": mask} if masked else {})}
    layer = random_params(mtp, seed=2, std=0.3)
    got = jax.jit(task.loss)({"params": layer}, {"target": params}, batch, 0, None)
    ours, theirs = by_hand.wide((layer, params))
    head = theirs["lm_head"]["kernel"]
    drafts: list = [[], [], [], []]
    for row, line in enumerate(tokens):
        for place in range(len(line) - 4):
            x = by_hand.mtp_hidden(
                model.config,
                ours,
                theirs["embed_tokens"]["embedding"],
                head,
                final[row],
                line,
                place,
                3,
                task.on_policy,
            )
            after = slice(place + 2, place + 5)
            drafts[0].append(np.asarray(x) @ head)
            drafts[1].append(line[after])
            drafts[2].append(final[row, place + 1 : place + 4] @ head)
            drafts[3].append(mask[row, after] if masked else np.ones(3))
    close(got, by_hand.mean_loss(task.loss_options, *drafts))


def test_anchors_stand_before_answers_and_change_with_the_key():
    model, params = tiny()
    task = BlockTask(target=model, block=block_model(), anchors=4, dtype="float32")
    tokens, mask, _, _ = text()
    trainable = {"params": random_params(task.block, std=0.3)}
    frozen = {"target": params, "scale": np.ones(32, np.float32)}
    loss = jax.jit(task.loss)
    found = {}
    for key in range(3):
        for name, few in (("many", mask), ("few", mask & (np.arange(12) < 5))):
            batch = {"tokens": tokens, "mask": few}
            got = loss(trainable, frozen, batch, 0, jax.random.key(key))
            found[name, key] = float(got[0]), int(got[1]["weight"])
    # Answers begin at three and four places of the first nine, or at two and two.
    assert {n for (name, _), (_, n) in found.items() if name == "many"} == {8}
    assert {n for (name, _), (_, n) in found.items() if name == "few"} == {4}
    assert len({x for (name, _), (x, _) in found.items() if name == "many"}) == 3
    alike = [x for (name, _), (x, _) in found.items() if name == "few"]
    np.testing.assert_allclose(alike, alike[0], rtol=1e-5)
    nothing = {"tokens": tokens, "mask": np.zeros_like(mask)}
    got = loss(trainable, frozen, nothing, 0, jax.random.key(0))
    assert float(got[0]) == 0 and float(got[1]["weight"]) == 0


@pytest.mark.parametrize("name", ["block", "mtp"])
def test_a_text_learnt_by_heart_is_accepted_whole(name):
    model, params = tiny()
    run = model, params, PROMPTS[3:4]
    want = autoregressive(*run, max_new_tokens=32).tokens
    assert len(set(np.asarray(want)[0].tolist())) > 8
    row = np.concatenate([PROMPTS[3], np.asarray(want)[0]])[None].astype(np.int32)
    options = {"target": model, "dtype": "float32"}
    key = jax.random.key(1)
    if name == "block":
        task = BlockTask(block=block_model(num_layers=1), **options)
        start = task.init(params, row, key=key)
    else:
        task = MTPTask(mtp=MTPModel(model.config), steps=3, **options)
        start = task.init(params, key=key)
    untrained = generate(*run, drafter=task.drafter(*start), max_new_tokens=32)
    result = fit(
        task.loss,
        start[0],
        lambda step: {"tokens": row},
        frozen=start[1],
        optimizer=make_optimizer(OptimizerConfig(lr=2e-2), 120),
        steps=120,
    )
    drafter = task.drafter(result.trainable, start[1])
    got = generate(*run, drafter=drafter, max_new_tokens=32)
    np.testing.assert_array_equal(got.tokens, want)
    np.testing.assert_array_equal(untrained.tokens, want)
    assert untrained.tau < 2 and got.tau > 2.5
    assert result.metrics["tau"] > 3
