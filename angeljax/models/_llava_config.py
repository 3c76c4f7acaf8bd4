"""Configuration of LLaVA: a vision tower, a projector and a decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from angeljax.models.config import ACTIVATIONS, DecoderConfig, ModelError
from angeljax.models.vision_tower import VisionTowerConfig, layers_run

STRATEGIES = ("default", "full")
# Checkpoints leave out what is the default of `transformers`.
_TEXT: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """Sizes and switches of a LLaVA-style model.

    Attributes:
      text: of the decoder.
      vision: of the tower.
      image_token_id: the placeholder of one image token.
      vision_layer: which hidden state of the tower is read; -2 is behind all layers but
        one.
      select: "default" leaves the class token out, "full" keeps it.
      activation: of the projector.
      projector_bias: whether its products have biases.
    """

    text: DecoderConfig
    vision: VisionTowerConfig
    image_token_id: int = 32000
    vision_layer: int = -2
    select: str = "default"
    activation: str = "gelu"
    projector_bias: bool = True

    def __post_init__(self) -> None:
        if self.select not in STRATEGIES:
            raise ModelError(
                f"vision_feature_select_strategy {self.select!r} is not supported: use "
                f"{' or '.join(STRATEGIES)}"
            )
        if self.activation not in ACTIVATIONS:
            raise ModelError(
                f"projector_hidden_act {self.activation!r} is not supported: use one "
                f"of {', '.join(ACTIVATIONS)}"
            )
        if isinstance(self.vision_layer, bool) or not isinstance(
            self.vision_layer, int
        ):
            raise ModelError(
                f"vision_feature_layer must be one number, not {self.vision_layer!r}"
            )
        try:
            layers_run(self.vision_layer, self.vision.num_layers)
        except ValueError as e:
            raise ModelError(f"vision_feature_layer: {e}") from None

    @property
    def vision_layers(self) -> int:
        """Layers of the tower that run."""
        return layers_run(self.vision_layer, self.vision.num_layers)

    @property
    def num_image_tokens(self) -> int:
        """N, tokens of one image."""
        extra = self.select == "full" and self.vision.class_token
        return self.vision.num_patches + extra

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> LlavaConfig:
        """Reads the fields of a Hugging Face `config.json`.

        Raises:
          ModelError: a field is missing, or asks for what is not supported.
        """
        if data.get("model_type") != "llava":
            raise ModelError(
                f"model_type {data.get('model_type')!r} is not supported: use llava"
            )
        text = dict(data.get("text_config") or {})
        kind = text.setdefault("model_type", "llama")
        text = {**_TEXT.get(kind, {}), **text}
        text.setdefault("tie_word_embeddings", data.get("tie_word_embeddings", False))
        image = data.get("image_token_id", data.get("image_token_index", 32000))
        return cls(
            text=DecoderConfig.from_hf(text),
            vision=VisionTowerConfig.from_hf(data.get("vision_config") or {}),
            image_token_id=image,
            vision_layer=data.get("vision_feature_layer", -2),
            select=data.get("vision_feature_select_strategy", "default"),
            activation=data.get("projector_hidden_act", "gelu"),
            projector_bias=bool(data.get("multimodal_projector_bias", True)),
        )
