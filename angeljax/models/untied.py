"""A head of its own for a decoder whose head is the embedding."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from angeljax.formats import QTensor
from angeljax.models.language_model import LanguageModel


def untie(
    model: LanguageModel, params: dict[str, Any]
) -> tuple[LanguageModel, dict[str, Any]]:
    """Gives a tied head a kernel of its own; the function is unchanged.

    Rotations fold the final norm into the head, which the embedding must not see.

    Args:
      model: the architecture; one that is not tied is returned as it is.
      params: its params, the embedding dense.

    Returns:
      The architecture with `tied=False`, and params with `lm_head/kernel`
      `[hidden_size, vocab_size]`, a copy.

    Raises:
      ValueError: the embedding is quantized.

    Example:
      >>> import jax
      >>> from angeljax.models import DecoderConfig, LanguageModel, untie
      >>> model = LanguageModel(DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=2,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8, tied=True,
      ... ))
      >>> model, params = untie(model, model.init(jax.random.key(0)))
      >>> params["lm_head"]["kernel"].shape
      (16, 32)
    """
    if not model.config.tied:
        return model, params
    embedding = params["embed_tokens"]["embedding"]
    if isinstance(embedding, QTensor):
        raise ValueError("embed_tokens/embedding is quantized: untie before that")
    config = dataclasses.replace(model.config, tied=False)
    head = {"kernel": jnp.swapaxes(embedding, -1, -2)}
    return dataclasses.replace(model, config=config), {**params, "lm_head": head}
