"""`MTPDrafter`: one more layer behind the target, run again for each draft.

Multi-token prediction (arXiv 2404.19737; the module of arXiv 2412.19437, section 2.2):
the hidden state of a token and the embedding of the next one go through one decoder
layer, whose output stands for the hidden state of that next token. Embedding and head
are the target's.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from angeljax.models.attention import dense_attention
from angeljax.models.cache import Store, Stored
from angeljax.models.config import DecoderConfig
from angeljax.models.language_model import bind_params
from angeljax.models.layers import Block, Linear, RMSNorm
from angeljax.models.rope import cos_sin
from angeljax.speculative._chains import draw_chain
from angeljax.speculative._rows import chain_mask
from angeljax.speculative._shared import check_shared, embed, head, norm
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


class MTPNetwork(nnx.Module):
    """The layer with what is around it; see `MTPModel`."""

    def __init__(self, c: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        make = functools.partial(
            RMSNorm, c.hidden_size, c.norm_eps, dtype=dtype, rngs=rngs
        )
        self.enorm, self.hnorm, self.norm = make(), make(), make()
        self.eh_proj = Linear(
            2 * c.hidden_size, c.hidden_size, bias=False, dtype=dtype, rngs=rngs
        )
        self.layer = Block(c, fused=False, dtype=dtype, rngs=rngs)

    def enter(self, embeds: jax.Array, hidden: jax.Array) -> jax.Array:
        """What the layer reads, of two arrays `[B, T, hidden_size]`."""
        both = self.enorm(embeds), self.hnorm(hidden.astype(embeds.dtype))
        return self.eh_proj(jnp.concatenate(both, axis=-1))


@dataclasses.dataclass(frozen=True)
class MTPModel:
    """The network of an `MTPDrafter` as pure functions of its params; hashable.

    Attributes:
      target: configuration of the target; the layer is like one of its layers.
    """

    target: DecoderConfig

    @property
    def config(self) -> DecoderConfig:
        """Of the one layer."""
        return dataclasses.replace(self.target, num_layers=1, windows=())

    def init(self, key: jax.Array, param_dtype: Any = jnp.float32) -> dict[str, Any]:
        """Random parameters as a nested dict."""
        rngs = nnx.Rngs(params=key)
        module = MTPNetwork(self.config, dtype=param_dtype, rngs=rngs)
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    def abstract(self, param_dtype: Any = jnp.float32) -> dict[str, Any]:
        """The tree of `init` with `jax.ShapeDtypeStruct` leaves."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0), param_dtype))

    def bind(self, params: dict[str, Any]) -> MTPNetwork:
        """The nnx module with these parameters.

        Raises:
          ValueError: a parameter is missing.
        """
        return bind_params(_skeleton(self), params)

    def read(
        self,
        params: dict[str, Any],
        cache: tuple[Stored, Stored],
        embeds: jax.Array,
        hidden: jax.Array,
        slots: jax.Array,
    ) -> tuple[jax.Array, tuple[Stored, Stored]]:
        """Reads T pairs of each row.

        Args:
          params: the param tree.
          cache: keys and values `[B, num_kv_heads, S, head_dim]`; a pair's slot is the
            position of its hidden state.
          embeds: `[B, T, hidden_size]`, of the tokens one position further.
          hidden: `[B, T, hidden_size]` after a last norm, of the target or of this.
          slots: int32 `[B]`, of the first pair.

        Returns:
          The outputs after the last norm, `[B, T, hidden_size]`, and the cache.
        """
        module = self.bind(params)
        k, v = cache
        at = slots[:, None] + jnp.arange(embeds.shape[1])
        x, store = module.layer(
            module.enter(embeds, hidden),
            cos_sin(self.config, at),
            chain_mask(at, k.shape[2]),
            Store(k, v, None, slots),
            dense_attention,
        )
        assert store is not None
        return module.norm(x), (store.k, store.v)


@functools.lru_cache(maxsize=16)
def _skeleton(model: MTPModel) -> tuple[Any, Any]:
    def network() -> MTPNetwork:
        return MTPNetwork(model.config, dtype=jnp.float32, rngs=nnx.Rngs(0))

    graphdef, state = nnx.split(nnx.eval_shape(network))
    return graphdef, nnx.filter_state(state, nnx.Param)


class _State(NamedTuple):
    """Keys and values, and the output `[B, D]` that the next token is read from."""

    cache: tuple[Stored, Stored]
    output: jax.Array
    ready: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MTPDrafter(Drafter):
    """Drafts a chain, one pass of one layer for each token.

    After a prompt of a single token there is no pair to begin with, and the first round
    goes without drafts.

    Attributes:
      model: the network; static.
      params: its param tree.
      num_tokens: drafts of one round.

    Raises:
      ValueError: no drafts.

    Example:
      >>> import jax
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> from angeljax.speculative import MTPDrafter, MTPModel, generate
      >>> config = DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=2,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... )
      >>> target, mtp = LanguageModel(config), MTPModel(config)
      >>> params = target.init(jax.random.key(0))
      >>> drafter = MTPDrafter(mtp, mtp.init(jax.random.key(1)), num_tokens=2)
      >>> out = generate(target, params, [[1, 2]], drafter=drafter, max_new_tokens=8)
      >>> int(out.lengths[0])
      8
    """

    model: MTPModel = dataclasses.field(metadata=_static)
    params: Any
    num_tokens: int = dataclasses.field(default=3, metadata=_static)

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, not {self.num_tokens}")

    @property
    def width(self) -> int:
        return self.num_tokens + 1

    @property
    def hidden(self) -> tuple[int, ...]:
        return (self.model.target.num_layers - 1,)

    def check(self, model: TargetModel, sampling: Sampling) -> None:
        check_shared(model, self.model.config, self.model.target.num_layers)

    def init(self, target: Target, batch: int, slots: int) -> Any:
        c, dtype = self.model.config, target.model.dtype
        empty = jnp.zeros((batch, c.num_kv_heads, slots, c.head_dim), dtype)
        output = jnp.zeros((batch, c.hidden_size), dtype)
        return _State((empty, empty), output, jnp.zeros(batch, bool))

    def prefill(self, target: Target, state: Any, prompt: Prompt) -> Any:
        none, after = jnp.zeros_like(prompt.lengths), jnp.roll(prompt.tokens, -1, 1)
        hidden = norm(target, prompt.final)
        pairs = prompt.lengths - 1
        return self._read(target, state, hidden, after, none, pairs)

    def draft(self, target: Target, state: Any, context: Context) -> tuple[Draft, Any]:
        def choose(carry: Any, at: jax.Array) -> Any:
            logits = head(target, carry[0][:, None])
            return target.sampler.draft(logits, at[:, None])

        def read(carry: Any, token: jax.Array, at: jax.Array) -> Any:
            output, cache = carry
            x, cache = self.model.read(
                self.params, cache, embed(target, token), output[:, None], at - 1
            )
            return x[:, 0], cache

        first = state.output, state.cache
        draft, (_, cache) = draw_chain(
            choose, read, first, context.lengths, self.num_tokens
        )
        tokens = jnp.where(state.ready[:, None], draft.tokens, -1)
        return draft._replace(tokens=tokens), state._replace(cache=cache)

    def update(self, target: Target, state: Any, verified: Verified) -> Any:
        before = verified.context.lengths - verified.emitted
        at = before[:, None] + jnp.arange(self.width)
        tokens = jnp.take_along_axis(verified.context.tokens, at, axis=1)
        hidden = norm(target, verified.hidden[0])
        return self._read(target, state, hidden, tokens, before - 1, verified.emitted)

    def _read(
        self,
        target: Target,
        state: _State,
        hidden: jax.Array,
        tokens: jax.Array,
        slots: jax.Array,
        pairs: jax.Array,
    ) -> _State:
        """Reads as many pairs as each row has; the rest is junk, and comes later."""
        x, cache = self.model.read(
            self.params, state.cache, embed(target, tokens), hidden, slots
        )
        at = jnp.maximum(pairs - 1, 0)[:, None, None]
        output = jnp.take_along_axis(x, at, axis=1)[:, 0]
        some = pairs > 0
        return _State(
            cache,
            jnp.where(some[:, None], output, state.output),
            state.ready | some,
        )
