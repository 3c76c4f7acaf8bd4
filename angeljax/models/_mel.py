"""The log-mel spectrogram that Whisper reads, in JAX."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.models._whisper_config import HOP, SAMPLE_RATE

_N_FFT = 400
_FLOOR = 1e-10
# Slaney's mel scale: linear below 1 kHz, logarithmic above.
_LINEAR_HZ = 200.0 / 3
_BREAK_HZ = 1000.0
_LOG_STEP = np.log(6.4) / 27


def log_mel(
    audio: jax.Array, *, num_mels: int = 80, num_samples: int | None = None
) -> jax.Array:
    """Whisper's log-mel spectrogram of 16 kHz mono audio (arXiv 2212.04356, 2.2).

    Windows of 25 ms (Hann) every 10 ms, power spectrum, Slaney's mel filters up to
    8 kHz, log10 floored 8 below the loudest value of the clip, then `(x + 4) / 4`.

    Args:
      audio: float `[..., S]` in [-1, 1], S >= 201; zeros after the end of a clip.
      num_mels: bands; 80, or 128 for the third large model.
      num_samples: length that clips are cut or filled with zeros to; 480000 for the
        30 s that Whisper was trained with. Default: S.

    Returns:
      float32 `[..., num_mels, num_samples // 160]`.

    Raises:
      ValueError: `audio` is not floating-point or too short.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.models import log_mel
      >>> log_mel(jnp.zeros((2, 16000))).shape
      (2, 80, 100)
    """
    audio = jnp.asarray(audio)
    if not jnp.issubdtype(audio.dtype, jnp.floating):
        raise ValueError(
            f"audio has dtype {audio.dtype}: divide 16-bit samples by 32768.0 first"
        )
    audio = audio.astype(jnp.float32)
    if num_samples is not None:
        audio = audio[..., :num_samples]
        fill = [(0, 0)] * (audio.ndim - 1) + [(0, num_samples - audio.shape[-1])]
        audio = jnp.pad(audio, fill)
    if audio.shape[-1] <= _N_FFT // 2:
        raise ValueError(
            f"audio has {audio.shape[-1]} samples: at least {_N_FFT // 2 + 1} are "
            "needed, or pass num_samples"
        )
    power = _power_spectrum(audio)
    mel = jnp.einsum(
        "...tf,fm->...mt",
        power,
        jnp.asarray(mel_filters(num_mels), jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    logs = jnp.log10(jnp.maximum(mel, _FLOOR))
    loudest = jnp.max(logs, axis=(-2, -1), keepdims=True)
    return (jnp.maximum(logs, loudest - 8.0) + 4.0) / 4.0


def _power_spectrum(audio: jax.Array) -> jax.Array:
    """`[..., S]` to `[..., S // 160, 201]`."""
    half = _N_FFT // 2
    edges = [(0, 0)] * (audio.ndim - 1) + [(half, half)]
    padded = jnp.pad(audio, edges, mode="reflect")
    # A frame stands around every multiple of the hop; the last one is dropped.
    count = audio.shape[-1] // HOP
    at = np.arange(count)[:, None] * HOP + np.arange(_N_FFT)
    window = np.hanning(_N_FFT + 1)[:-1].astype(np.float32)
    spectrum = jnp.fft.rfft(padded[..., at] * window, axis=-1)
    return jnp.square(spectrum.real) + jnp.square(spectrum.imag)


@functools.lru_cache(maxsize=4)
def mel_filters(num_mels: int) -> np.ndarray:
    """Triangular filters with the area of Slaney's toolbox, float64 `[201, num_mels]`.

    Args:
      num_mels: bands from 0 to 8 kHz.

    Returns:
      The filters; a spectrum times them is the mel spectrum.
    """
    edges = _to_hz(np.linspace(0.0, _to_mel(SAMPLE_RATE / 2), num_mels + 2))
    bins = np.linspace(0.0, SAMPLE_RATE / 2, _N_FFT // 2 + 1)[:, None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins - low) / (centre - low)
    falling = (high - bins) / (high - centre)
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    return triangles * (2.0 / (high - low))


def _to_mel(hz: float) -> float:
    if hz < _BREAK_HZ:
        return hz / _LINEAR_HZ
    return float(_BREAK_HZ / _LINEAR_HZ + np.log(hz / _BREAK_HZ) / _LOG_STEP)


def _to_hz(mel: np.ndarray) -> np.ndarray:
    above = mel - _BREAK_HZ / _LINEAR_HZ
    return np.where(above < 0, mel * _LINEAR_HZ, _BREAK_HZ * np.exp(_LOG_STEP * above))
