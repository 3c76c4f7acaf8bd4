"""The network of a block drafter: a whole block of tokens in one pass (DFlash)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from angeljax.models.config import DecoderConfig
from angeljax.models.features import check_layers
from angeljax.models.language_model import bind_params
from angeljax.models.layers import Block, Linear, RMSNorm
from angeljax.models.rope import cos_sin
from angeljax.speculative._context_attention import attend

# Keys (rotated) and values of each layer, `[B, Hkv, S, D]`.
ContextKV = tuple[tuple[jax.Array, jax.Array], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """The shape of a block drafter.

    Attributes:
      decoder: sizes of its layers; `hidden_size` and `vocab_size` are the target's.
      block_size: slots of a block: the last committed token and the drafts.
      mask_token_id: token of the target whose embedding stands where a draft is wanted.
      target_layers: layers of the target, from 0, whose outputs it reads.
      num_target_layers: how many layers the target has.

    Raises:
      ValueError: a field is out of range; names it.

    Example:
      >>> from angeljax.models import DecoderConfig
      >>> from angeljax.speculative import BlockConfig
      >>> target = DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=12,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... )
      >>> BlockConfig.of(target, num_layers=3, mask_token_id=31).target_layers
      (1, 5, 9)
    """

    decoder: DecoderConfig
    block_size: int
    mask_token_id: int
    target_layers: tuple[int, ...]
    num_target_layers: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_layers", tuple(self.target_layers))
        if self.block_size < 2:
            raise ValueError(f"block_size must be at least 2, not {self.block_size}")
        if not 0 <= self.mask_token_id < self.decoder.vocab_size:
            raise ValueError(
                f"mask_token_id={self.mask_token_id}: the target has "
                f"{self.decoder.vocab_size} tokens; take one that no text has"
            )
        if not self.target_layers:
            raise ValueError("target_layers must name at least one layer of the target")
        check_layers(self.target_layers, self.num_target_layers)

    @classmethod
    def of(
        cls,
        target: DecoderConfig,
        *,
        mask_token_id: int,
        num_layers: int = 5,
        block_size: int = 16,
        target_layers: Sequence[int] | None = None,
        **sizes: Any,
    ) -> BlockConfig:
        """A drafter for a target, with layers of the target's sizes.

        Args:
          target: its configuration.
          mask_token_id, block_size: see the class.
          num_layers: of the drafter.
          target_layers: default as many as the drafter has layers, from the second to
            the fourth from the end.
          **sizes: fields of `DecoderConfig` that differ, such as `intermediate_size`.

        Raises:
          ValueError: a field is out of range.
        """
        decoder = dataclasses.replace(
            target,
            model_type="qwen3",
            num_layers=num_layers,
            qk_norm=True,
            attention_bias=False,
            output_bias=False,
            mlp_bias=False,
            windows=(),
            mrope_section=(),
            mrope_interleaved=False,
            **sizes,
        )
        count = target.num_layers
        if target_layers is None:
            target_layers = default_layers(count, num_layers)
        return cls(
            decoder=decoder,
            block_size=block_size,
            mask_token_id=mask_token_id,
            target_layers=tuple(target_layers),
            num_target_layers=count,
        )


def default_layers(num_target_layers: int, count: int) -> tuple[int, ...]:
    """`count` layers spread from the second to the fourth from the end.

    Args:
      num_target_layers: of the target.
      count: how many are wanted.
    """
    if count == 1:
        return (num_target_layers // 2,)
    span = max(num_target_layers - 4, 0)
    first = min(1, num_target_layers - 1)
    return tuple(round(first + t * span / (count - 1)) for t in range(count))


class _Network(nnx.Module):
    def __init__(self, config: BlockConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        c = config.decoder
        norm = functools.partial(
            RMSNorm, c.hidden_size, c.norm_eps, dtype=dtype, rngs=rngs
        )
        wide = len(config.target_layers) * c.hidden_size
        self.fc = Linear(wide, c.hidden_size, bias=False, dtype=dtype, rngs=rngs)
        self.hidden_norm, self.norm = norm(), norm()
        self.layers = nnx.List(
            Block(c, fused=False, dtype=dtype, rngs=rngs) for _ in range(c.num_layers)
        )


@dataclasses.dataclass(frozen=True)
class BlockModel:
    """A block drafter's network as pure functions of its params; hashable.

    Attributes:
      config: its shape.
    """

    config: BlockConfig

    def init(self, key: jax.Array, param_dtype: Any = jnp.float32) -> dict[str, Any]:
        """Random parameters as a nested dict."""
        module = _Network(self.config, dtype=param_dtype, rngs=nnx.Rngs(params=key))
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    def abstract(self, param_dtype: Any = jnp.float32) -> dict[str, Any]:
        """The tree of `init` with `jax.ShapeDtypeStruct` leaves."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0), param_dtype))

    def context(
        self,
        params: dict[str, Any],
        hidden: Sequence[jax.Array],
        positions: jax.Array,
    ) -> ContextKV:
        """Keys and values of tokens that the target has read.

        Args:
          params: the param tree.
          hidden: outputs of `target_layers`, `[B, T, hidden_size]` each.
          positions: int32 `[B or 1, T]`.

        Returns:
          Of each layer keys and values, `[B, num_kv_heads, T, head_dim]`.
        """
        module = bind_params(_skeleton(self), params)
        rotation = cos_sin(self.config.decoder, positions)
        x = module.hidden_norm(module.fc(jnp.concatenate(hidden, axis=-1)))
        found = []
        for block in module.layers:
            # The features have a norm of their own; that of the layer is for its input.
            _, k, v = block.attn.project(x, rotation, _as_it_is)
            found.append((jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)))
        return tuple(found)

    def blocks(
        self,
        params: dict[str, Any],
        embeds: jax.Array,
        positions: jax.Array,
        context: ContextKV,
        seen: jax.Array,
    ) -> jax.Array:
        """All slots of some blocks, each of which sees itself and a part of the text.

        Args:
          params: the param tree.
          embeds: `[B, A, block_size, hidden_size]`: A blocks, of the last committed
            token and of the mask token.
          positions: int32 `[B, A]`, of the first slots.
          context: see `context`; S tokens.
          seen: bool `[B or 1, A, S]`, which of them a block sees.

        Returns:
          What the target's head makes logits of, `[B, A, block_size, hidden_size]`:
          slot j is about the token at `positions + j`.
        """
        module = bind_params(_skeleton(self), params)
        batch, runs, size, width = embeds.shape
        at = positions[..., None] + jnp.arange(size)
        rotation = cos_sin(self.config.decoder, at.reshape(batch, -1))
        x = embeds.reshape(batch, -1, width)

        def apart(y: jax.Array) -> jax.Array:
            return y.reshape(batch, runs, size, *y.shape[2:])

        for block, kv in zip(module.layers, context, strict=True):
            q, k, v = map(apart, block.attn.project(x, rotation, block.attn_norm))
            y = attend(q, kv, seen, (k, v)).reshape(batch, runs * size, -1)
            x = block.attn.o_proj(y, residual=x)
            x = block.mlp(x, block.mlp_norm)
        return apart(module.norm(x))


@functools.lru_cache(maxsize=16)
def _skeleton(model: BlockModel) -> tuple[Any, Any]:
    def network() -> _Network:
        return _Network(model.config, dtype=jnp.float32, rngs=nnx.Rngs(0))

    graphdef, state = nnx.split(nnx.eval_shape(network))
    return graphdef, nnx.filter_state(state, nnx.Param)


_as_it_is: Any = lambda x: x  # noqa: E731
