"""Configuration of Qwen2-Audio: an encoder of sound and a decoder of text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from angeljax.models.config import DecoderConfig, ModelError, _positive

_SIZES = {  # our name: name in config.json, and what it is where that leaves it out
    "hidden_size": ("d_model", 1280),
    "encoder_layers": ("encoder_layers", 32),
    "encoder_heads": ("encoder_attention_heads", 20),
    "encoder_ffn_size": ("encoder_ffn_dim", 5120),
    "num_mel_bins": ("num_mel_bins", 128),
    "max_source_positions": ("max_source_positions", 1500),
}
# The published files leave out what is the default of Qwen2 in `transformers`.
_TEXT = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioEncoderConfig:
    """Sizes of the encoder, which is that of Whisper large with a pool behind it.

    Attributes:
      hidden_size, encoder_layers, encoder_heads, encoder_ffn_size: of the transformer.
      num_mel_bins: bands of the log-mel spectrogram.
      max_source_positions: frames after the convolutions; 1500 for 30 s.

    Raises:
      ModelError: a size that no encoder can have.
    """

    hidden_size: int
    encoder_layers: int
    encoder_heads: int
    encoder_ffn_size: int
    num_mel_bins: int = 128
    max_source_positions: int = 1500

    def __post_init__(self) -> None:
        for ours, (theirs, _) in _SIZES.items():
            _positive(getattr(self, ours), f"audio_config.{theirs}")
        if self.hidden_size % self.encoder_heads:
            raise ModelError(
                f"audio_config.encoder_attention_heads={self.encoder_heads} does not "
                f"divide d_model={self.hidden_size}"
            )
        if self.max_source_positions % 2:
            raise ModelError(
                f"audio_config.max_source_positions={self.max_source_positions} must "
                "be even: two frames make a token"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2AudioConfig:
    """Qwen2-Audio (arXiv 2407.10759).

    Attributes:
      audio: of the encoder.
      text: of the decoder.
      audio_token_id: the placeholder for one token of audio in a prompt.
    """

    audio: AudioEncoderConfig
    text: DecoderConfig
    audio_token_id: int = 151646

    def __post_init__(self) -> None:
        if not 0 <= self.audio_token_id < self.text.vocab_size:
            raise ModelError(
                f"audio_token_index {self.audio_token_id} is no id of a vocabulary of "
                f"{self.text.vocab_size}"
            )

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> Qwen2AudioConfig:
        """Reads a Hugging Face `config.json`.

        Raises:
          ModelError: it asks for what is not supported, or a size cannot be.

        Example:
          >>> Qwen2AudioConfig.from_hf({
          ...     "model_type": "qwen2_audio",
          ...     "audio_config": {"d_model": 64, "encoder_attention_heads": 4},
          ...     "text_config": {"num_hidden_layers": 2},
          ... }).audio.encoder_layers
          32
        """
        if data.get("model_type") != "qwen2_audio":
            raise ModelError(
                f"model_type {data.get('model_type')!r} is not supported: use "
                "qwen2_audio"
            )
        audio = data.get("audio_config") or {}
        if audio.get("activation_function", "gelu") != "gelu":
            raise ModelError(
                f"audio_config.activation_function {audio['activation_function']!r} is "
                "not supported: use gelu"
            )
        if audio.get("scale_embedding"):
            raise ModelError(
                "audio_config.scale_embedding=true is not supported: use false"
            )
        sizes = {
            ours: audio.get(theirs, default)
            for ours, (theirs, default) in _SIZES.items()
        }
        text = {**_TEXT, **(data.get("text_config") or {})}
        token = data.get("audio_token_index", data.get("audio_token_id", 151646))
        return cls(
            audio=AudioEncoderConfig(**sizes),
            text=DecoderConfig.from_hf(text),
            audio_token_id=token,
        )
