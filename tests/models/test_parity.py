"""Logits and greedy continuations against PyTorch `transformers` (golden files)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.models import (
    DecoderConfig,
    LanguageModel,
    filter_logits,
    generate,
    init_cache,
    load_model,
    stack_layers,
    unstack_layers,
)
from tests.models._files import FAMILIES, GOLDEN, golden, write_folder

TOLERANCE = 2e-4  # of the largest logit


def relative(got, want):
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    cache = {}

    def load(name):
        if name not in cache:
            folder = write_folder(tmp_path_factory.mktemp(name), name)
            cache[name] = load_model(folder, dtype=jnp.float32)
        return cache[name]

    return load


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_continuation(loaded, name):
    _, _, want = golden(name)
    x = loaded(name)
    ids = jnp.asarray(want["ids"])
    with jax.default_matmul_precision("highest"):
        logits = x.model.logits(x.params, ids)
        assert logits.dtype == jnp.float32
        assert relative(logits, want["logits"]) < TOLERANCE
        out = generate(x.model, x.params, ids, max_new_tokens=8, eos_ids=())
        np.testing.assert_array_equal(out.tokens, want["greedy"])


@pytest.mark.parametrize("name", FAMILIES)
def test_scanned_layers(loaded, name):
    _, _, want = golden(name)
    x = loaded(name)
    model = LanguageModel(x.model.config, scan_layers=True)
    params = stack_layers(x.params)
    ids = jnp.asarray(want["ids"])
    with jax.default_matmul_precision("highest"):
        assert relative(model.logits(params, ids), want["logits"]) < TOLERANCE
        out = generate(model, params, ids, max_new_tokens=8, eos_ids=())
    np.testing.assert_array_equal(out.tokens, want["greedy"])
    back = unstack_layers(params)
    assert jax.tree.structure(back) == jax.tree.structure(x.params)


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2_window", "qwen3"])
def test_left_padding_changes_nothing(loaded, name):
    _, _, want = golden(name)
    x = loaded(name)
    ids = want["ids"][:1]
    padded = jnp.asarray(np.pad(ids, ((0, 0), (4, 0)), constant_values=7))
    mask = jnp.arange(24)[None] >= 4
    with jax.default_matmul_precision("highest"):
        logits, _ = x.model.apply(x.params, padded, mask=mask)
        assert relative(logits[:, 4:], want["logits"][:1]) < TOLERANCE
        out = generate(x.model, x.params, padded, mask, max_new_tokens=8, eos_ids=())
    np.testing.assert_array_equal(out.tokens, want["greedy"][:1])


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2_window"])
def test_chunked_prefill_equals_one(loaded, name):
    _, _, want = golden(name)
    x = loaded(name)
    ids = jnp.asarray(want["ids"])
    with jax.default_matmul_precision("highest"):
        cache = init_cache(x.model.config, 2, 20, jnp.float32)
        parts = []
        for cut in (slice(0, 9), slice(9, 17), slice(17, 20)):
            logits, cache = x.model.apply(x.params, ids[:, cut], cache=cache)
            parts.append(logits)
    assert relative(np.concatenate(parts, 1), want["logits"]) < TOLERANCE
    assert int(cache.length) == 20


@pytest.mark.parametrize("name", FAMILIES)
def test_configuration_round_trips(name):
    config = DecoderConfig.from_hf(golden(name)[0])
    text = json.dumps(config.to_dict())
    assert DecoderConfig.from_dict(json.loads(text)) == config


def test_generation_stops_pads_and_counts(loaded):
    x = loaded("llama3")
    _, _, want = golden("llama3")
    first = want["greedy"][0]
    stop = int(first[3])
    n = int(np.argmax(first == stop)) + 1
    ids = jnp.asarray(want["ids"][:1])
    with jax.default_matmul_precision("highest"):
        out = generate(x.model, x.params, ids, max_new_tokens=8, eos_ids=(stop,))
    assert int(out.lengths[0]) == n
    np.testing.assert_array_equal(out.tokens[0, :n], first[:n])
    np.testing.assert_array_equal(out.tokens[0, n:], x.model.config.pad_id)


def test_filters_against_numpy(rng):
    logits = rng.normal(size=(3, 50)).astype(np.float32)
    kept = np.isfinite(filter_logits(jnp.asarray(logits), top_k=5))
    np.testing.assert_array_equal(kept, logits >= np.sort(logits, -1)[:, -5:-4])
    kept = np.isfinite(filter_logits(jnp.asarray(logits), top_p=jnp.float32(0.6)))
    for row, keep in zip(logits, kept, strict=True):
        p = np.exp(row) / np.exp(row).sum()
        order = np.argsort(-p)
        n = int(np.searchsorted(np.cumsum(p[order]), 0.6)) + 1
        assert set(np.flatnonzero(keep)) == set(order[:n].tolist())
    whole = filter_logits(jnp.asarray(logits), top_k=99, top_p=jnp.float32(1.0))
    assert np.isfinite(whole).all()


def test_sampling_follows_the_distribution(loaded):
    x = loaded("smollm")
    ids = jnp.tile(jnp.asarray(golden("smollm")[2]["ids"][:1]), (4000, 1))
    probs = jax.nn.softmax(x.model.logits(x.params, ids[:1])[0, -1])
    out = generate(
        x.model,
        x.params,
        ids,
        max_new_tokens=1,
        temperature=1.0,
        key=jax.random.key(0),
    )
    counts = np.bincount(np.asarray(out.tokens[:, 0]), minlength=64) / 4000
    assert np.abs(counts - np.asarray(probs)).max() < 0.03


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -1.0}, "temperature must be >= 0"),
        ({"temperature": 1.0}, "sampling needs a key"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"mask": [[True, False]]}, "padded on the left"),
        ({"tokens": [[]]}, "tokens must be"),
    ],
)
def test_bad_options_of_generate(loaded, options, message):
    x = loaded("llama3")
    options = {"max_new_tokens": 2, "tokens": [[1, 2]], **options}
    with pytest.raises(ValueError, match=message):
        generate(x.model, x.params, **options)


@pytest.mark.network
@pytest.mark.slow
def test_smollm2():
    from angeljax.models import ModelError

    try:
        x = load_model("smollm2", dtype=jnp.float32)
    except ModelError as e:
        if "could not download" not in str(e):
            raise
        pytest.skip(str(e))
    with np.load(GOLDEN / "smollm2.npz") as want:
        for i, prompt in enumerate(want["prompts"]):
            ids = want[f"ids{i}"]
            assert x.tokenizer.encode(str(prompt)) == ids.tolist()
            assert x.tokenizer.decode(ids) == prompt
            with jax.default_matmul_precision("highest"):
                logits = np.asarray(x.model.logits(x.params, jnp.asarray(ids[None])))[0]
                scale = float(want[f"max{i}"])
                for got, name in (
                    (logits[:, ::997], f"sample{i}"),
                    (logits[-1, want[f"top{i}"]], f"top_logits{i}"),
                ):
                    assert np.abs(got - want[name]).max() / scale < TOLERANCE
                out = generate(
                    x.model,
                    x.params,
                    jnp.asarray(ids[None]),
                    max_new_tokens=24,
                    eos_ids=(),
                )
            np.testing.assert_array_equal(out.tokens[0], want[f"greedy{i}"])
