"""Language and speech models of our own, loaded from other people's files.

The rest of angeljax does not import this package: it works on anybody's model.
"""

from angeljax.models._audio import read_audio
from angeljax.models._audio_pruner import audio_pruner
from angeljax.models._fused_rows import FusedRows
from angeljax.models._llava_config import LlavaConfig
from angeljax.models._llava_loading import LoadedLlava, load_llava, load_vision_tower
from angeljax.models._mel import log_mel
from angeljax.models._qwen2_audio_config import AudioEncoderConfig, Qwen2AudioConfig
from angeljax.models._qwen2_audio_loading import LoadedQwen2Audio, load_qwen2_audio
from angeljax.models._transcribe import encode_audio, transcribe
from angeljax.models._whisper_config import WhisperConfig
from angeljax.models._whisper_decode import transcribe_tokens
from angeljax.models._whisper_layers import EncoderAttention
from angeljax.models._whisper_loading import LoadedWhisper, load_whisper
from angeljax.models._whisper_rows import WhisperText, whisper_text
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
from angeljax.models.qwen2_audio import AudioTokens, Qwen2AudioModel, audio_lengths
from angeljax.models.qwen_vl import QwenVL, QwenVLConfig, VisionTokens, load_qwen_vl
from angeljax.models.serving import prepare_decoder
from angeljax.models.staged import StagedCache, StagedPrefill, prefill_pruned
from angeljax.models.tokenizer import Tokenizer
from angeljax.models.untied import untie
from angeljax.models.vision_tower import (
    VisionFeatures,
    VisionTower,
    VisionTowerConfig,
)
from angeljax.models.whisper import EncodedAudio, WhisperModel

__all__ = [
    "AudioEncoderConfig",
    "AudioTokens",
    "Decoder",
    "DecoderConfig",
    "EncodedAudio",
    "EncoderAttention",
    "Features",
    "Generated",
    "ImagePrompt",
    "ImageTokens",
    "KVCache",
    "FusedRows",
    "LanguageModel",
    "LlavaConfig",
    "LlavaModel",
    "LoadedLlava",
    "LoadedModel",
    "LoadedQwen2Audio",
    "LoadedWhisper",
    "ModelError",
    "Qwen2AudioConfig",
    "Qwen2AudioModel",
    "QwenVL",
    "QwenVLConfig",
    "StagedCache",
    "StagedPrefill",
    "Tokenizer",
    "VisionFeatures",
    "VisionTokens",
    "VisionTower",
    "VisionTowerConfig",
    "WhisperConfig",
    "WhisperModel",
    "WhisperText",
    "add_biases",
    "audio_lengths",
    "audio_pruner",
    "causal_attention",
    "decode_step",
    "dense_attention",
    "encode_audio",
    "filter_logits",
    "fuse_projections",
    "generate",
    "generate_after",
    "init_cache",
    "load_config",
    "load_llava",
    "load_model",
    "load_qwen2_audio",
    "load_qwen_vl",
    "load_vision_tower",
    "load_whisper",
    "log_mel",
    "prefill_pruned",
    "prepare_decoder",
    "read_audio",
    "split_projections",
    "stack_layers",
    "transcribe",
    "transcribe_tokens",
    "unstack_layers",
    "untie",
    "whisper_text",
]
