"""The benchmark of pruned Whisper runs on a tiny model, and scores what it should."""

import json
import wave

import numpy as np

from angeljax.evaluation import word_error_rate
from benchmarks import whisper_pruning
from benchmarks._results import read


def test_smoke(tmp_path, monkeypatch):
    monkeypatch.setattr(whisper_pruning, "WEIGHTS", {"int8": {"format": "int8"}})
    options = ["--smoke", "--methods", "uniform", "--keep", "0.5", "--thresholds"]
    arguments = ["x", *options, "--tag", "here", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    whisper_pruning.main()
    rows = read(tmp_path / "whisper_pruning.here.json")["rows"]
    rates = {
        (r.case["method"], r.case["padding"], r.case["weights"]): r
        for r in rows
        if r.metric == "wer"
    }
    assert rates["none", "all", "float32"].case["tokens"] == 200
    lengths = [-(-n // 320) for n in (9000, 14000, 20000)]
    mean = sum(lengths) / 3
    assert rates["none", "none", "float32"].case["tokens"] == round(mean, 1)
    kept = sum(round(n / 2) for n in lengths) / 3 + 50
    assert rates["uniform", "last 50", "float32"].case["tokens"] == round(kept, 1)
    assert (
        rates["none", "all", "int8"].baseline == rates["none", "all", "float32"].value
    )


def test_spoken_brackets_count(tmp_path):
    lines = []
    for i, text in enumerate(["(in brackets) and not", "a"]):
        with wave.open(str(tmp_path / f"{i}.wav"), "wb") as f:
            f.setparams((1, 2, 16000, 0, "NONE", ""))
            f.writeframes(np.zeros(900 - i, np.int16).tobytes())
        lines.append(json.dumps({"file": f"{i}.wav", "text": text}))
    (tmp_path / "transcripts.jsonl").write_text("\n".join(lines))
    speech = whisper_pruning.Speech.load(tmp_path, None)
    # In order of length, each with its text.
    assert [len(c) for c in speech.clips] == [899, 900]
    same = whisper_pruning.english_normalizer()
    heard = ["a", "in brackets and not"]
    assert word_error_rate(speech.texts, heard, normalize=same).errors == 0
