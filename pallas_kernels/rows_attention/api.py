"""`rows_attention`: rotation, new cache entries and attention of few tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._choose import choose
from pallas_kernels._weights import KernelError
from pallas_kernels.rows_attention._blocks import TOKENS, Blocks

_DTYPES = ("bfloat16", "float16", "float32")


class Held(NamedTuple):
    """Entries that belong right before the new ones.

    Attributes:
      k, v: `[B, Hkv, R, D]`, rotated.
      valid: int32 `[B]`, how many of the R count.
    """

    k: jax.Array
    v: jax.Array
    valid: jax.Array


def rows_attention(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    mask: jax.Array,
    slots: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    held: Held | None = None,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    norm_eps: float = 1e-6,
    tiles: Blocks | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of up to 16 tokens of each row on the row's cache, in two launches.

    Queries and keys are rotated (arXiv 2104.09864; pairs i, i + D / 2) in float32, keys
    and values are written to the cache, which is updated in place where it is donated,
    and each token attends to the slots that its mask names (grouped queries, arXiv
    2305.13245; softmax in float32).

    The cache is read in parts by as many thread blocks, whose results are then weighed
    ("Flash-Decoding", crfm.stanford.edu/2023/10/12/flashdecoding.html). What a token
    gets is the same, bit for bit, however many tokens are read with it: parts are of
    fixed slots, whatever stands in them. ("xla" promises that only as far as XLA does.)
    "mosaic_gpu" has no gradient and no vmap.

    Args:
      qkv: `[B, T, (H + 2 Hkv) D]`, T from 1 to 16: all queries, all keys, all values.
      cos, sin: float32 `[B, T, D / 2]`, of each token's position.
      mask: bool `[B, 1, T, S]`, what each token sees, itself included. Slots from
        `slots + T` on must not be seen.
      slots: int32 `[B]`, where the T new entries of each row go; `slots + T` must not
        exceed S.
      k, v: the cache, `[B, Hkv, S, D]`, D a power of two from 32 to 256.
      held: entries that go to `slots - valid` and on first; None without.
      q_norm, k_norm: `[D]`, scales of root-mean-square norms of each head before the
        rotation (Qwen3); None without.
      norm_eps: of those norms.
      tiles: sizes to use instead of those in the table, for tuning.
      implementation: "mosaic_gpu" (Hopper, bfloat16, heads of 64 or 128
        features, up to 8192 slots) or "xla"; None takes the first where it can run,
        else the other.

    Returns:
      `[B, T, H D]`, and `k` and `v` with the new entries. A token that sees nothing
      gets zeros ("xla": a mean).

    Raises:
      KernelError: shapes or dtypes that do not go together, or an implementation that
        cannot run here.

    Example:
      >>> import jax.numpy as jnp
      >>> from pallas_kernels import rows_attention
      >>> cache = jnp.zeros((1, 1, 8, 32))
      >>> qkv, turn = jnp.ones((1, 2, 4 * 32)), jnp.ones((1, 2, 16))
      >>> mask = jnp.arange(8) <= jnp.arange(3, 5)[:, None]
      >>> y, k, v = rows_attention(
      ...     qkv, turn, 0 * turn, mask[None, None], jnp.asarray([3]), cache, cache
      ... )
      >>> y.shape, k[0, 0, :, 0].tolist()
      ((1, 2, 64), [0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    """
    _check(qkv, cos, sin, mask, slots, k, v, held, q_norm, k_norm)
    from pallas_kernels.rows_attention import mosaic_gpu

    name = choose(implementation, mosaic_gpu.refused(qkv, k))
    norms = () if q_norm is None else (q_norm, k_norm)
    flat = mask[:, 0].astype(jnp.int8)
    args: Any = (qkv, cos, sin, flat, slots, k, v, tuple(held or ()), norms)
    eps = float(norm_eps)
    if name == "xla":
        from pallas_kernels.rows_attention import xla

        return xla.attend(*args, eps=eps)
    return mosaic_gpu.attend(*args, eps=eps, tiles=tiles)


def _check(
    qkv: Any,
    cos: Any,
    sin: Any,
    mask: Any,
    slots: Any,
    k: Any,
    v: Any,
    held: Any,
    q_norm: Any,
    k_norm: Any,
) -> None:
    if qkv.dtype not in _DTYPES or k.dtype != v.dtype or k.dtype not in _DTYPES:
        raise KernelError(
            f"qkv, k and v must be {', '.join(_DTYPES)}, k like v, not {qkv.dtype}, "
            f"{k.dtype} and {v.dtype}"
        )
    if qkv.ndim != 3 or k.ndim != 4 or k.shape != v.shape or len(k) != len(qkv):
        raise KernelError(
            f"qkv must be [B, T, columns] and k and v [B, Hkv, S, D], not "
            f"{list(qkv.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    (batch, tokens, columns), (_, kv_heads, size, features) = qkv.shape, k.shape
    if not 1 <= tokens <= TOKENS:
        raise KernelError(f"qkv has {tokens} tokens a row: it takes 1 to {TOKENS}")
    if features & (features - 1) or not 32 <= features <= 256:
        raise KernelError(
            f"heads of {features} features: it takes powers of two from 32 to 256"
        )
    heads = columns // features - 2 * kv_heads
    if columns % features or heads < kv_heads or heads % kv_heads:
        raise KernelError(
            f"{columns} columns of qkv are not H + 2 x {kv_heads} heads of {features} "
            f"features with H a multiple of {kv_heads}"
        )
    want = {
        "cos": (cos, (batch, tokens, features // 2)),
        "sin": (sin, (batch, tokens, features // 2)),
        "mask": (mask, (batch, 1, tokens, size)),
        "slots": (slots, (batch,)),
        "q_norm": (q_norm, (features,)),
        "k_norm": (k_norm, (features,)),
    }
    if held is not None:
        rows = (batch, kv_heads, held.k.shape[2], features)
        want |= {"held.k": (held.k, rows), "held.v": (held.v, rows)}
        want |= {"held.valid": (held.valid, (batch,))}
    for name, (found, shape) in want.items():
        if found is not None and found.shape != shape:
            raise KernelError(
                f"{name} must have shape {list(shape)}, not {list(found.shape)}"
            )
    if (q_norm is None) != (k_norm is None):
        raise KernelError("q_norm and k_norm go together: give both or none")
