"""Language models of our own, loaded from other people's files.

The rest of angeljax does not import this package: it works on anybody's model.
"""

from angeljax.models._llava_config import LlavaConfig
from angeljax.models._llava_loading import LoadedLlava, load_llava, load_vision_tower
from angeljax.models.attention import causal_attention, dense_attention
from angeljax.models.biases import add_biases
from angeljax.models.cache import KVCache, init_cache
from angeljax.models.config import DecoderConfig, ModelError
from angeljax.models.decoder import Decoder
from angeljax.models.features import Features
from angeljax.models.fusion import fuse_projections, split_projections
from angeljax.models.generate import (
    Generated,
    decode_step,
    filter_logits,
    generate,
    generate_after,
)
from angeljax.models.language_model import LanguageModel, stack_layers, unstack_layers
from angeljax.models.llava import ImagePrompt, ImageTokens, LlavaModel
from angeljax.models.loading import LoadedModel, load_config, load_model
from angeljax.models.qwen_vl import QwenVL, QwenVLConfig, VisionTokens, load_qwen_vl
from angeljax.models.serving import prepare_decoder
from angeljax.models.staged import StagedCache, StagedPrefill, prefill_pruned
from angeljax.models.tokenizer import Tokenizer
from angeljax.models.vision_tower import (
    VisionFeatures,
    VisionTower,
    VisionTowerConfig,
)

__all__ = [
    "add_biases",
    "Decoder",
    "DecoderConfig",
    "Features",
    "Generated",
    "ImagePrompt",
    "ImageTokens",
    "KVCache",
    "LanguageModel",
    "LlavaConfig",
    "LlavaModel",
    "LoadedLlava",
    "LoadedModel",
    "ModelError",
    "QwenVL",
    "QwenVLConfig",
    "StagedCache",
    "StagedPrefill",
    "Tokenizer",
    "VisionFeatures",
    "VisionTokens",
    "VisionTower",
    "VisionTowerConfig",
    "causal_attention",
    "decode_step",
    "dense_attention",
    "filter_logits",
    "fuse_projections",
    "generate",
    "generate_after",
    "init_cache",
    "load_config",
    "load_llava",
    "load_model",
    "load_qwen_vl",
    "load_vision_tower",
    "prefill_pruned",
    "prepare_decoder",
    "split_projections",
    "stack_layers",
    "unstack_layers",
]
