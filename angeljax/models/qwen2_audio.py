"""Qwen2-Audio (arXiv 2407.10759): sound and text in, text out (nnx).

Whisper's encoder, a mean over pairs of frames and one linear layer give a token for
each 40 ms, which stand in the prompt of a Qwen2 decoder where its placeholders are.
Every product with a weight goes through `angeljax.ops`, so that a compressed tree runs
from its packed planes. Between `encode` and `prompt` nothing but embeddings is passed
on, so that tokens may be merged or dropped there.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from angeljax import ops
from angeljax.models._qwen2_audio_config import AudioEncoderConfig, Qwen2AudioConfig
from angeljax.models._whisper_layers import EncoderLayer, LayerNorm
from angeljax.models.decoder import Decoder
from angeljax.models.language_model import LanguageModel, bind_params
from angeljax.models.layers import Linear
from angeljax.models.whisper import Stem, Table
from angeljax.tokens import (
    AttentionWeights,
    Prompt,
    attention_weights,
    token_positions,
)

POOL = 2  # frames of the encoder in a token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioTokens:
    """A batch of clips as the decoder reads them; a pytree.

    Attributes:
      embeds: `[B, N, hidden_size of the decoder]`, 25 tokens for each second.
      mask: bool `[B, N]`, True for tokens of real audio.
      attention: of the encoder's last layer, for `angeljax.tokens.samp`; None if it was
        not asked for.
    """

    embeds: jax.Array
    mask: jax.Array
    attention: AttentionWeights | None = None


class AudioEncoder(nnx.Module):
    """From a log-mel spectrogram to one vector for each 40 ms."""

    def __init__(self, c: AudioEncoderConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        around = {"dtype": dtype, "rngs": rngs}
        self.embed = Stem(c, **around)
        self.embed_positions = Table(c.max_source_positions, c.hidden_size, **around)
        self.layers = nnx.List(
            [EncoderLayer(c, **around) for _ in range(c.encoder_layers)]
        )
        self.layer_norm = LayerNorm(c.hidden_size, **around)

    def __call__(
        self, x: jax.Array, seen: jax.Array, *, relevance: Any
    ) -> tuple[jax.Array, AttentionWeights | None]:
        """Of `[B, T, num_mels]` and the frames `[B, T / 2]` that are real."""
        x = self.embed(x)
        places = jnp.arange(x.shape[1])
        table = self.embed_positions.embedding[...]
        x = x + ops.embed(table, places, dtype=x.dtype)
        found = None
        for i, layer in enumerate(self.layers):
            if relevance is not None and i == len(self.layers) - 1:
                q, k = layer.queries_keys(x)
                found = attention_weights(
                    q, k, pool=POOL, mask=seen, relevance=relevance, scale=1.0
                )
            x = layer(x, seen[:, None, None])
        batch, _, size = x.shape
        wide = x.astype(jnp.float32).reshape(batch, -1, POOL, size)
        return self.layer_norm(jnp.mean(wide, axis=2).astype(x.dtype)), found


class Qwen2Audio(nnx.Module):
    """Encoder, projector and decoder.

    Args:
      config: sizes.
      rngs: for the initial parameters.
      dtype: of activations.
      param_dtype: of the parameters.
    """

    def __init__(
        self,
        config: Qwen2AudioConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ) -> None:
        around = {"dtype": param_dtype, "rngs": rngs}
        sizes = config.audio.hidden_size, config.text.hidden_size
        self.audio_tower = AudioEncoder(config.audio, **around)
        self.projector = Linear(*sizes, bias=True, **around)
        self.language_model = Decoder(
            config.text, rngs=rngs, dtype=dtype, param_dtype=param_dtype
        )
        self.dtype = dtype


@dataclasses.dataclass(frozen=True)
class Qwen2AudioModel:
    """The architecture without parameters: hashable, so that `jit` can close over it.

    `params` is everywhere a nested dict of arrays or QTensors with the subtrees
    `audio_tower`, `projector` and `language_model`.

    Attributes:
      config: sizes.
      dtype: of activations.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.models import Qwen2AudioConfig, Qwen2AudioModel
      >>> from angeljax.tokens import apply_selection, samp
      >>> model = Qwen2AudioModel(Qwen2AudioConfig.from_hf({
      ...     "model_type": "qwen2_audio", "audio_token_index": 9,
      ...     "audio_config": {
      ...         "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2,
      ...         "encoder_ffn_dim": 32, "num_mel_bins": 8, "max_source_positions": 20,
      ...     },
      ...     "text_config": {
      ...         "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32,
      ...         "num_hidden_layers": 1, "num_attention_heads": 2,
      ...         "num_key_value_heads": 1,
      ...     },
      ... }))
      >>> params = model.init(jax.random.key(0))
      >>> audio = model.encode(params, jnp.ones((1, 8, 40)), relevance="mean")
      >>> tokens = jnp.array([[1, *[9] * 10, 2]])  # 10 placeholders
      >>> prompt = model.prompt(params, tokens, audio)
      >>> chosen = samp(audio.embeds, keep=0.6, attn=audio.attention)
      >>> where = tokens == model.config.audio_token_id
      >>> short = apply_selection(chosen, prompt, where, position_policy="compact")
      >>> short.prompt.embeds.shape
      (1, 8, 16)
      >>> logits, _ = model.language_model.apply(
      ...     params["language_model"], embeds=short.prompt.embeds,
      ...     mask=short.prompt.mask,
      ... )
      >>> logits.shape
      (1, 8, 32)
    """

    config: Qwen2AudioConfig
    dtype: Any = jnp.float32

    @property
    def language_model(self) -> LanguageModel:
        """The decoder, for `params["language_model"]`."""
        return LanguageModel(self.config.text, self.dtype)

    def module(self, rngs: nnx.Rngs, param_dtype: Any = jnp.float32) -> Qwen2Audio:
        """A `Qwen2Audio` with fresh parameters."""
        return Qwen2Audio(
            self.config, rngs=rngs, dtype=self.dtype, param_dtype=param_dtype
        )

    def init(self, key: jax.Array, param_dtype: Any = jnp.float32) -> dict[str, Any]:
        """Random parameters as a nested dict."""
        module = self.module(nnx.Rngs(params=key), param_dtype)
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    def abstract(self, param_dtype: Any = jnp.float32) -> dict[str, Any]:
        """The tree of `init` with `jax.ShapeDtypeStruct` leaves; takes no memory."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0), param_dtype))

    def bind(self, params: dict[str, Any]) -> Qwen2Audio:
        """The nnx module with these parameters.

        Raises:
          ValueError: a parameter is missing.
        """
        return bind_params(_skeleton(self), params)

    def encode(
        self,
        params: dict[str, Any],
        mel: jax.Array,
        *,
        lengths: jax.Array | None = None,
        relevance: str | None = None,
    ) -> AudioTokens:
        """Audio tokens of log-mel spectrograms.

        Args:
          params: the param tree.
          mel: float `[B, num_mels, T]`, see `log_mel` with 128 mels; T is 3000 for the
            30 s that the model was trained with, and any multiple of 4 below.
          lengths: int32 `[B]`, real frames of `mel` in each row, 100 for each second;
            attention does not see the others. Default: all.
          relevance: "mean" or "max" to sum up the attention of the last layer, see
            `angeljax.tokens.pool_attention`; None for no attention.

        Returns:
          `AudioTokens` with N = T / 4 tokens; `audio_lengths` of each row are real.

        Raises:
          ValueError: the shape of `mel` does not fit the model, or another `relevance`.
        """
        c = self.config.audio
        if mel.ndim != 3 or mel.shape[1] != c.num_mel_bins:
            raise ValueError(
                f"mel must be [batch, {c.num_mel_bins} bands, frames], not "
                f"{list(mel.shape)}"
            )
        batch, _, frames = mel.shape
        if frames % (2 * POOL) or not 0 < frames <= 2 * c.max_source_positions:
            raise ValueError(
                f"mel has {frames} frames: this model reads a multiple of 4, at most "
                f"{2 * c.max_source_positions}; pad with silence, or cut into windows"
            )
        real = jnp.full(batch, frames) if lengths is None else jnp.asarray(lengths)
        if real.shape != (batch,):
            raise ValueError(f"lengths must be [{batch}], not {list(real.shape)}")
        seen = jnp.arange(frames // 2) < ((real + 1) // 2)[:, None]
        model = self.bind(params)
        x = jnp.swapaxes(mel, 1, 2).astype(self.dtype)
        x, attention = model.audio_tower(x, seen, relevance=relevance)
        mask = jnp.arange(x.shape[1]) < audio_lengths(real)[:, None]
        return AudioTokens(embeds=model.projector(x), mask=mask, attention=attention)

    def prompt(
        self,
        params: dict[str, Any],
        tokens: jax.Array,
        audio: AudioTokens,
        *,
        mask: jax.Array | None = None,
    ) -> Prompt:
        """Embeddings of a prompt with audio where its placeholders stand.

        Args:
          params: the param tree.
          tokens: int32 `[B, L]`, with `audio_token_id` once for each real token of the
            row's clip; see `angeljax.tokens.expand_placeholders`. What is too many is
            left out, and placeholders that are too many stay what they are.
          audio: one clip for each row.
          mask: bool `[B, L]`, True for real tokens; default all.

        Returns:
          A `Prompt` for `apply_selection`, or for `language_model` at once.

        Raises:
          ValueError: another number of rows in `tokens` than in `audio`.
        """
        batch, n, _ = audio.embeds.shape
        if tokens.ndim != 2 or tokens.shape[0] != batch:
            raise ValueError(
                f"tokens must be [{batch}, length] for {batch} clips, not "
                f"{list(tokens.shape)}"
            )
        holes = tokens == self.config.audio_token_id
        at = token_positions(holes, length=tokens.shape[1], num_tokens=n)
        at = jnp.where(audio.mask, at, tokens.shape[1])
        text = self.language_model.embed(params["language_model"], tokens)
        rows = jnp.arange(batch)[:, None]
        embeds = text.at[rows, at].set(audio.embeds.astype(text.dtype), mode="drop")
        return Prompt(embeds=embeds, mask=mask, tokens=tokens)


def audio_lengths(mel_frames: Any) -> Any:
    """Audio tokens of clips with so many frames of their spectrogram.

    Args:
      mel_frames: an integer, or integers of any shape; 100 for each second.

    Returns:
      As many integers: the first convolution's ceil(frames / 2), in whole pairs.

    Example:
      >>> from angeljax.models import audio_lengths
      >>> audio_lengths(3000), audio_lengths(1001)
      (750, 250)
    """
    return (mel_frames + 1) // 2 // POOL


@functools.lru_cache(maxsize=16)
def _skeleton(model: Qwen2AudioModel) -> tuple[Any, Any]:
    abstract = nnx.eval_shape(lambda: model.module(nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    return graphdef, nnx.filter_state(state, nnx.Param)
