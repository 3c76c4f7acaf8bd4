"""Losses of one token each, with their gradients, in few passes over the vocabulary.

Softmax over a vocabulary is limited by memory, not by arithmetic. Everything here is
therefore written in sums of `exp(z - max)`: one pass for the maxima, one for all sums
together, and one for the gradient, which is given in closed form so that nothing of the
size of the logits is kept in between.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from angeljax.train._options import DistillOptions

# d(sum of losses) / d(logits) for weights of the two losses, `[...] -> [..., V]`
Pullback = Callable[[jax.Array, jax.Array], jax.Array]
# Where the student's mass outside the teacher's entries counts as none.
_LEAST_TAIL = 1e-6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK:
    """A teacher's likeliest entries for each token, as kept on disk.

    Attributes:
      ids: integers `[..., K]`.
      log_probs: `[..., K]`, log-probabilities in the whole vocabulary.
      tail: `[...]`, probability of all other entries.
      gold: `[...]`, log-probability of the true next token.
    """

    ids: jax.Array
    log_probs: jax.Array
    tail: jax.Array
    gold: jax.Array


class _Soft(NamedTuple):
    """Softmax of z without its last division: d = z - max, log_sum = log sum exp d."""

    d: jax.Array
    log_sum: jax.Array
    top: jax.Array

    def exp(self) -> jax.Array:
        return jnp.exp(self.d)

    def probs(self) -> jax.Array:
        return jnp.exp(self.d - self.log_sum[..., None])

    def log_prob(self, z: jax.Array) -> jax.Array:
        """Of one entry that has the logit z `[...]`."""
        return z - self.top - self.log_sum


def terms(
    student: jax.Array, teacher: Any, labels: jax.Array, options: DistillOptions
) -> tuple[jax.Array, jax.Array, Pullback]:
    """Cross entropy and distillation loss of each token.

    Args:
      student: float32 logits `[..., V]`.
      teacher: float32 logits `[..., V]`, a `TopK`, or None.
      labels: int `[...]`; negative ones give 0 and no gradient.
      options: which loss, temperature and so on; the weights are not applied.

    Returns:
      CE and KD `[...]`, float32, and the function that gives the gradient.
    """
    valid = labels >= 0
    gold = jnp.maximum(labels, 0)[..., None]
    tau = options.temperature
    plain = _soft(student)
    gold_logit = jnp.take_along_axis(student, gold, axis=-1)[..., 0]
    ce = jnp.where(valid, -plain.log_prob(gold_logit), 0.0)
    kd, pull_kd = jnp.zeros_like(ce), None
    if teacher is not None and options.weight > 0:
        if isinstance(teacher, TopK):
            kd, pull_kd = _sparse(student, teacher, options)
        else:
            soft = plain if tau == 1 else _soft(student / tau)
            kd, pull_kd = _dense(student, soft, teacher, gold, options)
        kd = jnp.where(valid, kd, 0.0)

    def pull(ce_weight: jax.Array, kd_weight: jax.Array) -> jax.Array:
        one_hot = gold == jnp.arange(student.shape[-1])
        grad = ce_weight[..., None] * (plain.probs() - one_hot)
        if pull_kd is not None:
            grad = grad + pull_kd(kd_weight)
        # Selected, not multiplied: padding may be infinite and must still not count.
        return jnp.where(valid[..., None], grad, 0.0)

    return ce, kd, pull


def _soft(z: jax.Array, keep: jax.Array | None = None) -> _Soft:
    z = z if keep is None else jnp.where(keep, z, -jnp.inf)
    top = jax.lax.stop_gradient(z.max(axis=-1))
    d = z - top[..., None]
    return _Soft(d, jnp.log(jnp.exp(d).sum(axis=-1)), top)


def _dense(
    zs: jax.Array, s: _Soft, zt: jax.Array, gold: jax.Array, options: DistillOptions
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    tau, kind = options.temperature, options.loss
    if kind == "mse":
        error = zs - zt
        scale = 2.0 / zs.shape[-1]
        return (error * error).mean(axis=-1), lambda g: g[..., None] * scale * error
    if kind.endswith("_top"):
        keep = _largest(zt if kind == "kl_top" else zs, options.top_k)
        s, t = _soft(zs / tau, keep), _soft(zt / tau, keep)
    else:
        t = _soft(zt / tau)
    backward = _cross(s, t) if kind in ("rkl", "rkl_top", "cakld") else None
    forward = _cross(t, s) if kind in ("kl", "kl_top", "cakld") else None
    c: Any = 1.0 if forward is None else 0.0
    if kind == "cakld":
        confident = t if tau == 1 else _soft(zt)
        c = jnp.exp(confident.log_prob(jnp.take_along_axis(zt, gold, axis=-1)[..., 0]))
    kd = jnp.zeros_like(s.log_sum)
    if forward is not None:
        kd += (1 - c) * forward
    if backward is not None:
        kd += c * backward

    def pull(g: jax.Array) -> jax.Array:
        g, ps = g * tau, s.probs()
        grad = jnp.zeros_like(zs)
        if forward is not None:
            grad += ((1 - c) * g)[..., None] * (ps - t.probs())
        if backward is not None:
            shift = t.log_sum - s.log_sum - backward
            ratio = jnp.where(ps > 0, s.d - t.d + shift[..., None], 0.0)
            grad += (c * g)[..., None] * ps * ratio
        return grad

    return kd * tau**2, pull


def _cross(p: _Soft, q: _Soft) -> jax.Array:
    """KL(p||q); 0 where p is 0."""
    e = p.exp()
    total = jnp.where(e > 0, e * (p.d - q.d), 0.0).sum(axis=-1)
    return total * jnp.exp(-p.log_sum) - p.log_sum + q.log_sum


def _sparse(
    zs: jax.Array, teacher: TopK, options: DistillOptions
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    tau, kind = options.temperature, options.loss
    ids = teacher.ids.astype(jnp.int32)
    lt = teacher.log_probs.astype(jnp.float32)
    tail = teacher.tail.astype(jnp.float32)

    def loss(zs: jax.Array) -> jax.Array:
        at = jnp.take_along_axis(zs, ids, axis=-1)
        if kind == "kl_top":
            count = min(options.top_k, ids.shape[-1])
            s, t = _soft(at[..., :count] / tau), _soft(lt[..., :count] / tau)
            return _cross(t, s) * tau**2
        whole = _soft(zs)
        ls = at - (whole.top + whole.log_sum)[..., None]
        # All other entries are one more: a bound of the divergence from below.
        rest = jnp.maximum(1 - jnp.exp(ls).sum(axis=-1), _LEAST_TAIL)
        other = jnp.maximum(tail, _LEAST_TAIL)
        gap, gap_rest = lt - ls, jnp.log(other) - jnp.log(rest)
        c: Any = {"kl": 0.0, "rkl": 1.0}.get(kind)
        c = jnp.exp(teacher.gold.astype(jnp.float32)) if c is None else c
        forward = (jnp.exp(lt) * gap).sum(axis=-1) + other * gap_rest
        backward = -(jnp.exp(ls) * gap).sum(axis=-1) - rest * gap_rest
        return (1 - c) * forward + c * backward

    kd, pull = jax.vjp(loss, zs)
    return kd, lambda g: pull(g)[0]


def _largest(z: jax.Array, count: int) -> jax.Array:
    """bool: the `count` largest along the last axis, and all that equal the last one.

    A sort of a whole vocabulary takes a GPU longer than the model itself. This finds
    the threshold two bits at a time, by counting, and is exact.
    """
    if count >= z.shape[-1]:
        return jnp.ones(z.shape, bool)
    bits = jax.lax.bitcast_convert_type(z, jnp.uint32)
    # The order of floats as the order of unsigned integers.
    order = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

    def digit(i: jax.Array, least: jax.Array) -> jax.Array:
        shift = (30 - 2 * i).astype(jnp.uint32)
        found = least
        for value in (1, 2, 3):
            trial = least | (jnp.uint32(value) << shift)
            enough = (order >= trial[..., None]).sum(axis=-1) >= count
            found = jnp.where(enough, trial, found)
        return found

    start = jnp.zeros(z.shape[:-1], jnp.uint32)
    least = jax.lax.fori_loop(0, 16, digit, start)
    return order >= least[..., None]
