"""`audio_pruner`: a token method between Whisper's encoder and its decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from angeljax import tokens
from angeljax.models._whisper_layers import EncoderAttention
from angeljax.tokens import AttentionWeights, Selection

# Methods that merge neighbours in time; all others are those of `tokens.prune`.
AUDIO_METHODS = ("atome", "fastadasp", "samp")


@dataclasses.dataclass(frozen=True)
class AudioPruner:
    """What `audio_pruner` makes: equal settings are equal, and compile once.

    Attributes:
      method: name of the method.
      keep: share or number of the real tokens that stay.
      tail: tokens of padding that stay at the end of the window.
      seed: of methods that draw.
      options: of the method, as sorted items.
    """

    method: str
    keep: int | float
    tail: int = 50
    seed: int = 0
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(
        self, features: jax.Array, attention: EncoderAttention, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Fewer features, and which of them are to be looked at; see `transcribe`."""
        chosen = self.select(features, attention, mask)
        rows = chosen.take(features) if chosen.merged is None else chosen.merged
        tail = min(self.tail, mask.shape[1])
        if tail == 0:
            return rows, chosen.used
        last, padding = features[:, -tail:], ~mask[:, -tail:]
        return (
            jnp.concatenate([rows.astype(features.dtype), last], axis=1),
            jnp.concatenate([chosen.used, padding], axis=1),
        )

    def select(
        self, features: jax.Array, attention: EncoderAttention, mask: jax.Array
    ) -> Selection:
        """The method's choice among the real tokens."""
        options = dict(self.options)
        if self.method in AUDIO_METHODS:
            by_max = options.get("relevance") == "max"
            weights = AttentionWeights(
                received=attention.received_max,
                diagonal=attention.diagonal_max if by_max else attention.diagonal_mean,
            )
            method: Callable[..., Selection] = getattr(tokens, self.method)
            return method(features, keep=self.keep, mask=mask, attn=weights, **options)
        return tokens.prune(
            features,
            method=self.method,
            keep=self.keep,
            mask=mask,
            importance=attention.received_mean,
            attn=attention.received_mean,
            key=jax.random.key(self.seed),
            **options,
        )


def audio_pruner(
    method: str = "samp",
    *,
    keep: int | float,
    tail: int = 50,
    seed: int = 0,
    **options: Any,
) -> AudioPruner:
    """A method of `angeljax.tokens` as the `prune` of `transcribe`.

    Of each clip's real encoder tokens a share stays, chosen or merged by the method.
    Whisper was trained on windows of 30 s and ends a text by what it sees in the
    padding after the speech: without any it often says everything again until it is cut
    off. The last tokens of the window are enough, so that the padding before them goes
    for nothing.

    The methods get the attention of the last encoder layer: what a token receives
    (mean over heads as `importance` and `attn`; for samp, atome and fastadasp the
    maximum) and, those three, what it pays to itself.

    Args:
      method: samp, atome, fastadasp, or one of `angeljax.tokens.methods()`.
      keep: share of the real tokens, or a count.
      tail: tokens at the end of the window that stay if they are padding; the default
        is a second, and 0 only fits clips that fill their window.
      seed: of methods that draw.
      **options: of the method, such as `threshold`.

    Returns:
      A function for `transcribe(prune=...)`.

    Raises:
      ValueError: no such method, or `tail` is negative.

    Example:
      >>> from angeljax.models import audio_pruner
      >>> prune = audio_pruner("samp", keep=0.7, threshold=0.8)
      >>> prune == audio_pruner("samp", keep=0.7, threshold=0.8)
      True
    """
    known = (*AUDIO_METHODS, *tokens.methods())
    if method not in known:
        raise ValueError(
            f"unknown method {method!r}: use one of {', '.join(sorted(set(known)))}"
        )
    if tail < 0:
        raise ValueError(f"tail={tail} must not be negative")
    items = tuple(sorted(options.items()))
    return AudioPruner(method, keep, tail, seed, items)
