"""Losses of a drafter on the probabilities of the model that it drafts for.

A draft is accepted with probability alpha = sum min(p, q) = 1 - TV(p, q), so that the
total variation is what counts in the end; far from the goal its gradient is weak, and
the divergence leads there faster (LK losses, as AngelSpec trains them).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LOSSES = ("kl", "lk_hybrid", "lk_alpha")
_LEAST = 1e-10


def draft_loss(
    target: jax.Array, draft: jax.Array, kind: str, *, eta: float = 3.0
) -> jax.Array:
    """The loss of each token.

    Args:
      target: float32 logits `[..., V]`; p.
      draft: float32 logits `[..., V]` of the same tokens; q.
      kind: "kl" is KL(p||q); "lk_alpha" is -log alpha; "lk_hybrid" is
        `c KL + (1 - c) TV` with `c = exp(-eta alpha)`, which no gradient goes through.
      eta: see "lk_hybrid".

    Returns:
      float32 `[...]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.train._eagle_losses import draft_loss
      >>> z = jnp.asarray([[0.0, 1.0, 2.0]])
      >>> bool(jnp.allclose(draft_loss(z, z + 5.0, "lk_hybrid"), 0.0, atol=1e-6))
      True
    """
    log_p = jax.nn.log_softmax(target, axis=-1)
    log_q = jax.nn.log_softmax(draft, axis=-1)
    p = jnp.exp(log_p)
    kl = jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0.0), axis=-1)
    if kind == "kl":
        return kl
    tv = 0.5 * jnp.sum(jnp.abs(p - jnp.exp(log_q)), axis=-1)
    if kind == "lk_alpha":
        return -jnp.log(jnp.maximum(1.0 - tv, _LEAST))
    c = jnp.exp(-eta * jax.lax.stop_gradient(1.0 - tv))
    return c * kl + (1.0 - c) * tv
