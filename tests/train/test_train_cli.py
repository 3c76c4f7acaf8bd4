"""`angeljax train` on a tiny model: its result, a kill and a resume, refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import angeljax as aj
from angeljax import _workflow
from angeljax.cli import app
from angeljax.models import DecoderConfig, LanguageModel
from angeljax.train import ConfigError, TrainConfig
from tests.test_cli import tokenizer

RUNNER = CliRunner()
STEPS = 120
CONFIG = {
    "recipe": {
        "rules": [
            {
                "match": r"layers/mlp/.*",
                "format": "int4",
                "group_size": 16,
                "qat": {"scale": "learned"},
            }
        ],
        "train": {"arenas": {"peak": 0.3}},
    },
    "steps": STEPS,
    "seq_length": 12,
    "batch_size": 4,
    "dtype": "float32",
    "scan_layers": True,
    "freeze": ["norm/scale"],
    "optimizer": {"lr": 3.0e-3, "warmup": 5},
    "distill": {"teacher": "self", "weight": 0.5},
    "checkpoint": {"every": 20},
    "eval": {"every": 60, "length": 16, "tokens": 200},
    "log": {"every": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint, texts and a configuration."""
    folder = tmp_path_factory.mktemp("train")
    config = DecoderConfig(
        model_type="llama",
        vocab_size=100,
        hidden_size=16,
        intermediate_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        tied=True,
        eos_ids=(1,),
    )
    model = LanguageModel(config)
    params = model.init(jax.random.key(0), jnp.float32)
    opened = _workflow.Opened(model, params, tokenizer(), "tiny")
    _workflow.save_model(folder / "tiny", opened, params, None)
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 9)
    np.save(folder / "b.npy", np.tile(np.arange(2, 40, dtype=np.uint16), 9))
    data = [str(folder / "a.txt"), str(folder / "b.npy")]
    whole = {**CONFIG, "model": str(folder / "tiny"), "data": data}
    whole["eval"] = {**CONFIG["eval"], "data": str(folder / "a.txt")}
    (folder / "config.yaml").write_text(yaml.safe_dump(whole))
    return folder


def run(folder, *args, code=0, out="out"):
    args = ("train", "-c", folder / "config.yaml", "-o", folder / out, *args)
    result = RUNNER.invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result


def curve(folder):
    rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {r["step"]: r["loss"] for r in rows if "loss" in r}
    return losses, [r for r in rows if "eval/perplexity" in r]


@pytest.fixture(scope="module")
def trained(folder):
    return json.loads(run(folder, "--json").stdout)


def test_trains_packs_and_generates(folder, trained):
    losses, evaluations = curve(folder / "out")
    assert list(losses) == list(range(1, STEPS + 1)) and trained["steps"] == STEPS
    assert losses[STEPS] < 0.8 * losses[1]
    assert [e["step"] for e in evaluations] == [60, STEPS]
    first, last = (e["eval/perplexity"] for e in evaluations)
    assert last < first < 100
    assert trained["evaluation"]["eval/kl"] == evaluations[1]["eval/kl"] > 0
    assert set(trained["metrics"]) >= {"ce", "kd", "lr", "tokens", "grad_norm"}
    assert trained["metrics"]["tokens"] == STEPS * 4 * 12
    text = (folder / "out" / "metrics.jsonl").read_text()
    rows = [json.loads(x) for x in text.splitlines()]
    residual = {r["step"]: r["lambda"] for r in rows if "lambda" in r}
    assert residual[1] < residual[13] == pytest.approx(0.3) and residual[STEPS] == 0
    kept = TrainConfig.load(folder / "out" / "config.yaml")
    assert kept == TrainConfig.load(folder / "config.yaml")

    params, recipe = aj.load(trained["path"])
    assert recipe.rules[0].format == "int4"
    assert isinstance(params["layers"]["mlp"]["up_proj"]["kernel"], aj.QTensor)
    start, _ = aj.load(folder / "tiny")
    np.testing.assert_array_equal(params["norm"]["scale"], start["norm"]["scale"])
    # What was evaluated as fake-quantized is what the packed model gives.
    command = ["eval", "-m", trained["path"], "--text", str(folder / "a.txt")]
    command += ["--length", "16", "--tokens", "200", "--json"]
    again = json.loads(RUNNER.invoke(app, command).stdout)
    assert again["perplexity"] == pytest.approx(last, rel=1e-5)
    command = ["generate", "-m", trained["path"], "-p", "the quick", "--raw"]
    assert RUNNER.invoke(app, [*command, "--max-new-tokens", "8"]).exit_code == 0


def test_killed_and_resumed_gives_the_same_curve(folder, trained):
    out = folder / "killed"
    command = [sys.executable, "-m", "angeljax.cli", "train", "-o", str(out), "--json"]
    # What is measured on the way does not make it another training.
    command += ["-c", str(folder / "config.yaml"), "--set", "eval.data=null"]
    root = Path(aj.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, env=environment, cwd=root)
    metrics = out / "metrics.jsonl"
    until = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < until:
        if metrics.is_file() and metrics.read_text().count("\n") > 50:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    before = curve(out)[0]
    assert 50 <= len(before) < STEPS
    saved = [int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit()]
    assert 20 <= max(saved) < STEPS

    run(folder, "--no-resume", "--json", out="killed", code=1)
    run(folder, "--json", "--set", "eval.data=null", out="killed")
    losses = curve(out)[0]
    want = curve(folder / "out")[0]
    assert list(losses) == list(want)
    np.testing.assert_allclose(
        list(losses.values()), list(want.values()), rtol=1e-6, atol=1e-6
    )
    assert {k: losses[k] for k in before if k <= max(saved)}.items() <= before.items()


def test_another_training_cannot_be_resumed(folder, trained):
    def refused(message, *settings):
        args = [x for s in settings for x in ("--set", s)]
        error = run(folder, *args, code=1).stderr
        assert message in error and error.count("\n") == 1, error

    refused(
        "was written with another recipe (rules:",
        'recipe={"rules": [{"match": "layers/mlp/.*", "format": "int8"}]}',
    )
    refused("another data or order (seed: 0, now 3)", "seed=3")
    refused("another data or order (sha256:", f'data=["{folder / "b.npy"}"]')
    refused("another optimizer (lr: 0.003, now 0.001)", "optimizer.lr=1e-3")
    refused("another number of steps (120, now 200)", "steps=200")


def test_bad_input_is_refused_before_anything_is_written(folder):
    def refused(message, *settings):
        args = [x for s in settings for x in ("--set", s)]
        error = run(folder, *args, code=1, out="none").stderr
        assert message in error and error.count("\n") == 1, error
        assert not (folder / "none").exists()

    refused("steps must be an integer >= 1, not 0", "steps=0")
    refused("give steps or tokens, one of them", "tokens=100")
    refused("warmup of 500 steps leaves none of the 120", "optimizer.warmup=500")
    refused("do not fill a row of 4096", "seq_length=4096")
    refused("no such text file", "data=missing.txt")
    refused("freeze: 'nothing' matches no leaf", "freeze=nothing")
    refused("needs 16 devices and there are 8", "mesh.fsdp=16")
    refused("micro-batches of 2 rows cannot be", "mesh.fsdp=4", "accumulate=2")
    refused("no recipe 'shery'", "recipe=shery")
    refused("'missing' is no file or folder", "model=missing")

    # A teacher whose ids mean other tokens.
    manifest = json.loads((folder / "tiny" / "manifest.json").read_text())
    fields = {k: v for k, v in manifest["model_config"].items() if k != "scan_layers"}
    other = LanguageModel(DecoderConfig.from_dict({**fields, "vocab_size": 96}))
    params = other.init(jax.random.key(0))
    opened = _workflow.Opened(other, params, None, "other")
    _workflow.save_model(folder / "other", opened, params, None)
    refused(
        "vocabulary of 100 and the teacher of 96", f"distill.teacher={folder}/other"
    )


def test_configurations():
    plain = {"model": "m", "data": "d", "steps": 3}

    def refused(message, **fields):
        with pytest.raises(ConfigError, match=message):
            TrainConfig.from_dict({**plain, **fields})

    refused(
        "a training has no field 'batchsize' .did you mean 'batch_size'", batchsize=1
    )
    refused("optimizer has no field 'rate'; known: name, lr", optimizer={"rate": 1})
    refused("optimizer must be a mapping of name, .*, not 3", optimizer=3)
    refused(
        "optimizer.name must be one of adamw, .* not 'sgd'", optimizer={"name": "sgd"}
    )
    refused(
        "schedule must be constant for schedule_free",
        optimizer={"name": "schedule_free", "schedule": "linear"},
    )
    refused("distill has no field 'los' .did you mean 'loss'", distill={"los": "kl"})
    refused("distill.teacher must be 'self' or a model: 3", distill={"teacher": 3})
    refused("batch_size of 6 cannot be divided into 4", batch_size=6, accumulate=4)
    refused("freeze: '\\[' is no regular expression", freeze="[")
    refused("mesh maps data and fsdp to numbers", mesh={"tensor": 2})
    refused("log.tensorboard must be true or false", log={"tensorboard": "no"})
    refused("data must name files", data=[])
    with pytest.raises(ConfigError, match="a training needs the field 'data'"):
        TrainConfig.from_dict({"model": "m", "steps": 3})
    config = TrainConfig.from_dict({**plain, "distill": {"loss": "cakld"}})
    assert config.teacher == "self" and config.options().loss == "cakld"
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert TrainConfig.from_dict(plain).teacher is None
