"""How far a drafter's probabilities are from those of the model that it drafts for.

A draft is accepted with probability alpha = sum min(p, q) = 1 - TV(p, q), so that the
total variation is what counts in the end; far from the goal its gradient is weak, and
the divergence leads there faster (LK losses, as AngelSpec trains them).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

DISTANCES = ("kl", "tv", "lk_alpha", "lk_hybrid")
_LEAST = 1e-10


def acceptance(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """alpha `[...]` of log-probabilities `[..., V]`."""
    return jnp.sum(jnp.exp(jnp.minimum(log_p, log_q)), axis=-1)


def distance(
    log_p: jax.Array, log_q: jax.Array, kind: str, *, eta: float = 3.0
) -> jax.Array:
    """The loss of each token.

    Args:
      log_p: float32 log-probabilities `[..., V]` of the target.
      log_q: float32 log-probabilities `[..., V]` of the drafter for the same tokens.
      kind: "kl" is KL(p||q); "tv" is 1 - alpha; "lk_alpha" is -log alpha; "lk_hybrid"
        is `c KL + (1 - c) TV` with `c = exp(-eta alpha)`, which no gradient goes
        through.
      eta: see "lk_hybrid".

    Returns:
      float32 `[...]`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.train._acceptance import distance
      >>> z = jax.nn.log_softmax(jnp.asarray([[0.0, 1.0, 2.0]]))
      >>> bool(jnp.allclose(distance(z, z, "lk_hybrid"), 0.0, atol=1e-6))
      True
    """
    if kind in ("kl", "lk_hybrid"):
        p = jnp.exp(log_p)
        kl = jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0.0), axis=-1)
        if kind == "kl":
            return kl
    alpha = acceptance(log_p, log_q)
    if kind == "tv":
        return 1 - alpha
    if kind == "lk_alpha":
        return -jnp.log(jnp.maximum(alpha, _LEAST))
    share = jnp.exp(-eta * jax.lax.stop_gradient(alpha))
    return share * kl + (1 - share) * (1 - alpha)
