"""Logits and greedy continuations against PyTorch `transformers` (golden files)."""

import dataclasses
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
from angeljax.models.rope import frequencies
from tests.models._files import FAMILIES, GOLDEN, golden, write_folder

TOLERANCE = 2e-5  # of the largest logit; float32 gives about 1e-6


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
        logits = jax.jit(x.model.logits)(x.params, ids)
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
        assert relative(jax.jit(model.logits)(params, ids), want["logits"]) < TOLERANCE
        if name in ("llama3", "qwen2_layers"):  # with one window, and with two
            out = generate(model, params, ids, max_new_tokens=8, eos_ids=())
            np.testing.assert_array_equal(out.tokens, want["greedy"])
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(params), x.params)


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen3"])
def test_left_padding_changes_nothing(loaded, name):
    _, _, want = golden(name)
    x = loaded(name)
    ids = want["ids"][:1]
    ids, short = ids[0], want["ids"][1, :13]
    padded = np.full((3, 24), 7, np.int32)  # rows of 20, 13 and 24 tokens
    padded[0, 4:], padded[1, 11:] = ids, short
    padded[2] = np.arange(24)
    mask = jnp.arange(24)[None] >= jnp.asarray([[4], [11], [0]])
    padded = jnp.asarray(padded)
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(lambda p, t, m: x.model.apply(p, t, mask=m)[0])
        logits = apply(x.params, padded, mask)
        assert relative(logits[0, 4:], want["logits"][0]) < TOLERANCE
        # Causal: the beginning of a sequence has the logits it has in the whole one.
        assert relative(logits[1, 11:], want["logits"][1, :13]) < TOLERANCE
        out = generate(x.model, x.params, padded, mask, max_new_tokens=8, eos_ids=())
        one = generate(
            x.model, x.params, jnp.asarray(short[None]), max_new_tokens=8, eos_ids=()
        )
    np.testing.assert_array_equal(out.tokens[0], want["greedy"][0])
    np.testing.assert_array_equal(out.tokens[1], one.tokens[0])


def test_padding_on_the_right_changes_nothing_before_it(loaded):
    _, _, want = golden("mistral")
    x = loaded("mistral")
    padded = jnp.asarray(np.pad(want["ids"], ((0, 0), (0, 4)), constant_values=7))
    mask = jnp.tile(jnp.arange(24) < 20, (2, 1))
    with jax.default_matmul_precision("highest"):
        logits, _ = jax.jit(lambda t: x.model.apply(x.params, t, mask=mask))(padded)
    assert relative(logits[:, :20], want["logits"]) < TOLERANCE


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2_layers"])
def test_chunks_and_single_tokens_equal_one_pass(loaded, name, scan):
    _, _, want = golden(name)
    x = loaded(name)
    model = LanguageModel(x.model.config, scan_layers=scan)
    params = stack_layers(x.params) if scan else x.params
    ids = jnp.asarray(want["ids"])
    apply = jax.jit(lambda t, cache: model.apply(params, t, cache=cache))
    with jax.default_matmul_precision("highest"):
        # More slots than tokens: what is not filled is not seen.
        cache = init_cache(model.config, 2, 23, jnp.float32)
        parts = []
        for start, stop in [(0, 8), (8, 16), *((i, i + 1) for i in range(16, 20))]:
            logits, cache = apply(ids[:, start:stop], cache)
            parts.append(logits)
    assert relative(np.concatenate(parts, 1), want["logits"]) < TOLERANCE
    assert int(cache.length) == 20
    np.testing.assert_array_equal(cache.positions[0, :20], np.arange(20))
    np.testing.assert_array_equal(cache.positions[:, 20:], -1)


@pytest.mark.parametrize("name", FAMILIES)
def test_configuration_round_trips(name):
    config = DecoderConfig.from_hf(golden(name)[0])
    text = json.dumps(config.to_dict())
    assert DecoderConfig.from_dict(json.loads(text)) == config


def test_windows_without_layer_types():
    fields = dict(golden("qwen2_window")[0])
    with_types = DecoderConfig.from_hf(fields).windows
    del fields["layer_types"]
    assert DecoderConfig.from_hf(fields).windows == with_types == (0, 4)
    fields["use_sliding_window"] = False
    assert DecoderConfig.from_hf(fields).windows == ()


def test_fields_that_may_be_absent():
    # The defaults of `transformers`.
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    fields = {k: golden("qwen3")[0][k] for k in (*sizes, "num_attention_heads")}
    llama = DecoderConfig.from_hf({**fields, "model_type": "llama"})
    assert (llama.num_kv_heads, llama.head_dim, llama.norm_eps) == (4, 8, 1e-6)
    assert not (llama.tied or llama.windows or llama.attention_bias or llama.eos_ids)
    mistral = DecoderConfig.from_hf({**fields, "model_type": "mistral"})
    assert mistral.windows == (4096, 4096) and mistral.head_dim == 8
    free = {**fields, "model_type": "mistral", "sliding_window": None}
    assert DecoderConfig.from_hf(free).windows == ()
    qwen3 = DecoderConfig.from_hf({**fields, "model_type": "qwen3"})
    assert qwen3.head_dim == 128 and qwen3.qk_norm and not qwen3.attention_bias
    qwen2 = DecoderConfig.from_hf(
        {**fields, "model_type": "qwen2", "use_sliding_window": True}
    )
    assert qwen2.attention_bias and not qwen2.output_bias
    assert qwen2.windows == (0, 0)  # max_window_layers is 28
    # Old files have rope_scaling with a `type`, beside rope_theta.
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    scaled = DecoderConfig.from_hf({**fields, "model_type": "llama", **old})
    assert scaled.rope_theta == 5e5
    assert dict(scaled.rope_scaling) == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 2048,
    }


def test_rope_of_real_sizes():
    fields = golden("llama3")[0]
    with np.load(GOLDEN / "rope.npz") as want:
        for i, (head_dim, positions, rope) in enumerate(
            json.loads(str(want["settings"]))
        ):
            config = DecoderConfig.from_hf(
                {
                    **fields,
                    "head_dim": head_dim,
                    "max_position_embeddings": positions,
                    "rope_parameters": rope,
                }
            )
            got, factor = frequencies(config)
            np.testing.assert_allclose(got, want[f"frequencies{i}"], rtol=2e-6)
            np.testing.assert_allclose(factor, want[f"factor{i}"], rtol=1e-6)


def check_stops(out, greedy, eos, pad):
    for tokens, length, free in zip(out.tokens, out.lengths, greedy, strict=True):
        ends = np.isin(free, eos)
        n = int(np.argmax(ends)) + 1 if ends.any() else len(free)
        assert int(length) == n
        np.testing.assert_array_equal(tokens[:n], free[:n])
        np.testing.assert_array_equal(tokens[n:], pad)


def test_generation_stops_pads_and_counts(loaded):
    x = loaded("llama3")
    _, _, want = golden("llama3")
    ids, greedy = jnp.asarray(want["ids"]), want["greedy"]
    only_first = [int(t) for t in greedy[0, 2:] if t not in greedy[1]]
    assert only_first
    for eos in (
        (only_first[0],),  # one row ends, the other is full
        (int(greedy[0, 0]),),  # with its first token
        (int(greedy[0, 3]), int(greedy[1, 5])),  # all rows end early
        (),
    ):
        with jax.default_matmul_precision("highest"):
            out = generate(x.model, x.params, ids, max_new_tokens=8, eos_ids=eos)
        check_stops(out, greedy, eos, x.model.config.pad_id)


def test_ends_of_the_configuration(loaded):
    x = loaded("llama3")
    _, _, want = golden("llama3")
    ids, greedy = jnp.asarray(want["ids"]), want["greedy"]
    eos = (int(greedy[0, 2]), int(greedy[1, 4]))
    # Without a padding id the first of the ends pads.
    config = dataclasses.replace(x.model.config, eos_ids=eos, pad_id=None)
    with jax.default_matmul_precision("highest"):
        out = generate(LanguageModel(config), x.params, ids, max_new_tokens=8)
        one = generate(LanguageModel(config), x.params, ids, max_new_tokens=1)
    check_stops(out, greedy, eos, eos[0])
    check_stops(one, greedy[:, :1], eos, eos[0])


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
    both = filter_logits(jnp.asarray(logits), top_k=5, top_p=jnp.float32(0.6))
    for row, keep in zip(logits, np.isfinite(both), strict=True):
        order = np.argsort(-row)[:5]  # top-p counts what top-k has left
        p = np.exp(row[order]) / np.exp(row[order]).sum()
        n = int(np.searchsorted(np.cumsum(p), 0.6)) + 1
        assert set(np.flatnonzero(keep)) == set(order[:n].tolist())
    least = filter_logits(jnp.asarray(logits), top_p=jnp.float32(1e-6))
    np.testing.assert_array_equal(
        np.isfinite(least), logits == logits.max(-1, keepdims=True)
    )
    whole = filter_logits(jnp.asarray(logits), top_k=99, top_p=jnp.float32(1.0))
    assert np.isfinite(whole).all()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_sampling_follows_the_distribution(loaded, temperature):
    x = loaded("smollm")
    prompt = golden("smollm")[2]["ids"][:1, :4]
    ids = jnp.tile(jnp.asarray(prompt), (4000, 1))
    logits = jnp.asarray(golden("smollm")[2]["logits"][0, 3])  # causal
    probs = jax.nn.softmax(filter_logits(logits / temperature, top_k=12))
    out = generate(
        x.model,
        x.params,
        ids,
        max_new_tokens=1,
        temperature=temperature,
        top_k=12,
        key=jax.random.key(0),
    )
    counts = np.bincount(np.asarray(out.tokens[:, 0]), minlength=64) / 4000
    assert np.abs(counts - np.asarray(probs)).max() < 0.03
    assert not counts[np.asarray(probs) == 0].any()


def test_sampling_is_repeatable_and_needs_its_key(loaded):
    x = loaded("smollm")
    ids = jnp.asarray(golden("smollm")[2]["ids"])
    first, again, other = (
        np.asarray(
            generate(
                x.model,
                x.params,
                ids,
                max_new_tokens=12,
                temperature=3.0,
                top_p=0.95,
                key=jax.random.key(seed),
                eos_ids=(),
            ).tokens
        )
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -1.0}, "temperature must be >= 0"),
        ({"temperature": 1.0}, "sampling needs a key"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"temperature": float("nan")}, "temperature must be >= 0"),
        ({"mask": [[True, False]]}, "padded on the left"),
        ({"mask": [[False, False]]}, "padded on the left"),
        ({"mask": [[True]]}, "mask has shape"),
        ({"tokens": [[]]}, "tokens must be"),
        ({"tokens": [1, 2]}, "tokens must be"),
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
        x = load_model("smollm2", dtype=jnp.float32, scan_layers=True)
    except ModelError as e:
        if "could not download" not in str(e):
            raise
        pytest.skip(str(e))
    config, tokenizer = x.model.config, x.tokenizer
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (30, 9, 3)
    assert config.tied and config.rope_theta == 1e5 and config.eos_ids == (2,)
    digits = [tokenizer.decode([i]) for i in tokenizer.encode("2026 and 31")]
    assert digits == ["2", "0", "2", "6", " and", " ", "3", "1"]
    text = "Grüße, 你好 🎉\n\tdef f(x): return x**2  # it's 3,14\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    turn = tokenizer.chat("Hi")
    assert turn.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode(turn)[0] == tokenizer.token_id("<|im_start|>") == 1
    with np.load(GOLDEN / "smollm2.npz") as file:
        want = dict(file)
    prompts = [want[f"ids{i}"] for i in range(len(want["prompts"]))]
    for text, ids in zip(want["prompts"], prompts, strict=True):
        assert tokenizer.encode(str(text)) == ids.tolist()
        assert tokenizer.decode(ids) == text
    # One batch, padded on the left, so that everything compiles once.
    length = max(map(len, prompts))
    batch = np.zeros((len(prompts), length), np.int32)
    mask = np.zeros(batch.shape, bool)
    for row, ids in enumerate(prompts):
        batch[row, length - len(ids) :] = ids
        mask[row, length - len(ids) :] = True
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(lambda p, t, m: x.model.apply(p, t, mask=m)[0])(
            x.params, batch, mask
        )
        out = generate(x.model, x.params, batch, mask, max_new_tokens=24, eos_ids=())
    for i, ids in enumerate(prompts):
        row = np.asarray(logits[i, length - len(ids) :])
        for got, name in (
            (row[:, ::997], f"sample{i}"),
            (row[-1, want[f"top{i}"]], f"top_logits{i}"),
        ):
            error = np.abs(got - want[name]).max() / want[f"max{i}"]
            assert error < TOLERANCE
        np.testing.assert_array_equal(np.argsort(-row[-1])[:8], want[f"top{i}"][:8])
        np.testing.assert_array_equal(out.tokens[i], want[f"greedy{i}"])
