"""IDPruner: importance and diversity by maximal marginal relevance (2602.13315)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from angeljax.tokens import _choose
from angeljax.tokens._difftopk import soft_top_k
from angeljax.tokens._method import Choice, Tokens, method, one_of, within
from angeljax.tokens._proxies import distinctiveness as distinct
from pallas_kernels import greedy_select

# What DiffTopK keeps in the training of the published scorers.
_SOFT_SHARE = 0.2


@method(batched=True)
def idpruner(
    tokens: Tokens,
    *,
    lam: float = 0.5,
    importance_transform: str = "raw",
    parallel: int = 1,
    center: bool = False,
    distinctiveness: bool = False,
    stop_threshold: float | None = None,
    precision: str = "highest",
    implementation: str | None = None,
) -> Choice:
    """Tokens that matter and differ, one after the other.

        v = min-max of the importance
        first: argmax v;  then: argmax_i  lam v_i - (1 - lam) max_{j in S} cos(x_i, x_j)

    (arXiv 2602.13315, section 4; AngelSlim's published code). Arguments are those of
    `prune`. Without `importance`, or with `lam=0`, this is farthest-point sampling;
    `lam=1` keeps the K most important. Cosines are signed.

    Args:
      tokens: see `prune`.
      lam: weight of importance against diversity, from 0 to 1.
      importance_transform: "raw" takes the importance as it is, as the published code
        does; "soft_topk" puts it through DiffTopK with a share of 0.2 first, as the
        paper says. The order of tokens is the same, their distances are not.
      parallel: tokens taken in each step, an approximation that the published code
        offers; 1 is exact.
      center: compares embeddings less their mean, as Cen-Prune does. Alone it may hurt.
      distinctiveness: adds the min-max of `angeljax.tokens.distinctiveness`, of
        embeddings that are not centred, to v, and halves the sum. Cen-Prune's remedy
        for what centring loses, in a form of our own.
      stop_threshold: a row ends where the best score falls below this, so that rows
        keep different numbers. Scores go from `lam` down to `lam - 1`, or less.
      precision, implementation: of `pallas_kernels.greedy_select`.

    Returns:
      A `Selection`; every prefix of its order is the choice for a smaller K.

    Raises:
      ValueError: an option is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 1.0]])
      >>> w = jnp.array([1.0, 0.9, 0.5, 0.2])
      >>> idpruner(x, keep=2, importance=w).order.tolist()  # 1 is important, but as 0
      [0, 2]
      >>> idpruner(x, keep=2, importance=w, lam=1.0).order.tolist()
      [0, 1]
    """
    within("lam", lam, 0, 1)
    one_of("importance_transform", importance_transform, ("raw", "soft_topk"))
    mask, embeds = tokens.mask, tokens.embeds
    value = jnp.zeros(mask.shape) if tokens.importance is None else tokens.importance
    if importance_transform == "soft_topk":
        share = _SOFT_SHARE * jnp.sum(mask, axis=-1)
        value = soft_top_k(value, share, mask)
    value = _choose.min_max(value, mask)
    if distinctiveness:
        value = (value + _choose.min_max(distinct(embeds, mask), mask)) / 2
    if center:
        embeds = embeds - _choose.masked_mean(embeds, mask)[..., None, :]
    order = greedy_select(
        embeds,
        value,
        tokens.keep,
        weight=float(lam),
        mask=mask,
        counts=tokens.count,
        parallel=parallel,
        precision=precision,
        implementation=implementation,
    )
    if stop_threshold is None:
        return order
    scores = _scores(order, embeds, value, lam)
    # Scores never rise, so the first that is too low ends the row.
    enough = (scores >= stop_threshold).at[:, 0].set(True)
    count = jnp.sum(jnp.cumprod(enough, axis=-1), axis=-1)
    return _choose.first(order, jnp.minimum(count, tokens.count), tokens.num_tokens)


def _scores(
    order: jax.Array, embeds: jax.Array, value: jax.Array, lam: float
) -> jax.Array:
    """float32 `[B, K]`: the score with which each token was chosen."""
    place = jnp.minimum(order, value.shape[-1] - 1)
    rows = jnp.take_along_axis(embeds, place[..., None], axis=-2)
    like = _choose.cosines(rows, rows)
    earlier = jnp.tril(jnp.ones(like.shape[-2:], bool), -1)
    nearest = jnp.max(jnp.where(earlier, like, -jnp.inf), axis=-1).at[:, 0].set(0)
    return lam * jnp.take_along_axis(value, place, axis=-1) - (1 - lam) * nearest
