"""What merging and pruning of audio tokens read from an encoder's attention."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

HEADS = ("mean", "max")
Heads = Literal["mean", "max"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """Attention of one encoder layer, summed up for each audio token; a pytree.

    Attributes:
      received: float32 `[..., N]`, attention that a token receives from all others: the
        weight with which it enters a merged token.
      diagonal: float32 `[..., N]`, attention that a token pays to itself: the relevance
        by which pruning ranks it.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.tokens import AttentionWeights
      >>> x = AttentionWeights(received=jnp.ones((1, 4)), diagonal=jnp.ones((1, 4)))
      >>> x.received.shape
      (1, 4)
    """

    received: jax.Array
    diagonal: jax.Array


def pool_attention(
    attn: jax.Array,
    pool: int,
    *,
    mask: jax.Array | None = None,
    relevance: Heads = "mean",
) -> AttentionWeights:
    """Sums up the attention of frames for the tokens that the frames are pooled to.

    `pool` neighbouring frames make a token. The attention of token i to token j is

        P[i, j] = sum over b < pool of (mean over a < pool of A[pool i + a, pool j + b])

    and a token j receives `mean over i of P[i, j]`, A being the maximum over the heads.
    Its relevance is `P[j, j]`, A being their mean (Qwen2-Audio and GLM-ASR) or maximum
    (Kimi-Audio). Source: Samp (arXiv 2602.21233, 4.2.3).

    Args:
      attn: `[B, H, pool * N, pool * N]` or without B: softmax weights, a row for each
        query.
      pool: frames of a token; 2 for Qwen2-Audio, 4 for Kimi-Audio, 1 for Whisper.
      mask: bool `[B, N]`, True for real tokens; what others pay does not count.
      relevance: "mean" or "max" over the heads for the relevance.

    Returns:
      `AttentionWeights` of `[B, N]`.

    Raises:
      ValueError: shapes that do not go together, or another `relevance`.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.tokens import pool_attention
      >>> attn = jnp.full((1, 2, 8, 8), 1 / 8)
      >>> pool_attention(attn, 2).diagonal.tolist()
      [[0.25, 0.25, 0.25, 0.25]]
    """
    if attn.ndim == 3:
        batched = pool_attention(attn[None], pool, mask=_row(mask), relevance=relevance)
        return jax.tree.map(lambda x: x[0], batched)
    _check_heads(relevance)
    if attn.ndim != 4 or attn.shape[2] != attn.shape[3]:
        raise ValueError(
            f"attn must be [B, heads, frames, frames], not {list(attn.shape)}"
        )
    batch, _, frames, _ = attn.shape
    if pool < 1 or frames % pool:
        raise ValueError(f"pool={pool} must divide the {frames} frames of attn")
    mask = _check_mask(mask, batch, frames // pool)
    received, diagonal = _sum_up(attn, pool, mask, relevance, 0)
    return AttentionWeights(received=received / mask.shape[1], diagonal=diagonal)


def attention_weights(
    q: jax.Array,
    k: jax.Array,
    *,
    pool: int = 1,
    mask: jax.Array | None = None,
    relevance: Heads = "mean",
    scale: float | None = None,
    block: int = 128,
) -> AttentionWeights:
    """`pool_attention` of `softmax(q k^T)`, which is never there as a whole.

    Blocks of queries are taken one after the other, so that `heads * block * frames`
    weights are held at once and not `heads * frames^2`: 20 heads of 1500 frames are
    180 MB in float32, here 15 MB.

    Args:
      q, k: `[B, frames, heads, D]`. Products have the precision of `q`'s dtype with
        float32 sums; softmax is float32.
      pool: frames of a token; `frames` is a multiple.
      mask: bool `[B, frames]`, True for frames that attention sees. A token is real if
        all of its frames are.
      relevance: as in `pool_attention`.
      scale: of the products; default `D ** -0.5`.
      block: queries at once; rounded up to whole tokens.

    Returns:
      `AttentionWeights` of `[B, frames / pool]`.

    Raises:
      ValueError: shapes that do not go together, or another `relevance`.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.tokens import attention_weights
      >>> x = jnp.ones((1, 8, 2, 4))
      >>> attention_weights(x, x, pool=2).received.tolist()
      [[0.25, 0.25, 0.25, 0.25]]
    """
    _check_heads(relevance)
    if q.ndim != 4 or q.shape != k.shape:
        raise ValueError(
            "q and k must both be [B, frames, heads, D], not "
            f"{list(q.shape)} and {list(k.shape)}"
        )
    batch, frames, _, dim = q.shape
    if pool < 1 or frames % pool:
        raise ValueError(f"pool={pool} must divide the {frames} frames of q")
    seen = _check_mask(mask, batch, frames)
    tokens = jnp.all(seen.reshape(batch, -1, pool), axis=-1)
    scale = dim**-0.5 if scale is None else scale
    size = min(-(-block // pool) * pool, frames)
    count = -(-frames // size)
    padded = jnp.pad(q, ((0, 0), (0, count * size - frames), (0, 0), (0, 0)))
    padded = padded.reshape(batch, count, size, *q.shape[2:]).swapaxes(0, 1)
    rows = jnp.pad(tokens, ((0, 0), (0, (count * size - frames) // pool)))
    rows = rows.reshape(batch, count, size // pool).swapaxes(0, 1)

    def part(received: jax.Array, queries: Any) -> tuple[jax.Array, jax.Array]:
        first, q, real = queries
        scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(seen[:, None, None], scores * scale, -jnp.inf)
        attn = jax.nn.softmax(scores, axis=-1)
        attn = jnp.where(seen[:, None, None], attn, 0)  # rows that see nothing are NaN
        paid, diagonal = _sum_up(attn, pool, real, relevance, first // pool)
        return received + paid, diagonal

    zeros = jnp.zeros(tokens.shape, jnp.float32)
    firsts = jnp.arange(count) * size
    received, diagonal = jax.lax.scan(part, zeros, (firsts, padded, rows))
    diagonal = diagonal.swapaxes(0, 1).reshape(batch, -1)[:, : tokens.shape[1]]
    return AttentionWeights(
        received=received / tokens.shape[1], diagonal=jnp.where(tokens, diagonal, 0)
    )


def _sum_up(
    attn: jax.Array, pool: int, real: jax.Array, relevance: Heads, first: Any
) -> tuple[jax.Array, jax.Array]:
    """Sums over the queries and the diagonal of `[B, H, T, S]`, T from `first` on."""
    most = jnp.max(attn, axis=1).astype(jnp.float32)
    pooled = _pooled(most, pool)
    received = jnp.sum(jnp.where(real[..., None], pooled, 0), axis=1)
    rows = jnp.arange(pooled.shape[1])
    columns = jnp.minimum(rows + first, pooled.shape[2] - 1)
    if relevance == "max":
        return received, pooled[:, rows, columns]
    # Only the cells on the diagonal: the mean over heads is not needed elsewhere.
    cells = attn.reshape(*attn.shape[:2], len(rows), pool, -1, pool)
    cells = cells[:, :, rows, :, columns].astype(jnp.float32)  # [T, B, H, a, b]
    return received, cells.sum(-1).mean((-1, -2)).T


def _pooled(attn: jax.Array, pool: int) -> jax.Array:
    batch, queries, keys = attn.shape
    cells = attn.reshape(batch, queries // pool, pool, keys // pool, pool)
    return cells.mean(2).sum(-1)


def _row(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else x[None]


def _check_mask(mask: jax.Array | None, batch: int, count: int) -> jax.Array:
    if mask is None:
        return jnp.ones((batch, count), bool)
    if mask.shape != (batch, count) or mask.dtype != jnp.bool_:
        raise ValueError(
            f"mask must be bool [{batch}, {count}], not {mask.dtype} {list(mask.shape)}"
        )
    return mask


def _check_heads(relevance: str) -> None:
    if relevance not in HEADS:
        raise ValueError(f"relevance={relevance!r} must be one of {', '.join(HEADS)}")
