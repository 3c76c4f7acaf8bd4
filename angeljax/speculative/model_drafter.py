"""Chains drafted by a model: a compressed copy of the target, or a smaller model.

A compressed copy need not have a cache of its own. It reads the target's keys and
values of the committed text, which are better than its own would be, and writes its
drafts' behind them, where the target overwrites them. That costs no memory and no
prefill. Layer skipping is the same with fewer layers (arXiv 2309.08168, 2404.16710).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.speculative._chains import chain_draft, draw_chain
from angeljax.speculative._rows import cache_slots, chain_mask
from angeljax.speculative.drafter import (
    Context,
    Draft,
    Drafter,
    Prompt,
    Target,
    TargetModel,
)
from angeljax.speculative.sampling import Sampling

_static = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelfDrafter(Drafter):
    """A compressed copy of the target, some of its layers, or both; shares its cache.

    Attributes:
      params: of the copy, such as `angeljax.compress` gives; None for the target's own,
        which makes sense with `layers`.
      num_tokens: drafts of one round.
      layers: numbers of the layers that run; default all.
      model: where it is not the target's, as after `prepare_decoder`; with the same
        layers, heads and vocabulary.

    Raises:
      ValueError: no drafts, or nothing that differs from the target.

    Example:
      >>> import jax, angeljax as aj
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> from angeljax.speculative import SelfDrafter, generate
      >>> config = DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=64, num_layers=1,
      ...     intermediate_size=64, num_heads=2, num_kv_heads=1, head_dim=32,
      ... )
      >>> model = LanguageModel(config)
      >>> params = model.init(jax.random.key(0))
      >>> small = aj.compress(params, aj.Recipe(rules=[aj.Rule(format="int8")]))
      >>> drafter = SelfDrafter(small, num_tokens=3)
      >>> out = generate(model, params, [[1, 2]], drafter=drafter, max_new_tokens=8)
      >>> out.tau > 1
      True
    """

    params: Any = None
    num_tokens: int = dataclasses.field(default=4, metadata=_static)
    layers: tuple[int, ...] | None = dataclasses.field(default=None, metadata=_static)
    model: Any = dataclasses.field(default=None, metadata=_static)

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, not {self.num_tokens}")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))

    @property
    def width(self) -> int:
        return self.num_tokens + 1

    def check(self, model: TargetModel, sampling: Sampling) -> None:
        if self.params is None and self.layers is None:
            raise ValueError(
                "a SelfDrafter needs params or layers: otherwise it is the target"
            )
        mine, theirs = (self.model or model).config, model.config
        for name in ("vocab_size", "num_layers", "num_kv_heads", "head_dim"):
            if getattr(mine, name) != getattr(theirs, name):
                raise ValueError(
                    f"the drafter has {name}={getattr(mine, name)} and the target "
                    f"{getattr(theirs, name)}: they share a cache, use DraftModel"
                )
        count = theirs.num_layers
        wrong = [i for i in self.layers or () if not 0 <= i < count]
        if wrong or self.layers == ():
            raise ValueError(
                f"layers={self.layers}: some of the model's {count}, 0 first"
            )
        scans = [getattr(m, "scan_layers", None) for m in (self.model or model, model)]
        if scans[0] != scans[1]:
            raise ValueError("drafter and target must have the same scan_layers")

    def draft(self, target: Target, state: Any, context: Context) -> tuple[Draft, Any]:
        model = self.model or target.model
        params = target.params if self.params is None else self.params
        slots = cache_slots(context.cache)

        def logits_of(token: jax.Array, at: jax.Array, cache: Any) -> Any:
            rows = model.read_rows(
                params,
                cache,
                token[:, None],
                positions=at[:, None],
                slots=at,
                mask=chain_mask(at[:, None], slots),
                layers=self.layers,
            )
            return model.head_rows(params, rows.final), rows.cache

        def step(carry: Any, _: None) -> tuple[Any, Any]:
            token, at, cache = carry
            logits, cache = logits_of(token, at, cache)
            new, log_q = target.sampler.draft(logits, at[:, None] + 1)
            return (new[:, 0], at + 1, cache), (new[:, 0], log_q)

        first = context.last, context.lengths - 1, context.cache
        if target.sampler.rejection:
            (_, _, cache), drawn = jax.lax.scan(step, first, length=self.num_tokens)
            return chain_draft(drawn, cache), state
        place = jnp.arange(self.num_tokens)[:, None]

        # The outputs of a scan are put where they belong one by one, and a loop that
        # does so keeps the loop around it out of a CUDA graph.
        def keep(i: jax.Array, carry: Any) -> Any:
            carry, tokens = carry
            carry, (new, _) = step(carry, None)
            return carry, jnp.where(place == i, new, tokens)

        none = jnp.zeros((self.num_tokens, len(context.lengths)), jnp.int32)
        (*_, cache), tokens = jax.lax.fori_loop(0, self.num_tokens, keep, (first, none))
        return chain_draft((tokens, None), cache), state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftModel(Drafter):
    """Another model with the same vocabulary, and a cache of its own.

    Attributes:
      model: such as a small model of the same family; static.
      params: its param tree.
      num_tokens: drafts of one round.

    Raises:
      ValueError: no drafts.
    """

    model: Any = dataclasses.field(metadata=_static)
    params: Any
    num_tokens: int = dataclasses.field(default=4, metadata=_static)

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, not {self.num_tokens}")

    @property
    def width(self) -> int:
        return self.num_tokens + 1

    def check(self, model: TargetModel, sampling: Sampling) -> None:
        mine, theirs = self.model.config.vocab_size, model.config.vocab_size
        if mine != theirs:
            raise ValueError(
                f"the draft model has a vocabulary of {mine} and the target one of "
                f"{theirs}: they must share a tokenizer"
            )

    def init(self, target: Target, batch: int, slots: int) -> Any:
        return self.model.init_rows(batch, slots)

    def prefill(self, target: Target, state: Any, prompt: Prompt) -> Any:
        batch, count = prompt.tokens.shape
        at = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))
        none = jnp.zeros(batch, jnp.int32)
        return self._read(state, prompt.tokens, at, none)[1]

    def draft(self, target: Target, state: Any, context: Context) -> tuple[Draft, Any]:
        # The last draft of a round that was accepted whole was never read: each round
        # begins with the last two tokens, whether or not the first is known.
        start = jnp.maximum(context.lengths - 2, 0)
        at = start[:, None] + jnp.arange(2)
        two = jnp.take_along_axis(context.tokens, at, axis=1)
        logits, state = self._read(state, two, at, start)
        row = (context.lengths - 1 - start)[:, None, None]
        logits = jnp.take_along_axis(logits, row, axis=1)

        def choose(carry: Any, at: jax.Array) -> Any:
            return target.sampler.draft(carry[0], at[:, None])

        def read(carry: Any, new: jax.Array, at: jax.Array) -> Any:
            return self._read(carry[1], new, at[:, None], at)

        first = logits, state
        draft, (_, state) = draw_chain(
            choose, read, first, context.lengths, self.num_tokens
        )
        return draft, state

    def _read(
        self, cache: Any, tokens: jax.Array, at: jax.Array, start: jax.Array
    ) -> tuple[jax.Array, Any]:
        rows = self.model.read_rows(
            self.params,
            cache,
            tokens,
            positions=at,
            slots=start,
            mask=chain_mask(at, cache_slots(cache)),
        )
        return self.model.head_rows(self.params, rows.final), rows.cache
