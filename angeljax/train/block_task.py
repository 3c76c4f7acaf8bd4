"""`BlockTask`: training of a block drafter beside its frozen target."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from angeljax._fields import count
from angeljax.models import LanguageModel
from angeljax.speculative._shared import check_shared
from angeljax.speculative.block import BlockDrafter
from angeljax.speculative.block_model import BlockModel
from angeljax.train._feature_scales import feature_scales
from angeljax.train.draft_losses import DraftLoss, draft_loss
from angeljax.train.language_model import cast, forward_flops
from angeljax.train.step import Metrics

# Of the target's last norm at the start: small logits are learned from faster.
_NORM_SHARE = 0.15


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockTask:
    """The loss of a block drafter for `fit`; hashable.

    Of every row `anchors` places are drawn at random at each step, of those first whose
    next token is to be learned; the block of an anchor sees the context before it and
    itself, all in one packed forward. Trained is
    `{"params": ...}` of the drafter; frozen are the target and the scale of each
    feature, by which large ones do not drown the rest; `drafter`
    multiplies them into `fc`.

    Attributes:
      target: whose text is to be drafted.
      block: the network.
      anchors: blocks of a row.
      loss_options: see `DraftLoss`.
      dtype: of compute.

    Raises:
      ValueError: the network is for another target.

    Example:
      >>> import jax, numpy as np
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> from angeljax.speculative import BlockConfig, BlockModel
      >>> from angeljax.train import BlockTask, OptimizerConfig, fit, make_optimizer
      >>> config = DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=2,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... )
      >>> target = LanguageModel(config)
      >>> block = BlockModel(
      ...     BlockConfig.of(config, num_layers=1, block_size=4, mask_token_id=31)
      ... )
      >>> task = BlockTask(target=target, block=block, anchors=4, dtype="float32")
      >>> tokens = np.arange(34, dtype=np.int32).reshape(2, 17) % 31
      >>> params = target.init(jax.random.key(0))
      >>> trainable, frozen = task.init(params, tokens, key=jax.random.key(1))
      >>> result = fit(task.loss, trainable, lambda step: {"tokens": tokens},
      ...              frozen=frozen, steps=2,
      ...              optimizer=make_optimizer(OptimizerConfig(lr=0.01), 2))
      >>> 1 <= result.metrics["tau"] <= 4
      True
    """

    target: LanguageModel
    block: BlockModel
    anchors: int = 64
    loss_options: DraftLoss = DraftLoss()
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        count("anchors", self.anchors)
        config = self.block.config
        check_shared(self.target, config.decoder, config.num_target_layers)

    def init(
        self, params: Any, tokens: Any, *, key: jax.Array
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """`(trainable, frozen)` at the start.

        Args:
          params: of the target.
          tokens: int32 `[B, T]`, some text, by which the features are scaled.
          key: of the random parameters.
        """
        params = cast(params, self.dtype)
        start = dict(self.block.init(key))
        last = jnp.asarray(self.target.bind(params).norm.scale[...], jnp.float32)
        start["norm"] = {"scale": _NORM_SHARE * last}
        layers = self.block.config.target_layers
        scale = jnp.asarray(feature_scales(self.target, params, layers, [tokens]))
        return {"params": start}, {"target": params, "scale": scale}

    def params(self, trainable: Any, frozen: Any) -> Any:
        """The drafter's params in float32, the scale of features in `fc`."""
        params = dict(trainable["params"])
        kernel = params["fc"]["kernel"] * frozen["scale"][:, None]
        return {**params, "fc": {"kernel": kernel}}

    def drafter(self, trainable: Any, frozen: Any) -> BlockDrafter:
        """The drafter as it is now, in the dtype of compute."""
        return BlockDrafter(
            self.block, cast(self.params(trainable, frozen), self.dtype)
        )

    def hidden(
        self, params: Any, target: Any, tokens: jax.Array, anchors: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """All blocks of some rows in one forward.

        Args:
          params: of the drafter.
          target: params of the target.
          tokens: int32 `[B, T]`.
          anchors: int32 `[B, A]`, places of the first slots.

        Returns:
          Of the drafter, `[B, A, block_size - 1, D]`, slot 1 and on; of the target
          after its last norm, `[B, T, D]`.
        """
        config = self.block.config
        features = self.target.features(target, tokens, hidden=config.target_layers)
        features = jax.lax.stop_gradient(features)
        places = jnp.arange(tokens.shape[1])
        context = self.block.context(params, features.hidden, places[None])
        size = (*anchors.shape, config.block_size)
        slots = jnp.full(size, config.mask_token_id)
        first = jnp.take_along_axis(tokens, anchors, axis=1)
        slots = slots.at[..., 0].set(first)
        embeds = self.target.embed(target, slots.reshape(len(tokens), -1))
        seen = places < anchors[..., None]
        x = self.block.blocks(params, embeds.reshape(*size, -1), anchors, context, seen)
        return x[:, :, 1:], features.final

    def loss(
        self, trainable: Any, frozen: Any, batch: Any, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Mean loss over the blocks of a batch; see `fit`.

        Args:
          trainable, frozen: from `init`.
          batch: `tokens` int32 `[B, T + 1]` and, if not all of them are to be learned,
            `mask` bool `[B, T + 1]` of those that are: a block counts up to the first
            that is none.
          step: is not used.
          key: of the anchors.

        Raises:
          ValueError: rows that are shorter than a block.
        """
        tokens, target = batch["tokens"], jax.lax.stop_gradient(frozen["target"])
        size = self.block.config.block_size
        places = tokens.shape[1] - size + 1
        if places < 1:
            raise ValueError(
                f"rows of {tokens.shape[1]} tokens hold no block of {size}: raise "
                "seq_length"
            )
        noise, mask = jax.random.uniform(key, (len(tokens), places)), batch.get("mask")
        if mask is not None:
            noise += mask[:, 1 : places + 1]
        anchors = jax.lax.top_k(noise, min(self.anchors, places))[1]
        params = cast(self.params(trainable, frozen), self.dtype)
        x, final = self.hidden(params, target, tokens[:, :-1], anchors)
        at = anchors[..., None] + jnp.arange(1, size)
        return draft_loss(
            self.loss_options,
            x,
            take_rows(tokens, at),
            self.target.head_params(target),
            take_rows(final, at - 1) if self.loss_options.needs_target else None,
            counts=None if mask is None else take_rows(mask, at),
        )

    def flops(self, length: int) -> float:
        """Floating-point operations of a step, for each token of a row, about."""
        target = forward_flops(self.target.config, length)
        config = self.block.config
        each = min(self.anchors, length) * config.block_size / length
        return target + 3 * each * forward_flops(config.decoder, length)


def take_rows(array: jax.Array, at: jax.Array) -> jax.Array:
    """`array` `[B, T, ...]` at places `[B, A, J]` of each row: `[B, A, J, ...]`."""
    return jax.vmap(lambda row, at: row[at])(array, at)
