"""Language and speech models of our own, loaded from other people's files.

The rest of angeljax does not import this package: it works on anybody's model.
"""

from angeljax.models._audio import read_audio
from angeljax.models._audio_pruner import audio_pruner
from angeljax.models._mel import log_mel
from angeljax.models._transcribe import encode_audio, transcribe
from angeljax.models._whisper_config import WhisperConfig
from angeljax.models._whisper_decode import transcribe_tokens
from angeljax.models._whisper_layers import EncoderAttention
from angeljax.models._whisper_loading import LoadedWhisper, load_whisper
from angeljax.models.attention import causal_attention, dense_attention
from angeljax.models.biases import add_biases
from angeljax.models.cache import KVCache, init_cache
from angeljax.models.config import DecoderConfig, ModelError
from angeljax.models.decoder import Decoder
from angeljax.models.features import Features
from angeljax.models.fusion import fuse_projections, split_projections
from angeljax.models.generate import Generated, decode_step, filter_logits, generate
from angeljax.models.language_model import LanguageModel, stack_layers, unstack_layers
from angeljax.models.loading import LoadedModel, load_config, load_model
from angeljax.models.serving import prepare_decoder
from angeljax.models.tokenizer import Tokenizer
from angeljax.models.whisper import EncodedAudio, WhisperModel

__all__ = [
    "Decoder",
    "DecoderConfig",
    "EncodedAudio",
    "EncoderAttention",
    "Features",
    "Generated",
    "KVCache",
    "LanguageModel",
    "LoadedModel",
    "LoadedWhisper",
    "ModelError",
    "Tokenizer",
    "WhisperConfig",
    "WhisperModel",
    "add_biases",
    "audio_pruner",
    "causal_attention",
    "decode_step",
    "dense_attention",
    "encode_audio",
    "filter_logits",
    "fuse_projections",
    "generate",
    "init_cache",
    "load_config",
    "load_model",
    "load_whisper",
    "log_mel",
    "prepare_decoder",
    "read_audio",
    "split_projections",
    "stack_layers",
    "transcribe",
    "transcribe_tokens",
    "unstack_layers",
]
