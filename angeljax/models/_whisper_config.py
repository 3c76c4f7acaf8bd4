"""`WhisperConfig`: the shape of a Whisper model and what its decoding needs to know."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from angeljax.models.config import ModelError, _positive

# Rates of the log-mel front end, the same for every Whisper model.
SAMPLE_RATE = 16_000
HOP = 160
# The second convolution halves the frames: 50 encoder tokens a second.
TOKENS_PER_SECOND = SAMPLE_RATE // (2 * HOP)

_SIZES = {  # our name: name in config.json
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "encoder_layers": "encoder_layers",
    "decoder_layers": "decoder_layers",
    "encoder_heads": "encoder_attention_heads",
    "decoder_heads": "decoder_attention_heads",
    "encoder_ffn_size": "encoder_ffn_dim",
    "decoder_ffn_size": "decoder_ffn_dim",
    "num_mel_bins": "num_mel_bins",
    "max_source_positions": "max_source_positions",
    "max_target_positions": "max_target_positions",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WhisperConfig:
    """Sizes of a Whisper model, and the token ids that its decoding uses.

    Attributes:
      vocab_size, hidden_size: sizes that encoder and decoder share.
      encoder_layers, encoder_heads, encoder_ffn_size: of the encoder.
      decoder_layers, decoder_heads, decoder_ffn_size: of the decoder.
      num_mel_bins: bands of the log-mel spectrogram.
      max_source_positions: encoder tokens of a whole window; 1500 for 30 s.
      max_target_positions: tokens that the decoder can read, prompt included.
      start_id: first token of every prompt.
      eos_id: ends a transcript.
      pad_id: what stands after the end.
      no_timestamps_id: asks for text without times; None if the model has no such
        token.
      suppress_ids: never produced.
      begin_suppress_ids: not produced as the first token of a transcript.
      language_ids, task_ids: tokens of a multilingual model's prompt by name, such as
        `("en", 50259)`; () for an English one.

    Raises:
      ModelError: a size or an id that no model can have.
    """

    vocab_size: int
    hidden_size: int
    encoder_layers: int
    decoder_layers: int
    encoder_heads: int
    decoder_heads: int
    encoder_ffn_size: int
    decoder_ffn_size: int
    num_mel_bins: int = 80
    max_source_positions: int = 1500
    max_target_positions: int = 448
    start_id: int
    eos_id: int
    pad_id: int
    no_timestamps_id: int | None = None
    suppress_ids: tuple[int, ...] = ()
    begin_suppress_ids: tuple[int, ...] = ()
    language_ids: tuple[tuple[str, int], ...] = ()
    task_ids: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        for ours, theirs in _SIZES.items():
            _positive(getattr(self, ours), theirs)
        for side in ("encoder", "decoder"):
            heads = getattr(self, f"{side}_heads")
            if self.hidden_size % heads:
                raise ModelError(
                    f"{side}_attention_heads={heads} does not divide "
                    f"d_model={self.hidden_size}"
                )
        if self.hidden_size % 2 or self.hidden_size < 4:
            raise ModelError(
                f"d_model={self.hidden_size} must be even and at least 4, for the "
                "sinusoidal positions"
            )
        for name in ("start_id", "eos_id", "pad_id", "no_timestamps_id"):
            self._check_id(name, getattr(self, name))
        for name in ("suppress_ids", "begin_suppress_ids"):
            for i in getattr(self, name):
                self._check_id(name, i)
        for name in ("language_ids", "task_ids"):
            for _, i in getattr(self, name):
                self._check_id(name, i)

    def _check_id(self, name: str, value: int | None) -> None:
        if value is None and name == "no_timestamps_id":
            return
        known = isinstance(value, int) and 0 <= value < self.vocab_size
        if isinstance(value, bool) or not known:
            raise ModelError(
                f"{name} {value!r} is no id of a vocabulary of {self.vocab_size}"
            )

    @classmethod
    def from_hf(
        cls, data: Mapping[str, Any], generation: Mapping[str, Any] | None = None
    ) -> WhisperConfig:
        """Reads a Hugging Face `config.json`, and `generation_config.json` over it.

        Raises:
          ModelError: a field is missing, or asks for what is not supported.

        Example:
          >>> WhisperConfig.from_hf({
          ...     "model_type": "whisper", "vocab_size": 64, "d_model": 16,
          ...     "encoder_layers": 1, "decoder_layers": 1,
          ...     "encoder_attention_heads": 2, "decoder_attention_heads": 2,
          ...     "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 80,
          ...     "max_source_positions": 1500, "max_target_positions": 448,
          ...     "decoder_start_token_id": 60, "eos_token_id": 61,
          ... }).pad_id
          61
        """
        if data.get("model_type") != "whisper":
            raise ModelError(
                f"model_type {data.get('model_type')!r} is not supported: use whisper"
            )
        for theirs in _SIZES.values():
            if theirs not in data:
                raise ModelError(f"config.json has no field {theirs!r}")
        if data.get("activation_function", "gelu") != "gelu":
            raise ModelError(
                f"activation_function {data['activation_function']!r} is not "
                "supported: use gelu"
            )
        if data.get("scale_embedding"):
            raise ModelError("scale_embedding=true is not supported: use false")
        if not data.get("tie_word_embeddings", True):
            raise ModelError("tie_word_embeddings=false is not supported: use true")
        told = {k: v for k, v in (generation or {}).items() if v is not None}
        merged = {**data, **told}
        eos: Any = merged.get("eos_token_id")
        eos = eos[0] if isinstance(eos, list | tuple) and eos else eos
        pad = merged.get("pad_token_id")
        languages = merged.get("lang_to_id") or {}
        return cls(
            **{ours: data[theirs] for ours, theirs in _SIZES.items()},
            start_id=_needed(merged, "decoder_start_token_id"),
            eos_id=_needed({"eos_token_id": eos}, "eos_token_id"),
            pad_id=eos if pad is None else pad,
            no_timestamps_id=_no_timestamps(merged),
            suppress_ids=_ids(merged, "suppress_tokens"),
            begin_suppress_ids=_ids(merged, "begin_suppress_tokens"),
            # "<|en|>" is the token, "en" what people say.
            language_ids=tuple((k.strip("<|>"), v) for k, v in languages.items()),
            task_ids=tuple((merged.get("task_to_id") or {}).items()),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = dataclasses.asdict(self)
        for name in ("suppress_ids", "begin_suppress_ids"):
            values[name] = list(values[name])
        for name in ("language_ids", "task_ids"):
            values[name] = dict(values[name])
        return values

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WhisperConfig:
        """Inverse of `to_dict`.

        Raises:
          ModelError: a field is unknown or missing.
        """
        unknown = set(data) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ModelError(f"unknown model field {sorted(unknown)[0]!r}")
        fields = dict(data)
        for name in ("suppress_ids", "begin_suppress_ids"):
            fields[name] = tuple(fields.get(name, ()))
        for name in ("language_ids", "task_ids"):
            fields[name] = tuple(dict(fields.get(name, {})).items())
        try:
            return cls(**fields)
        except TypeError as e:
            raise ModelError(f"model configuration: {e}") from None

    def prompt(
        self, language: str | None = None, task: str | None = None
    ) -> tuple[int, ...]:
        """Ids that a transcript without timestamps starts with.

        Args:
          language: such as "en", for a multilingual model, which needs one.
          task: "transcribe", the default, or "translate", for a multilingual model.

        Returns:
          The ids.

        Raises:
          ValueError: a language or task that the model does not know.
        """
        ids = [self.start_id]
        if not self.language_ids:
            if language not in (None, "en") or task not in (None, "transcribe"):
                raise ValueError(
                    f"language={language!r}, task={task!r}: this model only "
                    "transcribes English; leave both out"
                )
        else:
            ids.append(_lookup("language", language, self.language_ids))
            ids.append(_lookup("task", task or "transcribe", self.task_ids))
        if self.no_timestamps_id is not None:
            ids.append(self.no_timestamps_id)
        return tuple(ids)


def _lookup(what: str, name: str | None, table: tuple[tuple[str, int], ...]) -> int:
    known = dict(table)
    if name not in known:
        some = ", ".join(list(known)[:6]) or "none"
        raise ValueError(f"{what}={name!r}: this model is told one of {some} ...")
    return known[name]


def _needed(data: Mapping[str, Any], name: str) -> Any:
    if data.get(name) is None:
        raise ModelError(f"config.json has no field {name!r}")
    return data[name]


def _ids(data: Mapping[str, Any], name: str) -> tuple[int, ...]:
    ids = data.get(name) or ()
    # [-1] has stood for "the usual ones" in some early files; they name none.
    if not isinstance(ids, list | tuple):
        raise ModelError(f"{name} must be a list of ids, not {ids!r}")
    return tuple(i for i in ids if i != -1)


def _no_timestamps(data: Mapping[str, Any]) -> int | None:
    """From its own field, or the last of the forced ids in older files."""
    if data.get("no_timestamps_token_id") is not None:
        return data["no_timestamps_token_id"]
    forced = data.get("forced_decoder_ids") or []
    return forced[-1][1] if forced else None
