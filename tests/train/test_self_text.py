"""Text that a model writes itself: rows that are filled again, requests, processes."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax import _workflow
from angeljax._kv_cache_options import KVCacheOptions
from angeljax._spec_workflow import training
from angeljax._train_workflow._draft_data import write_text
from angeljax.models import DecoderConfig, LanguageModel, stack_layers
from angeljax.train import ConfigError, load_tokens
from angeljax.train._draft_config import SelfText
from angeljax.train._lanes import _advance, _choose, _empty
from angeljax.train.document_tasks import TASKS, document_requests, kind_of
from angeljax.train.eagle_data import places_of
from angeljax.train.generated import generate_tokens
from tests.models._random_params import random_params
from tests.test_cli import run, tokenizer

MODEL = LanguageModel(
    DecoderConfig(
        model_type="llama",
        vocab_size=100,
        hidden_size=16,
        num_layers=2,
        intermediate_size=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        tied=True,
        eos_ids=(1,),
    )
)
SENTENCES = [f"Sentence {i} says {'so ' * (i % 5)}much." for i in range(400)]
# With `batch`: a document begins where another ends, and programs are shared.
WRITE: dict[str, Any] = {"rows": 20, "batch": 5, "max_new_tokens": 30}


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL, std=0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, params: Any) -> Path:
    """A checkpoint, documents, and a configuration."""
    folder = tmp_path_factory.mktemp("text")
    opened = _workflow.Opened(MODEL, params, tokenizer(), "tiny")
    _workflow.save_model(folder / "tiny", opened, params, None)
    (folder / "some").mkdir()
    for i in range(2):
        text = " ".join(SENTENCES[200 * i : 200 * (i + 1)])
        (folder / "some" / f"{i}.txt").write_text(text)
    config = {
        "model": str(folder / "tiny"),
        "generate": {
            **WRITE,
            "shards": 4,
            "question_tokens": 30,
            "question_starts": ["what", ""],
            "temperatures": [0.0, 1.0],
            "documents": str(folder / "some"),
            "document_tokens": [30, 60],
        },
        "loss": {"steps": 2},
        "steps": 1,
        "seq_length": 32,
        "batch_size": 2,
        "dtype": "float32",
        "eval": {"prompts": 0},
    }
    (folder / "head.yaml").write_text(json.dumps(config))
    return folder


def test_rows_filled_again_write_what_one_batch_writes(
    params: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    sizes = (1, 5, 9, 30, 70, 2, 3, 150, 4, 6, 7)
    prompts = [rng.integers(10, 100, size=n).tolist() for n in sizes]
    options = {**WRITE, "shards": 2, "prompts": prompts, "temperature": 0.0}
    options["eos_ids"] = tuple(range(0, 100, 6))
    at_once = generate_tokens(
        tmp_path / "one", MODEL, params, **{**options, "batch": None}
    )
    stacked = dataclasses.replace(MODEL, scan_layers=True)
    again = generate_tokens(tmp_path / "two", stacked, stack_layers(params), **options)
    written = 0
    for a, b in zip(map(np.load, at_once), map(np.load, again), strict=True):
        np.testing.assert_array_equal(a, b)
        written += len(a)
    written -= sum(sizes[i % 11] for i in range(40))
    assert 40 * 4 < written < 40 * 28  # some ended, some did not
    with pytest.raises(ValueError, match="begun with batch 5, not 4"):
        generate_tokens(tmp_path / "two", MODEL, params, **{**options, "batch": 4})
    quantized = dataclasses.replace(MODEL, kv_cache=KVCacheOptions(format="int8"))
    with pytest.raises(ValueError, match="leave batch out, or kv_cache"):
        generate_tokens(tmp_path / "no", quantized, params, **options)
    with pytest.raises(ValueError, match="room of 3 for max_new_tokens of 30"):
        generate_tokens(tmp_path / "no", MODEL, params, **options, room=3)
    assert not (tmp_path / "no").exists()


def test_no_step_copies_the_keys_and_values() -> None:
    abstract = MODEL.abstract(), jax.eval_shape(lambda: _empty(MODEL, 24, 192))
    rest = jax.random.key(0), jnp.ones(()), None
    lowered = _advance.lower(*abstract, *rest, model=MODEL, ends=(1,), top_k=None)
    text = lowered.compile().as_text()
    made = re.findall(r"= f32\[24,1,192,8\]\S* ([\w-]+)\(", text)
    # Two layers, two sides: written in place in the loop, and nothing else of the size.
    assert made.count("fusion") == made.count("scatter") == 4
    assert set(made) == {"parameter", "get-tuple-element", "fusion", "scatter"}
    assert "input_output_alias" in text.split("\n")[0]


def test_one_choice_for_all_temperatures(rng: np.random.Generator) -> None:
    logits = jnp.asarray(rng.normal(size=100) * 2, jnp.float32)
    rows, key = jnp.tile(logits, (4000, 1)), jax.random.key(0)
    best = _choose(rows, key, jnp.zeros(()), top_k=None, top_p=None)
    assert np.all(best == np.argmax(logits))
    for top_k in (None, 7):
        hot = jnp.asarray(1.5)
        found = np.asarray(_choose(rows, key, hot, top_k=top_k, top_p=None))
        kept = np.argsort(-logits)[:top_k]
        p = np.exp(np.asarray(logits, np.float64)[kept] / 1.5)
        counts = np.bincount(found, minlength=100)[kept]
        assert counts.sum() == 4000
        # Chi-squared of at most 99 degrees: above 170 once in 100,000 times.
        want = 4000 * p / p.sum()
        assert np.sum((counts - want) ** 2 / want) < (170 if top_k is None else 40)


def test_requests_bring_whole_sentences_along() -> None:
    tok = tokenizer()
    documents = [" ".join(SENTENCES[i : i + 50]) for i in range(0, 400, 50)]
    documents.append("Sentence 0 says <end> too much. " * 50)  # not to be asked about
    end = tok.token_id("<end>")
    ids = np.concatenate([[*tok.encode(x), end] for x in documents])
    tasks = ["Shorten: {text}", "{text} Why?"]
    options: dict[str, Any] = {"tokens": (60, 120), "tasks": tasks}
    found = document_requests(tok, ids, 50, **options)
    for request in found:
        text = request.removeprefix("Shorten: ").removesuffix(" Why?")
        assert 60 <= len(text) <= 120 and text != request
        # From the middle of no sentence, to the end of one, and out of one document.
        assert text.startswith("Sentence ") and text.endswith("much.")
        assert sum(text in document for document in documents[:-1]) == 1
    assert len({request.startswith("Shorten") for request in found}) == 2
    assert len(set(found)) > 40
    assert document_requests(tok, ids, 20, **options) == found[:20]
    assert document_requests(tok, ids, 20, **options, seed=1) != found[:20]
    for tasks in TASKS.values():
        assert all(task.count("{text}") == 1 for task in tasks)
    assert kind_of(documents[0]) == "prose"
    with pytest.raises(ConfigError, match="no such|0 passages of 2000 to 4000 tokens"):
        document_requests(tok, ids, 1, tokens=(2000, 4000))


def test_processes_write_and_one_trains(folder: Path) -> None:
    config, texts = folder / "head.yaml", [folder / "a", folder / "b"]
    for seed, out in enumerate(texts):
        # As if stopped by the clock: a file of each, and each whole.
        args = ("spec", "text", "-c", config, "-o", out, "--json")
        args = (*args, "--set", f"generate.seed={seed}")
        done = json.loads(run(*args, "--set", "generate.max_minutes=1e-5").stdout)
        assert done["paths"] == [str(out / f"temperature-{t}") for t in (0, 1)]
        files = sorted(out.glob("*/*"))
        assert [f.name for f in files] == 3 * ["manifest.json", "tokens-00000.npy"]
        assert done["tokens"] == len(load_tokens(done["paths"]))
    a, b = (load_tokens(str(x / "temperature-0")) for x in texts)
    assert not np.array_equal(a[:100], b[:100])
    tok = tokenizer()
    begun = places_of(a, tok.encode("u:"))
    assert len(begun) >= 20  # the model may write it as well
    long = sum(
        len(places_of(x, tok.encode("Sentence"))) > 0 for x in np.split(a, begun)
    )
    assert 4 <= long <= 16
    # With more time it goes on, from the questions that there were.
    before = {f: f.read_bytes() for f in texts[0].glob("*/*")}
    training.write(config, texts[0], ["generate.max_minutes=5"], show=False)
    assert {f: f.read_bytes() for f in before} == before
    assert len(list(texts[0].glob("temperature-*/*.npy"))) == 4
    named = f"data={json.dumps(list(map(str, texts)))}"
    trained = training.train(config, folder / "run", [named], show=False)
    assert trained.steps == 1 and (trained.path / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch": 0}, "generate.batch must be"),
        ({"tasks": ["x"]}, "lacks {text}"),
        ({"tasks": []}, "generate.tasks must name texts"),
        ({"document_share": 2}, "generate.document_share must be"),
        ({"document_tokens": 64}, "must be \\[least, most\\]"),
        ({"document_tokens": [64, 64]}, "64 must be below 64"),
        ({"documents": 3}, "generate.documents must name files"),
    ],
)
def test_options_that_cannot_be(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SelfText(**changes)


def test_documents_that_are_not_there(params: Any, tmp_path: Path) -> None:
    opened = _workflow.Opened(MODEL, params, tokenizer(), "tiny")
    options = SelfText(documents=str(tmp_path / "none.npy"))
    with pytest.raises(ConfigError, match="none.npy: No such file"):
        write_text(options, opened, tmp_path / "out", False)
    assert not (tmp_path / "out").exists()
