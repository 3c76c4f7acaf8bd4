"""Importance of tokens without training, for methods that take `importance`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from angeljax.tokens import _choose

_HIGHEST = jax.lax.Precision.HIGHEST


@functools.partial(jax.jit, static_argnames=("merge_unit", "mean_query"))
def received_attention(
    q: jax.Array,
    k: jax.Array,
    *,
    mask: jax.Array | None = None,
    merge_unit: int = 1,
    mean_query: bool = False,
) -> jax.Array:
    """The attention that each token of an image receives from all of them.

        a_j = sum_i mean_h softmax_j(q_hi . k_hj / sqrt(d))

    summed over each run of `merge_unit` tokens, which a patch merger makes one of: the
    saliency of VisionZip (arXiv 2412.04467), HiPrune (2508.00553) and SCOPE
    (2510.24214) for towers without a class token. One image at a time: several images
    are several rows.

    Args:
      q, k: `[..., N, heads, d]`, queries and keys of a layer of the vision tower, after
        its rotary embedding.
      mask: bool `[..., N]`; False for padding, which neither gives nor receives.
      merge_unit: patches of a token, which must be neighbours in N: 4 in Qwen2.5-VL.
      mean_query: takes the mean of the queries for all of them, as AngelSlim does from
        6144 patches on: linear in N, and another result.

    Returns:
      float32 `[..., N / merge_unit]`. Rows are scanned one head at a time, so that
      `[N, N]` is the largest intermediate.

    Raises:
      ValueError: shapes do not agree, or N is no multiple of `merge_unit`.

    Example:
      >>> import jax.numpy as jnp
      >>> received_attention(jnp.ones((8, 2, 4)), jnp.ones((8, 2, 4)), merge_unit=4)
      Array([4., 4.], dtype=float32)
    """
    _check(q, k)
    n = q.shape[-3]
    if merge_unit < 1 or n % merge_unit:
        raise ValueError(f"merge_unit={merge_unit} must divide the {n} tokens")
    mask = jnp.ones(q.shape[:-2], bool) if mask is None else mask
    if mean_query:
        q = _choose.masked_mean(
            q.reshape(*q.shape[:-2], -1), mask
        ).reshape(*q.shape[:-3], 1, *q.shape[-2:])  # fmt: skip
        asks = jnp.ones((*mask.shape[:-1], 1), bool)
    else:
        asks = mask

    def head(
        total: jax.Array, qk: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        weights = _softmax(*qk, mask)
        return total + jnp.sum(weights, axis=-2, where=asks[..., None]), None

    k = jnp.repeat(k, q.shape[-2] // k.shape[-2], axis=-2)
    heads = jnp.moveaxis(q, -2, 0), jnp.moveaxis(k, -2, 0)
    total, _ = jax.lax.scan(head, jnp.zeros(mask.shape), heads)
    total = total / q.shape[-2]
    return total.reshape(*mask.shape[:-1], n // merge_unit, merge_unit).sum(-1)


@jax.jit
def cls_attention(
    q: jax.Array, k: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    """What the class token looks at.

        a_j = mean_h softmax_j(q_h . k_hj / sqrt(d))

    The saliency of VisionZip (arXiv 2412.04467), VisPruner (2412.01818) and PruMerge
    (2403.15388) for towers with a class token, as CLIP's. The softmax is over the
    patches alone.

    Args:
      q: `[..., heads, d]`, query of the class token.
      k: `[..., N, heads, d]`, keys of the patches, without the class token's.
      mask: bool `[..., N]`, False for padding.

    Returns:
      float32 `[..., N]`, 1 in all.

    Example:
      >>> import jax.numpy as jnp
      >>> cls_attention(jnp.ones((2, 4)), jnp.ones((4, 2, 4))).tolist()
      [0.25, 0.25, 0.25, 0.25]
    """
    return last_token_attention(q, k, mask=mask)


@jax.jit
def last_token_attention(
    q: jax.Array, k: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    """What one token of the prompt looks at among the vision tokens, for `fastv`.

        a_j = mean_h softmax_j(q_h . k_hj / sqrt(d))

    with the softmax over the vision tokens alone (FastV, arXiv 2403.06764, as AngelSlim
    computes it).

    Args:
      q: `[..., heads, d]`, query of the last text token, after its rotary embedding.
      k: `[..., N, kv_heads, d]`, keys of the vision tokens; `heads` is a multiple of
        `kv_heads` (grouped-query attention).
      mask: bool `[..., N]`, False for padding.

    Returns:
      float32 `[..., N]`, 1 in all.

    Raises:
      ValueError: shapes do not agree.

    Example:
      >>> import jax.numpy as jnp
      >>> keys = jnp.array([[[0.0]], [[2.0]]])
      >>> [round(float(a), 3) for a in last_token_attention(jnp.ones((4, 1)), keys)]
      [0.119, 0.881]
    """
    _check(q[..., None, :, :], k)
    k = jnp.repeat(k, q.shape[-2] // k.shape[-2], axis=-2)
    mask = jnp.ones(k.shape[:-2], bool) if mask is None else mask
    weights = _softmax(q[..., None, :], jnp.moveaxis(k, -2, -3), mask[..., None, :])
    return weights[..., 0, :].mean(-2)


@jax.jit
def text_relevance(embeds: jax.Array, text: jax.Array) -> jax.Array:
    """How far a token is from the prompt: -mean_m cos(x_i, t_m).

    CDPruner's relevance (arXiv 2506.10967). The sign is that of the
    published code: CLIP's patch embeddings lie *away* from the text that describes
    them. For embeddings that lie nearer to what they mean, negate it.

    Args:
      embeds: `[..., N, D]`, in a space that they share with the text.
      text: `[..., M, D]`, embeddings of the prompt; rows of zeros are padding.

    Returns:
      float32 `[..., N]`.

    Example:
      >>> import jax.numpy as jnp
      >>> text_relevance(jnp.eye(2), jnp.array([[3.0, 0.0], [0.0, 0.0]])).tolist()
      [-1.0, -0.0]
    """
    there = jnp.any(text != 0, axis=-1)
    mean = _choose.masked_mean(_choose.unit(text), there)
    return -jnp.einsum(
        "...nd,...d->...n", _choose.unit(embeds), mean, precision=_HIGHEST
    )


def norm_importance(embeds: jax.Array, *, order: int = 2) -> jax.Array:
    """The norm of each embedding: what DART chooses pivots by (arXiv 2502.11494).

    Args:
      embeds: `[..., N, D]`.
      order: 1 (DART's) or 2.

    Returns:
      float32 `[..., N]`.

    Raises:
      ValueError: another `order`.

    Example:
      >>> import jax.numpy as jnp
      >>> norm_importance(jnp.array([[3.0, -4.0]])).tolist()
      [5.0]
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, not {order!r}")
    return jnp.linalg.norm(embeds.astype(jnp.float32), ord=order, axis=-1)


@jax.jit
def distinctiveness(embeds: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """How unlike the others a token is: 1 - mean_j cos(x_i, x_j).

    Linear in N: the mean is a product with the mean of the unit rows.

    Args:
      embeds: `[..., N, D]`.
      mask: bool `[..., N]`, False for padding, which is no other.

    Returns:
      float32 `[..., N]`.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
      >>> [round(float(d), 2) for d in distinctiveness(x)]
      [0.33, 0.33, 0.67]
    """
    rows = _choose.unit(embeds)
    mask = jnp.ones(rows.shape[:-1], bool) if mask is None else mask
    mean = _choose.masked_mean(rows, mask)
    return 1 - jnp.einsum("...nd,...d->...n", rows, mean, precision=_HIGHEST)


def _softmax(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """float32 `[..., Q, N]` of `[..., Q, d]` and `[..., N, d]`; 0 where masked."""
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    logits = jnp.einsum("...qd,...nd->...qn", q, k, precision=_HIGHEST)
    there = mask[..., None, :]
    logits = jnp.where(there, logits / jnp.sqrt(q.shape[-1]), -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True, initial=jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - top)
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)


def _check(q: jax.Array, k: jax.Array) -> None:
    fits = q.ndim == k.ndim and q.ndim >= 3 and q.shape[-1] == k.shape[-1]
    if not fits or q.shape[:-3] != k.shape[:-3] or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            "q and k must be [..., N, heads, d] with the same d, and heads of q a "
            f"multiple of those of k; they are {list(q.shape)} and {list(k.shape)}"
        )
