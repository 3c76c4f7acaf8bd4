"""What pruning of encoder tokens costs Whisper in word errors, for each method.

    python -m benchmarks.whisper_pruning --model whisper-tiny.en --audio DIR --tag cpu

`--model` is a Hugging Face folder, `--audio` a folder with `transcripts.jsonl`, one
`{"file": ..., "text": ...}` a line, and the sound files it names, each of 30 s at most.
FLAC needs `pip install soundfile`; 16-bit WAV does not.

The encoder runs once over all recordings. For every method and share its real tokens
(50 a second, rounded up) are pruned; those of the padding never are. What is left is
decoded greedily, together with the last second of the window's padding. The first rows
say why: with all padding, as Whisper was trained; with none, where it repeats itself
until it is cut off; and with the last tokens alone. At a half, two methods are decoded
with all padding too. Texts end after 80 tokens, so that repetitions cost a bounded
number of errors. Rows with `weights` are the unpruned model with quantized weights.
Brackets of the reference texts are taken off before Whisper's normaliser, which would
drop the words in them. `--smoke` runs everything on a tiny random model and noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import angeljax as aj
from angeljax.evaluation import WordErrors, english_normalizer, word_error_rate
from angeljax.models import (
    EncodedAudio,
    LoadedWhisper,
    WhisperConfig,
    WhisperModel,
    audio_pruner,
    encode_audio,
    load_whisper,
    read_audio,
    transcribe_tokens,
)
from benchmarks._results import RESULTS, Row, write

# Name on the command line -> method, what it is called in a row, its options.
METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "samp": ("samp", "", {}),
    "samp-0.9": ("samp", "threshold 0.9", {"threshold": 0.9}),
    "samp-mmr": ("samp", "mmr", {"pruner": "mmr"}),
    **{
        name: (name, "", {})
        for name in ("atome", "fastadasp", "divprune", "idpruner", "uniform", "random")
    },
}
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
# Of samp; 0.85, its own, and 0.9 are among the methods.
THRESHOLDS = (0.7, 0.75, 0.8, 0.95)
# Read with all padding of the window as well, at the share nearest to a half.
WHOLE = ("samp", "uniform")
TAIL = 50
MAX_TOKENS = 80
SEEDS = (0, 1, 2)
# Weight-only formats of the whole model's matrices.
WEIGHTS: dict[str, dict[str, Any]] = {
    "int8, channel": {"format": "int8", "granularity": "channel"},
    "int4, groups of 32": {"format": "int4", "group_size": 32},
    "int4, asymmetric, groups of 32": {
        "format": "int4",
        "group_size": 32,
        "symmetric": False,
    },
}


@dataclasses.dataclass(frozen=True)
class Speech:
    """Recordings in order of length, and what was said in them."""

    clips: list[np.ndarray]
    texts: list[str]

    @classmethod
    def load(cls, folder: Path, limit: int | None) -> Speech:
        """From a folder with `transcripts.jsonl`."""
        lines = (folder / "transcripts.jsonl").read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines if line.strip()][:limit]
        clips = [read_audio(folder / e["file"]) for e in entries]
        # The normaliser takes what stands in brackets for a note; here it is spoken.
        spoken = str.maketrans("()[]", "    ")
        texts = [e["text"].translate(spoken) for e in entries]
        order = sorted(range(len(clips)), key=lambda i: len(clips[i]))
        return cls([clips[i] for i in order], [texts[i] for i in order])


class Bench:
    """A model's encoded recordings, and the word errors of what is decoded from them.

    Args:
      loaded: the model.
      speech: what it hears.
      batch_size: recordings at a time.
      window: seconds of the encoder's window.
    """

    def __init__(
        self, loaded: LoadedWhisper, speech: Speech, *, batch_size: int, window: float
    ) -> None:
        self.loaded, self.speech, self.batch_size = loaded, speech, batch_size
        self.window = window
        self.limit = min(MAX_TOKENS, loaded.model.config.max_target_positions - 2)
        self.normalize = english_normalizer()
        self.audio = self.encoded(loaded.params)
        self.lengths = np.asarray(self.audio.mask).sum(1)

    def encoded(self, params: Any) -> EncodedAudio:
        """All recordings, in one array on the host."""
        model = dataclasses.replace(self.loaded, params=params)
        parts = []
        for start in range(0, len(self.speech.clips), self.batch_size):
            clips = self.speech.clips[start : start + self.batch_size]
            found = encode_audio(
                model, clips, window=self.window, return_attention="last"
            )
            parts.append(jax.device_get(found))
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)

    def errors(
        self, features: np.ndarray, mask: np.ndarray, params: Any = None
    ) -> WordErrors:
        """Decodes `[B, N, D]`, the tokens that `mask` names, and compares."""
        params = self.loaded.params if params is None else params
        # What is looked at comes first; a batch is as long as its longest row needs,
        # in steps, so that few shapes are compiled.
        order = np.argsort(~mask, axis=1, kind="stable")
        features = np.take_along_axis(features, order[..., None], axis=1)
        mask = np.take_along_axis(mask, order, axis=1)
        rows = []
        for start in range(0, len(mask), self.batch_size):
            part = slice(start, start + self.batch_size)
            most = int(mask[part].sum(1).max())
            n = -(-most // 128) * 128
            if n > mask.shape[1]:
                more = n - mask.shape[1]
                features = np.pad(features, ((0, 0), (0, more), (0, 0)))
                mask = np.pad(mask, ((0, 0), (0, more)))
            rows.append(
                transcribe_tokens(
                    self.loaded.model,
                    params,
                    jnp.asarray(features[part, :n]),
                    mask=jnp.asarray(mask[part, :n]),
                    max_new_tokens=self.limit,
                ).tokens
            )
        texts = [self.text(row) for part in jax.device_get(rows) for row in part]
        return word_error_rate(self.speech.texts, texts, normalize=self.normalize)

    def text(self, row: np.ndarray) -> str:
        """The text of a row of ids."""
        ids = row.tolist()
        end = self.loaded.model.config.eos_id
        return self.loaded.tokenizer.decode(
            ids[: ids.index(end)] if end in ids else ids
        )

    def padded(self, tail: int | None) -> tuple[np.ndarray, np.ndarray]:
        """All real tokens, and the last `tail` of the window (None: all padding)."""
        mask = self.audio.mask
        features = np.asarray(self.audio.features)
        if tail is None:
            return features, np.ones(mask.shape, bool)
        places = np.arange(mask.shape[1])
        return features, np.asarray(mask) | (places >= mask.shape[1] - tail)

    def pruned(
        self, method: str, keep: float, *, whole: bool = False, **options: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """The real tokens pruned, and the tail or the `whole` padding."""
        # Selection is among real tokens: the rest of the window is cut off before.
        n = -(-int(self.lengths.max()) // 64) * 64
        n = min(n, self.audio.mask.shape[1])
        prune = audio_pruner(method, keep=keep, tail=0, **options)
        attention = jax.tree.map(lambda x: jnp.asarray(x[:, :n]), self.audio.attention)
        rows, used = jax.jit(prune)(
            jnp.asarray(self.audio.features[:, :n]),
            attention,
            jnp.asarray(self.audio.mask[:, :n]),
        )
        last = slice(0 if whole else -TAIL, None)
        tail = self.audio.features[:, last], ~self.audio.mask[:, last]
        return (
            np.concatenate([np.asarray(rows), tail[0]], axis=1),
            np.concatenate([np.asarray(used), tail[1]], axis=1),
        )


def measure(
    bench: Bench,
    methods: Sequence[str],
    keeps: Sequence[float],
    thresholds: Sequence[float],
    weights: Mapping[str, Mapping[str, Any]],
) -> list[Row]:
    """All rows."""
    rows: list[Row] = []
    reference = bench.errors(*bench.padded(None))

    def add(
        found: WordErrors,
        mask: np.ndarray,
        *,
        method: str = "none",
        keep: float = 1.0,
        option: str = "",
        padding: str = f"last {TAIL}",
        weights: str = "float32",
    ) -> None:
        case = {
            "method": method,
            "keep": keep,
            "option": option,
            "padding": padding,
            "weights": weights,
            # Kept in the mean, those of padding included.
            "tokens": round(float(mask.sum(1).mean()), 1),
        }
        base = 100 * reference.rate
        rows.append(Row(case, "wer", 100 * found.rate, "%", baseline=base))
        kinds = ("substitutions", "deletions", "insertions")
        rows.extend(Row(case, k, getattr(found, k), "words") for k in kinds)
        print(
            f"{time.perf_counter() - start:4.0f} s {json.dumps(case)}: {found}",
            flush=True,
        )

    start = time.perf_counter()
    add(reference, bench.padded(None)[1], padding="all")
    for tail in (0, 10, TAIL, 100):
        features, mask = bench.padded(tail)
        name = f"last {tail}" if tail else "none"
        add(bench.errors(features, mask), mask, padding=name)
    for keep in keeps:
        for name in methods:
            method, option, options = METHODS[name]
            for seed in SEEDS if method == "random" else (0,):
                features, mask = bench.pruned(method, keep, seed=seed, **options)
                option = f"seed {seed}" if method == "random" else option
                found = bench.errors(features, mask)
                add(found, mask, method=method, keep=keep, option=option)
    half = min(keeps, key=lambda keep: abs(keep - 0.5))
    for method in WHOLE:
        features, mask = bench.pruned(method, half, whole=True)
        found = bench.errors(features, mask)
        add(found, mask, method=method, keep=half, padding="all")
    # Where methods differ most.
    changed: list[dict[str, Any]] = [{"threshold": x} for x in thresholds]
    changed += [{"relevance": x} for x in ("max", "received") if thresholds]
    for options in changed:
        features, mask = bench.pruned("samp", min(keeps), **options)
        option = ", ".join(f"{k} {v}" for k, v in options.items())
        found = bench.errors(features, mask)
        add(found, mask, method="samp", keep=min(keeps), option=option)
    for name, rule in weights.items():
        recipe = aj.Recipe(rules=[aj.Rule(**rule)])
        compress = jax.jit(functools.partial(aj.compress, recipe=recipe))
        params = compress(bench.loaded.params)
        features = np.asarray(bench.encoded(params).features)
        mask = np.ones(features.shape[:2], bool)
        found = bench.errors(features, mask, params)
        add(found, mask, padding="all", weights=name)
    return rows


def smoke_model() -> tuple[LoadedWhisper, Speech]:
    """A tiny random model and noise, with letters for tokens."""
    import tokenizers

    from angeljax.models import Tokenizer

    vocab = {chr(ord("a") + i): i for i in range(26)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))
    config = WhisperConfig(
        vocab_size=26,
        hidden_size=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_heads=2,
        decoder_heads=2,
        encoder_ffn_size=32,
        decoder_ffn_size=32,
        max_source_positions=200,
        max_target_positions=12,
        start_id=24,
        eos_id=25,
        pad_id=25,
    )
    model = WhisperModel(config)
    params = jax.tree.map(lambda x: 8 * x, model.init(jax.random.key(0)))
    tokenizer = Tokenizer({"tokenizer.json": words.to_str().encode()})
    rng = np.random.default_rng(0)
    clips = [rng.normal(size=n).astype(np.float32) / 9 for n in (9000, 14000, 20000)]
    speech = Speech(clips, ["a b c", "d e f g", "h i"])
    return LoadedWhisper(model, params, tokenizer, "smoke"), speech


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub name of a Whisper model")
    parser.add_argument("--audio", type=Path, help="folder with transcripts.jsonl")
    parser.add_argument("--tag", help="device name in the file's name, such as cpu")
    parser.add_argument("--methods", nargs="+", default=tuple(METHODS), choices=METHODS)
    parser.add_argument("--keep", nargs="+", type=float, default=KEEPS)
    parser.add_argument("--thresholds", nargs="*", type=float, default=THRESHOLDS)
    parser.add_argument("--limit", type=int, help="use the first so many recordings")
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--no-weights", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    window = 30.0
    if args.smoke:
        loaded, speech = smoke_model()
        window = 4.0
    elif args.model is None or args.audio is None:
        parser.error("--model and --audio are needed (or --smoke)")
    else:
        loaded = load_whisper(args.model)
        speech = Speech.load(args.audio, args.limit)
    start = time.perf_counter()
    bench = Bench(loaded, speech, batch_size=args.batch_size, window=window)
    print(f"encoded in {time.perf_counter() - start:.1f} s", flush=True)
    weights = {} if args.no_weights else WEIGHTS
    rows = measure(bench, args.methods, args.keep, args.thresholds, weights)
    print(f"{time.perf_counter() - start:.0f} s in all")
    if args.tag:
        print(write("whisper_pruning", rows, device_tag=args.tag, directory=args.out))


if __name__ == "__main__":
    main()
