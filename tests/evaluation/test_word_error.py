"""Word error rate against a distance by search, and the normaliser's promises."""

import functools
import json

import numpy as np
import pytest

from angeljax.evaluation import (
    WordErrors,
    english_normalizer,
    word_error_rate,
    word_errors,
)


def distance(a, b):
    """Edit distance by recursion over both texts."""

    @functools.cache
    def best(i, j):
        if i == 0 or j == 0:
            return i + j
        if a[i - 1] == b[j - 1]:
            return best(i - 1, j - 1)
        return 1 + min(best(i - 1, j), best(i, j - 1), best(i - 1, j - 1))

    return best(len(a), len(b))


def test_errors_are_the_fewest_edits(rng):
    for _ in range(200):
        a, b = (list(rng.choice(list("abcd"), rng.integers(0, 9))) for _ in range(2))
        found = word_errors(" ".join(a), " ".join(b))
        assert found.errors == distance(tuple(a), tuple(b))
        assert found.words == len(a)
        assert found.insertions - found.deletions == len(b) - len(a)
        counts = found.substitutions, found.deletions, found.insertions
        assert min(counts) >= 0


@pytest.mark.parametrize(
    ("said", "heard", "counts"),
    [
        ("a b c", "a b c", (0, 0, 0)),
        ("a b c", "a x c", (1, 0, 0)),
        ("a b c", "a c", (0, 1, 0)),
        ("a c", "a b c", (0, 0, 1)),
        ("a b c d", "b c d e", (0, 1, 1)),
        ("a b", "", (0, 2, 0)),
        ("", "a b", (0, 0, 2)),
        ("a b", "c d", (2, 0, 0)),
    ],
)
def test_kinds_of_errors(said, heard, counts):
    found = word_errors(said, heard)
    assert (found.substitutions, found.deletions, found.insertions) == counts


def test_rate_is_of_all_texts_together():
    total = word_error_rate(["a b c d", "e"], ["a b c d", "x y"])
    assert (total.errors, total.words, total.rate) == (2, 5, 0.4)
    assert "2 errors in 5 words, 40.00 % (1 changed, 0 missing, 1 added)" == str(total)
    with pytest.raises(ValueError, match="one hypothesis for each"):
        word_error_rate(["a"], [])
    with pytest.raises(ValueError, match="no word"):
        word_error_rate([], []).rate  # noqa: B018
    assert str(WordErrors(0, 0, 1, 0)).startswith("1 errors in 0 words (")


def test_normalizer(tmp_path):
    same = english_normalizer()
    said = "Well, I won't pay the $3.50 (laughs); it's the twenty-first, I'm sure."
    heard = (
        "well i will not pay the three dollars and fifty cents it's the 21st i am sure"
    )
    assert word_error_rate([said], [heard], normalize=same).errors == 0
    assert same("the colour") == "the colour"
    assert english_normalizer({"colour": "color"})("the colour") == "the color"
    (tmp_path / "normalizer.json").write_text(json.dumps({"grey": "gray"}))
    assert english_normalizer(tmp_path)("Grey.") == "gray"
    assert english_normalizer(tmp_path / "normalizer.json")("Grey.") == "gray"
    (tmp_path / "list.json").write_text("[]")
    for bad in (tmp_path / "missing.json", tmp_path / "list.json"):
        with pytest.raises(ValueError, match=bad.name):
            english_normalizer(bad)


def test_numpy_texts_are_taken():
    assert word_error_rate(np.array(["a b"]), np.array(["a"])).deletions == 1
