"""`audio_pruner`: a token method between Whisper's encoder and its decoder."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from angeljax import tokens
from angeljax.models._whisper_layers import EncoderAttention
from angeljax.tokens import AttentionWeights, Selection, TokenPruner

# Methods that merge neighbours in time, and read attention in both of its forms.
AUDIO_METHODS = ("atome", "fastadasp", "samp")
RELEVANCE = ("mean", "max", "received")


@dataclasses.dataclass(frozen=True)
class AudioPruner:
    """What `audio_pruner` makes: equal settings are equal, and compile once.

    Attributes:
      pruner: method, share and options, without arrays.
      tail: tokens of padding that stay at the end of the window.
      seed: of methods that draw.
    """

    pruner: TokenPruner
    tail: int = 50
    seed: int = 0

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
        received: Any = attention.received_mean
        attn, importance = received, received
        options = dict(self.pruner.options)
        if self.pruner.method in AUDIO_METHODS:
            relevance = options.get("relevance", "mean")
            by_max = relevance == "max"
            attn = AttentionWeights(
                received=attention.received_max,
                diagonal=attention.diagonal_max if by_max else attention.diagonal_mean,
            )
            importance = None
            if relevance == "received":
                del options["relevance"]
                importance = received
        if self.pruner.importance is not None:
            importance = received if self.pruner.importance == "attn" else None
        pruner = dataclasses.replace(
            self.pruner,
            options=tuple(sorted(options.items())),
            key=jax.random.key(self.seed),
        )
        return pruner(features, mask=mask, attn=attn, importance=importance)


def audio_pruner(
    method: str | TokenPruner = "samp",
    *,
    keep: int | float | None = None,
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
      method: one of `angeljax.tokens.methods()`; or a `TokenPruner`, such as a recipe's
        `tokens.prune_fn()`, which has `keep` and the options in it.
      keep: share of the real tokens, or a count.
      tail: tokens at the end of the window that stay if they are padding; the default
        is a second, and 0 only fits clips that fill their window.
      seed: of methods that draw.
      **options: of the method, such as `threshold`. For samp, atome and fastadasp
        `relevance` is "mean" or "max" (over the heads, of what a token pays to itself),
        or "received" for the mean over heads of what it receives.

    Returns:
      A function for `transcribe(prune=...)`.

    Raises:
      ValueError: no such method, `keep` is missing or given twice, the pruner has a
        learned scorer, or `tail` is negative.

    Example:
      >>> from angeljax.models import audio_pruner
      >>> prune = audio_pruner("samp", keep=0.7, threshold=0.8)
      >>> prune == audio_pruner("samp", keep=0.7, threshold=0.8)
      True
    """
    if tail < 0:
        raise ValueError(f"tail={tail} must not be negative")
    if isinstance(method, TokenPruner):
        if keep is not None or options:
            raise ValueError("keep and options are in the TokenPruner: leave them out")
        if method.scorer is not None:
            raise ValueError("scorer: learned scorers are for tokens of images")
        return AudioPruner(dataclasses.replace(method, key=None), tail, seed)
    if method not in tokens.methods():
        known = ", ".join(tokens.methods())
        raise ValueError(f"unknown method {method!r}: use one of {known}")
    if keep is None:
        raise ValueError("keep is missing: give a share of the tokens, or a count")
    relevance = options.get("relevance", "mean")
    if method in AUDIO_METHODS and relevance not in RELEVANCE:
        raise ValueError(
            f"relevance={relevance!r} must be one of {', '.join(RELEVANCE)}"
        )
    items = tuple(sorted(options.items()))
    return AudioPruner(TokenPruner(method=method, keep=keep, options=items), tail, seed)
