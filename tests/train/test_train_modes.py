"""`angeljax train` with a teacher on disk, layer by layer and with LoRA.

Also `angeljax train-data`, which writes what these read.
"""

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
from angeljax import _shards, _workflow
from angeljax._train_workflow.run import _set_up
from angeljax.cli import app
from angeljax.models import DecoderConfig, LanguageModel, add_biases
from angeljax.qat.lora import load_lora, lora_merge
from angeljax.train import (
    ConfigError,
    PackedTokens,
    TrainConfig,
    load_tokens,
)
from angeljax.train.losses import cross_entropy, distillation
from tests.models._random_params import random_params
from tests.test_cli import tokenizer

RUNNER = CliRunner()
TEXT = "the quick brown fox jumps over the lazy dog. "
TEQUILA = {"match": ".*mlp/.*kernel", "format": "t2", "group_size": 16}
NF4 = {"rules": [{"format": "nf4", "group_size": 16}]}
RECIPE = {"rules": [{**TEQUILA, "qat": {"tequila": 0.1}}]}
COMMON = {
    "steps": 4,
    "seq_length": 12,
    "batch_size": 4,
    "dtype": "float32",
    "log": {"every": 1},
    "optimizer": {"lr": 3.0e-3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, the same compressed, and a text."""
    folder = tmp_path_factory.mktemp("modes")
    config = DecoderConfig(
        model_type="llama",
        vocab_size=100,
        hidden_size=32,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        tied=True,
        eos_ids=(1,),
    )
    model = LanguageModel(config, scan_layers=True)
    params = random_params(model, std=0.16)
    opened = _workflow.Opened(model, params, tokenizer(), "tiny")
    _workflow.save_model(folder / "tiny", opened, params, None)
    (folder / "a.txt").write_text(TEXT * 9)
    (folder / "nf4.yaml").write_text(yaml.safe_dump(NF4))
    command = ("compress", "-m", folder / "tiny", "-r", folder / "nf4.yaml", "-o")
    invoke(*command, folder / "small")
    return folder


def invoke(*args, code=0):
    result = RUNNER.invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result


def train(folder, out, code=0, **fields):
    plain = {"model": str(folder / "tiny"), "data": str(folder / "a.txt")}
    file = folder / f"{out}.yaml"
    file.write_text(yaml.safe_dump({**plain, **COMMON, **fields}))
    done = invoke("train", "-c", file, "-o", folder / out, "--json", code=code)
    return json.loads(done.stdout) if code == 0 else done.stderr


def numbers(folder, out, name):
    lines = (folder / out / "metrics.jsonl").read_text().splitlines()
    return [row[name] for row in map(json.loads, lines) if name in row]


def contents(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def written(folder):
    """Text of the model's own and predictions for `a.txt`, by the command line."""
    commands = {
        "generated": (
            *("generate", "--shards", 24, "--rows", 2, "--max-new-tokens", 8),
            *("--top-k", 20, "--prompts", folder / "prompts.txt"),
        ),
        "teacher": (
            *("teacher", "--data", folder / "a.txt", "--seq-length", 12),
            *("--top-k", 8, "--batch-size", 1, "--shard-rows", 1),
        ),
    }
    (folder / "prompts.txt").write_text("the quick\n\nfox\n")
    commands = {
        name: [str(a) for a in ("train-data", *c, "-m", folder / "tiny", "--json")]
        for name, c in commands.items()
    }
    for name, command in commands.items():
        invoke(*command, "--out", folder / name)
    return commands


def test_killed_and_resumed_writes_the_same_text(folder, written):
    root, out = Path(aj.__file__).parents[1], folder / "killed"
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    command = [*written["generated"], "--out", str(out)]
    whole = [sys.executable, "-m", "angeljax.cli", *command]
    process = subprocess.Popen(whole, env=environment, cwd=root)
    until = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < until:
        if len(list(out.glob("tokens-*"))) > 2:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    left, want = contents(out), contents(folder / "generated")
    assert 2 < len([p for p in left if "partial" not in p]) < len(want)
    invoke(*command)
    assert contents(out) == want


def test_a_teacher_on_disk_is_the_teacher_beside(folder, written):
    """Rows in shuffled order, micro-batches, and a model that gets biases."""
    losses = {"loss": "kl_top", "top_k": 8, "teacher": str(folder / "teacher")}
    # A rate at which nothing moves: each step is known.
    fields = {"recipe": RECIPE, "accumulate": 2, "optimizer": {"lr": 1.0e-9}}
    train(folder, "offline", distill=losses, **fields)
    tiny = _workflow.open_checkpoint(folder / "tiny")
    data = PackedTokens(
        load_tokens(folder / "a.txt", tiny.tokenizer), length=12, batch_size=4
    )
    rows = np.concatenate([data.batch(step)["tokens"] for step in range(4)])
    with pytest.raises(ValueError, match="parts are attention, output, mlp, not 'up'"):
        add_biases(tiny.model, tiny.params, parts=["up"])
    model, params = add_biases(tiny.model, tiny.params, parts=["mlp"])
    qat = aj.qat.make(aj.Recipe.from_dict(RECIPE), total_steps=4)
    params = jax.jit(lambda p: qat.apply(p, qat.init(p), 4))(params)
    student, teacher = (
        jax.jit(m.logits)(p, rows[:, :-1]).reshape(4, 4, 12, -1)
        for m, p in ((model, params), (tiny.model, tiny.params))
    )
    labels = rows[:, 1:].reshape(4, 4, 12)
    kd = jax.vmap(lambda *a: distillation(*a, loss="kl_top", top_k=8))
    want = kd(student, teacher, labels), jax.vmap(cross_entropy)(student, labels)
    for name, values in zip(("kd", "ce"), want, strict=True):
        # Log-probabilities are kept in 16 bits.
        got = numbers(folder, "offline", name)
        np.testing.assert_allclose(got, values, rtol=2e-3)

    # The dead zones went into biases of the MLPs, and only there.
    opened = _workflow.open_checkpoint(folder / "offline" / "model")
    assert opened.model.config == model.config and model.config.mlp_bias
    assert not model.config.attention_bias and not model.config.output_bias
    up, want = (p["layers"]["mlp"]["up_proj"] for p in (opened.params, params))
    assert isinstance(up["kernel"], aj.QTensor) and up["bias"].shape == (2, 32)
    np.testing.assert_allclose(up["bias"], want["bias"], atol=1e-6)
    assert np.abs(up["bias"]).max() > 0.01
    assert "bias" not in opened.params["layers"]["attn"]["q_proj"]
    # A run knows whose predictions it is learning from.
    error = train(folder, "offline", code=1, distill={**losses, "top_k": 4}, **fields)
    assert "was written with another distillation (top_k: 8, now 4)" in error


def test_layer_by_layer(folder, monkeypatch):
    fields = {
        "mode": "blockwise",
        "recipe": RECIPE,
        "blockwise": {"epochs": 12, "learning_rate": 3.0e-3},
        "eval": {"data": str(folder / "a.txt"), "length": 16, "tokens": 200},
        "optimizer": {},
        "log": {},
    }
    done = train(folder, "layers", **fields)
    before, after = (numbers(folder, "layers", n) for n in ("error_before", "error"))
    assert len(after) == 2 and all(a < b for a, b in zip(after, before, strict=True))
    assert done["steps"] == 2 * 12 * 4
    assert done["metrics"]["error"] == pytest.approx(np.mean(after))
    for name in ("eval/perplexity", "eval/kl"):
        assert numbers(folder, "layers", name) == [done["evaluation"][name]]
    assert done["evaluation"]["eval/kl"] > 0

    # Stopped in the second layer, half of its file written.
    write = _shards._write_arrays

    def stop(path, arrays):
        if "layer-00001" in path.name:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        write(path, arrays)

    with monkeypatch.context() as patch:
        patch.setattr(_shards, "_write_arrays", stop)
        train(folder, "stopped", code=130, **fields)
    kept = [p.name for p in sorted((folder / "stopped" / "layers").iterdir())]
    assert kept == ["layer-00000.npz", "manifest.json"]
    train(folder, "stopped", **fields)
    for part in ("layers", "metrics.jsonl", "model/arrays"):
        a, b = (folder / out / part for out in ("layers", "stopped"))
        if part == "model/arrays":  # orbax writes times into its files
            jax.tree.map(
                np.testing.assert_array_equal,
                *(aj.load(p.parent)[0] for p in (a, b)),
            )
        elif a.is_dir():
            assert contents(a).keys() == contents(b).keys()
        else:
            assert a.read_bytes() == b.read_bytes()
    error = train(folder, "stopped", code=1, **{**fields, "seed": 1})
    assert "layers was begun with " in error and error.count("\n") == 1
    (folder / "stopped" / "layers" / "layer-00000.npz").write_bytes(b"half")
    error = train(folder, "stopped", code=1, **fields)
    assert "layer-00000.npz cannot be read" in error and error.count("\n") == 1


def test_lora(folder, written):
    """On a packed model, with the one that it came from as teacher."""
    small = folder / "small"
    fields = {
        "mode": "lora",
        "data": [str(folder / "generated"), str(folder / "a.txt")],
        "lora": {"rank": 4, "targets": "layers/.*(q|up)_proj/kernel"},
        "optimizer": {"lr": 1.0e-2},
        "steps": 12,
    }
    distill = {"teacher": str(folder / "tiny"), "lm_weight": 0.0}
    done = train(folder, "lora", model=str(small), distill=distill, **fields)
    kd = numbers(folder, "lora", "kd")
    assert kd[-1] < 0.9 * kd[0]
    # The factors alone, added to what was there.
    start, _ = aj.load(small)
    lora = load_lora(folder / "lora" / "adapter")
    assert set(lora.factors) == {
        "layers/attn/q_proj/kernel",
        "layers/mlp/up_proj/kernel",
    }
    got, recipe = aj.load(done["path"])
    assert recipe.rules[0].format == "nf4"  # of the other weights, which stay packed
    assert isinstance(got["layers"]["mlp"]["down_proj"]["kernel"], aj.QTensor)
    want = lora_merge(start, lora, dtype=jnp.float32)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)

    # The same from the model itself, as it is set up; merged and packed again.
    fields |= {"lora": {"merge": "requantize"}, "distill": {"teacher": "self"}}
    plain = {"model": str(folder / "tiny"), "recipe": str(folder / "nf4.yaml")}
    setup = _set_up(TrainConfig.from_dict({**COMMON, **fields, **plain}))
    jax.tree.map(np.testing.assert_array_equal, setup.frozen["params"], start)
    tiny, _ = aj.load(folder / "tiny")
    jax.tree.map(np.testing.assert_array_equal, setup.frozen["teacher"], tiny)
    factors = jax.tree.map(lambda x: x + 0.01, setup.trainable["lora"])
    packed = setup.task.packed({"lora": factors}, setup.frozen)
    assert jax.tree.structure(packed) == jax.tree.structure(start)
    kernels = (t["layers"]["mlp"]["down_proj"]["kernel"] for t in (packed, start))
    new, old = (np.asarray(k.dequantize()) for k in kernels)
    assert 0 < np.abs(new - old).mean() < 0.05


def test_refused_before_anything_is_written(folder, written):
    def refused(message, **fields):
        error = train(folder, "none", code=1, **fields)
        assert message in error and error.count("\n") == 1, error
        assert not (folder / "none").exists()

    teacher = {"teacher": str(folder / "teacher")}
    refused("has rows of 12 tokens, not of 16", distill=teacher, seq_length=16)
    twice = [str(folder / "a.txt")] * 2
    refused("was written for another token stream", distill=teacher, data=twice)
    refused("needs all logits of the teacher", distill={**teacher, "loss": "mse"})
    refused("8 likeliest entries are kept", distill={**teacher, "loss": "kl_top"})
    refused("need the teacher itself", distill={**teacher, "hidden_weight": 1.0})
    refused("holds no text but teacher's pred", data=str(folder / "teacher"))
    refused("mode lora adds to packed weights", mode="lora")
    small = {"mode": "lora", "model": str(folder / "small")}
    refused("is compressed already; leave it out", **small, recipe="nf4-g64")
    refused("distill.teacher: self is", **small, distill={})
    lora = {"mode": "lora", "recipe": "nf4-g64", "lora": {"targets": "embed.*"}}
    refused("targets 'embed.*' matches none of the packed", **lora)
    layers = {"mode": "blockwise", "optimizer": {}, "log": {}}
    refused("there are 33 rows of 12 tokens", **layers, recipe="int8-channel", steps=9)
    only = {"rules": [{"match": "embed.*", "format": "int8"}]}
    refused("takes no weight of a layer", **layers, recipe=only)
    head = {"rules": [{**TEQUILA, "match": "embed.*", "qat": {"tequila": 0.1}}]}
    refused("adds to the bias of the layer, which has none", recipe=head)

    def data_refused(message, *args):
        out = folder / "nothing"
        error = invoke("train-data", *args, "--out", out, code=1).stderr
        assert message in error and error.count("\n") == 1, error
        assert not out.exists()

    model = ("-m", folder / "tiny")
    data_refused("shards must be an integer >= 1", "generate", *model, "--shards", 0)
    data_refused("No such file", "generate", *model, "--prompts", folder / "no")
    data_refused("there are none", "generate", *model, "--chat")
    text = ("teacher", *model, "--data", folder / "a.txt")
    data_refused("do not fill a row of 1024", *text)
    data_refused("--top-k must be an integer >= 1", *text, "--top-k", 0)
    data_refused("at most 100, not 200", *text, "--seq-length", 12, "--top-k", 200)


def test_text_of_the_model_in_order(folder, written):
    ids = load_tokens(folder / "generated")
    files = sorted((folder / "generated").glob("*.npy"))
    np.testing.assert_array_equal(ids, np.concatenate([np.load(f) for f in files]))
    text = tokenizer().decode(ids.tolist())
    assert text.startswith("the quick") and text.count("fox") >= 24
    broken = folder / "broken"
    broken.mkdir()
    for name in ("manifest.json", "tokens-00001.npy"):
        (broken / name).write_bytes((folder / "generated" / name).read_bytes())
    with pytest.raises(ConfigError, match="tokens-00000.npy is missing"):
        load_tokens(broken)


def test_fields_of_modes():
    plain = {"model": "m", "data": "d", "steps": 3}

    def refused(message, **fields):
        with pytest.raises(ConfigError, match=message):
            TrainConfig.from_dict({**plain, **fields})

    layers = {"mode": "blockwise", "recipe": "int8-channel"}
    refused(
        "mode must be one of end_to_end, .* .did you mean 'blockwise'", mode="block"
    )
    refused("lora means nothing in mode end_to_end: .*set mode: lora", lora={"rank": 2})
    refused("freeze means nothing in mode lora", mode="lora", freeze="a")
    refused("distill means nothing in mode blockwise", **layers, distill={})
    refused("mode blockwise needs a recipe", mode="blockwise")
    refused("eval.every must be 0", **layers, eval={"every": 5})
    refused("blockwise.epochs must be", **layers, blockwise={"epochs": 0})
    refused("blockwise has no field 'seed'", **layers, blockwise={"seed": 1})
    refused("blockwise has no field 'epoch'", **layers, blockwise={"epoch": 1})
    refused("lora.rank must be", mode="lora", lora={"rank": 0})
    refused("lora.merge must be one of dense", mode="lora", lora={"merge": "no"})
    refused("lora.targets: '\\[' is no regular", mode="lora", lora={"targets": "["})
    config = TrainConfig.from_dict({**plain, **layers, "blockwise": {"epochs": 3}})
    assert TrainConfig.from_dict(config.to_dict()) == config
    options = config.reconstruction()
    assert (options.epochs, options.batch_size) == (3, config.batch_size)
