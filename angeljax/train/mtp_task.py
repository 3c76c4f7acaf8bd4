"""`MTPTask`: training of an MTP layer by running it as drafting does."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from angeljax._fields import count, flag
from angeljax.models import LanguageModel
from angeljax.models.rope import cos_sin
from angeljax.speculative._context_attention import attend
from angeljax.speculative._shared import check_shared
from angeljax.speculative.mtp import MTPDrafter, MTPModel
from angeljax.train.block_task import take_rows
from angeljax.train.chunked import head_logits
from angeljax.train.draft_losses import DraftLoss, draft_loss
from angeljax.train.language_model import cast, forward_flops
from angeljax.train.step import Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class MTPTask:
    """The loss of an MTP layer for `fit`; hashable.

    Training-time test (EAGLE-3, arXiv 2503.01840): the layer runs `steps` times over
    its own outputs, from every place of the text at once. Step k of a place sees the
    text up to the place by the keys of step 0, and after it its own earlier steps: what
    drafting does there.

    Attributes:
      target: whose text is to be drafted.
      mtp: the network.
      steps: drafts in a row.
      on_policy: from the second step on read the layer's own likeliest token instead of
        that of the text.
      loss_options: see `DraftLoss`.
      dtype: of compute.

    Raises:
      ValueError: the network is for another target.

    Example:
      >>> import jax, numpy as np
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> from angeljax.speculative import MTPModel
      >>> from angeljax.train import MTPTask, OptimizerConfig, fit, make_optimizer
      >>> config = DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=2,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... )
      >>> target = LanguageModel(config)
      >>> task = MTPTask(target=target, mtp=MTPModel(config), steps=2, dtype="float32")
      >>> tokens = np.arange(34, dtype=np.int32).reshape(2, 17) % 31
      >>> params = target.init(jax.random.key(0))
      >>> trainable, frozen = task.init(params, key=jax.random.key(1))
      >>> result = fit(task.loss, trainable, lambda step: {"tokens": tokens},
      ...              frozen=frozen, steps=2,
      ...              optimizer=make_optimizer(OptimizerConfig(lr=0.01), 2))
      >>> 1 <= result.metrics["tau"] <= 3
      True
    """

    target: LanguageModel
    mtp: MTPModel
    steps: int = 4
    on_policy: bool = False
    loss_options: DraftLoss = DraftLoss(weights="equal")
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        count("steps", self.steps)
        flag("on_policy", self.on_policy)
        check_shared(self.target, self.mtp.config, self.mtp.target.num_layers)

    def init(
        self, params: Any, *, key: jax.Array
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """`(trainable, frozen)` at the start.

        Args:
          params: of the target; its last norm is where that of the layer starts.
          key: of the random parameters.
        """
        params = cast(params, self.dtype)
        start = dict(self.mtp.init(key))
        last = jnp.asarray(self.target.bind(params).norm.scale[...], jnp.float32)
        start["norm"] = {"scale": last}
        return {"params": start}, {"target": params}

    def drafter(
        self, trainable: Any, frozen: Any, num_tokens: int | None = None
    ) -> MTPDrafter:
        """The drafter as it is now, in the dtype of compute.

        Args:
          trainable, frozen: from `init`.
          num_tokens: drafts of a round; default `steps`.
        """
        params = cast(trainable["params"], self.dtype)
        return MTPDrafter(self.mtp, params, num_tokens or self.steps)

    def hidden(
        self, params: Any, target: Any, tokens: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """All steps from all places.

        Args:
          params: of the layer.
          target: params of the target.
          tokens: int32 `[B, T + 1]`.

        Returns:
          Of the layer `[B, A, steps, D]` with `A = T - steps` places: step k of place i
          is about token `i + 2 + k`; of the target `[B, T, D]`; after last norms both.
        """
        module, config = self.mtp.bind(params), self.mtp.config
        final = self.target.features(target, tokens[:, :-1]).final
        final = jax.lax.stop_gradient(final)
        places = tokens.shape[1] - 1 - self.steps
        at = jnp.arange(places)
        seen = (at <= at[:, None])[None]
        hidden, block = final[:, :places], module.layer
        read = tokens[:, 1 : places + 1]
        context: Any = None
        own: list[tuple[jax.Array, jax.Array]] = []
        out = []
        for k in range(self.steps):
            x = module.enter(self.target.embed(target, read), hidden)
            rotation = cos_sin(config, (at + k)[None])
            q, key, value = block.attn.project(x, rotation, block.attn_norm)
            if k == 0:
                context = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
                y = attend(q[:, :, None], context, seen)
            else:
                own.append((key, value))
                mine = [jnp.stack(side, axis=2) for side in zip(*own, strict=True)]
                y = attend(q[:, :, None], context, seen, (mine[0], mine[1]))
            x = block.attn.o_proj(y.reshape(*x.shape[:2], -1), residual=x)
            hidden = module.norm(block.mlp(x, block.mlp_norm))
            out.append(hidden)
            if k + 1 < self.steps:
                read = tokens[:, k + 2 : k + 2 + places]
                if self.on_policy:
                    read = self._likeliest(target, hidden)
        return jnp.stack(out, axis=2), final

    def _likeliest(self, target: Any, hidden: jax.Array) -> jax.Array:
        """int32 `[B, A]`, row by row: logits of all would be the largest array."""
        head = self.target.head_params(target)

        def row(x: jax.Array) -> jax.Array:
            return jnp.argmax(head_logits(head, x), axis=-1).astype(jnp.int32)

        return jax.lax.map(row, jax.lax.stop_gradient(hidden))

    def loss(
        self, trainable: Any, frozen: Any, batch: Any, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Mean loss over the places of a batch; see `fit`.

        Args:
          trainable, frozen: from `init`.
          batch: `tokens` int32 `[B, T + 1]` and, if not all of them are to be learned,
            `mask` bool `[B, T + 1]` of those that are: the drafts of a place count up
            to the first that is none.
          step, key: are not used.

        Raises:
          ValueError: rows that are too short for the steps.
        """
        tokens, target = batch["tokens"], jax.lax.stop_gradient(frozen["target"])
        if tokens.shape[1] < self.steps + 2:
            raise ValueError(
                f"rows of {tokens.shape[1]} tokens are too short for {self.steps} "
                "steps: raise seq_length"
            )
        params = cast(trainable["params"], self.dtype)
        x, final = self.hidden(params, target, tokens)
        places = jnp.arange(x.shape[1])[:, None] + jnp.arange(self.steps)
        places = jnp.broadcast_to(places, x.shape[:3])
        mask = batch.get("mask")
        return draft_loss(
            self.loss_options,
            x,
            take_rows(tokens, places + 2),
            self.target.head_params(target),
            take_rows(final, places + 1) if self.loss_options.needs_target else None,
            counts=None if mask is None else take_rows(mask, places + 2),
        )

    def flops(self, length: int) -> float:
        """Floating-point operations of a step, for each token of a row, about."""
        layer = forward_flops(self.mtp.config, length)
        return forward_flops(self.target.config, length) + 3 * self.steps * layer
