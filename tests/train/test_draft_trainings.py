"""Trainings of block drafters and MTP layers, from a file to drafters that decode."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from angeljax import _workflow
from angeljax._train_workflow.block import train_block, train_mtp
from angeljax.models import DecoderConfig, LanguageModel
from angeljax.speculative import (
    BlockDrafter,
    MTPDrafter,
    autoregressive,
    generate,
    load_block,
    load_mtp,
)
from angeljax.train import BlockTrainConfig, ConfigError, MTPTrainConfig
from tests.models._random_params import random_params
from tests.test_cli import tokenizer

QUESTIONS = ["what is a fox?", "why do dogs lie?", "who is quick?", "what jumps?"]
COMMON = {
    "generate": {"shards": 2, "rows": 8, "max_new_tokens": 32, "temperatures": [0.0]},
    "seq_length": 32,
    "batch_size": 8,
    "dtype": "float32",
    "log": {"every": 10},
    "optimizer": {"lr": 1.0e-2, "warmup": 0},
    "eval": {"prompts": 3, "prompt_tokens": 32, "max_new_tokens": 16},
}
BLOCK = {"mask_token_id": 99, "num_layers": 1, "block_size": 4, "anchors": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny chat model, and what it is asked."""
    folder = tmp_path_factory.mktemp("drafts")
    config = DecoderConfig(
        model_type="llama",
        vocab_size=100,
        hidden_size=32,
        intermediate_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        tied=True,
        eos_ids=(1,),
    )
    model = LanguageModel(config)
    params = random_params(model, std=0.16)
    opened = _workflow.Opened(model, params, tokenizer(), "tiny")
    _workflow.save_model(folder / "tiny", opened, params, None)
    (folder / "questions.txt").write_text("\n".join(QUESTIONS))
    return folder


def config(folder, cls, **fields):
    common = {**COMMON, "model": str(folder / "tiny")}
    asked = {"prompts": str(folder / "questions.txt")}
    common["generate"] = {**COMMON["generate"], **asked}
    return cls.from_dict({**common, **fields})


def trained_text(folder, drafter):
    opened = _workflow.open_model(str(folder / "tiny"), dtype="float32")
    words = opened.tokenizer
    prompts = [words.encode(words.chat(text)) for text in QUESTIONS[:3]]
    run = opened.model, opened.params, prompts
    out = generate(*run, drafter=drafter, max_new_tokens=16)
    np.testing.assert_array_equal(
        out.tokens, autoregressive(*run, max_new_tokens=16).tokens
    )
    return out


def test_a_block_drafter_from_its_own_text(folder):
    out = folder / "block"
    asked = {**COMMON["eval"], "source": str(folder / "questions.txt")}
    options = {"block": BLOCK, "steps": 60, "eval": asked}
    # Time ends the first call after a step; the second goes on from there.
    short = config(folder, BlockTrainConfig, **options, max_minutes=1e-6)
    assert train_block(short, out, show=False).steps == 1
    written = {p: p.read_bytes() for p in (out / "text").rglob("*.npy")}
    whole = config(folder, BlockTrainConfig, **options)
    done = train_block(whole, out, show=False)
    assert done.steps == 60 and done.path == out / "block"
    assert {p: p.read_bytes() for p in (out / "text").rglob("*.npy")} == written
    assert BlockTrainConfig.load(out / "config.yaml") == whole
    assert done.evaluation["eval/same_text"] == 1 and done.evaluation["eval/tau"] > 1.5
    found = json.loads((out / "acceptance.json").read_text())
    assert found["evaluation"] == done.evaluation
    shares = [done.evaluation[f"eval/accepted/{i}"] for i in range(3)]
    assert [x["accepted"] for x in found["places"]] == shares
    assert shares == sorted(shares, reverse=True)
    assert found["places"][-1]["tau"] == pytest.approx(1 + sum(shares))
    assert found["places"][1]["conditional"] == pytest.approx(shares[1] / shares[0])
    curve = found["curve"]
    assert curve["step"][-1] == 60 and {len(x) for x in curve["top1"]} == {3}
    assert curve["tau"][-1] > curve["tau"][0]
    drafter = BlockDrafter(*load_block(done.path, dtype="float32"))
    assert drafter.hidden == (0,) and drafter.model.config.mask_token_id == 99
    assert trained_text(folder, drafter).tau > 1.3
    notes = json.loads((done.path / "config.json").read_text())["angeljax"]
    assert notes["steps"] == 60 and notes["measured"] == done.evaluation
    other = config(folder, BlockTrainConfig, **options, seed=1)
    with pytest.raises(ValueError, match="seed"):
        train_block(other, out, show=False)
    with pytest.raises(ValueError, match="holds a run"):
        train_block(whole, out, resume=False, show=False)


def test_an_mtp_layer_from_text(folder):
    text = folder / "fox.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    fields = {"data": str(text), "answers_only": False, "mtp": {"steps": 2}}
    short = {"generate": {}, "steps": 4, "loss": {"loss": "kl", "weights": "equal"}}
    whole = config(folder, MTPTrainConfig, **fields, **short)
    done = train_mtp(whole, folder / "mtp", show=False)
    assert done.steps == 4 and done.evaluation["eval/same_text"] == 1
    assert "eval/accepted/1" in done.evaluation
    assert "eval/accepted/2" not in done.evaluation
    drafter = MTPDrafter(*load_mtp(done.path, dtype="float32"), num_tokens=2)
    assert trained_text(folder, drafter).tau >= 1


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (BlockTrainConfig, {"block": None}, "needs the field 'block'"),
        (BlockTrainConfig, {"block": {}}, "block.mask_token or block.mask_token_id"),
        (BlockTrainConfig, {"blok": BLOCK}, "did you mean 'block'"),
        (BlockTrainConfig, {"block": {**BLOCK, "layers": 2}}, "did you mean"),
        (BlockTrainConfig, {"block": {**BLOCK, "block_size": 1}}, "block_size must be"),
        (BlockTrainConfig, {"seq_length": 3}, "no place for a block of 4"),
        (BlockTrainConfig, {"eval": {"num_tokens": 4}}, "at most 3 by"),
        (BlockTrainConfig, {"kind": "mtp"}, "kind must be one of dflash"),
        (BlockTrainConfig, {"loss": {"loss": "mse"}}, "loss.loss must be one of"),
        (MTPTrainConfig, {"block": None, "mtp": {"steps": 0}}, "mtp.steps must be"),
        (MTPTrainConfig, {"block": None, "seq_length": 4}, "no place for 4 drafts"),
    ],
)
def test_what_cannot_be_is_refused(folder, kind, change, message):
    given = {k: v for k, v in {"block": BLOCK, **change}.items() if v is not None}
    with pytest.raises(ConfigError, match=message):
        config(folder, kind, steps=1, **given)


def test_a_mask_token_that_is_none(folder):
    wrong = {**BLOCK, "mask_token": "<mask>", "mask_token_id": None}
    with pytest.raises(ConfigError, match="has no token '<mask>'"):
        train_block(
            config(folder, BlockTrainConfig, block=wrong, steps=1), folder / "x"
        )
    assert not (folder / "x").exists()
    text = yaml.safe_dump(config(folder, MTPTrainConfig, steps=1).to_dict())
    assert yaml.safe_load(text)["kind"] == "mtp"
