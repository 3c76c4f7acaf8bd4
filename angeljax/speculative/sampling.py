"""How the next token is chosen, the same way in plain and in speculative decoding.

Every choice is a function of the logits, of the row's key and of the position of the
token that is chosen. Nothing else enters: not the drafter, not how many tokens are
verified at once, not the other rows. With `rule="coupled"` (position-keyed noise, a
Gumbel coupling: arXiv 2408.07978) the text is therefore the same whatever is drafted,
at every temperature. `rule="rejection"` is speculative sampling (arXiv 2211.17192,
2302.01318): the same law, other texts, and more accepted drafts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

RULES = ("coupled", "rejection")
# What the keys of one position are for. The drafts of the rejection rule must not share
# noise with what accepts them.
_TARGET, _DRAFT, _ACCEPT, _RESIDUAL = range(4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of sampling.

    Attributes:
      temperature: 0 takes the likeliest token.
      top_k: sample among the k likeliest tokens only; at a tie the lower id.
      top_p: sample among the smallest set of likeliest tokens whose probabilities reach
        `top_p` (arXiv 1904.09751), after the temperature and `top_k`.
      candidates: a nucleus without `top_k` is cut at this many tokens, so that the
        vocabulary need not be sorted.
      rule: "coupled" or "rejection"; see the module.
      seed: one for all rows, which then differ by their number, or one for each row,
        whose text then does not depend on where it stands in the batch.

    Raises:
      ValueError: an option is out of range.

    Example:
      >>> from angeljax.speculative import Sampling
      >>> Sampling(temperature=0.7, top_p=0.9).greedy, Sampling().greedy
      (False, True)
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    candidates: int = 256
    rule: str = "coupled"
    seed: int | Sequence[int] = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be >= 0, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if self.candidates < 1:
            raise ValueError(f"candidates must be at least 1, not {self.candidates}")
        if self.rule not in RULES:
            raise ValueError(f"rule={self.rule!r}: use {' or '.join(map(repr, RULES))}")
        if not isinstance(self.seed, int):
            object.__setattr__(self, "seed", tuple(int(s) for s in self.seed))

    @property
    def greedy(self) -> bool:
        """Whether there is no chance in it."""
        return self.temperature == 0

    def sampler(self, batch: int) -> Sampler:
        """The same for a batch of rows, as a pytree.

        Raises:
          ValueError: there are seeds for another number of rows.
        """
        if isinstance(self.seed, int):
            keys = _row_keys(_key(self.seed), batch)
        else:
            if len(self.seed) != batch:
                raise ValueError(f"{len(self.seed)} seeds for {batch} rows")
            keys = jnp.stack([_key(s) for s in self.seed])
        top_p = None if self.top_p is None or self.greedy else jnp.float32(self.top_p)
        return Sampler(
            keys=keys,
            temperature=jnp.float32(self.temperature),
            top_p=top_p,
            top_k=None if self.greedy else self.top_k,
            candidates=self.candidates,
            greedy=self.greedy,
            rejection=self.rule == "rejection" and not self.greedy,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """`Sampling` for a batch: what the compiled loop and drafters choose with.

    Attributes:
      keys: typed PRNG keys `[B]`.
      temperature, top_p: float32 scalars; `top_p` None without.
      top_k, candidates, greedy, rejection: static, see `Sampling`.
    """

    keys: jax.Array
    temperature: jax.Array
    top_p: jax.Array | None
    top_k: int | None = dataclasses.field(metadata={"static": True})
    candidates: int = dataclasses.field(metadata={"static": True})
    greedy: bool = dataclasses.field(metadata={"static": True})
    rejection: bool = dataclasses.field(metadata={"static": True})

    def choose(
        self, logits: jax.Array, positions: jax.Array, ids: jax.Array | None = None
    ) -> jax.Array:
        """The tokens of plain decoding.

        A drafter that chooses with this, from its own logits, shares the noise of the
        target, and agrees with it with probability (1 - TV) / (1 + TV) or more.

        Args:
          logits: float `[B, T, V]`.
          positions: int32 `[B, T]`, where the chosen tokens will stand.
          ids: int32 `[V]`, what tokens the logits are of, for a drafter with a smaller
            vocabulary; default all, in order.

        Returns:
          int32 `[B, T]`.
        """
        if self.greedy:
            return _of(ids, jnp.argmax(logits, axis=-1))
        return self._sample(self._kept(logits, ids), positions, _TARGET)

    def draft(
        self, logits: jax.Array, positions: jax.Array, ids: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Draft tokens in the way that suits the rule.

        Args:
          logits, positions, ids: as in `choose`, of the drafter; `ids` needs
            `rejection` to be off.

        Returns:
          int32 `[B, T]`; and for the rejection rule the logarithms of the probabilities
          they were drawn with, `[B, T, V]`, else None.
        """
        if not self.rejection:
            return self.choose(logits, positions, ids), None
        if ids is not None:
            raise ValueError(
                "the rejection rule needs draft logits over the whole vocabulary: "
                "scatter them, with -inf elsewhere"
            )
        kept = self._kept(logits, None)
        tokens = self._sample(kept, positions, _DRAFT)
        return tokens, jnp.log(self._scattered(*kept, logits.shape[-1]))

    def scores(self, logits: jax.Array, positions: jax.Array) -> jax.Array:
        """float32 `[B, T, V]` of which `choose` takes the largest.

        Args:
          logits, positions: as in `choose`.
        """
        if self.greedy:
            return logits.astype(jnp.float32)
        kept, ids = self._kept(logits, None)
        noise = self._noise(kept, ids, positions, _TARGET)
        if ids is None:
            return kept + noise
        out = jnp.full(logits.shape, -jnp.inf)
        return jnp.put_along_axis(out, ids, kept + noise, axis=-1, inplace=False)

    def probabilities(self, logits: jax.Array) -> jax.Array:
        """float32 `[B, T, V]` that `choose` samples from; a temperature is needed."""
        return self._scattered(*self._kept(logits, None), logits.shape[-1])

    def reject(
        self,
        logits: jax.Array,
        drafts: jax.Array,
        log_probs: jax.Array | None,
        positions: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Accepts drafts by the rejection rule.

        Args:
          logits: of the target, `[B, T + 1, V]`.
          drafts: int32 `[B, T]`, -1 for none.
          log_probs: what they were drawn with, `[B, T, V]`; None if nothing was drawn.
          positions: int32 `[B, T + 1]` of what the logits are about.

        Returns:
          The tokens `[B, T + 1]`, each a draft or what stands in its place, and bool
          `[B, T]`, which drafts were accepted.
        """
        p = self.probabilities(logits)
        before, count = p[:, :-1], p.shape[-1]
        if log_probs is None:
            q = jax.nn.one_hot(drafts, count)
        else:
            q = jnp.where(drafts[..., None] >= 0, jnp.exp(log_probs), 0.0)
        at = jnp.maximum(drafts, 0)
        chance = jnp.take_along_axis(
            acceptance(before, q), at[..., None], axis=-1
        ).squeeze(-1)
        u = self._map(_ACCEPT, positions[:, :-1], lambda k: jax.random.uniform(k))
        accepted = (drafts >= 0) & (u < chance)
        rest = jnp.concatenate([residual(before, q), p[:, -1:]], axis=1)
        other = self._sample((jnp.log(rest), None), positions, _RESIDUAL)
        tokens = other.at[:, :-1].set(jnp.where(accepted, drafts, other[:, :-1]))
        return tokens, accepted

    def _kept(
        self, logits: jax.Array, ids: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Logits over the temperature, and what tokens they are of."""
        scaled = logits.astype(jnp.float32) / self.temperature
        count = scaled.shape[-1]
        k = count if self.top_k is None else min(self.top_k, count)
        if self.top_p is not None:
            k = min(k, max(self.candidates, self.top_k or 0))
        if k == count and self.top_p is None:
            return scaled, ids
        whole = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
        kept, index = jax.lax.top_k(scaled, k)
        if self.top_p is not None:
            if self.top_k is not None:
                whole = jax.nn.logsumexp(kept, axis=-1, keepdims=True)
            probs = jnp.exp(kept - whole)
            before = jnp.cumsum(probs, axis=-1) - probs
            # The first stays, whatever rounding makes of a small `top_p`.
            out = (before >= self.top_p) & (jnp.arange(k) > 0)
            kept = jnp.where(out, -jnp.inf, kept)
        return kept, _of(ids, index)

    def _sample(
        self, kept: tuple[jax.Array, jax.Array | None], positions: jax.Array, use: int
    ) -> jax.Array:
        logits, ids = kept
        index = jnp.argmax(logits + self._noise(logits, ids, positions, use), axis=-1)
        if ids is None:
            return index.astype(jnp.int32)
        ids = jnp.broadcast_to(ids, logits.shape)
        chosen = jnp.take_along_axis(ids, index[..., None], axis=-1).squeeze(-1)
        return chosen.astype(jnp.int32)

    def _noise(
        self, logits: jax.Array, ids: jax.Array | None, positions: jax.Array, use: int
    ) -> jax.Array:
        if ids is None or ids.ndim == 1:
            every = jnp.arange(logits.shape[-1]) if ids is None else ids
            return self._map(use, positions, lambda key: _gumbel(key, every))
        return self._map(use, positions, _gumbel, ids)

    def _map(self, use: int, positions: jax.Array, fn: Any, *rest: Any) -> Any:
        """`fn(key, ...)` for each row and position."""

        def one(key: jax.Array, position: jax.Array, *rest: Any) -> Any:
            key = jax.random.fold_in(jax.random.fold_in(key, position), use)
            return fn(key, *rest)

        rows = (0, *(0 for _ in rest))
        return jax.vmap(jax.vmap(one, (None, *rows)), (0, *rows))(
            self.keys, positions, *rest
        )

    @staticmethod
    def _scattered(kept: jax.Array, ids: jax.Array | None, count: int) -> jax.Array:
        probs = jax.nn.softmax(kept, axis=-1)
        if ids is None:
            return probs
        ids = jnp.broadcast_to(ids, kept.shape)
        return jnp.put_along_axis(
            jnp.zeros((*kept.shape[:-1], count)), ids, probs, axis=-1, inplace=False
        )


def _gumbel(key: jax.Array, ids: jax.Array) -> jax.Array:
    """Standard Gumbel noise of these tokens: a token's does not depend on the others.

    So a few candidates cost no more than they are, and a drafter with a part of the
    vocabulary has the noise of the target.
    """
    # A folded key is itself random bits; drawing from it would hash twice.
    bits = jax.vmap(lambda i: jax.random.key_data(jax.random.fold_in(key, i))[0])(ids)
    u = (bits.astype(jnp.float32) + 0.5) * 2.0**-32
    # Small `u` become the large values, where float32 has its resolution.
    return -jnp.log(-jnp.log1p(-jnp.minimum(u, 1 - 2.0**-24)))


def _key(seed: int) -> jax.Array:
    return jax.random.key(seed, impl="threefry2x32")


@functools.partial(jax.jit, static_argnames=("batch",))
def _row_keys(key: jax.Array, batch: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))


def acceptance(p: jax.Array, q: jax.Array) -> jax.Array:
    """Chance `[..., V]` that a draft drawn from `q` is accepted: min(1, p / q).

    Args:
      p, q: probabilities `[..., V]` of target and draft.
    """
    return jnp.where(q > 0, jnp.minimum(1.0, p / jnp.where(q > 0, q, 1.0)), 1.0)


def residual(p: jax.Array, q: jax.Array) -> jax.Array:
    """What a rejected draft is replaced from, `[..., V]`: max(p - q, 0), normalised.

    Where `p` and `q` are the same up to rounding nothing is left, and it is `p`.

    Args:
      p, q: probabilities `[..., V]` of target and draft.
    """
    rest = jnp.maximum(p - q, 0.0)
    total = jnp.sum(rest, axis=-1, keepdims=True)
    return jnp.where(total > 0, rest / jnp.where(total > 0, total, 1.0), p)


def _of(ids: jax.Array | None, index: jax.Array) -> jax.Array:
    return (index if ids is None else ids[index]).astype(jnp.int32)
