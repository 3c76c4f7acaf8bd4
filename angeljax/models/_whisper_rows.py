"""Whisper's decoder as a language model whose rows advance at different speeds.

What it hears is part of its params, so that it can be the target, or the draft model,
of speculative decoding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from angeljax import ops
from angeljax.models._whisper_config import WhisperConfig
from angeljax.models._whisper_layers import SelfKV
from angeljax.models.features import check_layers
from angeljax.models.rows import RowCache, Rows, init_rows, settle_rows
from angeljax.models.whisper import WhisperModel


@dataclasses.dataclass(frozen=True)
class WhisperTextConfig:
    """Sizes of the decoder, by the names that decoding asks for."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    eos_ids: tuple[int, ...]
    pad_id: int

    @classmethod
    def of(cls, c: WhisperConfig) -> WhisperTextConfig:
        """Those of a model."""
        return cls(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            num_layers=c.decoder_layers,
            num_kv_heads=c.decoder_heads,
            head_dim=c.hidden_size // c.decoder_heads,
            max_positions=c.max_target_positions,
            eos_ids=(c.eos_id,),
            pad_id=c.pad_id,
        )


@dataclasses.dataclass(frozen=True)
class WhisperText:
    """Whisper's decoder after some clips; hashable. `whisper_text` makes its params.

    Tokens that Whisper suppresses have logits of -inf.

    Attributes:
      model: the architecture.
      prompt_length: tokens before the first one that is chosen.
    """

    model: WhisperModel
    prompt_length: int

    @property
    def config(self) -> WhisperTextConfig:
        """Sizes of the decoder."""
        return WhisperTextConfig.of(self.model.config)

    @property
    def dtype(self) -> Any:
        """Of activations."""
        return self.model.dtype

    def init_rows(self, batch: int, slots: int) -> RowCache:
        """An empty cache; see `LanguageModel.init_rows`."""
        return init_rows(self.config, batch, slots, self.dtype, stacked=False)

    def read_rows(
        self,
        params: dict[str, Any],
        cache: RowCache,
        tokens: jax.Array,
        *,
        positions: jax.Array,
        slots: jax.Array,
        mask: jax.Array,
        key_positions: jax.Array | None = None,
        layers: Sequence[int] | None = None,
        hidden: Sequence[int] = (),
    ) -> Rows:
        """Reads T tokens of each row; see `LanguageModel.read_rows`.

        `final` has one number more for each token: whether it is the last one of the
        prompt, after which some tokens are not chosen.
        """
        count = self.config.num_layers
        run = check_layers(range(count) if layers is None else layers, count)
        wanted = check_layers(hidden, count)
        if missing := set(wanted) - set(run):
            raise ValueError(f"hidden layer {min(missing)} is not among those that run")
        decoder = self.model.bind(params["model"]).decoder
        cache = settle_rows(cache, slots)
        # Padding may stand beyond the last position; nothing sees it.
        at = jnp.minimum(positions, self.config.max_positions - 1)
        table = decoder.embed_positions.embedding[...]
        x = self.embed(params, tokens) + ops.embed(table, at, dtype=self.dtype)
        k: list[Any] = list(cast(Any, cache.k))
        v: list[Any] = list(cast(Any, cache.v))
        outputs = {}
        for i in run:
            kv, heard = SelfKV(k[i], v[i]), params["cross"][i]
            x, kv = decoder.layers[i](x, mask, slots, kv, heard, params["mask"])
            k[i], v[i] = kv.k, kv.v
            outputs[i] = x
        found = tuple(outputs[i] for i in wanted)
        first = (positions == self.prompt_length - 1).astype(x.dtype)
        final = jnp.concatenate([x, first[..., None]], axis=-1)
        return Rows(final, found, RowCache(tuple(k), tuple(v)))

    def head_rows(self, params: dict[str, Any], final: jax.Array) -> jax.Array:
        """float32 logits `[B, T, V]` of what `read_rows` calls `final`."""
        c = self.model.config
        decoder = self.model.bind(params["model"]).decoder
        x = decoder.layer_norm(final[..., :-1])
        logits = ops.attend(x, decoder.embed_tokens.embedding[...])
        none = jnp.zeros(c.vocab_size, bool)
        always = none.at[jnp.asarray(c.suppress_ids, jnp.int32)].set(True)
        begin = none.at[jnp.asarray(c.begin_suppress_ids, jnp.int32)].set(True)
        banned = always | (begin & (final[..., -1:] > 0))
        return jnp.where(banned, -jnp.inf, logits)

    def embed(self, params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        """Embeddings `[B, T, hidden_size]` of int32 tokens `[B, T]`."""
        table = self.model.bind(params["model"]).decoder.embed_tokens.embedding[...]
        return ops.embed(table, tokens, dtype=self.dtype)


def whisper_text(
    model: WhisperModel,
    params: dict[str, Any],
    features: jax.Array,
    *,
    mask: jax.Array | None = None,
    prompt: tuple[int, ...] | None = None,
) -> tuple[WhisperText, dict[str, Any], list[list[int]]]:
    """Whisper's decoder as `angeljax.speculative.generate` takes a model.

    Args:
      model: the architecture.
      params: its param tree, compressed or not.
      features: `[B, N, D]`, see `WhisperModel.encode`, all or some.
      mask: bool `[B, N]`, True where the decoder may look; default everywhere.
      prompt: ids that every text starts with; default `config.prompt()`.

    Returns:
      The model, its params, and the prompts, one for each clip.

    Raises:
      ValueError: shapes that do not fit each other or the model, or an empty prompt.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.models import WhisperConfig, WhisperModel, whisper_text
      >>> from angeljax.speculative import PromptLookup, generate
      >>> config = WhisperConfig(
      ...     vocab_size=32, hidden_size=16, encoder_layers=1, decoder_layers=1,
      ...     encoder_heads=2, decoder_heads=2, encoder_ffn_size=32,
      ...     decoder_ffn_size=32, start_id=30, eos_id=31, pad_id=31,
      ... )
      >>> model = WhisperModel(config)
      >>> params = model.init(jax.random.key(0))
      >>> audio = model.encode(params, jnp.zeros((1, 80, 100)))
      >>> run = whisper_text(model, params, audio.features)
      >>> generate(*run, drafter=PromptLookup(3), max_new_tokens=4).tokens.shape
      (1, 4)
    """
    prompt = model.config.prompt() if prompt is None else tuple(prompt)
    if not prompt:
        raise ValueError("prompt must hold at least one id, such as config.prompt()")
    state = model.start(params, features, mask=mask, slots=1)
    own = {"model": params, "cross": state.cross, "mask": state.mask}
    return WhisperText(model, len(prompt)), own, [list(prompt)] * len(features)
