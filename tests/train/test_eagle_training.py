"""`train_eagle` on a tiny model that writes its own text: a run, a resume, refusals."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from angeljax import _workflow
from angeljax._train_workflow._draft_data import _held_out
from angeljax._train_workflow.eagle import train_eagle
from angeljax._train_workflow.prompts import read_prompts
from angeljax.models import DecoderConfig, LanguageModel
from angeljax.speculative import ExitRule, load_eagle
from angeljax.train import ConfigError
from angeljax.train.eagle import EagleLoss, EagleTask
from angeljax.train.eagle_config import EagleTrainConfig
from angeljax.train.eagle_data import MaskedTokens, thinking_targets
from angeljax.train.loop import fit
from angeljax.train.optimizers import OptimizerConfig, decay_at, make_schedule
from tests.test_cli import tokenizer

SIZES = DecoderConfig(
    model_type="llama",
    vocab_size=100,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    tied=True,
    eos_ids=(1,),
)
STEPS = 6
CONFIG = {
    "generate": {
        "shards": 4,
        "rows": 16,
        "max_new_tokens": 24,
        "question_tokens": 32,
        "temperatures": [0.7, 1.0],
    },
    "scan_layers": True,
    "head": {"vocab_size": 40},
    "loss": {"steps": 2},
    "steps": STEPS,
    "seq_length": 16,
    "batch_size": 4,
    "dtype": "float32",
    "optimizer": {"lr": 3e-3, "warmup": 2},
    "checkpoint": {"every": 2},
    "log": {"every": 1},
    "eval": {"prompts": 0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of a model, and prompts."""
    folder = tmp_path_factory.mktemp("eagle")
    model = LanguageModel(SIZES)
    params = model.init(jax.random.key(0), jnp.float32)
    opened = _workflow.Opened(model, params, tokenizer(), "tiny")
    _workflow.save_model(folder / "tiny", opened, params, None)
    lines = [
        {"turns": ["what is it", "and then"], "category": "chat"},
        {"prompt": "a question that is too long for what is allowed here"},
        {"question": "how many", "category": "math"},
        {"question": "who", "category": "math"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "prompts.jsonl").write_text(text)
    return folder


def config(folder, **changes):
    return EagleTrainConfig.from_dict(
        {**CONFIG, "model": str(folder / "tiny"), **changes}
    )


@pytest.fixture(scope="module")
def trained(folder):
    evaluate = {
        "source": str(folder / "prompts.jsonl"),
        "prompts": 8,
        "prompt_tokens": 20,
        "max_new_tokens": 4,
        "num_tokens": 2,
    }
    return train_eagle(config(folder, eval=evaluate), folder / "whole", show=False)


def head_of(path):
    return (path / "model.safetensors").read_bytes()


def test_it_writes_trains_and_measures(folder, trained):
    out = folder / "whole"
    assert trained.steps == STEPS and 0 < trained.coverage <= 1
    found = trained.evaluation
    assert found["eval/same_text"] == 1 and found["eval/tau"] >= 1
    assert {"eval/tau/chat", "eval/tau/math", "eval/accepted/1"} <= set(found)
    curve = json.loads((out / "acceptance.json").read_text())["curve"]
    assert curve["step"] == list(range(1, STEPS + 1))
    assert np.shape(curve["top1"]) == (STEPS, 2)
    assert curve["loss"][-1] < curve["loss"][0]
    head, _ = load_eagle(trained.path, SIZES)
    assert head.draft_vocab_size == 40
    assert EagleTrainConfig.load(out / "config.yaml").generate.shards == 4


def test_a_stopped_run_goes_on_to_the_same_head(folder, trained, monkeypatch):
    out, whole = folder / "stopped", folder / "whole"
    batch = MaskedTokens.batch

    def fails(self, step):
        if step == 5:  # the first four are looked at before the training, too
            raise RuntimeError("stopped")
        return batch(self, step)

    monkeypatch.setattr(MaskedTokens, "batch", fails)
    with pytest.raises(RuntimeError, match="stopped"):
        train_eagle(config(folder), out, show=False)
    monkeypatch.undo()
    assert not (out / "head").exists()
    with pytest.raises(ValueError, match="holds a run"):
        train_eagle(config(folder), out, resume=False, show=False)
    with pytest.raises(ConfigError, match="with another loss"):
        train_eagle(config(folder, loss={"steps": 3}), out, show=False)
    # A shard of the text is lost as well: it is written again, as it was.
    lost = sorted((out / "text").glob("temperature-*/tokens-*.npy"))[-1]
    lost.unlink()
    again = train_eagle(config(folder), out, show=False)
    assert again.steps == STEPS
    assert lost.read_bytes() == (whole / lost.relative_to(out)).read_bytes()
    assert head_of(again.path) == head_of(trained.path)
    # And the text is data for whoever wants it later.
    texts = [str(x) for x in sorted((whole / "text").glob("temperature-*"))]
    later = train_eagle(config(folder, data=texts), folder / "later", show=False)
    assert head_of(later.path) == head_of(trained.path)
    assert not (folder / "later" / "text").exists()


def test_time_ends_the_text_and_the_training(folder):
    changes = {
        "generate": {**CONFIG["generate"], "max_minutes": 1e-5},
        "max_minutes": 1e-5,
    }
    out = train_eagle(config(folder, **changes), folder / "timed", show=False)
    assert out.steps == 1
    text = folder / "timed" / "text"
    assert len(list(text.glob("temperature-*/tokens-*.npy"))) == 2
    assert load_eagle(out.path, SIZES)[0].draft_vocab_size == 40


def test_the_rate_falls_with_the_time():
    for kind in ("constant", "linear", "cosine", "wsd"):
        options = OptimizerConfig(
            lr=1.0, schedule=kind, final_lr=0.1, decay_fraction=0.25
        )
        schedule = make_schedule(options, 1000)
        for share in (0.0, 0.4, 0.8, 1.0):
            want = float(schedule(int(share * 1000)))
            assert decay_at(options, share) == pytest.approx(want, abs=1e-5)


def test_pace_is_a_factor_on_the_rate():
    def loss(w, frozen, batch, step, key):
        return jnp.sum((w - batch) ** 2), {}

    import optax

    run = {"steps": 1, "optimizer": optax.sgd(0.1), "max_minutes": 5}
    start = jnp.zeros(2), lambda i: np.ones(2, np.float32)
    got = fit(loss, *start, pace=lambda share: 0.5, **run).trainable
    np.testing.assert_allclose(got, 0.1)
    with pytest.raises(ValueError, match="max_minutes must be above 0"):
        fit(loss, *start, **{**run, "max_minutes": 0})


def test_outputs_for_spec_exit_learn_where_thinking_stands(folder):
    ids = np.random.default_rng(0).integers(2, 90, size=600).astype(np.uint16)
    begin, end = (tokenizer().token_id(x) for x in "<>")
    ids[10::40], ids[30::40] = begin, end
    np.save(folder / "thinking.npy", ids)
    changes = {
        "data": str(folder / "thinking.npy"),
        "answers_only": False,
        "exit": {"begin": "<", "end": ">"},
    }
    out = train_eagle(config(folder, **changes), folder / "exit", show=False)
    _, head = load_eagle(out.path, SIZES)
    assert np.abs(head["exit"]["kernel"]).max() > 0
    assert {"exit/confidence", "exit/progress", "exit/remaining"} <= set(out.metrics)
    np.save(folder / "none.npy", np.full(600, 5, np.uint16))
    changes["data"] = str(folder / "none.npy")
    with pytest.raises(ConfigError, match="exit: the text has no thinking"):
        train_eagle(config(folder, **changes), folder / "none", show=False)


def test_targets_of_thinking_by_hand(rng):
    ids = rng.integers(0, 9, size=300)
    progress, left = thinking_targets(ids, 1, 2)
    want = np.zeros((2, 300))
    for i in range(300):
        first = next((j for j in range(i - 1, -1, -1) if ids[j] in (1, 2)), None)
        last = next((j for j in range(i + 1, 300) if ids[j] in (1, 2)), None)
        inside = ids[i] not in (1, 2) and None not in (first, last)
        if inside and ids[first] == 1 and ids[last] == 2:
            want[:, i] = (i - first) / (last - first - 1), last - i
    np.testing.assert_allclose(progress, want[0], rtol=1e-6)
    np.testing.assert_array_equal(left, want[1])
    assert 0 < (left > 0).mean() < 1


def test_errors_of_signals_by_hand(rng):
    from angeljax.speculative import EagleConfig, init_eagle

    model = LanguageModel(SIZES)
    params = model.init(jax.random.key(0), jnp.float32)
    sizes = EagleConfig.of(SIZES)
    head = init_eagle(sizes, jax.random.key(1), target=params, exit=True)
    kernel = rng.normal(size=(48, 3)).astype(np.float32)
    head["exit"] = {"kernel": jnp.asarray(kernel)}
    tokens = rng.integers(0, 100, size=(2, 9))
    remaining = rng.integers(0, 4, size=(2, 9)).astype(np.float32)
    progress = rng.random((2, 9)).astype(np.float32)
    batch = {"tokens": tokens, "mask": np.ones((2, 9), bool)}
    batch |= {"remaining": remaining, "progress": progress}
    task = EagleTask(model, sizes, EagleLoss(steps=1), "float32")
    trainable, frozen = task.init(params, head)

    @jax.jit
    def errors(trainable, frozen):
        final, features = task.target(frozen, tokens[:, :-1])
        _, sure = task._best(frozen, final, True)
        found = task._exit_loss(trainable, frozen, features, batch, sure)
        return found, features, model.logits(params, tokens[:, :-1])

    (got, metrics), features, logits = errors(trainable, frozen)
    raw = np.concatenate(features, axis=-1) @ kernel
    logits = np.asarray(logits, np.float64)
    total = left = count = 0.0
    for b in range(2):
        for i in range(8):
            if remaining[b, i] == 0:
                continue
            p = np.exp(logits[b, i]) / np.exp(logits[b, i]).sum()
            c, q, r = raw[b, i]
            total += (1 / (1 + np.exp(-c)) - p.max()) ** 2
            total += (1 / (1 + np.exp(-q)) - progress[b, i]) ** 2
            total += (r - np.log(remaining[b, i])) ** 2
            left += abs(r - np.log(remaining[b, i]))
            count += 1
    assert float(got) == pytest.approx(total / count, rel=1e-4)
    assert float(metrics["exit/remaining"]) == pytest.approx(left / count, rel=1e-4)


def test_prompts_of_a_file(folder, tmp_path):
    kept, kinds = read_prompts(str(folder / "prompts.jsonl"), tokenizer(), 8, 20)
    assert kinds == ["chat", "math", "math"]
    want = [tokenizer().encode(f"u:{x}|a:") for x in ("what is it", "how many", "who")]
    assert [x.tolist() for x in kept] == want
    assert len(read_prompts(str(folder / "prompts.jsonl"), tokenizer(), 2, 20)[0]) == 2
    (tmp_path / "bad.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "worse.jsonl").write_text("{\n")
    (tmp_path / "lines.txt").write_text("a\n\nb\n")
    assert len(read_prompts(str(tmp_path / "lines.txt"), tokenizer(), 8, 20)[0]) == 2
    for name, says in [
        ("bad.jsonl", "line 1 has no text as turns, prompt or question"),
        ("worse.jsonl", "line 1 is no JSON"),
        ("missing.jsonl", "No such file"),
        ("lines.txt", "no prompt of up to 2 tokens"),
    ]:
        with pytest.raises(ConfigError, match=says):
            read_prompts(str(tmp_path / name), tokenizer(), 8, 2)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": None}, "give steps or tokens"),
        ({"max_minutes": 0}, "max_minutes is 0"),
        ({"generate": {"max_minutes": -1}}, "generate.max_minutes must be"),
        ({"generate": {"shards": 1}}, "each needs one"),
        ({"loss": {"kind": "mse"}}, "loss.kind must be one of"),
        ({"loss": {"steps": 15}}, "leaves no place for 15 drafts"),
        ({"accumulate": 3}, "cannot be divided into 3"),
        ({"head": {"vocab_size": 0}}, "head.vocab_size must be"),
        ({"head": {"normalise": "none"}}, "did you mean 'normalize'"),
        ({"exit": {"begin": ""}}, "exit.begin must be"),
        ({"eval": {"num_tokens": 0}}, "eval.num_tokens must be"),
        ({"tempo": 1}, "has no field 'tempo'"),
    ],
)
def test_configurations_that_cannot_be(folder, changes, says):
    with pytest.raises(ConfigError, match=says):
        config(folder, **changes)


def test_trainings_that_cannot_be(folder):
    out = folder / "never"
    np.save(folder / "five.npy", np.full(600, 5, np.uint16))
    for changes, says in [
        ({"head": {"vocab_size": 101}}, "head.vocab_size of 101"),
        ({"head": {"layers": [0, 1, 2]}}, "reads layers"),
        ({"optimizer": {"warmup": STEPS}}, "leaves none of the 6"),
        ({"data": str(folder / "none.txt")}, "data: "),
        ({"data": str(folder / "five.npy")}, "set answers_only to false"),
    ]:
        with pytest.raises(ValueError, match=says):
            train_eagle(config(folder, **changes), out, show=False)


def test_what_is_held_out_is_not_trained_on():
    ids = np.arange(200).astype(np.uint16)
    mask = np.zeros(200, bool)
    for first in (20, 60, 100, 140, 180):
        mask[first : first + 10] = True
    options = EagleTrainConfig.from_dict(
        {"model": "any", "steps": 1, "eval": {"prompts": 2, "prompt_tokens": 8}}
    )
    rest, kept, prompts = _held_out(options.eval, ids, mask)
    # Each ends where an answer begins.
    assert [p.tolist() for p in prompts] == [[*range(132, 140)], [*range(172, 180)]]
    assert len(rest) == len(kept) == 132
    rest, _, prompts = _held_out(options.eval, ids, None)
    assert len(rest) == 184 and prompts[1].tolist() == list(range(192, 200))
    with pytest.raises(ConfigError, match="more than half"):
        _held_out(options.eval, ids[:24], None)


def test_yaml_of_the_guide_loads():
    page = Path(__file__).parents[2] / "docs" / "guides" / "eagle3_training.md"
    found = re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.S | re.M)
    configs = [EagleTrainConfig.from_dict(yaml.safe_load(text)) for text in found]
    assert [c.exit is not None for c in configs] == [False, False, False, True]
    rows = re.findall(r"^\| `(\w+)`(?:, `(\w+)`)? \|", page.read_text(), re.M)
    told = {name for row in rows for name in row if name}
    fields = {f.name for f in dataclasses.fields(ExitRule)}
    assert told == fields - {"alpha", "window"}  # told with `smoothing`
