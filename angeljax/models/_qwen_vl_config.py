"""Configurations of Qwen2.5-VL and Qwen3-VL: a vision tower and a decoder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from angeljax.models.config import ACTIVATIONS, DecoderConfig, ModelError

MODEL_TYPES = ("qwen2_5_vl", "qwen3_vl")
# What the fields of a family are where config.json leaves them out.
_VISION = {
    "qwen2_5_vl": {
        "hidden_act": "silu",
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": (7, 15, 23, 31),
        "tokens_per_second": 4,
    },
    "qwen3_vl": {
        "hidden_act": "gelu_pytorch_tanh",
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": (8, 16, 24),
    },
}
_TEXT: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "section": (16, 24, 24)},
    "qwen3_vl": {"rope_theta": 5e5, "rms_norm_eps": 1e-6, "section": (24, 20, 20)},
}
_SIZES = ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenVisionConfig:
    """The vision tower.

    Attributes:
      model_type: the family, one of `qwen2_5_vl` and `qwen3_vl`.
      depth, hidden_size, intermediate_size, num_heads: of the transformer.
      out_hidden_size: of the decoder.
      patch_size: pixels of a patch in height and width.
      temporal_patch_size: frames of a patch.
      spatial_merge_size: patches in height and width that become one token.
      in_channels: 3.
      activation: of the MLP.
      window_size: pixels in height and width of a window of attention; 0 for none.
      full_layers: layers whose attention sees all of a frame, where there are windows.
      tokens_per_second: temporal positions of a second of video; 0 where the text tells
        the time.
      num_positions: learned position embeddings, a square; 0 for none.
      deepstack_layers: layers whose outputs also go to the first layers of the decoder.
    """

    model_type: str
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    patch_size: int
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    activation: str = "silu"
    window_size: int = 0
    full_layers: tuple[int, ...] = ()
    tokens_per_second: float = 0
    num_positions: int = 0
    deepstack_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (isinstance(value, bool) or value != int(value)):
                raise ModelError(
                    f"vision_config: {field.name} must be an integer, not {value!r}"
                )
        if self.activation not in ACTIVATIONS:
            raise ModelError(
                f"vision_config: hidden_act {self.activation!r} is not supported: use "
                f"one of {', '.join(ACTIVATIONS)}"
            )
        if self.hidden_size % (4 * self.num_heads):
            raise ModelError(
                f"vision_config: hidden_size={self.hidden_size} must be a multiple of "
                f"4 * num_heads={4 * self.num_heads}"
            )
        unit = self.patch_size * self.spatial_merge_size
        if self.window_size % unit:
            raise ModelError(
                f"vision_config: window_size={self.window_size} must be a multiple of "
                f"the {unit} pixels of a token"
            )
        if self.num_positions != self.num_positions_per_side**2:
            raise ModelError(
                f"vision_config: num_position_embeddings={self.num_positions} must be "
                "a square"
            )

    @property
    def patch_dim(self) -> int:
        """Numbers in a patch, channels first."""
        frame = self.in_channels * self.patch_size**2
        return frame * self.temporal_patch_size

    @property
    def merge_unit(self) -> int:
        """Patches that become one token."""
        return self.spatial_merge_size**2

    @property
    def num_positions_per_side(self) -> int:
        """Height and width of the table of learned positions."""
        return math.isqrt(self.num_positions)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], kind: str) -> QwenVisionConfig:
        """Reads the `vision_config` of a model of the given type.

        Raises:
          ModelError: a field is missing, or asks for what is not supported.
        """
        for name in _SIZES:
            if name not in data:
                raise ModelError(f"vision_config has no field {name!r}")
        full = {**_VISION[kind], **data}
        return cls(
            model_type=kind,
            **{name: data[name] for name in _SIZES},
            patch_size=full["patch_size"],
            temporal_patch_size=data.get("temporal_patch_size", 2),
            spatial_merge_size=data.get("spatial_merge_size", 2),
            in_channels=data.get("in_channels", data.get("in_chans", 3)),
            activation=full["hidden_act"],
            window_size=full.get("window_size", 0),
            full_layers=tuple(full.get("fullatt_block_indexes", ())),
            tokens_per_second=full.get("tokens_per_second", 0),
            num_positions=full.get("num_position_embeddings", 0),
            deepstack_layers=tuple(full.get("deepstack_visual_indexes", ())),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenVLConfig:
    """A vision tower, a decoder, and the tokens that stand for images and videos.

    Attributes:
      model_type: `qwen2_5_vl` or `qwen3_vl`.
      text: the decoder.
      vision: the vision tower.
      image_token_id, video_token_id: placeholders, one for each token of an image or a
        video.
    """

    model_type: str
    text: DecoderConfig
    vision: QwenVisionConfig
    image_token_id: int = 151655
    video_token_id: int = 151656

    def __post_init__(self) -> None:
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ModelError(
                f"vision_config: out_hidden_size={self.vision.out_hidden_size} must be "
                f"the hidden_size={self.text.hidden_size} of the decoder"
            )
        if len(self.vision.deepstack_layers) > self.text.num_layers:
            raise ModelError(
                f"vision_config: {len(self.vision.deepstack_layers)} planes of "
                f"DeepStack for a decoder of {self.text.num_layers} layers"
            )

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> QwenVLConfig:
        """Reads a Hugging Face `config.json`, with the decoder's fields apart or not.

        Raises:
          ModelError: a field is missing, or asks for what is not supported.
        """
        kind = data.get("model_type")
        if kind not in MODEL_TYPES:
            raise ModelError(
                f"model_type {kind!r} is not supported: use one of "
                f"{', '.join(MODEL_TYPES)}"
            )
        vision = data.get("vision_config")
        if not isinstance(vision, Mapping):
            raise ModelError("config.json has no object 'vision_config'")
        tokens = {
            name: data[name]
            for name in ("image_token_id", "video_token_id")
            if name in data
        }
        return cls(
            model_type=kind,
            text=_text(data, kind),
            vision=QwenVisionConfig.from_hf(vision, kind),
            **tokens,
        )


def _text(data: Mapping[str, Any], kind: str) -> DecoderConfig:
    # Older files have the fields of the decoder beside those of the model.
    text = dict(data.get("text_config") or data)
    text["model_type"] = f"{kind}_text"
    default = _TEXT[kind]
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    rope.setdefault("mrope_section", default["section"])
    rope.setdefault("rope_theta", text.get("rope_theta") or default["rope_theta"])
    rope["mrope_interleaved"] = kind == "qwen3_vl"
    text["rope_parameters"] = rope
    text.setdefault("rms_norm_eps", default["rms_norm_eps"])
    # The two places in which files say so.
    tied = data.get("tie_word_embeddings") or text.get("tie_word_embeddings")
    text["tie_word_embeddings"] = bool(tied)
    text.setdefault("eos_token_id", data.get("eos_token_id"))
    return DecoderConfig.from_hf(text)
