"""Packed tokens: sources, order, refusals."""

import json
import lzma

import numpy as np
import pytest

from angeljax.models import Tokenizer
from angeljax.train import ConfigError, PackedTokens, load_tokens


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    vocab = {"<unk>": 0, "<|endoftext|>": 1, "a": 2, "b": 3, "c": 4, "\n": 5}
    backend = Backend(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return Tokenizer({"tokenizer.json": backend.to_str().encode()})


def test_every_epoch_has_each_row_once_in_an_order_of_its_own():
    data = PackedTokens(np.arange(41), length=4, batch_size=3, seed=5)
    assert data.rows == 10
    stream = np.concatenate([data.batch(i)["tokens"] for i in range(10)])
    assert stream.shape == (30, 5) and stream.dtype == np.int32
    assert (stream == stream[:, :1] + np.arange(5)).all()
    epochs = stream[:, 0].reshape(3, 10)
    assert (np.sort(epochs) == np.arange(0, 40, 4)).all()
    assert len({tuple(e) for e in epochs}) == 3
    # A function of the step alone: any order of calls, any object.
    again = PackedTokens(np.arange(41), length=4, batch_size=3, seed=5)
    for step in (7, 0, 3):
        np.testing.assert_array_equal(
            again.batch(step)["tokens"], stream[3 * step : 3 * step + 3]
        )
    assert again.identity() == data.identity()
    for change in ({"seed": 6}, {"length": 5}, {"batch_size": 2}):
        other = PackedTokens(
            np.arange(41), **({"length": 4, "batch_size": 3, "seed": 5} | change)
        )
        assert other.identity() != data.identity()
    ids = np.arange(41)
    ids[7] = 0
    changed = PackedTokens(ids, length=4, batch_size=3, seed=5).identity()
    assert changed["sha256"] != data.identity()["sha256"]


def test_sources(tmp_path, tokenizer):
    ids = np.array([2, 3, 4], np.uint16)
    np.save(tmp_path / "x.npy", ids)
    packed = tmp_path / "x.npy.xz"
    packed.write_bytes(lzma.compress((tmp_path / "x.npy").read_bytes()))
    text = tmp_path / "x.txt"
    text.write_text("ab\n<|endoftext|>\nc\n<|endoftext|>\n \n")
    rows = [json.dumps({"text": t}) for t in ("a", "bb")]
    lines = tmp_path / "x.jsonl.xz"
    lines.write_bytes(lzma.compress("\n".join(rows).encode()))
    got = load_tokens([tmp_path / "x.npy", packed, text, lines], tokenizer)
    assert got.dtype == np.uint16
    assert got.tolist() == [2, 3, 4, 2, 3, 4, 2, 3, 1, 4, 1, 2, 1, 3, 3, 1]
    with pytest.raises(ConfigError, match="is text, and the model has no tokenizer"):
        load_tokens(text)


def test_refusals(tmp_path, tokenizer):
    def refused(message, *sources):
        with pytest.raises(ConfigError, match=message):
            load_tokens(list(sources), tokenizer)

    refused("name at least one source")
    refused("no.npy: No such file", tmp_path / "no.npy")
    refused("no such text file", tmp_path / "no.txt")
    np.save(tmp_path / "e.npy", np.zeros(0, np.uint16))
    refused("e.npy holds no tokens", tmp_path / "e.npy")
    (tmp_path / "e.txt").write_text(" \n")
    refused("e.txt holds no tokens", tmp_path / "e.txt")
    np.save(tmp_path / "f.npy", np.zeros((2, 2), np.float32))
    refused(r"must hold one stream of token ids .*float32 \[2, 2\]", tmp_path / "f.npy")
    (tmp_path / "d.npy.xz").write_bytes(b"nothing")
    refused("d.npy.xz is damaged", tmp_path / "d.npy.xz")
    np.save(tmp_path / "o.npy", np.array([{}], object))
    refused("o.npy is damaged or no array", tmp_path / "o.npy")

    def packed(message, ids, **options):
        with pytest.raises(ConfigError, match=message):
            PackedTokens(np.array(ids), **({"length": 4, "batch_size": 1} | options))

    packed("there are no tokens", [])
    packed("4 tokens do not fill a row of 4", [1, 2, 3, 4])
    packed("token 9 is outside the model's vocabulary of 9", [9] * 9, vocab_size=9)
    packed("batch_size must be an integer >= 1, not 0", [1] * 9, batch_size=0)
