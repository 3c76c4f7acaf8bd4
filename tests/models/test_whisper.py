"""Whisper against PyTorch `transformers` (golden files), and what pruning relies on."""

import dataclasses
import functools
import json
import os
import wave
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

import angeljax as aj
from angeljax import tokens
from angeljax.models import (
    ModelError,
    WhisperConfig,
    WhisperModel,
    audio_pruner,
    encode_audio,
    load_whisper,
    log_mel,
    read_audio,
    transcribe,
    transcribe_tokens,
)

FILE = Path(__file__).parent / "golden" / "whisper" / "tiny.npz"
TOLERANCE = 2e-5  # of the largest value; float32 gives about 1e-6
HIGHEST = functools.partial(jax.default_matmul_precision, "highest")


def relative(got, want):
    return np.abs(np.asarray(got, np.float32) - want).max() / np.abs(want).max()


@functools.cache
def golden():
    with np.load(FILE) as data:
        return dict(data)


def write_folder(folder, *, drop=(), extra=None, **changes):
    """A Hugging Face folder of the golden model, with a tokenizer of one-letter words.

    `changes` go into config.json.
    """
    want = golden()
    config = json.loads(str(want["config"])) | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(str(want["generation"]))
    tensors = {k[2:]: v for k, v in want.items() if k.startswith("w:")}
    tensors = {k: v.astype(np.float32) for k, v in tensors.items() if k not in drop}
    save_file(tensors | (extra or {}), folder / "model.safetensors")
    vocab = {chr(ord("!") + i): i for i in range(64)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="!"))
    words.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_whisper(write_folder(tmp_path_factory.mktemp("whisper")))


@pytest.fixture(scope="module")
def encoded(loaded):
    """Features and attention of the golden clips; the second one is shorter."""
    run = functools.partial(
        loaded.model.encode, lengths=jnp.asarray([50, 28]), return_attention="last"
    )
    with HIGHEST():
        mel = jnp.asarray(golden()["mel80"])
        return jax.jit(functools.partial(run, full=True))(loaded.params, mel)


def clips():
    return [golden()[f"audio{i}"].astype(np.float32) / 32768 for i in range(2)]


# --- Parity


def test_log_mel():
    want, audio = golden(), clips()
    batch = np.zeros((2, 16000), np.float32)
    for row, clip in zip(batch, audio, strict=True):
        row[: len(clip)] = clip
    error = np.abs(log_mel(jnp.asarray(batch)) - want["mel80"]).max()
    assert error < 1e-4
    wide = log_mel(jnp.asarray(batch), num_mels=128)[:, ::16]
    assert np.abs(wide - want["mel128"]).max() < 1e-4
    # Filled up inside, to a second and to thirty.
    alone = log_mel(jnp.asarray(audio[1]), num_samples=16000)
    assert np.abs(alone - want["mel80"][1]).max() < 1e-4
    whole = log_mel(jnp.asarray(audio[0]), num_mels=128, num_samples=480_000)
    assert whole.shape == (128, 3000)
    assert np.abs(whole[::9, ::7] - want["mel_whole"]).max() < 1e-4
    cut = log_mel(jnp.asarray(batch), num_samples=8000)
    assert cut.shape == (2, 80, 50)


def test_encoder(loaded, encoded):
    assert encoded.features.dtype == jnp.float32
    assert relative(encoded.features, golden()["encoded"]) < TOLERANCE


def test_attention_summary(encoded):
    want = golden()["attention"].astype(np.float64)  # one clip, [1, H, N, N]
    found = encoded.attention
    assert np.abs(found.full[:1] - want).max() < 1e-3  # stored as float16
    # The sums, from the exact weights, clip by clip and query by query.
    for row, length in enumerate((50, 28)):
        weights = np.asarray(found.full[row], np.float64)
        assert np.abs(weights.sum(-1) - 1).max() < 1e-5
        for j in range(50):
            most = sum(max(w[i, j] for w in weights) for i in range(length)) / length
            mean = sum(w[i, j] for w in weights for i in range(length)) / length / 4
            assert abs(found.received_max[row, j] - most) < 1e-6
            assert abs(found.received_mean[row, j] - mean) < 1e-6
            own = [w[j, j] for w in weights]
            assert abs(found.diagonal_max[row, j] - max(own)) < 1e-6
            assert abs(found.diagonal_mean[row, j] - sum(own) / 4) < 1e-6


def test_attention_summary_of_more_than_one_block_of_queries(rng):
    from angeljax.models._whisper_layers import summarise

    q, k = (jnp.asarray(rng.normal(size=(2, 300, 3, 8)), jnp.float32) for _ in range(2))
    real = jnp.arange(300) < jnp.asarray([[300], [170]])
    with HIGHEST():
        found = jax.jit(functools.partial(summarise, full=False))(q, k, real)
        weights = jax.nn.softmax(jnp.einsum("bqhd,bshd->bhqs", q, k), axis=-1)
    weights, real = np.asarray(weights), np.asarray(real)
    most, mean = weights.max(1), weights.mean(1)
    for row in range(2):
        np.testing.assert_allclose(
            found.received_max[row], most[row][real[row]].mean(0), rtol=1e-4
        )
        np.testing.assert_allclose(
            found.received_mean[row], mean[row][real[row]].mean(0), rtol=1e-4
        )
        np.testing.assert_allclose(
            found.diagonal_max[row], np.diag(most[row]), rtol=1e-4
        )
        np.testing.assert_allclose(
            found.diagonal_mean[row], np.diag(mean[row]), rtol=1e-4
        )
    assert found.full is None


def test_decoder_on_all_and_on_some_encoder_tokens(loaded, encoded):
    want = golden()
    tokens, kept = jnp.asarray(want["tokens"]), jnp.asarray(want["kept"])
    decode = jax.jit(loaded.model.decode)
    with HIGHEST():
        logits = decode(loaded.params, tokens, encoded.features)
        assert logits.dtype == jnp.float32
        assert relative(logits, want["logits"]) < TOLERANCE
        some = decode(loaded.params, tokens, encoded.features[:, kept])
        assert relative(some, want["logits_kept"]) < TOLERANCE
        # What is masked is as good as gone, whatever it holds.
        mask = jnp.zeros((2, 50), bool).at[:, kept].set(True)
        spoilt = jnp.where(mask[..., None], encoded.features, 1e4)
        masked = decode(loaded.params, tokens, spoilt, mask=mask)
        assert relative(masked, want["logits_kept"]) < TOLERANCE


def test_steps_equal_one_pass(loaded, encoded):
    want = golden()
    tokens = jnp.asarray(want["tokens"])
    step = jax.jit(loaded.model.step)
    with HIGHEST():
        state = loaded.model.start(loaded.params, encoded.features)
        parts = []
        for start, stop in [(0, 4), *((i, i + 1) for i in range(4, 9))]:
            logits, state = step(loaded.params, state, tokens[:, start:stop])
            parts.append(logits)
    assert relative(np.concatenate(parts, 1), want["logits"]) < TOLERANCE
    assert int(state.length) == 9


def expected(name, limit):
    """Golden ids, filled with the padding id, which is that of the end."""
    ids = golden()[name]
    return np.pad(ids, ((0, 0), (0, limit - ids.shape[1])), constant_values=56)


def test_greedy(loaded, encoded):
    with HIGHEST():
        out = transcribe_tokens(loaded.model, loaded.params, encoded.features)
    np.testing.assert_array_equal(out.tokens, expected("greedy", 22))
    assert out.lengths.tolist() == [4, 8]


@pytest.mark.parametrize("case", [0, 2, 3, 4])
def test_beams(loaded, encoded, case):
    beams, penalty = golden()["beams"][case]
    with HIGHEST():
        out = transcribe_tokens(
            loaded.model,
            loaded.params,
            encoded.features,
            num_beams=int(beams),
            length_penalty=float(penalty),
        )
    np.testing.assert_array_equal(out.tokens, expected(f"beam{case}", 22))


def test_limit_and_padding(loaded, encoded):
    """A text that is cut off is the beginning of the whole one."""
    model, params = loaded.model, loaded.params
    with HIGHEST():
        out = transcribe_tokens(model, params, encoded.features, max_new_tokens=5)
        np.testing.assert_array_equal(out.tokens, expected("greedy", 22)[:, :5])
        assert out.lengths.tolist() == [4, 5]


def test_no_text_holds_a_suppressed_token(loaded, encoded):
    """The likeliest tokens of the golden text are forbidden, one way and the other."""
    first = int(golden()["greedy"][0, 0])
    config = dataclasses.replace(
        loaded.model.config, begin_suppress_ids=(first, 56), suppress_ids=(31,)
    )
    for beams in (1, 2):
        out = transcribe_tokens(
            WhisperModel(config), loaded.params, encoded.features, num_beams=beams
        )
        assert not np.isin(out.tokens, 31).any()
        assert not np.isin(out.tokens[:, 0], (first, 56)).any()


# --- From samples to text


def test_transcribe(loaded):
    letters = loaded.tokenizer
    want = [
        letters.decode([i for i in row.tolist() if i != 56])
        for row in golden()["greedy"]
    ]
    assert want[0] != want[1]
    with HIGHEST():
        short = transcribe(loaded, clips(), batch_size=4)
        assert transcribe(loaded, []) == []
        assert short == want
        # Two windows of a second, in batches of one.
        joined = np.concatenate([clips()[0], clips()[1]])
        both = transcribe(loaded, [joined], batch_size=1)
    assert both == [" ".join(want)]


def test_a_function_between_encoder_and_decoder(loaded):
    seen = []

    def all_of_it(features, attention, mask):
        seen.append((features.shape, attention.received_max.shape, mask.shape))
        return features, jnp.ones_like(mask)

    def halves(features, attention, mask):
        return features[:, ::2], mask[:, ::2]

    with HIGHEST():
        plain = transcribe(loaded, clips())
        assert transcribe(loaded, clips(), prune=all_of_it) == plain
        assert seen == [((2, 50, 32), (2, 50), (2, 50))]
        audio = encode_audio(loaded, clips())
        assert audio.mask.sum(1).tolist() == [50, 28]  # 8731 samples
        less = transcribe(loaded, clips(), prune=halves)
        out = transcribe_tokens(
            loaded.model,
            loaded.params,
            audio.features[:, ::2],
            mask=audio.mask[:, ::2],
        )
    ends = [row.tolist().index(56) for row in np.asarray(out.tokens)]
    texts = [
        loaded.tokenizer.decode(row[:end])
        for row, end in zip(np.asarray(out.tokens), ends, strict=True)
    ]
    assert less == texts


@pytest.mark.parametrize("method", ["samp", "idpruner"])
def test_audio_pruner(loaded, encoded, method):
    """Half of each clip's own tokens, as the method gives them, and the tail."""
    prune = audio_pruner(method, keep=0.5, tail=10)
    assert hash(prune) == hash(audio_pruner(method, keep=0.5, tail=10))
    features, mask = jax.jit(prune)(encoded.features, encoded.attention, encoded.mask)
    assert features.shape == (2, 35, 32)
    # The first clip has no padding, so that the tail is none of its own.
    assert mask.sum(1).tolist() == [25, 14 + 10]
    assert mask[1, 25:].all() and not mask[0, 25:].any()
    np.testing.assert_array_equal(features[1, 25:], encoded.features[1, -10:])
    alone = encoded.features[1:, :28]
    weights = jax.tree.map(
        lambda x: x[1:, :28], dataclasses.replace(encoded.attention, full=None)
    )
    if method == "samp":
        attn = weights.received_max, weights.diagonal_mean
        want = tokens.samp(alone, keep=0.5, attn=attn).merged
    else:
        chosen = tokens.idpruner(alone, keep=0.5, importance=weights.received_mean)
        want = chosen.take(alone)
    np.testing.assert_allclose(features[1, :14], want[0], rtol=1e-4, atol=1e-5)
    texts = transcribe(loaded, clips(), prune=prune)
    assert len(texts) == 2


def test_relevance_of_audio_pruners(encoded):
    """What samp prunes by: its own tokens' attention to themselves, or received."""
    attention = encoded.attention
    for relevance, by in (
        ("max", attention.diagonal_max),
        ("received", attention.received_mean),
    ):
        prune = audio_pruner("samp", keep=9, relevance=relevance, threshold=0.9)
        got = prune.select(encoded.features, attention, encoded.mask)
        want = tokens.samp(
            encoded.features,
            keep=9,
            mask=encoded.mask,
            attn=(attention.received_max, by),
            threshold=0.9,
        )
        np.testing.assert_array_equal(got.order, want.order)
        np.testing.assert_allclose(got.merged, want.merged, rtol=1e-5, atol=1e-6)


def test_unknown_pruners():
    with pytest.raises(ValueError, match="unknown method 'sampp': use one of atome"):
        audio_pruner("sampp", keep=0.5)
    with pytest.raises(ValueError, match="relevance='min' must be one of mean, max"):
        audio_pruner("samp", keep=0.5, relevance="min")
    with pytest.raises(ValueError, match="tail=-1"):
        audio_pruner("samp", keep=0.5, tail=-1)
    section = tokens.TokenPruner(method="samp", keep=0.5)
    assert audio_pruner(section) == audio_pruner("samp", keep=0.5)
    with pytest.raises(ValueError, match="keep and options are in the TokenPruner"):
        audio_pruner(section, keep=0.5)
    with pytest.raises(ValueError, match="keep is missing"):
        audio_pruner("samp")


def test_command_line(tmp_path, loaded):
    folder = write_folder(tmp_path)
    from typer.testing import CliRunner

    from angeljax.cli import app

    for i in range(2):
        write_wave(tmp_path / f"{i}.wav", golden()[f"audio{i}"], 16000)
    files = [str(tmp_path / f"{i}.wav") for i in range(2)]
    run = functools.partial(CliRunner().invoke, app)
    both = aj.Recipe.load("int8-channel").to_dict()
    both["tokens"] = {"method": "uniform", "keep": 0.5}
    (tmp_path / "both.json").write_text(json.dumps(both))
    found = []
    for options in (
        ["--keep", "0.5", "--method", "uniform", "--recipe", "int8-channel"],
        ["--recipe", str(tmp_path / "both.json")],
    ):
        result = run(["transcribe", str(folder), *files, *options, "--json"])
        assert result.exit_code == 0, result.output
        rows = json.loads(result.stdout)["transcripts"]
        assert [row["file"] for row in rows] == files
        found.append([row["text"] for row in rows])
    recipe = aj.Recipe.load("int8-channel")
    want = transcribe(
        loaded,
        [read_audio(f) for f in files],
        params=aj.compress(loaded.params, recipe),
        prune=audio_pruner("uniform", keep=0.5),
    )
    assert found == [want, want]
    for bad, message in (
        (["transcribe", str(folder), "none.wav"], "none.wav is no file"),
        (["transcribe", "nowhere", files[0]], "no folder and no hub name"),
        (
            ["transcribe", str(folder), files[0], "--keep", "0.5", "--method", "x"],
            "unknown method 'x'",
        ),
    ):
        result = run(bad)
        assert result.exit_code == 1 and result.stderr.count("\n") == 1
        assert message in result.stderr


def test_compressed_trees_run_packed(loaded, encoded):
    recipe = aj.Recipe(rules=[aj.Rule(format="int8", granularity="channel")])
    small = aj.compress(loaded.params, recipe)
    kernel = small["decoder"]["layers"][0]["encoder_attn"]["q_proj"]["kernel"]
    assert isinstance(kernel, aj.QTensor)
    # What is no matrix of the transformer stays: convolutions, tables, norms.
    names = {a.path for a in aj.report(loaded.params, small).leaves if a.snr_db}
    assert all("/layers/" in name and name.endswith("kernel") for name in names)
    assert len(names) == 2 * 6 + 3 * 10
    dense = jax.tree.map(
        lambda x: x.dequantize() if isinstance(x, aj.QTensor) else x,
        small,
        is_leaf=lambda x: isinstance(x, aj.QTensor),
    )
    tokens = jnp.asarray(golden()["tokens"])
    mel = jnp.asarray(golden()["mel80"])

    @jax.jit
    def logits(params):
        features = loaded.model.encode(params, mel).features
        return loaded.model.decode(params, tokens, features)

    with HIGHEST():
        got, want = logits(small), logits(dense)
    assert relative(got, np.asarray(want)) < TOLERANCE
    assert relative(got, golden()["logits"]) < 0.1


def test_bfloat16(loaded):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), loaded.params)
    model = WhisperModel(loaded.model.config, jnp.dtype(jnp.bfloat16))
    mel, tokens = jnp.asarray(golden()["mel80"]), jnp.asarray(golden()["tokens"])
    features = jax.jit(model.encode)(half, mel).features
    assert features.dtype == jnp.bfloat16
    assert relative(features, golden()["encoded"]) < 0.05
    logits = jax.jit(model.decode)(half, tokens, features)
    assert logits.dtype == jnp.float32
    assert relative(logits, golden()["logits"]) < 0.1


# --- Files


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(ModelError, match="no folder and no hub name"):
        load_whisper(tmp_path / "nothing")
    folder = write_folder(tmp_path, drop=("model.encoder.conv1.bias",))
    with pytest.raises(ModelError, match="no tensor for encoder/embed/conv1/bias"):
        load_whisper(folder)
    write_folder(tmp_path, model_type="llama")
    with pytest.raises(ModelError, match=r"config.json: model_type 'llama'"):
        load_whisper(folder)
    write_folder(tmp_path, activation_function="relu")
    with pytest.raises(ModelError, match="activation_function 'relu'"):
        load_whisper(folder)
    write_folder(tmp_path, decoder_attention_heads=5)
    with pytest.raises(ModelError, match="decoder_attention_heads=5 does not divide"):
        load_whisper(folder)
    # Checkpoints may carry the tied head as well.
    write_folder(tmp_path, extra={"proj_out.weight": np.zeros((64, 32), np.float32)})
    assert load_whisper(folder).model.config.suppress_ids == (3, 5, 40, 57)


def test_prompts(loaded):
    config = loaded.model.config
    assert config.prompt() == config.prompt("en", "transcribe") == (57, 62)
    with pytest.raises(ValueError, match="only transcribes English"):
        config.prompt("de")
    many = dataclasses.replace(
        config,
        language_ids=(("en", 58), ("de", 59)),
        task_ids=(("transcribe", 60), ("translate", 61)),
    )
    assert many.prompt("de", "translate") == (57, 59, 61, 62)
    assert many.prompt("en") == (57, 58, 60, 62)
    with pytest.raises(ValueError, match="language=None"):
        many.prompt()
    assert WhisperConfig.from_dict(json.loads(json.dumps(many.to_dict()))) == many
    with pytest.raises(ModelError, match="unknown model field"):
        WhisperConfig.from_dict({"depth": 3})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: log_mel(jnp.zeros(999, jnp.int16)), "divide 16-bit samples"),
        (lambda x: log_mel(jnp.zeros(200)), "200 samples"),
        (lambda x: x.model.encode(x.params, jnp.zeros((1, 40, 100))), "80 bands"),
        (lambda x: x.model.encode(x.params, jnp.zeros((1, 80, 102))), "102 frames"),
        (
            lambda x: x.model.encode(
                x.params, jnp.zeros((1, 80, 8)), return_attention=2
            ),
            "layers 0 to 1",
        ),
        (
            lambda x: x.model.encode(x.params, jnp.zeros((1, 80, 8)), full=True),
            "full=True needs",
        ),
        (lambda x: x.model.start(x.params, jnp.zeros((1, 5, 31))), r"tokens, 32\]"),
        (
            lambda x: x.model.start(
                x.params, jnp.zeros((1, 5, 32)), mask=jnp.ones((1, 4), bool)
            ),
            "mask has shape",
        ),
        (lambda x: x.model.start(x.params, jnp.zeros((1, 5, 32)), slots=25), "slots"),
        (
            lambda x: x.model.decode(
                x.params, jnp.zeros((2, 3), jnp.int32), jnp.zeros((1, 5, 32))
            ),
            "tokens must be",
        ),
        (
            lambda x: transcribe_tokens(
                x.model, x.params, jnp.zeros((1, 5, 32)), max_new_tokens=23
            ),
            "from 1 to 22",
        ),
        (
            lambda x: transcribe_tokens(
                x.model, x.params, jnp.zeros((1, 5, 32)), num_beams=33
            ),
            "num_beams=33",
        ),
        (lambda x: transcribe(x, [np.zeros(99)], window=2.0), "window=2.0"),
        (lambda x: transcribe(x, [np.zeros(9)], window=1, batch_size=0), "batch_size"),
        (
            lambda x: transcribe(x, [np.zeros((2, 9))], window=1),
            r"\[0\] has shape",
        ),
        (
            lambda x: transcribe(x, [np.zeros(9, int)], window=1),
            r"\[0\] has dtype",
        ),
        (
            lambda x: encode_audio(x, [np.zeros(17000)], window=1),
            "longer than the window of 1 s",
        ),
    ],
)
def test_bad_arguments(loaded, call, message):
    with pytest.raises(ValueError, match=message):
        call(loaded)


def write_wave(file, samples, rate, channels=1, width=2):
    with wave.open(str(file), "wb") as f:
        f.setnchannels(channels)
        f.setsampwidth(width)
        f.setframerate(rate)
        f.writeframes(samples.tobytes())


def test_sound_files(tmp_path, monkeypatch):
    # As where soundfile is not installed.
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    file = tmp_path / "a.wav"
    sound = golden()["audio0"]
    write_wave(file, sound, 16000)
    np.testing.assert_allclose(read_audio(file), sound / 32768, atol=1e-7)
    both = np.stack([sound, np.zeros_like(sound)], axis=1)
    write_wave(file, both, 16000, channels=2)
    np.testing.assert_allclose(read_audio(file), sound / 65536, atol=1e-7)
    # A tone keeps its frequency at another rate.
    tone = np.sin(2 * np.pi * 1000 * np.arange(44100) / 44100)
    write_wave(file, (tone * 30000).astype(np.int16), 44100)
    spectrum = np.abs(np.fft.rfft(read_audio(file)))
    assert len(spectrum) == 8001 and spectrum.argmax() == 1000
    write_wave(file, np.zeros(3, np.uint8), 16000, width=1)
    with pytest.raises(ImportError, match="pip install soundfile"):
        read_audio(file)
    (tmp_path / "b.flac").write_bytes(b"fLaC")
    with pytest.raises(ImportError, match=r"b.flac is no 16-bit WAV"):
        read_audio(tmp_path / "b.flac")
    with pytest.raises(ValueError, match="is no file"):
        read_audio(tmp_path / "c.wav")
    write_wave(file, np.zeros(0, np.int16), 16000)
    with pytest.raises(ValueError, match="no samples"):
        read_audio(file)


REAL = os.environ.get("ANGELJAX_WHISPER", "~/.cache/angeljax-models/whisper-tiny.en")


@pytest.mark.slow
@pytest.mark.skipif(
    not Path(REAL).expanduser().is_dir(), reason="ANGELJAX_WHISPER names no folder"
)
def test_whisper_tiny_en():
    """Shapes and ids of the real model, and that it hears nothing in silence."""
    real = load_whisper(Path(REAL).expanduser())
    config = real.model.config
    assert config.prompt() == (50257, 50362)
    assert (config.max_source_positions, config.hidden_size) == (1500, 384)
    assert len(config.suppress_ids) == 90 and config.begin_suppress_ids == (220, 50256)
    rate = np.arange(32000) / 16000
    audio = [np.zeros(16000, np.float32), (0.1 * np.sin(2765 * rate)).astype("f4")]
    texts = transcribe(real, audio, max_new_tokens=12, batch_size=2)
    assert len(texts) == 2 and len(texts[0].split()) <= 3
