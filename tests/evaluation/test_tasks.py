"""Multiple-choice tasks against one example at a time, and bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.evaluation import (
    EncodedTask,
    Example,
    Task,
    encode_task,
    evaluate_tasks,
    load_task,
    load_tasks,
    score_encoded,
)
from angeljax.evaluation import _choices as choices

VOCABULARY = 128


class Characters:
    def encode(self, text):
        return [ord(c) for c in text]


class Merging:
    """Characters, but "a" and a blank after it, or "bb", are one token."""

    def encode(self, text):
        ids = [ord(c) for c in text.replace("a ", "\1").replace("bb", "\2")]
        return ids


def model(params, tokens):
    """Causal, and every token before counts: a decaying sum of embeddings."""

    def step(state, embedding):
        state = 0.7 * state + embedding
        return state, state

    embedded = params["in"][tokens]
    _, states = jax.lax.scan(
        step, jnp.zeros_like(embedded[:, 0]), embedded.transpose(1, 0, 2)
    )
    return states.transpose(1, 0, 2) @ params["out"]


def uniform(params, tokens):
    return jnp.zeros((*tokens.shape, VOCABULARY)) + params


@pytest.fixture(scope="module")
def params():
    draw = np.random.default_rng(0).standard_normal
    return {
        "in": jnp.asarray(draw((VOCABULARY, 8)), jnp.float32),
        "out": jnp.asarray(draw((8, VOCABULARY)), jnp.float32),
    }


@pytest.fixture(scope="module")
def task():
    draw = np.random.default_rng(1)

    def words(low, high):
        return "".join(map(chr, draw.integers(97, 123, draw.integers(low, high))))

    examples = []
    for i in range(24):
        # Letters that share a row, more of them than it holds, and choices that do not.
        lettered = tuple(" " + chr(65 + k) for k in range(2 + i)) if i % 3 == 0 else ()
        free = tuple(" " + words(1, 30) for _ in range(2 + i % 4))
        offered = lettered or free
        examples.append(Example(words(1, 150), offered, int(draw.integers(2))))
    return Task("drawn", tuple(examples))


def by_hand(params, task):
    """Log-likelihoods in float64, one choice and one token at a time."""
    first = {k: np.asarray(v, np.float64) for k, v in params.items()}
    found, greedy = [], []
    for example in task.examples:
        for choice in example.choices:
            state, total, best = np.zeros(8), 0.0, True
            text = example.context + choice
            for t, character in enumerate(text):
                if t >= len(example.context):
                    logits = state @ first["out"]
                    total += logits[ord(character)] - np.log(np.exp(logits).sum())
                    best &= logits.argmax() == ord(character)
                state = 0.7 * state + first["in"][ord(character)]
            found.append(total)
            greedy.append(best)
    return np.asarray(found), np.asarray(greedy)


def test_against_one_choice_at_a_time(params, task):
    wanted, greedy = by_hand(params, task)
    encoded = encode_task(task, Characters())
    before = choices.score_choices._cache_size()
    result = score_encoded(model, params, encoded, tokens_per_batch=1024)
    shapes = choices.score_choices._cache_size() - before
    assert shapes == 3  # 256, 128 and 64 positions
    np.testing.assert_allclose(result.log_likelihoods, wanted, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(result.is_greedy, greedy)

    acc, norm, start = [], [], 0
    for example in task.examples:
        scores = wanted[start : start + len(example.choices)]
        sizes = [len(c) - 1 for c in example.choices]
        acc.append(scores.argmax() == example.label)
        norm.append((scores / sizes).argmax() == example.label)
        start += len(example.choices)
    assert result.acc == np.mean(acc) and result.acc_norm == np.mean(norm)
    assert result.acc_stderr == pytest.approx(np.std(acc, ddof=1) / 24**0.5)
    assert result.acc_norm_stderr == pytest.approx(np.std(norm, ddof=1) / 24**0.5)
    assert acc != norm and 0 < result.acc < 1
    chance = np.mean([1 / len(e.choices) for e in task.examples])
    assert result.chance == pytest.approx(chance)
    assert json.loads(json.dumps(result.to_dict()))["acc"] == result.acc


def test_greedy_is_what_the_model_would_write(params):
    # The model's own continuation, once by itself and once with another last letter.
    text = "start"
    for _ in range(3):
        state = np.zeros(8)
        for c in text:
            state = 0.7 * state + np.asarray(params["in"])[ord(c)]
        text += chr((state @ np.asarray(params["out"])).argmax())
    written = text[5:]
    other = written[:-1] + chr((ord(written[-1]) + 1) % VOCABULARY)
    task = Task("t", (Example("start", (written, other), 0),))
    # Example refuses blanks only; the model writes whatever it likes.
    result = score_encoded(model, params, encode_task(task, Characters()))
    assert result.is_greedy.tolist() == [True, False]
    assert result.greedy == 1 and result.greedy_stderr is None


def test_choices_of_one_token_share_a_row(task):
    encoded = encode_task(task, Characters())
    rows = choices.make_rows(encoded, None)
    lettered = [e for e in task.examples if e.choices[0] == " A"]
    shared = sum(-(-len(e.choices) // choices.ALTERNATIVES) for e in lettered)
    free = encoded.requests - sum(len(e.choices) for e in lettered)
    assert len(rows.inputs) == shared + free
    assert sorted(rows.requests[rows.requests >= 0]) == list(range(encoded.requests))


def test_batches_have_few_shapes():
    lengths = np.asarray([3, 200, 64, 65, 10, 10, 10])
    batches = list(choices.plan(lengths, 100, tokens_per_batch=256))
    assert [(c.tolist(), s, t) for c, s, t in batches] == [
        ([1], 1, 256),
        ([3, 2], 2, 128),
        ([4, 5, 6, 0], 4, 64),
    ]
    lengths = np.asarray([70, 5, 5])
    assert [b[1:] for b in choices.plan(lengths, 100, 512)] == [(3, 128)]


def test_tokens_are_split_as_the_harness_does():
    def split(context, choice, **options):
        task = Task("t", (Example(context, (choice,), 0),))
        e = encode_task(task, Merging(), **options)
        ids = "".join(map(chr, e.tokens))
        return ids[: e.choice_starts[0]], ids[e.choice_starts[0] :]

    # "a " is one token: the context by itself takes two, so the choice is the rest.
    assert split("xa", " y") == ("x\1", "y")
    # Blanks at the end of a context count to the choice.
    assert split("q: ", "y") == split("q:", " y") == ("q:", " y")
    assert split("q", " y", prefix_id=3) == ("\3q", " y")
    assert split("", "y", prefix_id=3) == ("\3", "y")
    with pytest.raises(ValueError, match="t: example 0: the context is empty: pass a"):
        split(" ", "y")
    # "bb" is one token, as the context "b" is by itself: nothing is left.
    with pytest.raises(ValueError, match="no token for the choice 'b'"):
        split("b", "b")


def test_long_contexts_lose_their_left_end(params, task):
    encoded = encode_task(task, Characters())
    result = score_encoded(model, params, encoded, max_length=40)
    short = Task(
        "short",
        tuple(
            Example((e.context + c)[-41 : -len(c)], (c,), 0)
            for e in task.examples
            for c in e.choices
        ),
    )
    lengths = np.diff(encoded.offsets)
    assert result.truncated == (lengths > 41).sum() > 0
    wanted, _ = by_hand(params, short)
    np.testing.assert_allclose(result.log_likelihoods, wanted, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="no room for a context in max_length=20"):
        score_encoded(model, params, encoded, max_length=20)


def test_save_and_load(tmp_path, task):
    encoded = encode_task(task, Characters())
    encoded.save(tmp_path / "t.npz")
    again = EncodedTask.load(tmp_path / "t.npz")
    assert again.name == "drawn" and [p.name for p in tmp_path.iterdir()] == ["t.npz"]
    for name, value in vars(encoded).items():
        np.testing.assert_array_equal(getattr(again, name), value)
        assert name == "name" or getattr(again, name).dtype == value.dtype

    with pytest.raises(ValueError, match=r"must end in \.npz"):
        encoded.save(tmp_path / "t.bin")
    for content in (b"", b"nothing", (tmp_path / "t.npz").read_bytes()[:200]):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.npz: not an encoded task"):
            EncodedTask.load(tmp_path / "bad.npz")
    arrays = vars(encoded) | {"labels": encoded.labels + 30}
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=r"bad\.npz: labels must be numbers of"):
        EncodedTask.load(tmp_path / "bad.npz")


def write(path, *records):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


GOOD = {"context": "é", "choices": [" a", " b"], "label": 1, "other": None}


def test_load(tmp_path):
    path = write(tmp_path / "one.jsonl", GOOD, "", GOOD | {"label": 0})
    task = load_task(path)
    assert task.name == "one" and task.examples[0] == Example("é", (" a", " b"), 1, 1)
    assert task.examples[1].line == 3
    assert load_tasks([path]) == load_tasks([tmp_path]) == [task]
    assert task.limit(None) is task.limit(2) is task
    assert [e.line for e in task.limit(1).examples] == [1]
    with pytest.raises(ValueError, match="limit must be positive, not 0"):
        task.limit(0)
    with pytest.raises(ValueError, match="is a task one already"):
        load_tasks([path, tmp_path])
    with pytest.raises(FileNotFoundError, match="two: no such task file"):
        load_tasks([tmp_path / "two"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no .jsonl file"):
        load_tasks([tmp_path / "empty"])
    with pytest.raises(ValueError, match="none.jsonl: there are no examples"):
        load_task(write(tmp_path / "none.jsonl", ""))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        (GOOD | {"label": 2}, "label 2 is none of the 2 choices"),
        (GOOD | {"label": -1}, "label -1 is none of the 2 choices"),
        (GOOD | {"label": True}, "'label' must be the index"),
        (GOOD | {"choices": []}, "there are no choices"),
        (GOOD | {"choices": ["a", " "]}, "a choice is empty"),
        (GOOD | {"choices": "ab"}, "'choices' must be a list of strings"),
        ({"choices": ["a"], "label": 0}, "'context' must be a string"),
    ],
)
def test_bad_lines_are_named(tmp_path, record, message):
    path = write(tmp_path / "bad.jsonl", GOOD, record)
    with pytest.raises(ValueError, match=f"bad.jsonl:2: {message}"):
        load_task(path)


def test_what_cannot_be_scored(task):
    encoded = encode_task(task, Characters())
    with pytest.raises(ValueError, match="choices are NaN: the model"):
        score_encoded(uniform, float("nan"), encoded)
    foreign = encode_task(Task("t", (Example("é", (" a", "b"), 0),)), Characters())
    with pytest.raises(ValueError, match="task t: token 233 is outside the model's"):
        score_encoded(uniform, 0.0, foreign)
    with pytest.raises(ValueError, match="tokens_per_batch must be positive, not 0"):
        score_encoded(uniform, 0.0, encoded, tokens_per_batch=0)
    with pytest.raises(ValueError, match="max_length must be positive, not 0"):
        score_encoded(uniform, 0.0, encoded, max_length=0)
    with pytest.raises(ValueError, match="task drawn is text: pass a tokenizer"):
        evaluate_tasks(uniform, 0.0, None, [task])
    with pytest.raises(ValueError, match="limit it before, with Task.limit"):
        evaluate_tasks(uniform, 0.0, None, [encoded], limit=3)


def test_limit_and_order_of_tasks(task):
    small = Task("small", task.examples[:2])
    results = evaluate_tasks(
        uniform, 0.0, Characters(), [task, small], limit=3, tokens_per_batch=256
    )
    assert [(r.name, r.examples) for r in results] == [("drawn", 3), ("small", 2)]
    lengths = [len(c) for e in small.examples for c in e.choices]
    wanted = -np.log(VOCABULARY) * np.asarray(lengths)
    np.testing.assert_allclose(results[1].log_likelihoods, wanted, rtol=1e-5)
