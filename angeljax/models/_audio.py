"""Reading sound files as 16 kHz mono."""

from __future__ import annotations

import math
import os
import wave
from pathlib import Path

import numpy as np

from angeljax.models._whisper_config import SAMPLE_RATE


def read_audio(file: str | os.PathLike[str]) -> np.ndarray:
    """Samples of a sound file, mixed to mono and brought to 16 kHz.

    16-bit WAV files are read with Python alone; all others need the package
    `soundfile`.

    Args:
      file: path of a sound file.

    Returns:
      float32 `[samples]` in [-1, 1].

    Raises:
      ValueError: the file is missing, empty or not readable as sound.
      ImportError: the format needs `soundfile`, and it is not installed.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    samples, rate = _read(path)
    if samples.size == 0:
        raise ValueError(f"{path} holds no samples")
    mono = samples.mean(axis=1).astype(np.float32)
    return _resample(mono, rate)


def _read(path: Path) -> tuple[np.ndarray, int]:
    """float `[samples, channels]` and the rate."""
    try:
        import soundfile
    except ImportError:
        return _read_wave(path)
    try:
        return soundfile.read(path, dtype="float32", always_2d=True)
    except RuntimeError as e:
        raise ValueError(f"{path}: not readable as sound ({e})") from None


def _read_wave(path: Path) -> tuple[np.ndarray, int]:
    try:
        with wave.open(str(path), "rb") as f:
            width, channels, rate = f.getsampwidth(), f.getnchannels(), f.getframerate()
            data = f.readframes(f.getnframes())
    except (wave.Error, EOFError):
        width = 0
    if width != 2:
        raise ImportError(
            f"{path} is no 16-bit WAV file, and other sound files need the package "
            "soundfile: pip install soundfile"
        )
    return np.frombuffer(data, "<i2").reshape(-1, channels) / 32768.0, rate


def _resample(samples: np.ndarray, rate: int) -> np.ndarray:
    if rate == SAMPLE_RATE:
        return samples
    # JAX itself depends on scipy.
    from scipy.signal import resample_poly

    shared = math.gcd(rate, SAMPLE_RATE)
    return resample_poly(samples, SAMPLE_RATE // shared, rate // shared).astype(
        np.float32
    )
