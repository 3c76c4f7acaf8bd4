"""What a drafter uses of its target: the embedding, the last norm and the head."""

from __future__ import annotations

from typing import Any

import jax

from angeljax.models.config import DecoderConfig
from angeljax.models.language_model import LanguageModel
from angeljax.speculative.drafter import Target


def check_shared(model: Any, decoder: DecoderConfig, num_target_layers: int) -> None:
    """Refuses a target that a drafter was not made for.

    Args:
      model: the target.
      decoder: of the drafter.
      num_target_layers: that it was made for.

    Raises:
      ValueError: says what differs.
    """
    if not isinstance(model, LanguageModel):
        raise ValueError(
            f"the drafter shares embedding and head with a LanguageModel, and "
            f"{type(model).__name__} is none"
        )
    mine = {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_layers": num_target_layers,
    }
    for name, size in mine.items():
        theirs = getattr(model.config, name)
        if size != theirs:
            raise ValueError(
                f"the drafter is for a target with {name}={size}, and this one has "
                f"{theirs}: take the model that it was trained for"
            )


def embed(target: Target, tokens: jax.Array) -> jax.Array:
    """The target's embeddings `[..., hidden_size]` of int32 tokens `[...]`."""
    rows = tokens.reshape(tokens.shape[0], -1)
    x = target.model.embed(target.params, rows)
    return x.reshape(*tokens.shape, -1)


def head(target: Target, x: jax.Array) -> jax.Array:
    """float32 logits `[..., V]` of hidden states `[..., hidden_size]` after a norm."""
    return target.model.bind(target.params).head(x)


def norm(target: Target, x: jax.Array) -> jax.Array:
    """The target's last norm."""
    return target.model.bind(target.params).norm(x)
