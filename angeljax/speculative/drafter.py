"""What a drafter is, and what passes between it and the target.

Each round of decoding has a committed text whose last token the target has not read.
The drafter proposes what may follow; the target reads the last token and all drafts at
once, keeps the drafts that it would have chosen itself, and adds one token of its own.
So a drafter decides about speed and never about the text.

A drafter is a frozen dataclass registered with `jax.tree_util.register_dataclass`:
parameters are children, everything else is static. All its functions are traced, once
for each shape; none may look at the values of arrays.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from angeljax.speculative.sampling import Sampler, Sampling
from angeljax.speculative.tree import DynamicTree, Tree


class TargetModel(Protocol):
    """What decoding needs of a model: hashable, without parameters.

    `angeljax.models.LanguageModel` is one. Its methods are described there. The cache
    is a pytree of arrays `[..., B, heads, slots, features]`; arrays of fewer axes tell
    of rows, and stay as the prompt left them. `inputs` of `read_rows` are needed for
    prompts of embeddings alone.
    """

    @property
    def config(self) -> Any:
        """Has `vocab_size`, `max_positions`, `num_layers`, `eos_ids` and `pad_id`."""

    def init_rows(self, batch: int, slots: int) -> Any:
        """An empty cache."""

    def read_rows(
        self,
        params: Any,
        cache: Any,
        tokens: jax.Array,
        *,
        positions: jax.Array,
        slots: jax.Array,
        mask: jax.Array,
        key_positions: jax.Array | None = None,
        layers: Sequence[int] | None = None,
        hidden: Sequence[int] = (),
    ) -> Any:
        """Reads T tokens of each row: `final`, `hidden` and `cache`."""

    def head_rows(self, params: Any, final: jax.Array) -> jax.Array:
        """Logits of `final`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Target:
    """The model whose text is generated, with its parameters and its sampling.

    Attributes:
      model: static.
      params: its param tree.
      sampler: how it chooses; `sampler.draft` chooses drafts to match.
    """

    model: Any = dataclasses.field(metadata={"static": True})
    params: Any
    sampler: Sampler


class Prompt(NamedTuple):
    """What was read before the first round.

    Attributes:
      tokens: int32 `[B, T]`, padded on the right.
      lengths: int32 `[B]`.
      final: `[B, T, hidden_size]` of the last layer, before the final norm; junk where
        there is padding. `target.model.head_rows` makes logits of it.
      hidden: outputs of the layers in `Drafter.hidden`, likewise.
      cache: of the target, all of the prompt read.
    """

    tokens: jax.Array
    lengths: jax.Array
    final: jax.Array
    hidden: tuple[jax.Array, ...]
    cache: Any


class Context(NamedTuple):
    """What a drafter sees at the beginning of a round.

    Attributes:
      tokens: int32 `[B, S]`, the committed text; beyond `lengths` junk.
      lengths: int32 `[B]`, tokens that are committed.
      cache: of the target: slots up to `lengths - 2` hold keys and values, slot `s`
        those of token `s`; the rest is junk. A drafter may write any slot from
        `lengths - 1` on, and then hands the cache back: the target overwrites them.
        With a tree a `RowCache` may hold the last of them back until it is read
        (`read_rows`).
      active: bool `[B]`, rows that are not finished.
    """

    tokens: jax.Array
    lengths: jax.Array
    cache: Any
    active: jax.Array

    @property
    def last(self) -> jax.Array:
        """int32 `[B]`, the last committed token, which the target has not read."""
        at = self.lengths[:, None] - 1
        return jnp.take_along_axis(self.tokens, at, axis=1)[:, 0]


class Draft(NamedTuple):
    """What a drafter proposes.

    Attributes:
      tokens: int32 `[B, width - 1]`, of nodes 1 and on; -1 for none.
      parents: int32 `[B, width]` for a `DynamicTree`, -1 for the root; else None.
      log_probs: float32 `[B, width - 1, V]`, what the tokens were drawn with (from
        `sampler.draft`), for the rejection rule; None if nothing was drawn.
      cache: that of the context if the drafter wrote into it; else None.
    """

    tokens: jax.Array
    parents: jax.Array | None = None
    log_probs: jax.Array | None = None
    cache: Any = None


class Verified(NamedTuple):
    """What came of a round. R is the depth of the tree, `width - 1` for a chain.

    Attributes:
      context: as it is now; `context.lengths - emitted` are the lengths before.
      emitted: int32 `[B]`, committed tokens, one more than drafts were accepted unless
        the row ended; 0 for rows that were finished before.
      accepted: int32 `[B]`, drafts that the target would have chosen.
      tokens: int32 `[B, width]`, last token and drafts, -1 for none.
      read: bool `[B, width]`, which of these the target has read: the rest is junk in
        `chosen` and `top_ids`.
      chosen: int32 `[B, width]`, what the target puts after each.
      path: int32 `[B, R + 1]`, accepted nodes from the root, the last repeated.
      hidden: outputs of the layers in `Drafter.hidden` at the nodes of `path`,
        `[B, R + 1, hidden_size]` each: row r belongs to position `before - 1 + r`, and
        counts where `r < emitted`.
      top_ids: int32 `[B, width, top_k]`, likeliest tokens after each node, for a
        drafter with `top_k`; else None.
    """

    context: Context
    emitted: jax.Array
    accepted: jax.Array
    tokens: jax.Array
    read: jax.Array
    chosen: jax.Array
    path: jax.Array
    hidden: tuple[jax.Array, ...]
    top_ids: jax.Array | None


class Drafter(abc.ABC):
    """Proposes tokens. `width` and `draft` are all that is needed.

    A state is a pytree of arrays of fixed shapes: a table, a cache, or nothing.
    """

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """Tokens that the target reads at once: the drafts and the last token."""

    @property
    def tree(self) -> Tree | DynamicTree | None:
        """Of `width` nodes; None for a chain, which is cheaper."""
        return None

    @property
    def hidden(self) -> tuple[int, ...]:
        """Layers of the target whose outputs the drafter wants, from 0."""
        return ()

    @property
    def top_k(self) -> int:
        """How many of the likeliest tokens after each node it wants to be told."""
        return 0

    @property
    def optional(self) -> bool:
        """Whether a round may pass without any draft, and then be one token wide."""
        return False

    @property
    def reach(self) -> int:
        """Slots of the target's cache, from the last token's on, that it may write."""
        return self.width

    def check(self, model: TargetModel, sampling: Sampling) -> None:
        """Refuses what it cannot draft for, before anything is compiled.

        Raises:
          ValueError: one line that says what would work.
        """
        return None

    def init(self, target: Target, batch: int, slots: int) -> Any:
        """A state for `batch` rows of up to `slots` tokens."""
        return ()

    def prefill(self, target: Target, state: Any, prompt: Prompt) -> Any:
        """The state after the prompts."""
        return state

    @abc.abstractmethod
    def draft(self, target: Target, state: Any, context: Context) -> tuple[Draft, Any]:
        """Drafts that follow `context`, and the state."""

    def update(self, target: Target, state: Any, verified: Verified) -> Any:
        """The state after the target has read the drafts."""
        return state

    def steer(
        self, state: Any, read: jax.Array, text: jax.Array, accepted: jax.Array
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Changes the text on purpose, before it is committed; by default it does not.

        Args:
          state: of the drafter.
          read: int32 `[B, R + 1]`, last token and drafts along the accepted path.
          text: int32 `[B, R + 1]`, what the target puts after each.
          accepted: int32 `[B]`, drafts that it would have chosen.

        Returns:
          text, of which `accepted + 1` tokens are committed; accepted, not more than
          before; the state.
        """
        return text, accepted, state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoDrafter(Drafter):
    """Proposes nothing: plain decoding, in the program of a given width.

    Attributes:
      tokens: tokens that the target reads at once, of which it keeps one.
      layers: whose outputs the target hands over, though nobody looks at them.
    """

    tokens: int = dataclasses.field(default=1, metadata={"static": True})
    layers: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    @classmethod
    def like(cls, drafter: Drafter) -> NoDrafter:
        """What reads in the same way as a drafter makes the target read."""
        return cls(drafter.width, drafter.hidden)

    @property
    def hidden(self) -> tuple[int, ...]:
        return self.layers

    @property
    def width(self) -> int:
        return self.tokens

    def draft(self, target: Target, state: Any, context: Context) -> tuple[Draft, Any]:
        nothing = jnp.full((len(context.lengths), self.tokens - 1), -1, jnp.int32)
        return Draft(nothing), state
