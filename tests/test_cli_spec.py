"""`angeljax spec` on a tiny model: every command, JSON, one-line errors."""

import json
import shlex

import jax.numpy as jnp
import numpy as np
import pytest
import typer

from angeljax import _workflow, models
from angeljax._data import configs_dir
from angeljax._spec_workflow import setup, widths
from angeljax._train_workflow import block
from angeljax.cli import app
from angeljax.models import DecoderConfig, LanguageModel
from angeljax.recipe import Recipe
from angeljax.speculative import Profile
from tests.models._random_params import random_params
from tests.test_cli import run, tokenizer

CONFIG = DecoderConfig(
    model_type="llama",
    vocab_size=100,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    tied=True,
    max_positions=256,
)
PROMPTS = ["the cat and the cat and the", "one two one two one and on"]
NEW = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = LanguageModel(CONFIG)
    params = random_params(model, std=0.15)
    opened = _workflow.Opened(model, params, tokenizer(), "tiny")
    path = tmp_path_factory.mktemp("model") / "tiny"
    _workflow.save_model(path, opened, params, None)
    return path


@pytest.fixture(scope="module")
def packed(checkpoint, tmp_path_factory):
    """The same in INT4, 64 weights to a scale."""
    path = tmp_path_factory.mktemp("packed") / "int4"
    run("compress", "-m", checkpoint, "-r", "int4-g64", "-o", path)
    return path


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [{"question": PROMPTS[0]}, {"turns": [PROMPTS[1], "and then?"]}]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def generated(*args):
    args = ("spec", "generate", *args, "--max-new-tokens", NEW)
    return run(*args)


def text_of(path, prompt):
    """By the library's plain decoding, which is another program."""
    opened = _workflow.open_model(str(path))
    words = opened.tokenizer
    ids = words.encode(words.chat(prompt))
    out = models.generate(
        opened.model, opened.params, jnp.asarray([ids]), max_new_tokens=NEW
    )
    return words.decode(np.asarray(out.tokens)[0, : int(out.lengths[0])].tolist())


def test_packed_model_drafts_and_keeps_its_text(packed, checkpoint, prompts):
    args = ("-d", "prompt_lookup:3", "--compare", "--json")
    found = json.loads(generated("-m", packed, "--prompts", prompts, *args).stdout)
    assert found["draft"] == {"method": "prompt_lookup", "num_tokens": 3}
    assert len(found["answers"]) == len(PROMPTS)
    for answer in found["answers"]:
        assert answer["same"] is True and answer["tokens"] == NEW
        assert answer["rounds"] == pytest.approx(NEW / answer["tau"])
    assert max(answer["tau"] for answer in found["answers"]) > 1
    text = found["answers"][0]["text"]
    assert text == text_of(packed, PROMPTS[0]) != text_of(checkpoint, PROMPTS[0])


def test_text_is_shown_as_it_comes(packed, checkpoint, tmp_path):
    """The recipe compresses as `compress` does, and its section drafts."""
    recipe = tmp_path / "both.yaml"
    recipe.write_text(
        "rules: [{format: int4, group_size: 64}]\n"
        "draft: {method: prompt_lookup, num_tokens: 3}\n"
        "kv_cache: {format: int8, granularity: head}"
    )
    shown = generated("-m", checkpoint, "-r", recipe, "-p", PROMPTS[0])
    text, summary = shown.stdout.rsplit("\n[", 1)
    assert text == text_of(packed, PROMPTS[0])
    assert f"{NEW} tokens in" in summary and "tau 1." in summary
    assert "the section `kv_cache` is left out" in shown.stderr
    stop = text[9:11]
    args = ("-d", "prompt_lookup:3", "--stop", stop, "--json")
    found = json.loads(generated("-m", packed, "-p", PROMPTS[0], *args).stdout)
    assert found["answers"][0]["text"] == text[: text.index(stop) + 2]


def test_sampled_text_is_that_of_plain_decoding(packed):
    args = ("-m", packed, "-p", PROMPTS[0], "-d", "prompt_lookup:3", "--json")
    args = (*args, "--temperature", 0.8, "--top-p", 0.9, "--seed", 3)
    found = json.loads(generated(*args, "--compare", "--exact").stdout)
    assert found["draft"]["exact"] == "same_width"
    assert found["draft"]["sampling"]["top_p"] == 0.9
    answer = found["answers"][0]
    assert answer["same"] is True
    assert answer["text"] != text_of(packed, PROMPTS[0])


def test_bench(packed, prompts):
    args = ("spec", "bench", "-m", packed, "--prompts", prompts)
    args = (*args, "--max-new-tokens", NEW, "-d", "prompt_lookup:3", "-d", "none")
    found = json.loads(run(*args, "--json").stdout)
    plain, fast, none = found["drafters"]
    assert plain["drafter"] == "plain decoding" and plain["speedup"] == 1
    assert plain["tau"] == none["tau"] == 1 and none["differ"] == 0
    assert fast["differ"] == 0 and fast["tau"] > 1 and fast["ms"] > 0
    assert fast["speedup"] == pytest.approx(plain["ms"] / fast["ms"])
    shown = run(*args, "--batch", 2).output
    assert "prompt_lookup:3" in shown and "0 of 2" in shown


def test_train_and_use_a_head(checkpoint, tmp_path):
    text, config, out = (tmp_path / n for n in ("text.txt", "head.yaml", "run"))
    text.write_text("the quick brown fox jumps over the lazy dog. " * 4)
    config.write_text(
        f"kind: eagle3\nmodel: {checkpoint}\ndata: {text}\nanswers_only: false\n"
        "steps: 1\nseq_length: 16\nbatch_size: 2\ndtype: float32\n"
        "loss: {steps: 2}\nhead: {layers: [0, 0, 0], intermediate_size: 32}\n"
        "eval: {prompts: 0}\n"
    )
    args = ("spec", "train", "-c", config, "-o", out)
    done = json.loads(run(*args, "--set", "batch_size=1", "--json").stdout)
    assert done["kind"] == "eagle3" and done["steps"] == 1
    failed = run(*args, "--no-resume", code=1).stderr
    assert "holds a run: choose another folder, or resume it" in failed
    args = ("-m", checkpoint, "-p", PROMPTS[0], "--compare", "--json")
    found = json.loads(generated(*args, "-d", f"eagle3:{done['path']}").stdout)
    assert found["answers"][0]["same"] is True


@pytest.mark.parametrize(
    ("file", "name"), [("block-smollm2", "train_block"), ("mtp-smollm2", "train_mtp")]
)
def test_trainings_of_other_drafters(tmp_path, monkeypatch, file, name):
    """What these do is tested with them; here, that they are given what was said."""
    seen = []

    def train(config, out, *, resume, show):
        seen.append((config, out, resume))
        return block.TrainedDrafter(out / "x", 7, {"loss": 2.0}, {"eval/tau": 3.0})

    monkeypatch.setattr(block, name, train)
    config, out = configs_dir() / "train" / f"{file}.yaml", tmp_path / "run"
    args = ("spec", "train", "-c", config, "-o", out, "--no-resume")
    shown = run(*args, "--set", "seed=5").output
    ((used, where, resume),) = seen
    assert (used.seed, where, resume) == (5, out, False)
    assert f"7 steps, loss 2, eval/tau 3; use it with --drafter {used.kind}" in shown


def test_trainings_of_nothing_known(tmp_path):
    config = tmp_path / "train.yaml"
    args = ("spec", "train", "-c", config, "-o", tmp_path / "no")
    for text, says in (
        ("kind: medusa", "train.yaml: kind must be one of eagle3, dflash, mtp"),
        ("kind: mtp\nmodel: x\nsteps: 1\nhead: {}", "train.yaml: "),
        ("steps: 1", "needs the field 'model'"),
    ):
        config.write_text(text)
        assert says in run(*args, code=1).stderr
    assert not (tmp_path / "no").exists()


def test_profile(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    args = ("spec", "profile", "-m", packed, "--widths", "1,4", "--slots", 64)
    found = json.loads(run(*args, "--json").stdout)
    rounds = found["rounds"]
    assert [r["width"] for r in rounds] == [1, 4] and rounds[0]["cost"] == 1
    assert [p["acceptance"] for p in found["pays"]] == list(widths.ACCEPTANCES)
    assert list(tmp_path.rglob("*.json"))
    # The second time nothing is measured: the times are the same to the last digit.
    assert json.loads(run(*args, "--json").stdout) == found
    shown = run(*args).output
    assert f"{rounds[1]['ms']:.3f}" in shown and "drafts that pay most" in shown


def test_what_pays_by_hand():
    profile = Profile((1, 2, 3), (1.0, 1.1, 1.9))
    # 1 + a over 1.1; 1 + a + a^2 over 1.9.
    assert widths.what_pays(profile, 0.05).drafts == 0
    some = widths.what_pays(profile, 0.5)
    assert (some.drafts, some.speedup) == (1, pytest.approx(1.5 / 1.1))
    costs = [(2, 0.9), (3, 0.95)]
    slow = widths.what_pays(profile, 0.95, costs)
    assert (slow.drafts, slow.speedup) == (2, pytest.approx(2.8525 / 2.85))
    assert widths.break_even(1.75, 2) == pytest.approx(0.5)
    assert widths.break_even(3.5, 2) is None and widths.break_even(0.9, 2) == 0


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("hybrid:31", {"method": "hybrid", "nodes": 31}),
        ("hybrid,path=a/b", {"method": "hybrid", "path": "a/b"}),
        ("layer_skip:0,-1", {"method": "layer_skip", "skip_layers": [0, -1]}),
        ("eagle:a/b", {"method": "eagle3", "path": "a/b"}),
        ("self_quant:int4-g64,num_tokens=2,layers=[0, 1]", None),
        ("spec-prompt-lookup", None),
    ],
)
def test_names_of_drafters(text, fields):
    found = setup.parse_drafter(text).to_dict()
    if fields is not None:
        assert found == fields
    elif text.startswith("self"):
        assert found["recipe"] == "int4-g64" and found["layers"] == [0, 1]
    else:
        assert found["method"] == "prompt_lookup" and found["num_tokens"] == 7
    assert setup.parse_drafter("auto").auto is not None


def test_recipes_name_commands_that_exist():
    commands = typer.main.get_command(app)
    found = 0
    for file in sorted(configs_dir().rglob("*.yaml")):
        for line in file.read_text().splitlines():
            if not line.startswith("#   angeljax spec "):
                continue
            name, *args = shlex.split(line.removeprefix("#   angeljax spec "))
            command = commands.commands["spec"].commands[name]
            parsed = command.make_context(name, args).params
            if parsed.get("recipe"):
                assert Recipe.load(parsed["recipe"]).draft is not None
            found += 1
    assert found >= 8


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("generate",), "pass --prompt or --prompts, one of them"),
        (("generate", "-p", "a", "-d", "lokup"), "neither a method (none, prompt_look"),
        (("generate", "-p", "a", "-d", "prompt_lookup:x"), "must be an integer"),
        (("generate", "-p", "a", "-d", "prompt_lookup,nodes=3"), "not prompt_lookup"),
        (("generate", "-p", "a", "-d", "eagle3:none"), "no folder none with a drafter"),
        (("generate", "-p", "a", "-d", "draft_model:nowhere"), "no file or"),
        (("generate", "-p", "a", "-d", "layer_skip:7"), "layer 7 is none of"),
        (("generate", "-p", "a", "-r", "int3-g64-gptq"), "needs calibration"),
        (("generate", "-p", "", "--raw", "-d", "lookup"), "prompt 1 is empty"),
        (("generate", "--prompts", "no.txt"), "no file of prompts at no.txt"),
        (("generate", "-p", "a", "-d", "auto", "--exact"), "use exact: fast"),
        (
            ("generate", "-p", "a", "-d", "lookup", "--temperature", "-1"),
            "temperature must be",
        ),
        (
            ("generate", "-p", "a", "-d", "lookup", "--max-new-tokens", "300"),
            "exceed the context of 256",
        ),
        (
            (
                "generate",
                "-p",
                "a",
                "-d",
                "lookup",
                "--temperature",
                "1",
                "--rule",
                "rejection",
                "--compare",
            ),
            "use --rule coupled",
        ),  # fmt: skip
        (("bench", "--prompts", "{p}", "--batch", "0"), "at least 1"),
        (("bench", "--prompts", "{empty}"), "has no prompts"),
        (("bench", "--prompts", "{bad}"), "line 1: not valid JSON"),
        (("profile", "--widths", "1,x"), "--widths takes numbers"),
        (("profile", "-d", "hybrid", "--widths", "1", "--slots", "64"), "for chains"),
    ],
)
def test_errors_are_one_line(checkpoint, prompts, tmp_path, args, message):
    names = {"p": prompts}
    for name, text in (("empty", "\n"), ("bad", "{")):
        names[name] = tmp_path / f"{name}.jsonl"
        names[name].write_text(text)
    command, *rest = (a.format(**names) for a in args)
    result = run("spec", command, "-m", checkpoint, *rest, code=1)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
