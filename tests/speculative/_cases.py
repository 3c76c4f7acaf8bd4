"""A target whose choices depend on all that it sees, and drafters to test with."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.models import DecoderConfig, LanguageModel
from angeljax.speculative import Draft, Drafter, DynamicTree, Tree
from tests.models._random_params import random_params

static = functools.partial(dataclasses.field, metadata={"static": True})
STATES = 97


@dataclasses.dataclass(frozen=True)
class HashTarget:
    """Logits are a row of a table; which one is a hash of all tokens that are seen.

    A token seen too many or too few, or at a wrong position, leads to another row.
    `params` is the table, `[STATES, vocab]`.
    """

    vocab: int = 16
    eos: tuple[int, ...] = ()

    @property
    def config(self) -> Any:
        return SimpleNamespace(
            vocab_size=self.vocab,
            max_positions=1000,
            num_layers=1,
            eos_ids=self.eos,
            pad_id=None,
        )

    def init_rows(self, batch: int, slots: int) -> Any:
        return {"tokens": jnp.zeros((batch, 1, slots, 1), jnp.int32)}

    def read_rows(self, params, cache, tokens, *, positions, slots, mask, **rest):
        keys = rest.get("key_positions")
        kept = cache["tokens"][:, 0, :, 0]
        at = jnp.arange(kept.shape[1])
        keys = jnp.broadcast_to(at, kept.shape) if keys is None else keys
        kept = jax.vmap(lambda row, new, s: row.at[s + jnp.arange(len(new))].set(new))(
            kept, tokens, slots
        )
        worth = (kept + 1) * (1 + keys) * (3 + keys % 5)
        final = jnp.sum(jnp.where(mask[:, 0], worth[:, None], 0), axis=-1)
        final = (final + 31 * positions)[..., None] % STATES
        cache = {"tokens": kept[:, None, :, None]}
        return SimpleNamespace(final=final, hidden=(), cache=cache)

    def head_rows(self, params, final):
        return params[final[..., 0]]

    def row_of(self, text: list[int]) -> int:
        """The row of the table after a text, in plain Python."""
        total = sum((t + 1) * (1 + i) * (3 + i % 5) for i, t in enumerate(text))
        return (total + 31 * (len(text) - 1)) % STATES


def table(vocab: int = 16, seed: int = 0, scale: float = 2.0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(scale * rng.normal(size=(STATES, vocab)), jnp.float32)


PROMPTS = [[5, 6, 7, 5, 6], [9, 9], [1], [3, 4, 5, 6, 7, 8, 3, 4, 5, 6]]


@functools.cache
def tiny() -> tuple[LanguageModel, Any]:
    """A decoder of two layers whose text is not all the same."""
    config = DecoderConfig(
        model_type="llama",
        vocab_size=32,
        hidden_size=16,
        num_layers=2,
        intermediate_size=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
    )
    model = LanguageModel(config)
    return model, random_params(model, std=0.3)


def whole(prompts: list[list[int]], out: Any) -> jax.Array:
    """Prompts and generated text, `[B, S]`, padded with 0 and plenty of it."""
    size = max(map(len, prompts)) + out.tokens.shape[1] + 16
    text = np.zeros((len(prompts), size), np.int32)
    for row, prompt, new in zip(text, prompts, np.asarray(out.tokens), strict=True):
        row[: len(prompt)] = prompt
        row[len(prompt) : len(prompt) + len(new)] = new
    return jnp.asarray(text)


def _ahead(text: jax.Array, lengths: jax.Array, count: int) -> jax.Array:
    at = lengths[:, None] + jnp.arange(count)
    return jnp.take_along_axis(text, jnp.minimum(at, text.shape[1] - 1), axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Oracle(Drafter):
    """Knows the text. With `wrong` it says something else at every place; with `luck`
    it is right at that percentage of places, by a hash of the position."""

    text: jax.Array
    num_tokens: int = static(default=3)
    vocab: int = static(default=16)
    luck: int = 100

    @property
    def width(self) -> int:
        return self.num_tokens + 1

    def draft(self, target, state, context):
        right = _ahead(self.text, context.lengths, self.num_tokens)
        at = context.lengths[:, None] + jnp.arange(self.num_tokens)
        good = (at * 7919 % 10007) % 100 < self.luck
        return Draft(jnp.where(good, right, (right + 1) % self.vocab)), state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TreeOracle(Drafter):
    """A tree in which the right token of each depth stands at a random node, if at all.

    With `dynamic` the parents change from round to round, else they are `parents`.
    """

    text: jax.Array
    parents: tuple[int, ...] = static()
    vocab: int = static(default=16)
    dynamic: bool = static(default=False)

    @property
    def width(self) -> int:
        return len(self.parents)

    @property
    def tree(self):
        tree = Tree(self.parents)
        return DynamicTree(tree.nodes, tree.nodes - 1) if self.dynamic else tree

    def draft(self, target, state, context):
        batch, nodes = len(context.lengths), self.width
        keys = jax.vmap(jax.random.key)(context.lengths)
        if self.dynamic:
            u = jax.vmap(lambda k: jax.random.uniform(k, (nodes,)))(keys)
            parents = (u * jnp.arange(nodes)).astype(jnp.int32).at[:, 0].set(-1)
        else:
            parents = jnp.broadcast_to(jnp.asarray(self.parents), (batch, nodes))
        depth = jnp.zeros((batch, nodes), jnp.int32)
        for node in range(1, nodes):
            above = jnp.take_along_axis(depth, parents[:, node : node + 1], axis=1)
            depth = depth.at[:, node].set(above[:, 0] + 1)
        ahead = _ahead(self.text, context.lengths, nodes)
        right = jnp.take_along_axis(ahead, depth - 1, axis=1)
        off = jax.vmap(lambda k: jax.random.randint(k, (nodes,), 0, 3))(keys)
        tokens = ((right + off) % self.vocab)[:, 1:]
        return Draft(tokens, parents if self.dynamic else None), state
