"""`BlockDrafter`: a chain of drafts from one pass of a small network.

DFlash (arXiv 2602.06036). The drafter reads what the target computed of the committed
text, through keys and values of its own that grow as tokens are accepted, and fills a
block of masked slots at once. Embedding and head are the target's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.models.cache import write
from angeljax.speculative._shared import check_shared, embed, head
from angeljax.speculative.block_model import BlockModel
from angeljax.speculative.drafter import (
    Context,
    Draft,
    Drafter,
    Prompt,
    Target,
    TargetModel,
    Verified,
)
from angeljax.speculative.sampling import Sampling

_static = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockDrafter(Drafter):
    """Drafts `block_size - 1` tokens in one pass.

    The drafts of a block are drawn independently of each other: under the rejection
    rule each is accepted against the law that it was drawn with.

    Attributes:
      model: the network; static.
      params: its param tree.
      num_tokens: drafts of one round, for a shorter forward of the target; default
        `block_size - 1`.

    Raises:
      ValueError: more drafts than a block has, or none.

    Example:
      >>> import jax
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> from angeljax.speculative import (
      ...     BlockConfig, BlockDrafter, BlockModel, generate,
      ... )
      >>> config = DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=2,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... )
      >>> target = LanguageModel(config)
      >>> params = target.init(jax.random.key(0))
      >>> block = BlockModel(
      ...     BlockConfig.of(config, num_layers=1, block_size=4, mask_token_id=31)
      ... )
      >>> drafter = BlockDrafter(block, block.init(jax.random.key(1)))
      >>> out = generate(target, params, [[1, 2]], drafter=drafter, max_new_tokens=8)
      >>> int(out.lengths[0])
      8
    """

    model: BlockModel = dataclasses.field(metadata=_static)
    params: Any
    num_tokens: int | None = dataclasses.field(default=None, metadata=_static)

    def __post_init__(self) -> None:
        most = self.model.config.block_size - 1
        if self.num_tokens is not None and not 1 <= self.num_tokens <= most:
            raise ValueError(
                f"num_tokens={self.num_tokens}: a block of {most + 1} drafts from 1 to "
                f"{most} tokens"
            )

    @property
    def width(self) -> int:
        if self.num_tokens is not None:
            return self.num_tokens + 1
        return self.model.config.block_size

    @property
    def hidden(self) -> tuple[int, ...]:
        return self.model.config.target_layers

    def check(self, model: TargetModel, sampling: Sampling) -> None:
        config = self.model.config
        check_shared(model, config.decoder, config.num_target_layers)

    def init(self, target: Target, batch: int, slots: int) -> Any:
        c = self.model.config.decoder
        empty = jnp.zeros((batch, c.num_kv_heads, slots, c.head_dim), _dtype(target))
        return tuple((empty, empty) for _ in range(c.num_layers))

    def prefill(self, target: Target, state: Any, prompt: Prompt) -> Any:
        positions = jnp.arange(prompt.tokens.shape[1])[None]
        return self._append(state, prompt.hidden, positions, jnp.int32(0))

    def draft(self, target: Target, state: Any, context: Context) -> tuple[Draft, Any]:
        config, last = self.model.config, context.lengths - 1
        tokens = jnp.full((len(last), 1, config.block_size), config.mask_token_id)
        tokens = tokens.at[:, 0, 0].set(context.last)
        seen = jnp.arange(state[0][0].shape[2]) < last[:, None, None]
        x = self.model.blocks(
            self.params, embed(target, tokens), last[:, None], state, seen
        )
        logits = head(target, x[:, 0, 1 : self.width])
        at = context.lengths[:, None] + jnp.arange(self.width - 1)
        drafts, log_q = target.sampler.draft(logits, at)
        return Draft(drafts, log_probs=log_q), state

    def update(self, target: Target, state: Any, verified: Verified) -> Any:
        # Features of rejected drafts go in as well: nothing sees them, and those of the
        # next round begin where the accepted ones end.
        start = verified.context.lengths - verified.emitted - 1
        positions = start[:, None] + jnp.arange(self.width)
        return self._append(state, verified.hidden, positions, start)

    def _append(
        self, state: Any, hidden: Any, positions: jax.Array, start: jax.Array
    ) -> Any:
        new = self.model.context(self.params, hidden, positions)
        return jax.tree.map(
            lambda store, x: write(store, jnp.swapaxes(x, 1, 2), start)[0], state, new
        )


def _dtype(target: Target) -> Any:
    return target.model.dtype
