"""Training of the importance scorer through a frozen model (VisionSelector)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from angeljax.tokens._difftopk import soft_top_k
from angeljax.tokens._scorer import Scorer, score_tokens

# (soft-masked embeddings, batch, frozen params) -> mean loss of the host model
HostLoss = Callable[[jax.Array, Any, Any], jax.Array]


def soft_mask(
    scorer: Scorer,
    embeds: jax.Array,
    mask: jax.Array | None = None,
    *,
    keep_ratio: float = 0.2,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Embeddings times their soft choice, which is differentiable in the scorer.

        w = score_tokens(x),   k = floor(keep_ratio n),   s = DiffTopK(w, k),   s_i x_i

    Args:
      scorer: see `score_tokens`.
      embeds: `[..., N, D]`.
      mask: bool `[..., N]`, False for padding.
      keep_ratio: share of the real tokens, above 0 and below 1.

    Returns:
      The masked embeddings in their dtype; s, float32 `[..., N]`; and the hard choice,
      1 for the top k of w and 0 for others, float32 `[..., N]`.

    Raises:
      ValueError: `keep_ratio` is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.tokens import init_scorer
      >>> scorer = init_scorer(jax.random.key(0), 8)
      >>> masked, soft, hard = soft_mask(scorer, jnp.ones((10, 8)))
      >>> masked.shape, round(float(soft.sum()), 2), float(hard.sum())
      ((10, 8), 2.0, 2.0)
    """
    if not 0 < keep_ratio < 1:
        raise ValueError(f"keep_ratio must be above 0 and below 1, not {keep_ratio!r}")
    mask = jnp.ones(embeds.shape[:-1], bool) if mask is None else mask
    real = jnp.sum(mask, axis=-1)
    # In float32 a fifth of 5 may fall short of 1.
    k = jnp.floor(keep_ratio * real + 1e-4).astype(jnp.int32)
    k = jnp.clip(k, 1, jnp.maximum(real, 1))
    scores = score_tokens(scorer, embeds, mask)
    soft = soft_top_k(scores, k, mask)
    ranked = jnp.where(mask, jax.lax.stop_gradient(scores), -jnp.inf)
    place = jnp.argsort(jnp.argsort(-ranked, axis=-1, stable=True), axis=-1)
    hard = ((place < k[..., None]) & mask).astype(jnp.float32)
    return (embeds * soft[..., None]).astype(embeds.dtype), soft, hard


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScorerTask:
    """The loss of VisionSelector's training (arXiv 2510.16598).

        CE(frozen model on s_i x_i) + gamma BCE(s, hard top k),   gamma from 0.1 to 2

    gamma rises linearly: the choice may be soft at first and must be hard in the end.
    Only the scorer is trained. An instance is a `loss_fn` for
    `angeljax.train.step.make_step`.

    Attributes:
      loss_fn: `(embeds, batch, frozen) -> loss`: the host model's mean loss on the
        masked embeddings `[B, N, D]`, a scalar.
      steps: of the training, for the curriculum.
      keep_ratio: share of the tokens that the soft choice keeps.
      gamma: at the first and at the last step.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> task = ScorerTask(loss_fn=lambda x, batch, frozen: jnp.mean(x**2), steps=10)
      >>> from angeljax.tokens import init_scorer
      >>> scorer = init_scorer(jax.random.key(0), 8)
      >>> batch = {"embeds": jnp.ones((1, 10, 8))}
      >>> loss, metrics = task(scorer, None, batch, jnp.array(0), jax.random.key(0))
      >>> round(float(metrics["gamma"]), 2), round(float(metrics["kept"]), 2)
      (0.1, 0.2)
    """

    loss_fn: HostLoss
    steps: int
    keep_ratio: float = 0.2
    gamma: tuple[float, float] = (0.1, 2.0)

    def __call__(
        self, trainable: Any, frozen: Any, batch: Any, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss and metrics.

        Args:
          trainable: the scorer.
          frozen: params of the host model, as `loss_fn` takes them.
          batch: a mapping with "embeds" `[B, N, D]` after the projector, "mask" bool
            `[B, N]` if there is padding, and whatever `loss_fn` needs.
          step: int scalar, for the curriculum.
          key: not used.
        """
        del key
        embeds, mask = batch["embeds"], batch.get("mask")
        masked, soft, hard = soft_mask(
            trainable, embeds, mask, keep_ratio=self.keep_ratio
        )
        mask = jnp.ones(soft.shape, bool) if mask is None else mask
        host = self.loss_fn(masked, batch, frozen)
        gap = binary_cross_entropy(soft, hard, mask)
        done = jnp.clip(step / max(self.steps - 1, 1), 0, 1)
        gamma = self.gamma[0] + (self.gamma[1] - self.gamma[0]) * done
        kept = jnp.sum(soft) / jnp.maximum(jnp.sum(mask), 1)
        metrics = {"host_loss": host, "bce": gap, "gamma": gamma, "kept": kept}
        return host + gamma * gap, metrics


def binary_cross_entropy(
    soft: jax.Array, hard: jax.Array, mask: jax.Array
) -> jax.Array:
    """float32 scalar: mean of -h log s - (1 - h) log(1 - s) over the real tokens.

    Logarithms end at -100, so that a choice that is wrong for certain costs a lot but
    not everything.
    """
    tiny = jnp.finfo(jnp.float32).tiny

    def log(x: jax.Array) -> jax.Array:
        return jnp.maximum(jnp.log(jnp.maximum(x, tiny)), -100.0)

    loss = -hard * log(soft) - (1 - hard) * log(1 - soft)
    count = jnp.maximum(jnp.sum(mask), 1)
    return jnp.sum(jnp.where(mask, loss, 0)) / count


def scorer_optimizer(
    steps: int, *, lr: float = 5e-5, warmup: float = 0.03, clip: float = 1.0
) -> optax.GradientTransformation:
    """AdamW as VisionSelector uses it: warm-up, cosine to 0, no weight decay.

    Args:
      steps: of the training.
      lr: peak learning rate.
      warmup: share of the steps in which it rises.
      clip: largest global norm of a gradient.

    Returns:
      An optax transformation.

    Example:
      >>> import jax
      >>> from angeljax.tokens import init_scorer
      >>> state = scorer_optimizer(100).init(init_scorer(jax.random.key(0), 8))
    """
    rises = max(round(steps * warmup), 1)
    schedule = optax.warmup_cosine_decay_schedule(0, lr, rises, max(steps, rises + 1))
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(schedule, b1=0.9, b2=0.999, weight_decay=0.0),
    )
