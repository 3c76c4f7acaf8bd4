"""EAGLE-3: drafts from the target's own features, by one trained layer.

Source: EAGLE-3 (arXiv 2503.01840). Slot and position p of the drafter's cache hold the
pair of the features at p and the token at p + 1. Pairs of committed text are read with
the target's features, a round's worth at once; what follows them is read with what the
layer gave itself, and is overwritten in the next round.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from angeljax.models._fused_rows import FusedRows
from angeljax.models.attention import dense_attention
from angeljax.models.cache import write
from angeljax.speculative._chains import draw_chain
from angeljax.speculative._eagle_config import EagleConfig, default_layers
from angeljax.speculative._eagle_head import (
    draft_logits,
    eagle_ids,
    embedded,
    fused_features,
    init_eagle,
    read_step,
)
from angeljax.speculative._eagle_io import load_eagle, save_eagle
from angeljax.speculative._eagle_rows import (
    features_fused,
    logits_fused,
    read_fused,
)
from angeljax.speculative._rows import cache_slots, chain_mask, tree_mask
from angeljax.speculative._top import top_tokens
from angeljax.speculative.drafter import (
    Context,
    Draft,
    Drafter,
    Prompt,
    Target,
    TargetModel,
    Verified,
)
from angeljax.speculative.grow import Frontier, grow_tree
from angeljax.speculative.sampling import Sampling
from angeljax.speculative.tree import DynamicTree

__all__ = [
    "EagleConfig",
    "EagleDrafter",
    "EagleTree",
    "default_layers",
    "eagle_ids",
    "init_eagle",
    "load_eagle",
    "save_eagle",
]
_static = {"static": True}


@dataclasses.dataclass(frozen=True)
class EagleTree:
    """How a tree of drafts is grown (EAGLE-2, arXiv 2406.16858).

    Attributes:
      nodes: of the tree, the last token included.
      branches: nodes of a level that are followed, and children of each.
      levels: how often the head reads the nodes of a level; the deepest are one more
        below the last token.

    Raises:
      ValueError: more nodes than are found.
    """

    nodes: int = 60
    branches: int = 10
    levels: int = 6

    def __post_init__(self) -> None:
        k = self.branches
        most = 1 + k + self.levels * k * k
        if k < 1 or self.levels < 0 or not 1 < self.nodes <= most:
            raise ValueError(
                f"{self.levels} levels of {k} branches: a tree of 2 to {most} nodes, "
                f"not {self.nodes}"
            )


class _State(NamedTuple):
    """The cache `[B, kv_heads, slots, head_dim]`, and pairs that are yet to be read.

    `features` `[B, R, D]` are of the last `fresh` positions before that of the last
    token, and of others, which do not count.
    """

    k: jax.Array
    v: jax.Array
    features: jax.Array
    fresh: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EagleDrafter(Drafter):
    """A chain or a tree drafted by an EAGLE-3 head.

    Attributes:
      config: of the head.
      params: of the head, such as `load_eagle` or `init_eagle` gives them; their dtype
        may be any, and kernels may be compressed.
      num_tokens: drafts of a chain.
      growth: an `EagleTree`; None drafts a chain.
      rows: how few tokens are read, of `prepare_drafter(..., rows=FusedRows())`, which
        joins matrices for it; None leaves all to XLA.

    Raises:
      ValueError: no drafts.

    Example:
      >>> import jax
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> from angeljax.speculative import (
      ...     EagleConfig, EagleDrafter, EagleTree, generate, init_eagle)
      >>> model = LanguageModel(DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=2,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... ))
      >>> params = model.init(jax.random.key(0))
      >>> config = EagleConfig.of(model.config)
      >>> head = init_eagle(config, jax.random.key(1), target=params)
      >>> drafter = EagleDrafter(config, head, growth=EagleTree(8, 3, 2))
      >>> generate(
      ...     model, params, [[1, 2]], drafter=drafter, max_new_tokens=4
      ... ).tokens.shape
      (1, 4)
    """

    config: EagleConfig = dataclasses.field(metadata=_static)
    params: Any
    num_tokens: int = dataclasses.field(default=3, metadata=_static)
    growth: EagleTree | None = dataclasses.field(default=None, metadata=_static)
    rows: FusedRows | None = dataclasses.field(default=None, metadata=_static)

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, not {self.num_tokens}")

    @property
    def width(self) -> int:
        return self.num_tokens + 1 if self.growth is None else self.growth.nodes

    @property
    def tree(self) -> DynamicTree | None:
        if self.growth is None:
            return None
        depth = min(self.growth.levels + 1, self.growth.nodes - 1)
        return DynamicTree(self.growth.nodes, depth)

    @property
    def hidden(self) -> tuple[int, ...]:
        return self.config.target_layers

    @property
    def _pairs(self) -> int:
        """Pairs that one round can leave to be read."""
        return self.width if self.tree is None else self.tree.depth + 1

    def check(self, model: TargetModel, sampling: Sampling) -> None:
        own = "embed_tokens" in self.params
        self.config.check_target(model.config, own_embedding=own)
        small = self.config.draft_vocab_size != self.config.vocab_size
        if small and "d2t" not in self.params:
            raise ValueError(
                f"the head has {self.config.draft_vocab_size} of "
                f"{self.config.vocab_size} tokens and no d2t to say which"
            )
        if self.growth is not None:
            if self.growth.branches > self.config.draft_vocab_size:
                raise ValueError(
                    f"{self.growth.branches} branches in a draft vocabulary of "
                    f"{self.config.draft_vocab_size}"
                )

    def init(
        self, target: Target, batch: int, slots: int, *, pairs: int | None = None
    ) -> _State:
        """A state; `pairs` that a round can leave, if more than its own drafts do."""
        config, pairs = self.config, pairs or self._pairs
        # What a tree reads lies behind the text too, and may be wider than the draft.
        more = 0 if self.growth is None else self.growth.branches * self.growth.levels
        slots += max(0, more + 1 - self.width)
        shape = batch, config.num_kv_heads, slots, config.head_dim
        dtype = target.model.dtype
        return _State(
            k=jnp.zeros(shape, dtype),
            v=jnp.zeros(shape, dtype),
            features=jnp.zeros((batch, pairs, config.hidden_size), dtype),
            fresh=jnp.zeros(batch, jnp.int32),
        )

    def prefill(self, target: Target, state: _State, prompt: Prompt) -> _State:
        count = prompt.tokens.shape[1]
        rows = jnp.arange(count, dtype=jnp.int32)
        at = jnp.broadcast_to(rows, prompt.tokens.shape)
        features = self._features(prompt.hidden)
        # The token after the last is not there: its pair is read in a round.
        after = jnp.roll(prompt.tokens, -1, axis=1)
        mask = chain_mask(at, count)
        none = jnp.zeros_like(prompt.lengths)
        small = state._replace(k=state.k[:, :, :count], v=state.v[:, :, :count])
        _, small = self._read(target, small, after, features, at, none, mask)
        # The last pair that is whole comes again, to begin the first draft with.
        last = jnp.maximum(prompt.lengths - 2, 0)
        one = jnp.take_along_axis(features, last[:, None, None], axis=1)
        return _State(
            k=state.k.at[:, :, :count].set(small.k),
            v=state.v.at[:, :, :count].set(small.v),
            features=state.features.at[:, :1].set(one.astype(state.features.dtype)),
            fresh=jnp.minimum(prompt.lengths - 1, 1),
        )

    def draft(
        self,
        target: Target,
        state: _State,
        context: Context,
        *,
        flat: jax.Array | None = None,
    ) -> tuple[Draft, _State]:
        """Drafts; where `flat`, bool, is true a tree is the root's children alone."""
        start = jnp.maximum(context.lengths - 1 - state.fresh, 0)
        pairs = state.features.shape[1]
        at = start[:, None] + jnp.arange(pairs, dtype=jnp.int32)
        # Beyond the text there is junk, which nothing sees.
        place = jnp.minimum(at + 1, context.tokens.shape[1] - 1)
        tokens = jnp.take_along_axis(context.tokens, place, axis=1)
        mask = chain_mask(at, cache_slots(state.k))
        hidden, state = self._read(
            target, state, tokens, state.features, at, start, mask
        )
        row = jnp.maximum(state.fresh - 1, 0)[:, None, None]
        hidden = jnp.take_along_axis(hidden, row, axis=1)
        if self.growth is not None:
            # Each node of the first level follows the same place.
            hidden = jnp.broadcast_to(
                hidden, (len(hidden), self.growth.branches, hidden.shape[-1])
            )
        logits = self._logits(hidden)[:, :1]
        grown = self._chain if self.growth is None else self._tree
        known = context.lengths, logits, hidden

        def whole(state: _State) -> tuple[Draft, _State]:
            return grown(target, state, *known)

        if flat is None:
            draft, state = whole(state)
        else:
            star = self._star(target, *known[:2])
            draft, state = jax.lax.cond(flat, lambda s: (star, s), whole, state)
        # A prompt of one token has no pair yet.
        some = (state.fresh > 0)[:, None]
        return draft._replace(tokens=jnp.where(some, draft.tokens, -1)), state

    def update(self, target: Target, state: _State, verified: Verified) -> _State:
        features = self._features(verified.hidden)
        return state._replace(
            features=features.astype(state.features.dtype),
            fresh=verified.emitted,
        )

    def _fused(self, count: int) -> FusedRows | None:
        """What reads that many tokens of a row in few kernels, if anything does."""
        return self.rows if count <= FusedRows.MOST else None

    def _features(self, hidden: Any) -> jax.Array:
        if rows := self._fused(hidden[0].shape[1]):
            return features_fused(self.params, hidden, rows=rows)
        return fused_features(self.params, hidden)

    def _logits(self, hidden: jax.Array) -> jax.Array:
        if rows := self._fused(hidden.shape[1]):
            return logits_fused(self.config, self.params, hidden, rows=rows)
        return draft_logits(self.config, self.params, hidden)

    def _chain(
        self,
        target: Target,
        state: _State,
        lengths: jax.Array,
        logits: jax.Array,
        hidden: jax.Array,
    ) -> tuple[Draft, _State]:
        ids, sampler = eagle_ids(self.params), target.sampler
        slots = cache_slots(state.k)

        def choose(carry: Any, at: jax.Array) -> Any:
            if sampler.rejection:
                return sampler.draft(self._spread(carry[0]), at[:, None])
            if sampler.greedy:
                best = top_tokens(carry[0], 1, rows=self.rows).ids[..., 0]
                return (best if ids is None else ids[best].astype(jnp.int32)), None
            return sampler.draft(carry[0], at[:, None], ids)

        def read(carry: Any, new: jax.Array, at: jax.Array) -> Any:
            _, hidden, state = carry
            here = at[:, None] - 1
            hidden, state = self._read(
                target, state, new, hidden, here, at - 1, chain_mask(here, slots)
            )
            return self._logits(hidden), hidden, state

        first = logits, hidden, state
        draft, (*_, state) = draw_chain(
            choose, read, first, lengths, self.num_tokens, unroll=True
        )
        return draft, state

    def _star(self, target: Target, lengths: jax.Array, logits: jax.Array) -> Draft:
        """The likeliest next tokens."""
        assert self.growth is not None
        greedy, nodes = target.sampler.greedy, self.growth.nodes
        ids = eagle_ids(self.params) if greedy else None
        if not greedy:
            logits = target.sampler.scores(self._spread(logits), lengths[:, None])
        tokens = top_tokens(logits[:, 0], nodes - 1, rows=self.rows).ids
        parents = jnp.zeros((len(tokens), nodes), jnp.int32).at[:, 0].set(-1)
        return Draft(tokens if ids is None else ids[tokens], parents)

    def _tree(
        self,
        target: Target,
        state: _State,
        lengths: jax.Array,
        logits: jax.Array,
        hidden: jax.Array,
    ) -> tuple[Draft, _State]:
        assert self.growth is not None
        k, slots, greedy = (
            self.growth.branches,
            cache_slots(state.k),
            target.sampler.greedy,
        )
        ids = eagle_ids(self.params) if greedy else None

        def named(tokens: jax.Array) -> jax.Array:
            return tokens if ids is None else ids[tokens]

        def scores(logits: jax.Array, at: jax.Array) -> jax.Array:
            """What stands first is what the target chooses if it agrees."""
            if greedy:
                return logits
            return target.sampler.scores(self._spread(logits), at)

        def read(frontier: Frontier, carry: Any) -> Any:
            above, state = carry
            above = jnp.take_along_axis(above, frontier.parents[..., None], axis=1)
            start = lengths - 1
            at = jnp.broadcast_to(start[:, None] + frontier.level, (len(start), k))
            mask = tree_mask(frontier.seen, start, slots)
            hidden, state = self._read(
                target,
                state,
                named(frontier.tokens),
                above,
                at,
                start + k * frontier.level,
                mask,
            )
            return scores(self._logits(hidden), at + 2), (hidden, state)

        tokens, parents, (_, state) = grow_tree(
            scores(logits, lengths[:, None])[:, 0],
            read,
            (hidden, state),
            branches=k,
            levels=self.growth.levels,
            nodes=self.growth.nodes,
            rows=self.rows,
        )
        return Draft(named(tokens), parents), state

    def _spread(self, logits: jax.Array) -> jax.Array:
        """Logits over the vocabulary of the target."""
        if (ids := eagle_ids(self.params)) is None:
            return logits
        whole = jnp.full((*logits.shape[:-1], self.config.vocab_size), -jnp.inf)
        return whole.at[..., ids].set(logits)

    def _read(
        self,
        target: Target,
        state: _State,
        tokens: jax.Array,
        features: jax.Array,
        positions: jax.Array,
        start: jax.Array,
        mask: jax.Array,
    ) -> tuple[jax.Array, _State]:
        """h' of pairs, whose keys and values go to the slots from `start` on."""
        embeds = embedded(self.params, target, tokens)
        if (rows := self._fused(tokens.shape[1])) and rows.reads(mask):
            around = positions, mask, start, state.k, state.v
            hidden, *cache = read_fused(
                self.config, self.params, embeds, features, *around, rows=rows
            )
            return hidden, state._replace(k=cache[0], v=cache[1])
        kept = state.k, state.v

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            nonlocal kept
            keys, seen = write(kept[0], k, start)
            values, worth = write(kept[1], v, start)
            kept = keys, values  # type: ignore[assignment]
            return dense_attention(q, seen.astype(q.dtype), worth.astype(q.dtype), mask)

        hidden = read_step(
            self.config, self.params, embeds, features, positions, attend
        )
        return hidden, state._replace(k=kept[0], v=kept[1])
