"""Sources of text, their errors, and windows that score each token once."""

import doctest

import numpy as np
import pytest

from angeljax.evaluation import load_text, text, windows


def test_default_text_is_long_and_deterministic():
    default = load_text()
    assert len(default) > 300_000
    assert default == load_text("pydoc_data.topics")
    assert "\n\n" in default


def test_text_and_jsonl_files(tmp_path):
    plain = tmp_path / "a.txt"
    plain.write_text("für\n", encoding="utf-8")
    assert load_text(plain) == load_text(str(plain)) == "für\n"
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "one", "id": 1}\n\n{"text": "two"}\n')
    assert load_text(lines) == "one\n\ntwo"


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "one"}\n{"body": "two"}', r"a\.jsonl:2: no string field 'text'"),
        ('{"text": 3}', r"a\.jsonl:1: no string field 'text'"),
        ("[1]", r"a\.jsonl:1: no string field 'text'"),
        ("{", r"a\.jsonl:1: not JSON"),
        ("\n\n", r"a\.jsonl: the text is empty"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=message) as caught:
        load_text(path)
    assert "\n" not in str(caught.value)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such text file"):
        load_text(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no such text file"):
        load_text("none.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="the text is empty"):
        load_text(tmp_path / "empty.txt")


class _Rows:
    def __init__(self, columns):
        self._columns = columns
        self.column_names = list(columns)

    def __getitem__(self, name):
        return self._columns[name]


@pytest.mark.parametrize(
    "source, expected",
    [
        ("wikitext", ("wikitext", None, "test")),
        ("wikitext:raw", ("wikitext", "raw", "test")),
        ("org/name:raw:train", ("org/name", "raw", "train")),
        ("wikitext::train", ("wikitext", None, "train")),
    ],
)
def test_dataset_names(monkeypatch, source, expected):
    seen = []

    def load_dataset(name, config, *, split):
        seen.append((name, config, split))
        return _Rows({"text": ["a", "b"]})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_text(source) == "a\n\nb"
    assert seen == [expected]


def test_dataset_errors_take_one_line(monkeypatch):
    with pytest.raises(ValueError, match="name"):
        load_text("a:b:c:d")
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: _Rows({"body": []}))
    with pytest.raises(ValueError, match="no column 'text' among body"):
        load_text("wikitext")

    def fail(*_, **__):
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(ValueError, match="no network") as caught:
        load_text("wikitext")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(200))
def test_every_token_is_scored_once_with_its_own_context(seed):
    rng = np.random.default_rng(seed)
    length = int(rng.integers(2, 12))
    stride = int(rng.integers(1, length)) if rng.random() < 0.8 else None
    stream = np.arange(1, 1 + int(rng.integers(2, 60)))
    tokens, score_mask = windows(stream, length, stride)
    assert tokens.dtype == np.int32 and score_mask.dtype == bool
    # The stream counts 1, 2, 3, ...: a scored token names its place.
    assert sorted(tokens[score_mask]) == stream[1:].tolist()
    # Each follows what precedes it in the stream, and padding comes last only.
    rows, columns = np.nonzero(score_mask)
    np.testing.assert_array_equal(tokens[rows, columns - 1], tokens[rows, columns] - 1)
    inside = tokens > 0
    assert (inside[:, :-1] >= inside[:, 1:]).all()
    assert inside[:-1].all()
    # A later window gives each token it scores at least length - stride of context.
    context = length - (stride or length - 1)
    assert (columns[rows > 0] >= context).all()


def test_stride_of_a_whole_window_is_the_published_protocol():
    tokens, score_mask = windows(np.arange(10), 4, 4, drop_last=True)
    assert tokens.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert score_mask.tolist() == 2 * [[False, True, True, True]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([1, 2, 3], 1), "length"),
        (([1, 2, 3], 3, 4), "stride"),
        (([1, 2, 3], 3, 0), "stride"),
        (([1], 3), "nothing to score"),
        (([], 3), "nothing to score"),
    ],
)
def test_bad_windows(arguments, message):
    with pytest.raises(ValueError, match=message):
        windows(*arguments)
    with pytest.raises(ValueError, match="do not fill"):
        windows([1, 2, 3], 4, drop_last=True)


def test_examples():
    assert doctest.testmod(text).failed == 0
