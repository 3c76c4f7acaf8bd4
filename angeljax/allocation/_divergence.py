"""KL divergence of a model with some weights replaced, in one compiled program."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from angeljax import _leaves
from angeljax.calibration.calibrate import as_function, mask_of

# The predictions of the full model are kept whole up to so many bytes, and beyond it as
# so many of their largest entries and one for all others.
WHOLE, TOP_K = 2**30, 1024
# Passes that the host may run ahead: each holds its own copy of the weights it changes.
_AHEAD = 2


class Divergence:
    """KL(full || changed) of the next-token distribution, mean over tokens, in nats.

    All weights are arguments of one compiled pass, so that it serves every change that
    leaves shapes and dtypes as they are.
    """

    def __init__(
        self,
        model: Any,
        leaves: Sequence[_leaves.Leaf],
        treedef: Any,
        batches: Iterable[Any],
        top_k: int | None = None,
    ) -> None:
        """Runs the full model once.

        Raises:
          ValueError: there are no batches, or the model returns no logits, or some that
            are not finite.
        """
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("batches are empty: the KL divergence needs some text")
        self._leaves = list(leaves)
        self._treedef = treedef
        self._forward = as_function(model)
        values = [leaf.value for leaf in leaves]
        shapes = [jax.eval_shape(self._logits, values, b).shape for b in self.batches]
        if top_k is None and 4 * sum(map(math.prod, shapes)) > WHOLE:
            top_k = min(TOP_K, shapes[0][-1] // 2)
        if top_k is not None and not 0 < top_k < shapes[0][-1]:
            raise ValueError(
                f"top_k must be from 1 to {shapes[0][-1] - 1}, the number of logits "
                f"minus 1, not {top_k}"
            )
        self._top_k = top_k
        self._teach = jax.jit(self._predictions)
        self._step = jax.jit(self._sums)
        self._teacher = [self._teach(values, b) for b in self.batches]
        finite = [jnp.all(jnp.isfinite(t[0])) for t in self._teacher]
        if not all(map(bool, jax.device_get(finite))):
            raise ValueError("the logits of the full model hold NaN or infinity")
        self.passes = 0
        self._pending: collections.deque[Any] = collections.deque()

    def __call__(self, changed: dict[int, Any]) -> jax.Array:
        """The divergence with other values at some leaves; a scalar on the device."""
        values = [changed.get(i, leaf.value) for i, leaf in enumerate(self._leaves)]
        total, count = jnp.float32(0), jnp.float32(0)
        for batch, teacher in zip(self.batches, self._teacher, strict=True):
            kl, tokens = self._step(values, batch, teacher)
            total, count = total + kl, count + tokens
            self.passes += 1
            self._pending.append(kl)
            if len(self._pending) > _AHEAD:
                jax.block_until_ready(self._pending.popleft())
        return total / count

    def _logits(self, values: Sequence[Any], batch: Any) -> jax.Array:
        tree = _leaves.unflatten(self._treedef, self._leaves, list(values))
        out = self._forward(tree, batch)
        out = out[0] if isinstance(out, tuple | list) and out else out
        out = getattr(out, "logits", out)
        shape = getattr(out, "shape", ())
        if len(shape) < 2 or not jnp.issubdtype(out.dtype, jnp.floating):
            raise ValueError(
                "the model must return logits [..., V], alone or first of a tuple, not "
                f"{type(out).__name__} of shape {tuple(shape)}"
            )
        return out

    def _log_probs(self, values: Sequence[Any], batch: Any) -> jax.Array:
        return jax.nn.log_softmax(self._logits(values, batch).astype(jnp.float32))

    def _predictions(self, values: Sequence[Any], batch: Any) -> tuple[jax.Array, ...]:
        log_probs = self._log_probs(values, batch)
        if self._top_k is None:
            return (log_probs,)
        return jax.lax.top_k(log_probs, self._top_k)

    def _sums(
        self, values: Sequence[Any], batch: Any, teacher: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, jax.Array]:
        log_probs = self._log_probs(values, batch)
        if self._top_k is None:
            kl = _kl(teacher[0], log_probs)
        else:
            mine = jnp.take_along_axis(log_probs, teacher[1], axis=-1)
            kl = _kl(_with_rest(teacher[0]), _with_rest(mine))
        mask = mask_of(batch)
        seen = jnp.ones(kl.shape, bool) if mask is None else mask
        seen = jnp.broadcast_to(seen, kl.shape)
        return jnp.sum(jnp.where(seen, kl, 0.0)), jnp.sum(seen, dtype=jnp.float32)


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p || q) over the last axis, float32, as sum of p (q/p - 1 - log q/p).

    Both sum to 1, so that this is the usual sum; but no term is below 0, and what a
    weight in 8 bits changes (1e-6 nats) does not drown in the rounding of terms of 1.
    """
    d = jnp.maximum(log_q - log_p, -1e4)
    series = d * d * (0.5 + d * (1 / 6 + d * (1 / 24)))
    small = jnp.abs(d) < 0.05
    term = jnp.where(small, series, jnp.expm1(jnp.where(small, 0.0, d)) - d)
    # exp(log_p + d) is q: where p vanishes, q alone is left.
    likely = jnp.exp(log_p) * term
    return jnp.sum(jnp.where(log_p > -80.0, likely, jnp.exp(log_q)), axis=-1)


def _with_rest(log_probs: jax.Array) -> jax.Array:
    """The largest entries, and one for the sum of all others."""
    rest = 1.0 - jnp.sum(jnp.exp(log_probs), axis=-1, keepdims=True)
    tiny = jnp.finfo(jnp.float32).tiny
    return jnp.concatenate([log_probs, jnp.log(jnp.maximum(rest, tiny))], axis=-1)
