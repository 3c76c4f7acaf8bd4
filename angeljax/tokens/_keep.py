"""How many tokens to keep, from a count or a share."""

from __future__ import annotations

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np


def keep_count(
    num_tokens: int,
    keep: int | float | None = None,
    *,
    drop_ratio: float | None = None,
) -> int:
    """Tokens kept out of `num_tokens`.

    An integer is a count. A float is a share: `num_tokens * keep` rounded to the
    nearest integer, halves to the even one, at least 1. `drop_ratio` is the share that
    goes, as AngelSlim counts: `num_tokens * (1 - drop_ratio)`, rounded the same way.

    Args:
      num_tokens: of the image, clip or sequence.
      keep: a count from 1 to `num_tokens`, or a share above 0 and up to 1.0.
      drop_ratio: instead of `keep`, a share from 0 to below 1.

    Returns:
      The count; 0 of 0 tokens.

    Raises:
      ValueError: neither or both are given, or the value is out of range, NaN, a
        boolean or no number.

    Example:
      >>> keep_count(576, 64), keep_count(576, 0.25), keep_count(10, drop_ratio=0.75)
      (64, 144, 2)
    """
    if (keep is None) == (drop_ratio is None):
        raise ValueError("say either keep or drop_ratio")
    if drop_ratio is not None:
        _number("drop_ratio", drop_ratio)
        if not 0 <= drop_ratio < 1:
            raise ValueError(
                f"drop_ratio={drop_ratio!r} must be a share from 0 to below 1"
            )
        share = 1 - float(drop_ratio)
        return max(1, round(num_tokens * share)) if num_tokens else 0
    _number("keep", keep)
    assert keep is not None
    if isinstance(keep, numbers.Integral):
        if not 1 <= keep <= max(num_tokens, 1):
            raise ValueError(
                f"keep={keep} must be a count from 1 to the {num_tokens} tokens, or a "
                "share above 0 and up to 1.0"
            )
        return int(min(keep, num_tokens))
    if not 0 < keep <= 1:
        raise ValueError(
            f"keep={keep!r} must be a share above 0, at most 1.0; an integer is a count"
        )
    return max(1, round(num_tokens * float(keep))) if num_tokens else 0


def keep_counts(keep: int | float, mask: jax.Array) -> jax.Array:
    """`keep_count` of every row of a mask.

    A share is of the real tokens of the row; a count is that count, or all of them
    where there are fewer. A row without a token keeps none.

    Args:
      keep: see `keep_count`; static.
      mask: bool `[..., N]`, True for real tokens.

    Returns:
      int32 `[...]`.

    Raises:
      ValueError: as `keep_count`.

    Example:
      >>> import jax.numpy as jnp
      >>> keep_counts(0.5, jnp.arange(8) < jnp.array([[8], [3], [0]])).tolist()
      [4, 2, 0]
    """
    n = mask.shape[-1]
    most = keep_count(n, keep)
    share = not isinstance(keep, numbers.Integral)
    # Rounded here, in Python's floats: float32 on the device rounds some halves away.
    counts = [keep_count(i, keep) if share else min(i, most) for i in range(n + 1)]
    real = jnp.sum(mask, axis=-1, dtype=jnp.int32)
    return jnp.asarray(np.asarray(counts, np.int32))[real]


def _number(name: str, value: object) -> None:
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name}={value!r} must be a number")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be finite")
