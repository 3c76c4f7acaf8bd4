"""The block drafter and the MTP layer in decoding, and their files."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.speculative import (
    BlockConfig,
    BlockDrafter,
    BlockModel,
    MTPDrafter,
    MTPModel,
    Sampling,
    Target,
    autoregressive,
    generate,
    load_block,
    prefill,
    save_block,
)
from angeljax.train import BlockTask, DraftLoss, MTPTask
from angeljax.train.chunked import head_logits
from tests.models._random_params import random_params
from tests.speculative._cases import PROMPTS, tiny

NEW = 20


def block_drafter(block_size=4, num_tokens=None):
    model, _ = tiny()
    block = BlockModel(
        BlockConfig.of(
            model.config, num_layers=2, block_size=block_size, mask_token_id=31
        )
    )
    return BlockDrafter(block, random_params(block, std=0.3), num_tokens)


def mtp_drafter(num_tokens=3):
    mtp = MTPModel(tiny()[0].config)
    return MTPDrafter(mtp, random_params(mtp, seed=2, std=0.3), num_tokens)


DRAFTERS = {"block": block_drafter, "mtp": mtp_drafter}


@functools.cache
def plain(rows, sampling):
    model, params = tiny()
    # Both drafters read four tokens at once.
    return autoregressive(
        model, params, PROMPTS[:rows], width=4, max_new_tokens=NEW, sampling=sampling
    )


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.8, seed=3)], ids=["greedy", "drawn"]
)
def test_text_is_that_of_plain_decoding(name, rows, sampling):
    (model, params), prompts = tiny(), PROMPTS[:rows]
    drafter = DRAFTERS[name]()
    assert drafter.width == 4
    options = {"max_new_tokens": NEW, "sampling": sampling}
    out = generate(model, params, prompts, drafter=drafter, **options)
    np.testing.assert_array_equal(out.tokens, plain(rows, sampling).tokens)
    # Drafts were made: a single token leaves the first round of MTP without.
    want = out.stats.rounds * (drafter.width - 1)
    short = np.asarray([len(p) == 1 and name == "mtp" for p in prompts])
    np.testing.assert_array_equal(out.stats.drafted, want - short * (drafter.width - 1))


def test_files_restore_the_drafter_and_say_what_is_wrong(tmp_path):
    drafter = block_drafter()
    save_block(tmp_path, drafter.model, drafter.params, dtype=jnp.float32)
    model, params = load_block(tmp_path, dtype=jnp.float32)
    assert model == drafter.model
    jax.tree.map(np.testing.assert_array_equal, params, drafter.params)
    file = tmp_path / "config.json"
    data = json.loads(file.read_text())
    assert data["dflash_config"] == {"mask_token_id": 31, "target_layer_ids": [1, 1]}
    for change, message in [
        ({"dflash_config": None}, "no dflash_config"),
        ({"dflash_config": {"mask_token_id": 1}}, "no field 'target_layer_ids'"),
        ({"block_size": 1}, "block_size must be at least 2"),
        ({"intermediate_size": 48}, "the configuration says"),
    ]:
        file.write_text(json.dumps({**data, **change}))
        with pytest.raises(ValueError, match=message):
            load_block(tmp_path)


def test_training_computes_what_the_drafter_drafts():
    """Likeliest tokens of the packed forward at an anchor: the drafts there."""
    model, params = tiny()
    drafter = block_drafter()
    task = BlockTask(target=model, block=drafter.model, dtype="float32")
    row = np.asarray([PROMPTS[3] + [2, 9, 4, 1]], np.int32)
    anchors = jnp.asarray([[2, 7, 4]])
    x, _ = jax.jit(task.hidden)(drafter.params, params, jnp.asarray(row), anchors)
    want = jnp.argmax(head_logits(model.head_params(params), x), axis=-1)
    target = Target(model, params, Sampling().sampler(3))
    sizes = jnp.asarray(anchors[0] + 1)
    tokens = jnp.asarray(np.repeat(row, 3, axis=0))
    state = prefill(target, drafter, tokens, sizes, sizes + 1, slots=24)
    draft, _ = jax.jit(drafter.draft)(target, state.drafter, state.context)
    np.testing.assert_array_equal(draft.tokens, want[0])


def test_losses_by_hand(rng):
    """Every loss with every weight, place by place in plain Python."""
    places, size = 4, 6
    z, target = rng.normal(size=(2, 3, places, size)).astype(np.float32)
    labels = rng.integers(0, size, (3, places))
    for loss, weights in [
        *(("ce", w) for w in ("exponential", "equal", "continuation")),
        *((name, "exponential") for name in ("kl", "tv", "lk_alpha", "lk_hybrid")),
        ("block_tv", "equal"),
    ]:
        options = DraftLoss(loss=loss, weights=weights, gamma=2.0, eta=1.5)
        got = options(jnp.asarray(z), jnp.asarray(labels), jnp.asarray(target))
        for row in range(3):
            terms, texts, alphas = [], [], []
            for j in range(places):
                q = np.exp(z[row, j]) / np.exp(z[row, j]).sum()
                p = np.exp(target[row, j]) / np.exp(target[row, j]).sum()
                kl = sum(x * np.log(x / y) for x, y in zip(p, q, strict=True))
                alpha = sum(min(x, y) for x, y in zip(p, q, strict=True))
                share = np.exp(-1.5 * alpha)
                texts.append(q[labels[row, j]])
                alphas.append(alpha)
                terms.append(
                    {
                        "ce": -np.log(texts[-1]),
                        "kl": kl,
                        "tv": 1 - alpha,
                        "lk_alpha": -np.log(alpha),
                        "lk_hybrid": share * kl + (1 - share) * (1 - alpha),
                    }.get(loss)
                )
            if loss == "block_tv":
                runs = [np.prod(alphas[: j + 1]) for j in range(places)]
                want = 1 - sum(runs) / places
            elif weights == "continuation":
                runs = [
                    np.prod([0.5 + 0.5 * t for t in texts[: j + 1]])
                    for j in range(places)
                ]
                want = sum(sum(runs[j:]) * terms[j] for j in range(places)) / places
            else:
                fixed = [np.exp(-j / 2.0) for j in range(places)]
                fixed = fixed if weights == "exponential" else [1.0] * places
                both = zip(fixed, terms, strict=True)
                want = sum(w * t for w, t in both) / sum(fixed)
            np.testing.assert_allclose(got[row], want, rtol=1e-4)


def test_mtp_steps_of_training_are_those_of_drafting():
    """The likeliest tokens of the steps from a place: the drafts there."""
    model, params = tiny()
    drafter = mtp_drafter()
    task = MTPTask(
        target=model, mtp=drafter.model, steps=3, on_policy=True, dtype="float32"
    )
    row = np.asarray([PROMPTS[3] + [2, 9, 4, 1, 5, 5]], np.int32)
    x, _ = jax.jit(task.hidden)(drafter.params, params, jnp.asarray(row))
    want = jnp.argmax(head_logits(model.head_params(params), x), axis=-1)
    places = jnp.asarray([2, 7, 4])
    # The pair of place i ends with token i + 1: the draft begins at i + 2.
    target = Target(model, params, Sampling().sampler(3))
    sizes = places + 2
    tokens = jnp.asarray(np.repeat(row, 3, axis=0))
    state = prefill(target, drafter, tokens, sizes, sizes + 4, slots=24)
    draft, _ = jax.jit(drafter.draft)(target, state.drafter, state.context)
    np.testing.assert_array_equal(draft.tokens, want[0, places])
