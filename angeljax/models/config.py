"""`DecoderConfig`: the shape of a decoder-only language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_SIZES = {  # our name: name in config.json
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}
_ROPE_NEEDS = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
}


# The decoders inside of models that also see.
_TEXT_MODELS = {"qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}


class ModelError(ValueError):
    """A model that cannot be read or is not supported; the message is one line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """One description for Llama 2 and 3, Mistral, Qwen2, Qwen3 and SmolLM.

    Attributes:
      model_type: the family, one of `MODEL_TYPES`.
      vocab_size, hidden_size, intermediate_size, num_layers: sizes.
      num_heads, num_kv_heads, head_dim: attention; `num_kv_heads` divides `num_heads`.
      max_positions: context length that the model was trained for.
      norm_eps: added to the mean square in RMS normalisation.
      activation: of the gated MLP, one of `ACTIVATIONS`.
      rope_theta: base of the rotary frequencies.
      rope_scaling: () or the sorted items of a Hugging Face `rope_scaling`.
      rope_factors: divisors of the rotary frequencies, as GGUF files carry them; ()
        without.
      mrope_section: how many rotary frequencies turn with time, height and width
        (Qwen2.5-VL, Qwen3-VL); () where positions have one axis.
      mrope_interleaved: the three take turns (Qwen3-VL); else one run for each.
      attention_bias: bias on q, k and v (Qwen2).
      output_bias: bias on the output projection.
      mlp_bias: bias on the three projections of the MLP.
      qk_norm: RMS normalisation of each head of q and k (Qwen3).
      tied: the head is the embedding, transposed.
      windows: sliding window of each layer in tokens, 0 for full attention.
      eos_ids: ids that end a generation.
      pad_id, bos_id: None if the model has none.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int = 2048
    norm_eps: float = 1e-5
    activation: str = "silu"
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    rope_factors: tuple[float, ...] = ()
    mrope_section: tuple[int, ...] = ()
    mrope_interleaved: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    windows: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    bos_id: int | None = None

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise ModelError(
                f"model_type {self.model_type!r} is not supported: use one of "
                f"{', '.join(MODEL_TYPES)}"
            )
        if self.activation not in ACTIVATIONS:
            raise ModelError(
                f"hidden_act {self.activation!r} is not supported: use one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        for ours, theirs in _SIZES.items():
            _positive(getattr(self, ours), theirs)
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_key_value_heads={self.num_kv_heads} does not divide "
                f"num_attention_heads={self.num_heads}"
            )
        kind = dict(self.rope_scaling).get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ModelError(
                f"rope scaling {kind!r} is not supported: use one of "
                f"{', '.join(ROPE_TYPES)}"
            )
        for name in _ROPE_NEEDS.get(kind, ()):
            value = dict(self.rope_scaling).get(name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ModelError(f"rope scaling {kind!r} needs a number {name!r}")
        if self.rope_factors and len(self.rope_factors) != self.head_dim // 2:
            raise ModelError(
                f"{len(self.rope_factors)} rope factors for a head_dim of "
                f"{self.head_dim}"
            )
        section = self.mrope_section
        if section and (len(section) != 3 or sum(section) != self.head_dim // 2):
            raise ModelError(
                f"mrope_section must be three numbers with the sum {self.head_dim // 2}"
                f" (half of head_dim), not {list(section)}"
            )
        if self.windows and len(self.windows) != self.num_layers:
            raise ModelError(
                f"{len(self.windows)} attention windows for {self.num_layers} layers"
            )

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> DecoderConfig:
        """Reads the fields of a Hugging Face `config.json`.

        Raises:
          ModelError: a field is missing, or asks for what is not supported.

        Example:
          >>> DecoderConfig.from_hf({
          ...     "model_type": "llama", "vocab_size": 32, "hidden_size": 16,
          ...     "intermediate_size": 32, "num_hidden_layers": 1,
          ...     "num_attention_heads": 2,
          ... }).head_dim
          8
        """
        kind = data.get("model_type")
        kind = _TEXT_MODELS.get(str(kind), kind)
        if kind not in MODEL_TYPES:
            raise ModelError(
                f"model_type {kind!r} is not supported: use one of "
                f"{', '.join(MODEL_TYPES)}"
            )
        sizes: dict[str, Any] = {}
        for ours, theirs in _SIZES.items():
            if ours in ("num_kv_heads", "head_dim"):
                continue
            if theirs not in data:
                raise ModelError(f"config.json has no field {theirs!r}")
            sizes[ours] = _positive(data[theirs], theirs)
        heads, layers = sizes["num_heads"], sizes["num_layers"]
        rope = _rope(data)
        if rope.pop("partial_rotary_factor", 1.0) != 1.0:
            raise ModelError("partial_rotary_factor below 1 is not supported")
        theta = rope.pop("rope_theta", None) or data.get("rope_theta") or 10000.0
        rope_type = rope.setdefault("rope_type", rope.pop("type", "default"))
        section = tuple(rope.pop("mrope_section", ()))
        interleaved = bool(rope.pop("mrope_interleaved", False))
        if rope_type == "mrope":
            rope_type = rope["rope_type"] = "default"
        positions = data.get("max_position_embeddings") or 2048
        if rope_type in ("llama3", "yarn"):
            rope.setdefault("original_max_position_embeddings", positions)
        if rope_type == "yarn":
            context = rope["original_max_position_embeddings"]
            rope.setdefault("factor", positions / _positive(context, "rope context"))
        # Of the defaults of `transformers`, the one that is no ratio of the sizes.
        head_dim = data.get("head_dim", 128 if kind == "qwen3" else None)
        bias = kind == "qwen2" or bool(data.get("attention_bias", False))
        return cls(
            model_type=kind,
            **sizes,
            num_kv_heads=data.get("num_key_value_heads") or heads,
            head_dim=head_dim or sizes["hidden_size"] // heads,
            max_positions=positions,
            norm_eps=data.get("rms_norm_eps", 1e-6),
            activation=data.get("hidden_act", "silu"),
            rope_theta=float(theta),
            rope_scaling=() if rope_type == "default" else tuple(sorted(rope.items())),
            mrope_section=section,
            mrope_interleaved=interleaved,
            attention_bias=bias,
            output_bias=bias and kind != "qwen2",
            mlp_bias=bool(data.get("mlp_bias", False)),
            qk_norm=kind == "qwen3",
            tied=bool(data.get("tie_word_embeddings", False)),
            windows=_windows(data, kind, layers),
            eos_ids=_ids(data.get("eos_token_id")),
            pad_id=data.get("pad_token_id"),
            bos_id=data.get("bos_token_id"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` restores an equal configuration."""
        return {
            **dataclasses.asdict(self),
            "rope_scaling": dict(self.rope_scaling),
            "rope_factors": list(self.rope_factors),
            "mrope_section": list(self.mrope_section),
            "windows": list(self.windows),
            "eos_ids": list(self.eos_ids),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DecoderConfig:
        """Inverse of `to_dict`.

        Raises:
          ModelError: a field is unknown or missing.
        """
        unknown = set(data) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ModelError(f"unknown model field {sorted(unknown)[0]!r}")
        fields = dict(data)
        fields["rope_scaling"] = tuple(sorted(fields.get("rope_scaling", {}).items()))
        for name in ("rope_factors", "mrope_section", "windows", "eos_ids"):
            fields[name] = tuple(fields.get(name, ()))
        try:
            return cls(**fields)
        except TypeError as e:
            raise ModelError(f"model configuration: {e}") from None


def _rope(data: Mapping[str, Any]) -> dict[str, Any]:
    """Rope fields under either of the names that Hugging Face has used."""
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ModelError(f"rope_parameters must be an object, not {rope!r}")
    return {k: v for k, v in rope.items() if v is not None}


def _windows(data: Mapping[str, Any], kind: str, layers: int) -> tuple[int, ...]:
    # Where a field is absent, the default of `transformers` holds.
    size = data.get("sliding_window", 0 if kind in ("llama", "smollm") else 4096)
    if not size or not data.get("use_sliding_window", kind == "mistral"):
        return ()
    types = data.get("layer_types")
    if types:
        if not isinstance(types, list | tuple):
            raise ModelError(f"layer_types must be a list, not {types!r}")
        return tuple(size if t == "sliding_attention" else 0 for t in types)
    first = data.get("max_window_layers", 28) if kind.startswith("qwen") else 0
    return tuple(size if i >= first else 0 for i in range(layers))


def _ids(value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list | tuple) else [value]
    ids = tuple(i for i in ids if i is not None)
    if not all(isinstance(i, int) for i in ids):
        raise ModelError(f"eos_token_id must be an id or a list of ids, not {value!r}")
    return ids


def _positive(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{name} must be a positive integer, not {value!r}")
    return value
