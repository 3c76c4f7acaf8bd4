"""`transcribe`: from samples to text with a Whisper model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.models._mel import log_mel
from angeljax.models._whisper_config import (
    HOP,
    SAMPLE_RATE,
    TOKENS_PER_SECOND,
    WhisperConfig,
)
from angeljax.models._whisper_decode import transcribe_tokens
from angeljax.models._whisper_layers import EncoderAttention
from angeljax.models._whisper_loading import LoadedWhisper
from angeljax.models.whisper import EncodedAudio, WhisperModel

# (features [B,N,D], attention of the last encoder layer, mask bool [B,N]) -> features
# [B,K,D], mask bool [B,K]
Prune = Callable[[jax.Array, EncoderAttention, jax.Array], tuple[jax.Array, jax.Array]]
_TOKEN = SAMPLE_RATE // TOKENS_PER_SECOND  # samples


def transcribe(
    loaded: LoadedWhisper,
    audio: Sequence[np.ndarray],
    *,
    prune: Prune | None = None,
    params: Any = None,
    language: str | None = None,
    task: str | None = None,
    window: float | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
) -> list[str]:
    """Texts of recordings.

    A recording longer than the window is cut into windows, each by itself; there are no
    timestamps, and a word on a cut may be lost.

    Args:
      loaded: what `load_whisper` gave.
      audio: recordings, float `[samples]` at 16 kHz in [-1, 1]; see `read_audio`.
      prune: drops or merges encoder tokens before the decoder reads them: a function of
        the features `[B, N, D]`, the `EncoderAttention` of the last layer and the mask
        bool `[B, N]` of real tokens, that gives features `[B, K, D]` and a mask bool
        `[B, K]`. It is traced and compiled, once for each function object. Without one
        the decoder reads all tokens, those of padding too, as it was trained to.
      params: instead of those of `loaded`, such as compressed ones.
      language: such as "en"; needed by multilingual models only.
      task: "transcribe" or "translate"; for multilingual models only.
      window: seconds of a window; default what the model was trained with, 30. Less is
        faster and less exact.
      batch_size: windows at a time.
      max_new_tokens, num_beams, length_penalty: see `transcribe_tokens`.

    Returns:
      One text for each recording.

    Raises:
      ValueError: an option is out of range, or a recording has another shape or dtype.
    """
    config = loaded.model.config
    prompt = config.prompt(language, task)
    size = _samples(config, window)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    pieces = [(i, p) for i, a in enumerate(audio) for p in _cut(i, a, size)]
    params = loaded.params if params is None else params
    batch_size = min(batch_size, max(len(pieces), 1))
    found = []
    for start in range(0, len(pieces), batch_size):
        part = [p for _, p in pieces[start : start + batch_size]]
        samples, lengths = _batch(part, batch_size, size)
        features, mask = _encode(
            params, samples, lengths, model=loaded.model, prune=prune
        )
        tokens = transcribe_tokens(
            loaded.model,
            params,
            features,
            mask=mask,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            length_penalty=length_penalty,
        ).tokens
        found.append(tokens)
    texts: list[list[str]] = [[] for _ in audio]
    rows = [row for tokens in jax.device_get(found) for row in tokens]
    for (i, _), row in zip(pieces, rows, strict=False):
        texts[i].append(to_text(loaded, row))
    return [" ".join(t for t in parts if t) for parts in texts]


def encode_audio(
    loaded: LoadedWhisper,
    audio: Sequence[np.ndarray],
    *,
    window: float | None = None,
    return_attention: int | str | None = None,
) -> EncodedAudio:
    """Encoder tokens of recordings that each fit one window, in one batch.

    Args:
      loaded: what `load_whisper` gave.
      audio: recordings, float `[samples]` at 16 kHz.
      window: seconds that all of them are filled with zeros to; default what the model
        was trained with.
      return_attention: see `WhisperModel.encode`.

    Returns:
      `EncodedAudio`; its mask says which tokens are no padding.

    Raises:
      ValueError: no recording, or one that is longer than the window, or a window
        longer than the model's.
    """
    size = _samples(loaded.model.config, window)
    if not audio:
        raise ValueError("audio holds no recording")
    pieces = [p for i, a in enumerate(audio) for p in _cut(i, a, size)]
    if len(pieces) != len(audio):
        raise ValueError(
            f"a recording is longer than the window of {size / SAMPLE_RATE:g} seconds"
        )
    samples, lengths = _batch(pieces, len(pieces), size)
    return _encoded(
        loaded.params,
        samples,
        lengths,
        model=loaded.model,
        return_attention=return_attention,
    )


def to_text(loaded: LoadedWhisper, tokens: Sequence[int] | np.ndarray) -> str:
    """The text of one row of ids, up to its end."""
    ids = [int(i) for i in tokens]
    end = loaded.model.config.eos_id
    ids = ids[: ids.index(end)] if end in ids else ids
    return loaded.tokenizer.decode(ids).strip()


@functools.partial(jax.jit, static_argnames=("model", "return_attention"))
def _encoded(
    params: Any,
    samples: jax.Array,
    lengths: jax.Array,
    *,
    model: WhisperModel,
    return_attention: int | str | None,
) -> EncodedAudio:
    mel = log_mel(samples, num_mels=model.config.num_mel_bins)
    return model.encode(params, mel, lengths=lengths, return_attention=return_attention)


@functools.partial(jax.jit, static_argnames=("model", "prune"))
def _encode(
    params: Any,
    samples: jax.Array,
    lengths: jax.Array,
    *,
    model: WhisperModel,
    prune: Prune | None,
) -> tuple[jax.Array, jax.Array | None]:
    which = None if prune is None else "last"
    found = _encoded(params, samples, lengths, model=model, return_attention=which)
    if prune is None:
        return found.features, None
    assert found.attention is not None, "it was asked for"
    return prune(found.features, found.attention, found.mask)


def _samples(config: WhisperConfig, window: float | None) -> int:
    """Samples of a window, a whole number of encoder tokens."""
    most = config.max_source_positions / TOKENS_PER_SECOND
    window = most if window is None else window
    if not 2 * HOP / SAMPLE_RATE <= window <= most:
        raise ValueError(
            f"window={window} must be a number of seconds up to the {most:g} that this "
            "model reads"
        )
    return int(window * TOKENS_PER_SECOND + 1e-6) * _TOKEN


def _cut(number: int, samples: Any, size: int) -> list[np.ndarray]:
    samples = np.asarray(samples)
    if samples.ndim != 1 or samples.size == 0:
        raise ValueError(
            f"audio[{number}] has shape {list(samples.shape)}: give mono samples, "
            "[samples], at least one"
        )
    if not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(
            f"audio[{number}] has dtype {samples.dtype}: divide 16-bit samples by "
            "32768.0 first"
        )
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def _batch(
    pieces: Sequence[np.ndarray], rows: int, size: int
) -> tuple[jax.Array, jax.Array]:
    """Samples `[rows, size]`, and how many encoder tokens of each row are real."""
    samples = np.zeros((rows, size), np.float32)
    lengths = np.zeros(rows, np.int32)
    for i, piece in enumerate(pieces):
        samples[i, : len(piece)] = piece
        lengths[i] = -(-len(piece) // _TOKEN)
    return jnp.asarray(samples), jnp.asarray(lengths)
