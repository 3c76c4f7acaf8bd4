"""Where in a sequence the tokens of images or clips stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# One span, several spans, int32 positions `[..., N]`, or a bool mask `[..., L]`.
Where = tuple[int, int] | Sequence[tuple[int, int]] | jax.Array | np.ndarray


def token_positions(
    where: Where, *, length: int, num_tokens: int | None = None
) -> jax.Array:
    """Positions of the vision (or audio) tokens in a sequence.

    Args:
      where: a span `(start, stop)`, a list of spans in ascending order (several
        images), int32 `[..., N]` positions, or bool `[..., L]`, True for the tokens,
        such as `token_types == 1`.
      length: L, of the sequence.
      num_tokens: N. Needed for a mask, whose rows may hold fewer: their last entries
        are `length`. Of rows with more, the first N count. Else it is checked.

    Returns:
      int32 `[N]` for spans, else int32 `[..., N]`.

    Raises:
      ValueError: spans that overlap or leave the sequence, or another number of tokens.

    Example:
      >>> token_positions([(1, 3), (5, 6)], length=8).tolist()
      [1, 2, 5]
      >>> import jax.numpy as jnp
      >>> types = jnp.array([[0, 1, 1, 0], [1, 0, 0, 0]])
      >>> token_positions(types == 1, length=4, num_tokens=2).tolist()
      [[1, 2], [0, 4]]
    """
    if not isinstance(where, jax.Array | np.ndarray):
        return jnp.asarray(_spans(where, length, num_tokens))
    if where.dtype == bool:
        if where.ndim < 1 or where.shape[-1] != length:
            raise ValueError(
                f"where, a mask of shape {where.shape}, must end in the {length} "
                "tokens of the sequence"
            )
        if num_tokens is None:
            raise ValueError("num_tokens is needed where `where` is a mask")
        return _from_mask(jnp.asarray(where), num_tokens)
    if not jnp.issubdtype(where.dtype, jnp.integer) or where.ndim < 1:
        raise ValueError(
            f"where must be spans, integer positions or a bool mask, not an array of "
            f"{where.dtype} {where.shape}"
        )
    if num_tokens is not None and where.shape[-1] != num_tokens:
        raise ValueError(
            f"where names {where.shape[-1]} positions and the selection has "
            f"{num_tokens} tokens"
        )
    return jnp.asarray(where).astype(jnp.int32)


def span_groups(spans: Where) -> np.ndarray:
    """Which image each token belongs to: `groups` for budgets by image.

    Args:
      spans: a span `(start, stop)`, or a list of them, one for each image.

    Returns:
      int32 `[N]`, a NumPy array, so that the methods can count the groups.

    Raises:
      ValueError: that is no span.

    Example:
      >>> span_groups([(1, 3), (5, 8)]).tolist()
      [0, 0, 1, 1, 1]
    """
    pairs = _pairs(spans)
    sizes = [stop - start for start, stop in pairs]
    return np.repeat(np.arange(len(pairs), dtype=np.int32), sizes)


def _pairs(where: Any) -> list[tuple[int, int]]:
    pairs = list(where) if isinstance(where, Sequence) else []
    if len(pairs) == 2 and all(isinstance(x, int | np.integer) for x in pairs):
        pairs = [tuple(pairs)]
    for pair in pairs:
        ends = pair if isinstance(pair, tuple | list) and len(pair) == 2 else ()
        if not ends or any(
            isinstance(x, bool) or not isinstance(x, int | np.integer) for x in ends
        ):
            raise ValueError(f"where: a span is (start, stop), not {pair!r}")
    if not pairs:
        raise ValueError(
            "where must be a span (start, stop), a list of spans, positions or a mask"
        )
    return [(int(a), int(b)) for a, b in pairs]


def _spans(where: Any, length: int, num_tokens: int | None) -> np.ndarray:
    pairs, end = _pairs(where), 0
    for start, stop in pairs:
        if not end <= start < stop <= length:
            raise ValueError(
                f"where: span {(start, stop)} must lie in the {length} tokens of the "
                f"sequence, after position {end}, and not be empty"
            )
        end = stop
    out = np.concatenate([np.arange(a, b, dtype=np.int32) for a, b in pairs])
    if num_tokens is not None and len(out) != num_tokens:
        raise ValueError(
            f"where spans {len(out)} tokens and the selection has {num_tokens}"
        )
    return out


def _from_mask(mask: jax.Array, num_tokens: int) -> jax.Array:
    lead, length = mask.shape[:-1], mask.shape[-1]
    flat = mask.reshape(-1, length)
    place = jnp.where(flat, jnp.cumsum(flat, axis=-1) - 1, num_tokens)
    rows = jnp.arange(len(flat))[:, None]
    out = jnp.full((len(flat), num_tokens), length, jnp.int32)
    out = out.at[rows, place].set(jnp.arange(length, dtype=jnp.int32), mode="drop")
    return out.reshape(*lead, num_tokens)
