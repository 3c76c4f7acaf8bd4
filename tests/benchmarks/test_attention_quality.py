"""What the benchmark asks: selectors of one density, and questions with an answer."""

import json

import numpy as np
import pytest

from benchmarks import _attention_data as data
from benchmarks.attention_quality import BY_SHARE, NAMES, STEM, attention


class Words:
    """One token for each word."""

    def __init__(self):
        self.known = []

    def encode(self, text, special=True):
        for word in text.split():
            if word not in self.known:
                self.known.append(word)
        return [self.known.index(word) + 1 for word in text.split()]

    def decode(self, ids):
        return " ".join(self.known[i - 1] for i in ids)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_rows_read_the_share_that_they_are_named_by(share):
    for name in NAMES:
        fn = attention(name, share, 8192, 128)
        assert fn.mean_correction == name.endswith("means")
        density = fn.selector.density(8192, layer=0, num_layers=30)
        if density is None:  # found out by running, from the option alone
            assert name in (*BY_SHARE, *STEM, "flashprefill + means")
            assert fn.selector.keep_ratio == share
        else:
            # Strides leave no less than 30 % of 64 blocks.
            most = 0.06 if name == "strided" else 0.02
            assert density == pytest.approx(share, abs=most), name


def test_questions_are_answered_in_one_document(tmp_path):
    rng = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz")

    def sentence():
        words = ["".join(rng.choice(letters, 5)) for _ in range(20)]
        return " ".join(words).capitalize() + "."

    texts = [" ".join(sentence() for _ in range(12)) for _ in range(5)]
    file = tmp_path / "text.txt"
    file.write_text(f"\n{data.END}\n".join(texts))
    tokenizer = Words()
    found = data.questions([file], tokenizer, length=400, count=3, documents=2)
    assert found.tokens.shape == (3, 400) and found.wanted.sum(1).tolist() == [8] * 3
    for tokens, mask, answer in zip(
        found.tokens, found.mask, found.answers, strict=True
    ):
        assert mask[-1] and not (tokens[~mask]).any()
        prompt, answer = tokenizer.decode(tokens[mask]), tokenizer.decode(answer)
        given = prompt.rsplit("Answer: ", 1)[1]
        assert len(given.split()) == 8
        documents = prompt.split("Question:")[0]
        assert documents.count("Document") == 2
        assert documents.count(f"{given} {answer}") == 1
    with pytest.raises(ValueError, match="the texts give"):
        data.questions([file], tokenizer, length=140, count=3, documents=4)


def test_needles_are_padded_on_the_left(tmp_path):
    file = tmp_path / "needle.jsonl"
    row = {"length": 8, "depth": 0.5, "prompt": "a b c", "answer": "d e"}
    file.write_text(json.dumps(row) + "\n" + json.dumps({**row, "length": 4}))
    found = data.needles(file, Words(), 8)
    assert found.tokens.tolist() == [[0] * 5 + [3, 4, 5]]
    assert found.answers.tolist() == [[1, 2]] and found.depths.tolist() == [0.5]
    assert found.padded(3).wanted.tolist() == [[True, True, False]]
    with pytest.raises(ValueError, match="no prompt of length 6"):
        data.needles(file, Words(), 6)
