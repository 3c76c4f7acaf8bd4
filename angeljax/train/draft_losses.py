"""What a drafter of chains learns from: losses over the places of a draft, in chunks.

A drafter is asked for J tokens after a text. Place j counts only if all before it were
accepted, so that the first weigh most. Sources: DFlash (arXiv 2602.06036); acceptance
as one less the total variation (arXiv 2211.17192, section 3).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from angeljax._fields import build, choice, number
from angeljax.train._acceptance import DISTANCES, acceptance, distance
from angeljax.train.chunked import head_logits

LOSSES = ("ce", *DISTANCES, "block_tv")
WEIGHTS = ("exponential", "equal", "continuation")
_CHUNK_LOGITS = 2**27


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftLoss:
    """The loss of J drafts after a text.

    With p of the target, q of the drafter and `alpha = sum(min(p, q))`, the chance that
    a draft is accepted:

    - "ce": cross entropy with the tokens of the text;
    - "kl": KL(p||q); "tv": total variation, `1 - alpha`; "lk_alpha": `-log(alpha)`;
    - "lk_hybrid": `w KL(p||q) + (1 - w) TV` with `w = exp(-eta alpha)`: the first while
      the drafter is bad, the second when it is good;
    - "block_tv": `1 - mean_j(alpha_1 ... alpha_j)`, the expected number of accepted
      drafts itself. It has no weights.

    Attributes:
      loss: one of these; all but "ce" need the target's logits.
      weights: of the places: "exponential" `exp(-(j - 1) / gamma)`; "equal";
        "continuation", what a draft is worth for those after it, by the drafter's
        probabilities of the tokens of the text.
      gamma: of the exponential weights.
      eta: of "lk_hybrid".

    Raises:
      ConfigError: a field is out of range.
    """

    loss: str = "ce"
    weights: str = "exponential"
    gamma: float = 7.0
    eta: float = 3.0

    def __post_init__(self) -> None:
        choice("loss.loss", self.loss, LOSSES)
        choice("loss.weights", self.weights, WEIGHTS)
        number("loss.gamma", self.gamma, 1e-6)
        number("loss.eta", self.eta, 0)

    @property
    def needs_target(self) -> bool:
        """Whether it looks at the target's logits."""
        return self.loss != "ce"

    @classmethod
    def from_dict(cls, data: Any) -> DraftLoss:
        """From a mapping such as a section of a YAML file.

        Raises:
          ConfigError: an unknown or invalid field.
        """
        return build(cls, data, "loss")

    def __call__(
        self,
        logits: jax.Array,
        labels: jax.Array,
        target: jax.Array | None = None,
        counts: jax.Array | None = None,
    ) -> jax.Array:
        """The loss of each draft as a whole.

        Args:
          logits: float32 `[..., J, V]` of the drafter.
          labels: int32 `[..., J]`, the tokens of the text.
          target: float32 `[..., J, V]` logits; None for "ce".
          counts: float32 `[..., J]`, 0 for places that are not learned from; default
            all are.

        Returns:
          float32 `[...]`.
        """
        log_q = jax.nn.log_softmax(logits, axis=-1)
        counts = jnp.ones(labels.shape) if counts is None else counts
        at = labels[..., None]
        of_text = jnp.take_along_axis(log_q, at, axis=-1)[..., 0]
        if self.loss == "ce":
            terms = -of_text
        else:
            assert target is not None, "all but ce compare with the target"
            log_p = jax.nn.log_softmax(jax.lax.stop_gradient(target), axis=-1)
            if self.loss == "block_tv":
                alpha = acceptance(log_p, log_q)
                return jnp.mean((1 - jnp.cumprod(alpha, axis=-1)) * counts, axis=-1)
            terms = distance(log_p, log_q, self.loss, eta=self.eta)
        weights = self.place_weights(jax.lax.stop_gradient(of_text))
        return jnp.sum(weights * terms * counts, axis=-1)

    def place_weights(self, of_text: jax.Array) -> jax.Array:
        """float32 `[..., J]`; fixed ones sum to 1.

        Args:
          of_text: `[..., J]`, the drafter's log-probabilities of the text.
        """
        count = of_text.shape[-1]
        if self.weights == "continuation":
            # Half a certain draft, so that a bad first place does not silence the rest.
            chain = jnp.cumprod(0.5 + 0.5 * jnp.exp(of_text), axis=-1)
            return jnp.cumsum(chain[..., ::-1], axis=-1)[..., ::-1] / count
        weights = jnp.ones(count)
        if self.weights == "exponential":
            weights = jnp.exp(-jnp.arange(count) / self.gamma)
        return jnp.broadcast_to(weights / jnp.sum(weights), of_text.shape)


def draft_loss(
    loss: DraftLoss,
    hidden: jax.Array,
    labels: jax.Array,
    head: dict[str, Any],
    target: jax.Array | None = None,
    *,
    counts: jax.Array | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean loss of `B x A` drafts and what a drafter of such drafts would give.

    The logits of a few drafts exist at a time, and are computed again in the gradient.

    Args:
      loss: see `DraftLoss`.
      hidden: `[B, A, J, D]` of the drafter, after its last norm.
      labels: int32 `[B, A, J]`, the tokens of the text.
      head: of the target, see `head_logits`; frozen.
      target: `[B, A, J, D]`, hidden states of the target after its last norm where it
        chose these tokens; for losses that need it.
      counts: bool `[B, A, J]`, tokens to learn from: a draft counts up to the first
        that is none. Default all.
      chunk: drafts of a row at once; default by the size of the vocabulary.

    Returns:
      The mean over the drafts whose first token counts, and metrics: "weight", how many
      these are; "top1/0" ... "top1/J-1", the shares of places where the likeliest token
      is the text's; and "tau", the mean of one plus the drafts before the first wrong
      one, over the drafts that count whole. On text that the target itself wrote
      greedily that is what greedy decoding gives.
    """
    batch, runs, count, width = hidden.shape
    vocabulary = next(iter(head.values())).shape["kernel" in head]
    limit = max(_CHUNK_LOGITS // (vocabulary * batch * count), 1)
    size = min(limit if chunk is None else chunk, runs)
    pieces = -(-runs // size)
    head = jax.lax.stop_gradient(head)

    @jax.checkpoint
    def piece(
        x: jax.Array, labels: jax.Array, real: jax.Array, target: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits = head_logits(head, x)
        other = None if target is None else head_logits(head, target)
        terms = loss(logits, labels, other, real)
        right = (jnp.argmax(logits, axis=-1) == labels) * real
        run = jnp.sum(jnp.cumprod(right, axis=-1), axis=-1) * real[..., -1]
        return jnp.sum(terms), jnp.sum(right, axis=(0, 1)), jnp.sum(run)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, pieces * size - runs)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, pieces, size, *x.shape[2:]), 1, 0)

    real = jnp.ones(labels.shape)
    if counts is not None:
        real = jnp.cumprod(counts.astype(jnp.float32), axis=-1)
    given = target if loss.needs_target else None
    items = jax.tree.map(cut, (hidden, labels, real, given))

    def step(total: Any, item: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, piece(*item)), None

    zero = jnp.zeros(()), jnp.zeros(count), jnp.zeros(())
    (total, right, ahead), _ = jax.lax.scan(step, zero, items)
    each = jnp.sum(real, axis=(0, 1))
    # Where nothing counts all sums are zero, and so are the means.
    least = jnp.maximum(each, 1e-6)
    metrics = {f"top1/{j}": right[j] / least[j] for j in range(count)}
    metrics["tau"] = 1 + ahead / least[-1]
    metrics["weight"] = each[0]
    return total / least[0], metrics
