"""Whisper (arXiv 2212.04356): speech to text with an encoder and a decoder (nnx).

Every product with a weight goes through `angeljax.ops`, so that a compressed tree runs
from its packed planes. Parameters lie under names such as
`encoder/layers/0/self_attn/q_proj/kernel`, kernels are `[in, out]`. Positions are part
of the encoder's output and cross-attention has none of its own, so that encoder tokens
may be dropped or merged between `encode` and `decode`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from angeljax import ops
from angeljax.models._whisper_config import WhisperConfig
from angeljax.models._whisper_layers import (
    Conv,
    CrossKV,
    DecoderLayer,
    EncoderAttention,
    EncoderLayer,
    EncoderSizes,
    LayerNorm,
    SelfKV,
    sinusoids,
)
from angeljax.models.language_model import bind_params

_INIT = nnx.initializers.normal(0.02)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedAudio:
    """What the encoder makes of a batch of windows.

    Attributes:
      features: `[B, N, D]`, 50 tokens for each second.
      mask: bool `[B, N]`, True for tokens of real audio, False for those of padding.
        Whisper was trained to read both.
      attention: of one encoder layer, where asked for; else None.
    """

    features: jax.Array
    mask: jax.Array
    attention: EncoderAttention | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WhisperState:
    """What a decoder step reads; a pytree of static shapes.

    Attributes:
      kv: keys and values of the tokens read so far, one pair for each layer.
      cross: those of the encoder tokens, computed once.
      mask: bool `[B, N]`, encoder tokens that are looked at.
      length: int32 scalar, tokens read so far.
    """

    kv: tuple[SelfKV, ...]
    cross: tuple[CrossKV, ...]
    mask: jax.Array
    length: jax.Array


class Table(nnx.Module):
    """An embedding `[rows, size]`."""

    def __init__(self, rows: int, size: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Param(_INIT(rngs.params(), (rows, size), dtype))


class Stem(nnx.Module):
    """Two convolutions with GELU; the second halves the frames."""

    def __init__(self, c: EncoderSizes, *, dtype: Any, rngs: nnx.Rngs) -> None:
        around = {"dtype": dtype, "rngs": rngs}
        self.conv1 = Conv(c.num_mel_bins, c.hidden_size, 1, **around)
        self.conv2 = Conv(c.hidden_size, c.hidden_size, 2, **around)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.gelu(self.conv1(x), approximate=False)
        return jax.nn.gelu(self.conv2(x), approximate=False)


class WhisperEncoder(nnx.Module):
    """From a log-mel spectrogram to one vector for each 20 ms."""

    def __init__(
        self, c: WhisperConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ) -> None:
        around = {"dtype": param_dtype, "rngs": rngs}
        self.config, self.dtype = c, dtype
        # The name keeps the convolutions out of recipes without a `match`: their 80
        # inputs fill no group, and they hold one weight in a hundred.
        self.embed = Stem(c, **around)
        self.embed_positions = Table(c.max_source_positions, c.hidden_size, **around)
        table = jnp.asarray(sinusoids(c.max_source_positions, c.hidden_size))
        self.embed_positions.embedding[...] = table.astype(param_dtype)
        self.layers = nnx.List(
            [EncoderLayer(c, **around) for _ in range(c.encoder_layers)]
        )
        self.layer_norm = LayerNorm(c.hidden_size, **around)

    def __call__(
        self,
        mel: jax.Array,
        mask: jax.Array | None = None,
        *,
        layer: int | None = None,
        full: bool = False,
    ) -> tuple[jax.Array, EncoderAttention | None]:
        """Features `[B, N, D]` of `[B, num_mels, T]`, and the attention of a layer."""
        x = self.embed(jnp.swapaxes(mel, 1, 2).astype(self.dtype))
        n = x.shape[1]
        places = ops.embed(
            self.embed_positions.embedding[...], jnp.arange(n), dtype=self.dtype
        )
        x = x + places
        found = None
        for i, block in enumerate(self.layers):
            if i == layer:
                found = block.attention(x, mask, full=full)
            x = block(x)
        return self.layer_norm(x), found


class WhisperDecoder(nnx.Module):
    """From encoder tokens and the text so far to the next token."""

    def __init__(
        self, c: WhisperConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ) -> None:
        around = {"dtype": param_dtype, "rngs": rngs}
        self.config, self.dtype = c, dtype
        self.embed_tokens = Table(c.vocab_size, c.hidden_size, **around)
        self.embed_positions = Table(c.max_target_positions, c.hidden_size, **around)
        self.layers = nnx.List(
            [DecoderLayer(c, **around) for _ in range(c.decoder_layers)]
        )
        self.layer_norm = LayerNorm(c.hidden_size, **around)

    def __call__(
        self, tokens: jax.Array, state: WhisperState
    ) -> tuple[jax.Array, WhisperState]:
        """float32 logits `[R, T, V]` of new tokens `[R, T]`, and the state after."""
        t = tokens.shape[1]
        x = ops.embed(self.embed_tokens.embedding[...], tokens, dtype=self.dtype)
        at = state.length + jnp.arange(t)
        table = self.embed_positions.embedding[...]
        x = x + ops.embed(table, at, dtype=self.dtype)
        slots = state.kv[0].k.shape[2]
        seen = (jnp.arange(slots) <= at[:, None])[None, None]
        done = []
        for block, kv, cross in zip(self.layers, state.kv, state.cross, strict=True):
            x, kv = block(x, seen, state.length, kv, cross, state.mask)
            done.append(kv)
        logits = ops.attend(self.layer_norm(x), self.embed_tokens.embedding[...])
        after = dataclasses.replace(
            state, kv=tuple(done), length=state.length + jnp.int32(t)
        )
        return logits, after


class Whisper(nnx.Module):
    """Encoder and decoder.

    Args:
      config: sizes.
      rngs: for the initial parameters.
      dtype: of activations.
      param_dtype: of the parameters.
    """

    def __init__(
        self,
        config: WhisperConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ) -> None:
        around = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.encoder = WhisperEncoder(config, **around)
        self.decoder = WhisperDecoder(config, **around)


@dataclasses.dataclass(frozen=True)
class WhisperModel:
    """The architecture without parameters: hashable, so that `jit` can close over it.

    `params` is everywhere a nested dict of arrays or QTensors, such as `init` gives.

    Attributes:
      config: sizes and token ids.
      dtype: of activations.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.models import WhisperConfig, WhisperModel
      >>> config = WhisperConfig(
      ...     vocab_size=32, hidden_size=16, encoder_layers=1, decoder_layers=1,
      ...     encoder_heads=2, decoder_heads=2, encoder_ffn_size=32,
      ...     decoder_ffn_size=32, start_id=30, eos_id=31, pad_id=31,
      ... )
      >>> model = WhisperModel(config)
      >>> params = model.init(jax.random.key(0))
      >>> audio = model.encode(params, jnp.zeros((1, 80, 100)))
      >>> audio.features.shape
      (1, 50, 16)
      >>> tokens = jnp.array([[30, 3, 4]])
      >>> kept = audio.features[:, ::2]  # any rows of the features, in any number
      >>> model.decode(params, tokens, kept).shape
      (1, 3, 32)
    """

    config: WhisperConfig
    dtype: Any = jnp.float32

    def module(self, rngs: nnx.Rngs, param_dtype: Any = jnp.float32) -> Whisper:
        """A `Whisper` with fresh parameters."""
        return Whisper(
            self.config, rngs=rngs, dtype=self.dtype, param_dtype=param_dtype
        )

    def init(self, key: jax.Array, param_dtype: Any = jnp.float32) -> dict[str, Any]:
        """Random parameters as a nested dict."""
        module = self.module(nnx.Rngs(params=key), param_dtype)
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    def abstract(self, param_dtype: Any = jnp.float32) -> dict[str, Any]:
        """The tree of `init` with `jax.ShapeDtypeStruct` leaves; takes no memory."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0), param_dtype))

    def bind(self, params: dict[str, Any]) -> Whisper:
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
        return_attention: int | str | None = None,
        full: bool = False,
    ) -> EncodedAudio:
        """Encoder tokens of log-mel spectrograms.

        The encoder attends to padding as well, as it was trained to; `lengths` only
        says which tokens `mask` and the averages of the attention count.

        Args:
          params: the param tree.
          mel: float `[B, num_mels, T]`, see `log_mel`; T is 3000 for the 30 s that
            Whisper was trained with, and may be less.
          lengths: int32 `[B]`, real tokens of each row, ceil(seconds * 50). Default:
            all.
          return_attention: number of an encoder layer, or "last", whose attention
            weights are summarised in `EncodedAudio.attention`; None for none.
          full: also keep those weights, `[B, H, N, N]`.

        Returns:
          `EncodedAudio` with N = ceil(T / 2) tokens.

        Raises:
          ValueError: the shape of `mel` does not fit the model, or there is no such
            layer.
        """
        c = self.config
        if mel.ndim != 3 or mel.shape[1] != c.num_mel_bins:
            raise ValueError(
                f"mel must be [batch, {c.num_mel_bins} bands, frames], not "
                f"{list(mel.shape)}"
            )
        n = -(-mel.shape[2] // 2)
        if not 0 < n <= c.max_source_positions:
            raise ValueError(
                f"mel has {mel.shape[2]} frames: this model reads 1 to "
                f"{2 * c.max_source_positions}; cut longer audio into windows"
            )
        layer = _layer(return_attention, c.encoder_layers)
        if full and layer is None:
            raise ValueError("full=True needs return_attention: name a layer or 'last'")
        if lengths is None:
            mask = jnp.ones((mel.shape[0], n), bool)
        else:
            mask = jnp.arange(n) < jnp.asarray(lengths)[:, None]
        encoder = self.bind(params).encoder
        features, attention = encoder(mel, mask, layer=layer, full=full)
        return EncodedAudio(features=features, mask=mask, attention=attention)

    def start(
        self,
        params: dict[str, Any],
        features: jax.Array,
        *,
        mask: jax.Array | None = None,
        slots: int | None = None,
        beams: int = 1,
    ) -> WhisperState:
        """The state before the first token: cross-attention's keys and values.

        Args:
          params: the param tree.
          features: `[B, N, D]`, all encoder tokens or those that are left of them.
          mask: bool `[B, N]`, True where the decoder may look; default everywhere.
          slots: tokens that may be read; default `max_target_positions`.
          beams: rows of the decoder for each row of `features`.

        Returns:
          A `WhisperState` for `[B * beams]` rows; those of one clip stand together.

        Raises:
          ValueError: shapes that do not fit each other or the model.
        """
        c = self.config
        if features.ndim != 3 or features.shape[2] != c.hidden_size:
            raise ValueError(
                f"features must be [batch, tokens, {c.hidden_size}], not "
                f"{list(features.shape)}"
            )
        if mask is not None and mask.shape != features.shape[:2]:
            raise ValueError(
                f"mask has shape {list(mask.shape)}, features have "
                f"{list(features.shape[:2])} tokens"
            )
        slots = c.max_target_positions if slots is None else slots
        if not 1 <= slots <= c.max_target_positions:
            raise ValueError(
                f"slots={slots}: this model reads 1 to {c.max_target_positions} tokens"
            )
        batch = features.shape[0]
        decoder = self.bind(params).decoder
        features = features.astype(self.dtype)
        cross = tuple(layer.cross(features) for layer in decoder.layers)
        head = c.hidden_size // c.decoder_heads
        shape = (batch * beams, c.decoder_heads, slots, head)

        # Buffers of their own, so that a step may be given them to overwrite.
        def empty() -> SelfKV:
            return SelfKV(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))

        return WhisperState(
            kv=tuple(empty() for _ in cross),
            cross=cross,
            mask=jnp.ones(features.shape[:2], bool) if mask is None else mask,
            length=jnp.zeros((), jnp.int32),
        )

    def step(
        self, params: dict[str, Any], state: WhisperState, tokens: jax.Array
    ) -> tuple[jax.Array, WhisperState]:
        """Reads int32 tokens `[R, T]`: float32 logits `[R, T, V]` and the new state."""
        return self.bind(params).decoder(tokens, state)

    def decode(
        self,
        params: dict[str, Any],
        tokens: jax.Array,
        features: jax.Array,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Next-token logits of whole texts, without keeping a cache.

        Args:
          params: the param tree.
          tokens: int32 `[B, T]`, prompt first.
          features: `[B, N, D]`, encoder tokens, all or some; see `encode`.
          mask: bool `[B, N]`, True where the decoder may look; default everywhere.

        Returns:
          float32 `[B, T, V]`.

        Raises:
          ValueError: shapes that do not fit each other or the model.
        """
        if tokens.ndim != 2 or tokens.shape[0] != features.shape[0]:
            raise ValueError(
                f"tokens must be [{features.shape[0]}, length], not "
                f"{list(tokens.shape)}"
            )
        state = self.start(params, features, mask=mask, slots=tokens.shape[1])
        return self.step(params, state, tokens)[0]


def _layer(name: int | str | None, count: int) -> int | None:
    if name is None:
        return None
    if name == "last":
        return count - 1
    if isinstance(name, bool) or not isinstance(name, int) or not 0 <= name < count:
        raise ValueError(
            f"return_attention={name!r}: name one of the layers 0 to {count - 1}, or "
            "'last'"
        )
    return name


@functools.lru_cache(maxsize=16)
def _skeleton(model: WhisperModel) -> tuple[Any, Any]:
    abstract = nnx.eval_shape(lambda: model.module(nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    return graphdef, nnx.filter_state(state, nnx.Param)
