"""EAGLE-3: what is trained is what is drafted, and the text stays the target's."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from angeljax.models import FusedRows, LanguageModel
from angeljax.models.config import ModelError
from angeljax.speculative import (
    EagleConfig,
    EagleDrafter,
    EagleTree,
    Hybrid,
    PromptLookup,
    Sampling,
    Target,
    autoregressive,
    decode,
    generate,
    init_eagle,
    load_eagle,
    prefill,
    prepare_drafter,
    save_eagle,
)
from angeljax.speculative._eagle_head import draft_logits, eagle_ids, read_step
from angeljax.train import (
    EagleLoss,
    EagleTask,
    OptimizerConfig,
    feature_scales,
    fit,
    make_optimizer,
)
from angeljax.train._acceptance import distance
from angeljax.train.eagle_data import answer_mask, draft_vocabulary
from tests.models._random_params import random_params
from tests.speculative._cases import PROMPTS, tiny

IDS = np.sort(np.random.default_rng(0).permutation(32)[:20])


@functools.cache
def small():
    """A random head of 20 of the 32 tokens, with logits that tell them apart."""
    model, params = tiny()
    config = EagleConfig.of(model.config, draft_vocab_size=20)
    key = jax.random.key(1)
    head = init_eagle(config, key, target=params, ids=IDS, norm_scale=1.0, std=0.2)
    return config, head


@functools.cache
def plain(temperature):
    model, params = tiny()
    sampling = Sampling(temperature=temperature)
    return autoregressive(
        model, params, PROMPTS, max_new_tokens=16, sampling=sampling
    ).tokens


def test_rejection_accepts_drafts_of_a_part_of_the_vocabulary():
    model, params = tiny()
    config, head = small()
    sampling = Sampling(temperature=0.8, rule="rejection")
    drafter = EagleDrafter(config, head, 3)
    out = generate(
        model, params, PROMPTS, drafter=drafter, max_new_tokens=16, sampling=sampling
    )
    assert out.tau > 1.1 and int(out.tokens.max()) < 32


@functools.partial(jax.jit, static_argnums=(0, 2))
def features_of(config, head, model, params, text):
    found = model.features(params, text[None, :-1], hidden=config.target_layers)
    return jnp.concatenate(found.hidden, -1) @ head["fc"]["kernel"]


@functools.partial(jax.jit, static_argnums=0)
def whole_text(config, head, params, text, own):
    """h' of all places of a text, and the logits of each, without any cache."""
    size = len(text) - 1
    embeds = params["embed_tokens"]["embedding"][text[None, 1:]]

    def attend(q, key, value):
        seen = jnp.tril(jnp.ones((size, size), bool))
        group = q.shape[2] // key.shape[2]
        key, value = (jnp.repeat(x, group, 2) for x in (key, value))
        s = jnp.einsum("bthd,bshd->bhts", q, key) * config.head_dim**-0.5
        w = jax.nn.softmax(jnp.where(seen, s, -jnp.inf), -1)
        return jnp.einsum("bhts,bshd->bthd", w, value)

    h = read_step(config, head, embeds, own, jnp.arange(size)[None], attend)
    return h, draft_logits(config, head, h)


def by_hand(config, head, model, params, text, start, count):
    """Recurrent logits after `text[: start + 2]`; nothing sees what comes later."""
    own = features_of(config, head, model, params, text)
    out = []
    for k in range(count):
        h, logits = whole_text(config, head, params, text, own)
        out.append(logits[0, start + k])
        # Where the target has not been yet: what the layer gave one place before.
        own = own.at[:, start + k + 1].set(h[:, start + k])
    return jnp.stack(out)


def test_steps_of_training_are_those_of_drafting():
    model, params = tiny()
    config, head = small()
    text = jnp.concatenate([jnp.asarray(PROMPTS[3]), plain(0.0)[3]])[:13]
    task = EagleTask(model, config, EagleLoss(steps=3), "float32")
    trainable, frozen = task.init(params, head)
    _, features = jax.jit(task.target)(frozen, text[None, :-1])
    hidden = jax.jit(task.hidden)(trainable, frozen, features, text[None])
    for start in (0, 7):
        want = by_hand(config, head, model, params, text, start, 3)
        for k, h in enumerate(hidden):
            got = draft_logits(config, head, h[0, start])
            np.testing.assert_allclose(got, want[k], rtol=1e-4, atol=1e-4)
    # And what the drafter proposes is the likeliest of the recurrence.
    target = Target(model, params, Sampling().sampler(1))
    n = jnp.asarray([9])
    drafter = EagleDrafter(config, head, 3)
    state = prefill(target, drafter, text[None, :9], n, n + 4, slots=16)
    draft, _ = jax.jit(drafter.draft)(target, state.drafter, state.context)
    known, ids = list(map(int, text[:9])), eagle_ids(head)
    for k in range(3):
        line = jnp.asarray(known + [0] * (len(text) - len(known)))
        logits = by_hand(config, head, model, params, line, 7, k + 1)[-1]
        known.append(int(ids[logits.argmax()]))
    assert draft.tokens[0].tolist() == known[9:]


def test_a_text_learnt_by_heart_is_accepted_whole():
    model, params = tiny()
    config = EagleConfig.of(model.config)
    want = autoregressive(model, params, PROMPTS[:1], max_new_tokens=32).tokens
    row = np.concatenate([PROMPTS[0], np.asarray(want)[0]])[None].astype(np.int32)
    batch = {"tokens": row, "mask": np.ones(row.shape, bool)}
    task = EagleTask(model, config, EagleLoss(steps=3), "float32")
    scales = feature_scales(model, params, config.target_layers, [row])
    head = init_eagle(config, jax.random.key(1), target=params)
    trainable, frozen = task.init(params, head, scales)
    result = fit(
        task.loss,
        trainable,
        lambda step: batch,
        frozen=frozen,
        optimizer=make_optimizer(OptimizerConfig(lr=1e-2), 90),
        steps=90,
    )
    drafter = EagleDrafter(config, task.head(result.trainable, frozen), 3)
    got = generate(model, params, PROMPTS[:1], drafter=drafter, max_new_tokens=32)
    np.testing.assert_array_equal(got.tokens, want)
    assert got.tau >= 3
    assert result.metrics["tau"] > 3


def test_the_head_of_a_hybrid_has_read_the_text():
    """Its cache is that of the text read at once, whichever nodes were accepted.

    The head reads rounds by the kernels for few tokens, and the text without them.
    """
    config = dataclasses.replace(tiny()[0].config, hidden_size=32, head_dim=32)
    model = LanguageModel(config)
    params = random_params(model, std=0.2)
    own = EagleConfig.of(config, draft_vocab_size=20)
    head = init_eagle(own, jax.random.key(1), ids=IDS, std=0.2)
    plain = EagleDrafter(own, head, growth=EagleTree(8, 2, 2))
    fused = prepare_drafter(model, plain, transpose=True, rows=FusedRows())
    target = Target(model, params, Sampling().sampler(2))
    # One that is too long for the kernels, and one without any pair.
    text, sizes = jnp.asarray([[5, 6, 7] * 6, [9] * 18]), jnp.asarray([18, 1])
    drafter = Hybrid(fused, PromptLookup(6))
    state = prefill(target, drafter, text, sizes, sizes + 40, slots=64)
    stops, rounds = jnp.zeros(0, jnp.int32), jnp.int32(5)
    state = decode(target, drafter, state, stops, rounds)
    # Continuations longer than any branch of the head's own tree are accepted.
    assert int(state.stats.hits[3]) > 0
    known = prefill(
        target, plain, state.tokens[:, :64], state.lengths, state.limits, slots=64
    )
    got, want = state.drafter, known.drafter
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    for row, n in enumerate(map(int, state.lengths)):
        fresh = int(got.fresh[row])
        assert 0 < fresh < n
        for x, y in zip(got[:2], want[:2], strict=True):
            close(x[row, :, : n - 1 - fresh], y[row, :, : n - 1 - fresh])
        # The last of what is yet to be read.
        close(got.features[row, fresh - 1], want.features[row, 0])
    # And it drafts the same.
    drafts = [
        jax.jit(d.draft)(target, s, state.context)[0]
        for d, s in ((plain, want), (fused, got))
    ]
    jax.tree.map(np.testing.assert_array_equal, *drafts)
    # What the kernels do not take is left to XLA.
    narrow, half = EagleDrafter(*small()), LanguageModel(config, dtype=jnp.bfloat16)
    for wrong, other in ((tiny()[0], narrow), (half, plain)):
        assert prepare_drafter(wrong, other, rows=FusedRows()).rows is None


def test_losses_by_hand(rng):
    p, q = rng.normal(size=(2, 5, 7)).astype(np.float32)
    for row in range(5):
        a = np.exp(p[row]) / np.exp(p[row]).sum()
        b = np.exp(q[row]) / np.exp(q[row]).sum()
        kl = sum(x * np.log(x / y) for x, y in zip(a, b, strict=True))
        alpha = sum(min(x, y) for x, y in zip(a, b, strict=True))
        c = np.exp(-3 * alpha)
        want = {
            "kl": kl,
            "tv": 1 - alpha,
            "lk_alpha": -np.log(alpha),
            "lk_hybrid": c * kl + (1 - c) * (1 - alpha),
        }
        for kind, value in want.items():
            logs = (jax.nn.log_softmax(jnp.asarray(x[row])) for x in (p, q))
            got = distance(*logs, kind)
            np.testing.assert_allclose(got, value, rtol=1e-4)


def test_answers_and_frequent_tokens_by_hand(rng):
    ids = rng.integers(0, 5, size=400)
    header, ends = [3, 1], [4]
    want, inside = [], False
    for i, token in enumerate(ids):
        inside = inside or (i >= 2 and list(ids[i - 2 : i]) == header)
        want.append(inside)
        inside = inside and token not in ends
    mask = answer_mask(ids, header, ends)
    np.testing.assert_array_equal(mask, want)
    assert 0 < mask.mean() < 1
    kept, share = draft_vocabulary(ids, mask, 2, 9)
    counts = [sum(ids[mask] == t) for t in range(9)]
    assert sorted(counts)[-2:] == sorted(counts[t] for t in kept)
    assert share == pytest.approx(sum(counts[t] for t in kept) / sum(counts))


def test_checkpoints_as_engines_load_them(tmp_path):
    model, _ = tiny()
    config, head = small()
    scales = np.linspace(0.5, 2, len(head["fc"]["kernel"]))
    save_eagle(tmp_path, config, head, scales=scales, dtype=jnp.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    weight = tensors["fc.weight"]
    np.testing.assert_allclose(weight, (scales[:, None] * head["fc"]["kernel"]).T)
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (16, 32)
    assert tensors["d2t"].dtype == np.int64 and tensors["t2d"].dtype == bool
    np.testing.assert_array_equal(tensors["d2t"] + np.arange(20), IDS)
    np.testing.assert_array_equal(np.flatnonzero(tensors["t2d"]), IDS)
    data = json.loads((tmp_path / "config.json").read_text())
    layers = list(config.target_layers)
    own = data["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    assert own == layers
    assert data["eagle_aux_hidden_state_layer_ids"] == [i + 1 for i in layers]
    loaded, params = load_eagle(tmp_path, model.config)
    assert loaded == config
    expected = {**head, "fc": {"kernel": jnp.asarray(weight.T)}}
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    # Without names of layers, as published heads are.
    del data["eagle_config"], data["eagle_aux_hidden_state_layer_ids"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert load_eagle(tmp_path, model.config)[0].target_layers == (1, 0, 0)
    # Heads that belong elsewhere, or are not whole.
    others = [
        ({"vocab_size": 40}, "vocabulary of 32"),
        ({"num_layers": 1}, "reads layers"),
        ({"hidden_size": 8}, "features of width 16"),
    ]
    for change, says in others:
        other = dataclasses.replace(model.config, **change)
        with pytest.raises(ValueError, match=says):
            load_eagle(tmp_path, other, target_layers=(1, 0, 0))
    del tensors["d2t"], tensors["t2d"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="needs a tensor d2t"):
        load_eagle(tmp_path, model.config)
    del tensors["norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="no tensor norm.weight"):
        load_eagle(tmp_path, model.config)
    data["architectures"] = ["LlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(ModelError, match="no EAGLE-3 head"):
        load_eagle(tmp_path, model.config)


def test_heads_that_cannot_be():
    model, params = tiny()
    config, head = small()
    cases = [
        (lambda: EagleTree(60, 3, 1), "a tree of 2 to 13 nodes"),
        (lambda: EagleDrafter(config, head, 0), "num_tokens must be"),
        (lambda: EagleConfig.of(model.config, draft_vocab_size=33), "from 1 to 32"),
        (lambda: EagleConfig.of(model.config, target_layers=(2,)), "reads layers"),
        (lambda: init_eagle(config, jax.random.key(0)), "needs ids"),
        (lambda: init_eagle(config, jax.random.key(0), ids=[1, 1]), "20 different"),
    ]
    for make, says in cases:
        with pytest.raises(ValueError, match=says):
            make()
    bare = {k: v for k, v in head.items() if k != "d2t"}
    with pytest.raises(ValueError, match="no d2t"):
        drafter = EagleDrafter(config, bare)
        generate(model, params, [[1]], drafter=drafter, max_new_tokens=4)
