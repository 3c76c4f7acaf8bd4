"""What a choice of tokens keeps, in numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from angeljax.tokens import _choose
from angeljax.tokens._selection import Selection


@jax.jit
def diagnostics(
    selection: Selection,
    embeds: jax.Array,
    *,
    importance: jax.Array | None = None,
    mask: jax.Array | None = None,
    reference: Selection | None = None,
) -> dict[str, jax.Array]:
    """How much of a row its kept tokens hold.

    Args:
      selection: of `[..., N]` tokens.
      embeds: `[..., N, D]`, what was chosen from.
      importance: `[..., N]`, for "importance".
      mask: bool `[..., N]`, False for padding.
      reference: another choice of the same tokens, for "jaccard".

    Returns:
      float32 `[...]` of each row:

      - "kept": share of the real tokens.
      - "coverage": mean over all real tokens of the largest cosine to a kept one; 1 if
        all are kept, 0 where a row has no tokens.
      - "importance", if given: summed over the kept tokens, over the sum of as many of
        the most important ones; of `importance` from 0 to 1 by min-max.
      - "jaccard", if there is a `reference`: tokens in both over tokens in either.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.tokens import diagnostics, uniform
      >>> x, w = jnp.eye(4), jnp.array([0.0, 1.0, 2.0, 3.0])
      >>> found = diagnostics(uniform(x, keep=2), x, importance=w)
      >>> {name: round(float(value), 2) for name, value in found.items()}
      {'coverage': 0.5, 'importance': 0.4, 'kept': 0.5}
    """
    kept = selection.mask
    mask = jnp.ones(kept.shape, bool) if mask is None else mask
    real = jnp.maximum(jnp.sum(mask, axis=-1), 1)
    rows = selection.take(embeds)
    like = _choose.cosines(embeds, rows)  # [..., N, K]
    like = jnp.where(selection.used[..., None, :], like, -jnp.inf)
    nearest = jnp.max(like, axis=-1)
    # A kept token stands for itself, whatever rounding makes of its cosine.
    nearest = jnp.where(kept, 1.0, nearest)
    found = {
        "kept": selection.count / real,
        "coverage": jnp.sum(nearest, axis=-1, where=mask) / real,
    }
    if importance is not None:
        value = _choose.min_max(importance, mask)
        ranked = -jnp.sort(-value, axis=-1)
        top = jnp.arange(value.shape[-1]) < selection.count[..., None]
        best = jnp.sum(ranked, axis=-1, where=top)
        held = jnp.sum(value, axis=-1, where=kept)
        found["importance"] = jnp.where(best > 0, held / jnp.maximum(best, 1e-30), 1.0)
    if reference is not None:
        both = jnp.sum(kept & reference.mask, axis=-1)
        either = jnp.sum(kept | reference.mask, axis=-1)
        found["jaccard"] = jnp.where(either > 0, both / jnp.maximum(either, 1), 1.0)
    return found
