"""The command line on a tiny model: every command, JSON, one-line errors."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import angeljax as aj
from angeljax import _workflow
from angeljax.cli import app
from angeljax.export import load_manifest
from angeljax.models import DecoderConfig, LanguageModel, Tokenizer, add_biases

RUNNER = CliRunner()
WORDS = [chr(i) for i in range(32, 127)]


def tokenizer():
    """One token for each printable character."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {"<unk>": 0, "<end>": 1} | {w: i + 2 for i, w in enumerate(WORDS)}
    backend = Backend(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}a:"
    config = {"chat_template": template, "eos_token": "<end>"}
    return Tokenizer(
        {
            "tokenizer.json": backend.to_str().encode(),
            "tokenizer_config.json": json.dumps(config).encode(),
        }
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = DecoderConfig(
        model_type="llama",
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        tied=True,
        eos_ids=(1,),
    )
    model = LanguageModel(config)
    params = model.init(jax.random.key(0), jnp.bfloat16)
    opened = _workflow.Opened(model, params, tokenizer(), "tiny")
    path = tmp_path_factory.mktemp("model") / "tiny"
    _workflow.save_model(path, opened, params, None)
    return path


def run(*args, code=0):
    result = RUNNER.invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result


def test_compress_inspect_eval_generate(checkpoint, tmp_path):
    out, html = tmp_path / "small", tmp_path / "report.html"
    done = run(
        "compress", "-m", checkpoint, "-r", "int4-g64", "-o", out, "--html", html
    )
    assert "bits per weight over the whole model" in done.output
    assert html.read_text().count("<svg") == 2
    params, recipe = aj.load(out)
    assert recipe == aj.Recipe.load("int4-g64")
    assert isinstance(params["layers"][0]["mlp"]["up_proj"]["kernel"], aj.QTensor)

    shown = run("inspect", out).output
    assert "int4 g64" in shown and "layers/*/mlp/up_proj/kernel" in shown
    assert "layers/1/mlp/up_proj/kernel" in run("inspect", out, "--leaves").output
    data = json.loads(run("inspect", out, "--json").stdout)
    total = sum(np.asarray(x).nbytes for x in jax.tree.leaves(params))
    assert data["bytes"] == total and data["recipe"]["name"] == "int4-g64"

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 10)
    args = ("eval", "-m", out, "--text", text, "--length", 64, "--json")
    # A reference of another architecture, and still the same function.
    opened = _workflow.open_checkpoint(checkpoint)
    model, wide = add_biases(opened.model, opened.params)
    opened = dataclasses.replace(opened, model=model, params=wide)
    _workflow.save_model(tmp_path / "wide", opened, wide, None)
    scored = json.loads(run(*args, "--reference", tmp_path / "wide").stdout)
    assert scored["perplexity"] > 1 and scored["kl"] > 0
    assert 0 <= scored["top1_agreement"] <= 1
    same = json.loads(run(*args, "--reference", out).stdout)
    assert same["kl"] == pytest.approx(0, abs=1e-6) and same["top1_agreement"] == 1
    assert "perplexity" in run("eval", "-m", out, "--text", text).output

    args = ("generate", "-m", out, "-p", "hello", "--max-new-tokens", 5)
    first = json.loads(run(*args, "--json").stdout)["text"]
    assert run(*args).output.strip() == first.strip()
    sampled = run(*args, "--temperature", 1, "--top-k", 5, "--seed", 3, "--raw")
    assert sampled.exit_code == 0


def test_allocate(checkpoint, tmp_path):
    out, text = tmp_path / "mixed.yaml", tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 4)
    args = ("allocate", "-m", checkpoint, "-o", out, "--text", text, "--length", 32)
    args = (*args, "--formats", "int3:64,int8", "--measure", "linear")
    data = json.loads(run(*args, "--budget-bits", 5, "--json").stdout)
    assert data["bits_per_weight"] <= 5 and data["kl"] > 0
    recipe = aj.Recipe.load(out)
    opened = _workflow.open_checkpoint(checkpoint)
    cparams = aj.compress(opened.params, recipe)
    assert aj.report(opened.params, cparams).nbytes == data["bytes"]
    failed = run(*args, "--budget-bits", 5, code=1)
    assert "pass --overwrite" in failed.output
    shown = run(*args, "--overwrite", "--measure", "error", "--budget-mb", 1).output
    assert "all int8: 8." in shown and "layers/0/mlp/down_proj/kernel" in shown


def test_eval_tasks(checkpoint, tmp_path):
    (tmp_path / "tasks").mkdir()
    line = json.dumps({"context": "2+2=", "choices": [" 4", " 5"], "label": 0})
    for name in ("a", "b"):
        (tmp_path / "tasks" / f"{name}.jsonl").write_text(f"{line}\n" * 3)
    args = ("eval", "-m", checkpoint, "--limit", 2, "--tasks", tmp_path / "tasks")
    rows = json.loads(run(*args, "--json").stdout)
    assert [(r["name"], r["examples"]) for r in rows] == [("a", 2), ("b", 2)]
    assert rows[0]["acc"] in (0, 1) and rows[0]["chance"] == 0.5
    assert "50.0%" in run(*args).output


def test_attention_of_a_recipe_is_used(checkpoint, tmp_path):
    """It travels with a checkpoint, or comes from an option; weights stay."""
    recipe, out = tmp_path / "near.yaml", tmp_path / "sparse"
    recipe.write_text(
        "attention: {selector: a_shape, dense_below: 0, dense_above: 1, options: "
        "{block_size: 16, sink_tokens: 16, window_tokens: 1}}"
    )
    run("compress", "-m", checkpoint, "-r", recipe, "-o", out)
    jax.tree.map(np.testing.assert_array_equal, aj.load(out)[0], aj.load(checkpoint)[0])
    opened = _workflow.open_model(str(out))
    assert opened.model.attention_fn == aj.Recipe.load(recipe).attention.attention_fn()
    args = ("eval", "-m", checkpoint, "--attention", recipe, "--reference", checkpoint)
    found = run(*args, "--length", 80, "--tokens", 160, "--json")
    # The reference is dense; a model against itself has a divergence of 0.
    assert json.loads(found.output)["kl"] > 1e-4
    failed = run(
        "generate", "-m", out, "-p", "a", "--attention", "int8-channel", code=1
    )
    assert "int8-channel has no section `attention`" in failed.output


def test_kv_cache_of_a_recipe_is_used(checkpoint, tmp_path):
    """It travels with a checkpoint, its static scales too, or comes from an option."""
    recipe, out = tmp_path / "static.yaml", tmp_path / "static"
    recipe.write_text("kv_cache: {format: int8, granularity: head}")
    run("compress", "-m", checkpoint, "-r", recipe, "-o", out)
    opened = _workflow.open_model(str(out))
    assert opened.model.kv_cache == aj.Recipe.load(recipe).kv_cache
    cache = opened.model.init_cache(1, 4, opened.params)
    assert cache.k[0].codes.dtype == np.int8
    assert (np.asarray(cache.k[0].scale) < 1).all()
    args = ("eval", "-m", checkpoint, "--reference", checkpoint, "--length", 32)
    args = (*args, "--tokens", 64, "--json", "--kv-cache")
    # The reference has no such cache; a model against itself has a divergence of 0.
    assert json.loads(run(*args, recipe).output)["kl"] > 1e-7
    failed = run(*args, "stem", code=1)
    assert "stem has no section `kv_cache`" in failed.output


def test_attention_show(checkpoint, tmp_path):
    picture = tmp_path / "blocks.png"
    args = ("attention", "show", checkpoint, "--length", 96, "--rows", 4)
    near = ("--selector", "a_shape", "--set", "block_size=16", "--set")
    near = (*near, "sink_tokens=16", "--set", "window_tokens=1")
    shown = run(*args, *near, "--layer", 1, "--head", 2, "--out", picture).output
    assert "AShape, 96 tokens" in shown and "written to" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    data = json.loads(run(*args, *near, "--layer", 1, "--json").output)
    assert [row["layer"] for row in data["layers"]] == [1]
    assert data["density"] == pytest.approx(11 / 21)
    for more, message in (
        ((), "nothing says which blocks are read"),
        (("--set", "alpha=1"), "--set goes with --selector"),
        (("--selector", "stem", "--set", "alpha"), "--set takes option=value"),
        (("--selector", "stm"), "did you mean stem"),
        (("-r", "stem", "--selector", "stem"), "not both"),
        (("-r", "hybrid"), "is for models with num_layers=30"),
    ):
        assert message in run(*args, *more, code=1).output


def test_compress_json(checkpoint, tmp_path):
    out = tmp_path / "x"
    args = ("compress", "-m", checkpoint, "-r", "sherry", "-o", out, "--json")
    data = json.loads(run(*args).stdout)
    assert data["path"] == str(out) and len(data["leaves"]) == 20
    kernel = next(x for x in data["leaves"] if x["path"].endswith("up_proj/kernel"))
    assert kernel["format"] == "sherry g64" and kernel["bits_per_weight"] == 1.5


def test_export(checkpoint, tmp_path):
    out = tmp_path / "x"
    run("export", "-m", checkpoint, "-r", "int8-channel", "-o", out)
    assert load_manifest(out).recipe["name"] == "int8-channel"
    run("export", "-m", out, "-o", tmp_path / "again")
    a, b = aj.load(out), aj.load(tmp_path / "again")
    assert a[1] == b[1]
    for x, y in zip(jax.tree.leaves(a[0]), jax.tree.leaves(b[0]), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_recipe_commands(checkpoint):
    assert "sherry-stride16" in run("recipe", "list").output
    shown = run("recipe", "show", "sherry").stdout
    assert aj.Recipe.from_yaml(shown) == aj.Recipe.load("sherry")
    checked = run("recipe", "check", "int4-g64", "-m", checkpoint).output
    assert "int4 g64" in checked and "skipped by default" in checked
    rows = json.loads(
        run("recipe", "check", "int4-g64", "-m", checkpoint, "--json").stdout
    )
    assert {r["format"] for r in rows} == {"int4 g64", None}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("compress", "-m", "{m}", "-r", "int5", "-o", "{o}"), "no recipe 'int5'"),
        (("compress", "-m", "nowhere", "-r", "sherry", "-o", "{o}"), "no file or"),
        (("compress", "-m", "{m}", "-r", "{bad}", "-o", "{o}"), "closest paths are"),
        (("compress", "-m", "{m}", "-r", "{other}", "-o", "{o}"), "model_type='qwen3'"),
        (("compress", "-m", "{m}", "-r", "sherry", "-o", "{m}"), "pass --overwrite"),
        (
            ("export", "-m", "{m}", "-o", "{o}", "--format", "onnx"),
            "unknown export format 'onnx'",
        ),
        (("eval", "-m", "{m}", "--text", "no.txt"), "no such text file"),
        (("eval", "-m", "{m}", "--dtype", "int3"), "unknown dtype 'int3'"),
        (("eval", "-m", "{m}", "--tasks", "no.jsonl"), "no such task file"),
        (("eval", "-m", "{m}", "--limit", "3"), "--limit goes with --tasks"),
        (
            ("eval", "-m", "{m}", "--tasks", "x", "--text", "y"),
            "--tasks goes with neither",
        ),
        (("generate", "-m", "{m}", "-p", "x", "--top-p", "7"), "top_p must be in"),
        (("inspect", "{o}"), "{o}"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(checkpoint, tmp_path, args, message):
    names = {"m": checkpoint, "o": tmp_path / "out"}
    for name, text in (
        ("bad", "rules: [{match: layers/0/atn/q_proj/kernel, format: int8}]"),
        ("other", "requires: {model_type: qwen3}\nrules: [{format: int8}]"),
    ):
        names[name] = tmp_path / f"{name}.yaml"
        names[name].write_text(text)
    # A source that is no file goes through a dtype check first.
    if "int3" in args:
        names["m"] = "nowhere"
    result = run(*(a.format(**names) for a in args), code=1)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message.format(**names) in result.stderr
    assert not (tmp_path / "out").exists()


def test_help_names_every_command():
    shown = run("--help").output
    for command in ("compress", "eval", "generate", "export", "inspect", "transcribe"):
        assert command in shown


class TestCalibration:
    @pytest.fixture
    def recipe(self, tmp_path):
        file = tmp_path / "static.yaml"
        file.write_text(
            "rules: [{format: int8, activation: int8, activation_scale: amax}]"
        )
        return file

    def test_layer_by_layer_resumed_and_in_one_pass(self, checkpoint, recipe, tmp_path):
        text, kept = tmp_path / "text.txt", tmp_path / "kept"
        text.write_text("the quick brown fox jumps over the lazy dog. " * 8)
        found = {}
        for name, more in (
            ("layers", ("--resume", kept)),
            ("again", ("--resume", kept)),
            ("once", ("--one-pass",)),
        ):
            out = tmp_path / name
            data = run(
                "compress", "-m", checkpoint, "-r", recipe, "-o", out, "--json",
                "--calibrate", text, "--rows", 4, "--length", 16, *more,
            ).output  # fmt: skip
            assert json.loads(data)["path"] == str(out)
            params, _ = aj.load(out)
            weight = params["layers"][1]["mlp"]["down_proj"]["kernel"]
            found[name] = float(weight.planes["input_scale"].squeeze())
        assert len(list(kept.glob("layer-*.npz"))) == 2
        assert found["layers"] == found["again"]
        assert found["layers"] != found["once"]
        assert found["layers"] == pytest.approx(found["once"], rel=0.3)

    def test_static_scales_of_the_cache_are_of_the_text(self, checkpoint, tmp_path):
        scales = []
        for text in ("the quick brown fox jumps. ", "over the lazy dog and so on, "):
            (tmp_path / "text.txt").write_text(text * 8)
            run(
                "compress", "-m", checkpoint, "-r", "kv-fp8-head-static",
                "-o", tmp_path / "out", "--calibrate", tmp_path / "text.txt",
                "--overwrite",
            )  # fmt: skip
            params, _ = aj.load(tmp_path / "out")
            scales.append(np.asarray(params["layers"][1]["attn"]["k_cache"]["scale"]))
        assert scales[0].shape == scales[1].shape
        assert not np.allclose(*scales)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ((), "algorithm rtn with activation_scale amax needs calibration: pass"),
            (("--rows", 4), "needs calibration"),
            (("--calibrate", "none.txt"), "no such text file"),
            (("--calibrate", "default", "--length", 10**6), "0 rows of 1000000"),
            (
                ("--calibrate", "default", "--one-pass", "--resume", "x"),
                "leave --one-pass out",
            ),
            (("--calibrate", "default", "--base", "x"), "leave --base out"),
        ],
    )
    def test_errors(self, checkpoint, recipe, tmp_path, options, message):
        out = tmp_path / "out"
        got = run(
            "compress", "-m", checkpoint, "-r", recipe, "-o", out, *options, code=1
        )
        assert message in got.output
        assert not out.exists()

    def test_options_without_need(self, checkpoint, tmp_path):
        args = ("compress", "-m", checkpoint, "-r", "int4-g64", "-o", tmp_path / "out")
        for options, message in (
            (("--calibrate", "default"), "needs no calibration"),
            (("--rows", 4), "--rows goes with --calibrate"),
            (("--one-pass",), "--one-pass goes with --calibrate"),
        ):
            assert message in run(*args, *options, code=1).output
