"""Models with random weights that stand in for real ones where notebooks are tested."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.models import (
    DecoderConfig,
    LanguageModel,
    LoadedModel,
    LoadedWhisper,
    Tokenizer,
    WhisperConfig,
    WhisperModel,
)


def load_model(
    source: str, *, dtype: Any = jnp.bfloat16, compute_dtype: Any = None
) -> LoadedModel:
    """As `angeljax.models.load_model`; needs no files and no network.

    Args:
      source: kept as the name of the model.
      dtype: of the parameters.
      compute_dtype: of the activations; default `dtype`.

    Returns:
      Two small layers and a tokenizer of single characters.
    """
    tokenizer = _tokenizer()
    config = DecoderConfig(
        model_type="llama",
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        num_layers=2,
        intermediate_size=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        tied=True,
    )
    model = LanguageModel(config, jnp.dtype(compute_dtype or dtype))
    return LoadedModel(model, model.init(jax.random.key(0), dtype), tokenizer, source)


def _tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {chr(c): i for i, c in enumerate([10, *range(32, 127)])}
    backend = Backend(models.WordLevel(vocabulary, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    return Tokenizer(
        {
            "tokenizer.json": backend.to_str().encode(),
            "tokenizer_config.json": json.dumps({"chat_template": template}).encode(),
        }
    )


def load_whisper(source: str) -> LoadedWhisper:
    """As `angeljax.models.load_whisper`, with random weights and letters as tokens.

    Args:
      source: kept as the name of the model.

    Returns:
      One layer on each side.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    letters = {chr(97 + i): i for i in range(26)}
    backend = Backend(models.WordLevel(letters, unk_token="a"))
    config = WhisperConfig(
        vocab_size=26,
        hidden_size=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_heads=2,
        decoder_heads=2,
        encoder_ffn_size=32,
        decoder_ffn_size=32,
        max_source_positions=200,
        max_target_positions=12,
        start_id=24,
        eos_id=25,
        pad_id=25,
    )
    model = WhisperModel(config)
    tokenizer = Tokenizer({"tokenizer.json": backend.to_str().encode()})
    return LoadedWhisper(
        model, jax.jit(model.init)(jax.random.key(0)), tokenizer, source
    )
