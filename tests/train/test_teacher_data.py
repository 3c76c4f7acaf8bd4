"""A teacher on disk and text that it wrote: exact, resumable, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax import _shards
from angeljax.models import DecoderConfig, LanguageModel
from angeljax.train._likeliest import top_k_of
from angeljax.train.generated import generate_tokens
from angeljax.train.losses import DistillOptions
from angeljax.train.objective import Objective
from angeljax.train.teacher import read_teacher, write_teacher
from tests.models._random_params import random_params

MODEL = LanguageModel(
    DecoderConfig(
        model_type="llama",
        vocab_size=300,
        hidden_size=16,
        num_layers=1,
        intermediate_size=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        tied=True,
        eos_ids=(0,),
    )
)
IDS = np.random.default_rng(0).integers(0, 300, 42).astype(np.uint16)
WRITE: dict[str, Any] = {"length": 8, "top_k": 4, "batch_size": 2, "shard_rows": 3}


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL, std=0.16)


def _contents(folder: Path) -> dict[str, bytes]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


class _Stop(Exception):
    pass


def _interrupt(monkeypatch: pytest.MonkeyPatch, after: int, name: str) -> None:
    """Dies inside the given write, half done."""
    count, write = 0, np.save

    def save(file: Any, array: Any, **options: Any) -> None:
        nonlocal count
        count += name in str(getattr(file, "name", file))
        if count > after:
            write(file, array[: len(array) // 2], **options)
            raise _Stop
        write(file, array, **options)

    monkeypatch.setattr(np, "save", save)


def test_teacher_on_disk(
    params: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_teacher(tmp_path / "whole", MODEL, params, IDS, **WRITE)
    with monkeypatch.context() as patch, pytest.raises(_Stop):
        _interrupt(patch, 1, "log_probs")
        write_teacher(tmp_path / "parts", MODEL, params, IDS, **WRITE)
    with pytest.raises(ValueError, match="not complete, shard 1 is missing"):
        read_teacher(tmp_path / "parts")
    # What a kill leaves behind, where no exception can clean up.
    (tmp_path / "parts" / "shard-00001.partial-0123abcd").mkdir()
    parts = write_teacher(tmp_path / "parts", MODEL, params, IDS, **WRITE)
    assert _contents(parts) == _contents(whole)
    teacher = read_teacher(whole, ids=IDS, length=8, vocab_size=300)
    assert teacher.count == 5 and len(teacher.shards) == 2
    picked = np.array([4, 0])
    kept = teacher.rows(picked)
    tokens = np.stack([IDS[i * 8 : i * 8 + 9] for i in picked]).astype(np.int32)
    logits = jax.jit(MODEL.logits)(params, tokens[:, :-1])
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    order = np.argsort(-log_probs, axis=-1)[..., :4]
    np.testing.assert_array_equal(kept.ids, order)
    best = np.take_along_axis(log_probs, order, -1)
    np.testing.assert_allclose(kept.log_probs, best, rtol=1e-3)
    np.testing.assert_allclose(kept.tail, 1 - np.exp(best).sum(-1), atol=1e-5)
    gold = np.take_along_axis(log_probs, tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(kept.gold, gold, rtol=1e-5)
    # The same loss as with the teacher beside the student, on its likeliest entries.
    options = DistillOptions(loss="kl_top", top_k=4)
    student = jax.tree.map(lambda p: p * 0.9, params)
    args = student, tokens[:, :-1], tokens[:, 1:]

    @jax.jit
    def losses(args: Any, kept: Any, params: Any) -> Any:
        offline = Objective(model=MODEL, options=options)
        online = Objective(model=MODEL, options=options, teacher=MODEL)
        return offline(*args, kept)[0], online(*args, params)[0]

    np.testing.assert_allclose(*losses(args, kept, params), rtol=1e-3)


def test_teacher_refused(params: Any, tmp_path: Path) -> None:
    folder = write_teacher(tmp_path / "t", MODEL, params, IDS, **WRITE)
    for change, message in (
        ({"vocab_size": 301}, "vocabulary of 301 and the teacher of 300"),
        ({"length": 16}, "rows of 8 tokens, not of 16"),
        ({"ids": IDS[:-1]}, "another token stream"),
    ):
        with pytest.raises(ValueError, match=message):
            read_teacher(folder, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has rows 0 to 4"):
        read_teacher(folder).rows(np.array([5]))
    with pytest.raises(ValueError, match="was begun with top_k 4, not 5"):
        write_teacher(folder, MODEL, params, IDS, **{**WRITE, "top_k": 5})
    other = jax.tree.map(lambda p: p + 1, params)
    with pytest.raises(ValueError, match="was begun with model"):
        write_teacher(folder, MODEL, other, IDS, **WRITE)
    with pytest.raises(ValueError, match="no manifest.json"):
        write_teacher(tmp_path, MODEL, params, IDS, **WRITE)
    for change, message in (
        ({"top_k": 301}, "top_k must be at least 1 and at most 300"),
        ({"length": 64}, "42 tokens do not fill a row"),
    ):
        with pytest.raises(ValueError, match=message):
            write_teacher(tmp_path / "n", MODEL, params, IDS, **{**WRITE, **change})
    assert not (tmp_path / "n").exists()
    file = folder / "shard-00000" / "log_probs.npy"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match="log_probs.npy cannot be read"):
        read_teacher(folder)


def test_top_k_of_blocks(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((3, 1000)), jnp.float32)
    ours = jax.jit(jax.vmap(lambda row: top_k_of(row, 9)))(x)
    for a, b in zip(ours, jax.lax.top_k(x, 9), strict=True):
        np.testing.assert_array_equal(a, b)


def test_generated_text(
    params: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "rows": 3,
        "max_new_tokens": 6,
        "prompts": [[0], [7, 8]],
        "top_k": 20,
        "eos_ids": tuple(range(0, 300, 4)),
        "seed": 5,
    }
    whole = generate_tokens(tmp_path / "whole", MODEL, params, shards=3, **options)
    with monkeypatch.context() as patch, pytest.raises(_Stop):
        _interrupt(patch, 1, "tokens-")
        generate_tokens(tmp_path / "parts", MODEL, params, shards=3, **options)
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == [
        "manifest.json",
        "tokens-00000.npy",
    ]
    for shards in (2, 3):  # goes on, and can be made longer
        generate_tokens(tmp_path / "parts", MODEL, params, shards=shards, **options)
    assert _contents(tmp_path / "parts") == _contents(tmp_path / "whole")
    streams = [np.load(file) for file in whole]
    assert streams[0].dtype == np.uint16
    assert not np.array_equal(streams[0], streams[2])  # the same prompts, other keys
    # Prompts in turn; a document ends at an ending token or at six.
    for n, stream in enumerate(streams):
        rest = list(stream)
        for i in range(3):
            prompt = [[0], [7, 8]][(3 * n + i) % 2]
            assert rest[: len(prompt)] == prompt
            rest = rest[len(prompt) :]
            body = 0
            while body < 6 and rest:
                if rest[0] == 0:  # dropped: what follows begins with it
                    break
                body, ended = body + 1, rest.pop(0) % 4 == 0
                if ended:
                    break
        assert not rest
    changed = {**options, "seed": 6}
    with pytest.raises(ValueError, match="was begun with seed 5, not 6"):
        generate_tokens(tmp_path / "whole", MODEL, params, shards=1, **changed)
    for wrong, message in (
        ({"prompts": [[1], []]}, "prompt 1 is empty or outside"),
        ({"top_p": 2.0}, "top_p must be in"),
        ({"rows": 0}, "rows must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_tokens(
                tmp_path / "n", MODEL, params, shards=1, **{**options, **wrong}
            )
    assert not (tmp_path / "n").exists()


def test_fingerprint_sees_paths_and_values() -> None:
    prints = {
        _shards.fingerprint(tree)
        for tree in (
            {"a": np.zeros(2)},
            {"b": np.zeros(2)},
            {"a": np.zeros((2, 1))},
            {"a": np.zeros(2, np.float32)},
            {"a": np.ones(2)},
        )
    }
    assert len(prints) == 5
