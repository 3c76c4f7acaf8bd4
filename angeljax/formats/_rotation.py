"""Products with orthonormal Hadamard matrices along an axis.

A Hadamard matrix spreads what one feature holds over all of its block, so that no
feature stands out (QuaRot, arXiv 2404.00456; QuIP#, arXiv 2402.04396). `H x` costs
n log n instead of n^2: the matrix of n = a b is a Kronecker product of two small ones.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.formats._hadamard import factor_sizes, hadamard_matrix, largest_known

# Larger factors would cost more than the passes over memory that they save.
_WIDEST = 128


def largest_block(k: int) -> int:
    """The largest size of a Hadamard matrix that divides k: the default of a block."""
    return largest_known(k)


def rotate(x: jax.Array, size: int, *, inverse: bool = False) -> jax.Array:
    """`x [..., K]` times the block-diagonal orthonormal Hadamard matrix of blocks.

    Args:
      x: float array; summed in float32, returned in its dtype.
      size: length of a block; divides K.
      inverse: by the transpose instead, which undoes it.

    Returns:
      An array like `x`.
    """
    y = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, *_factors(size))
    for axis, n in enumerate(_factors(size)):
        h = hadamard_matrix(n) * np.float32(n**-0.5)
        at = axis - len(_factors(size))
        y = jnp.moveaxis(
            jnp.matmul(
                jnp.moveaxis(y, at, -1),
                h.T if inverse else h,
                precision=jax.lax.Precision.HIGHEST,
            ),
            -1,
            at,
        )
    return y.reshape(x.shape).astype(x.dtype)


@functools.cache
def _factors(size: int) -> tuple[int, ...]:
    """Sizes of the small matrices whose Kronecker product is that of a block."""
    sizes = factor_sizes(size)
    if sizes is None:
        hadamard_matrix(size)  # says what would work
        raise AssertionError
    small: list[int] = []
    for n in sizes:
        while n & (n - 1) == 0 and n > _WIDEST:
            small.append(min(n // _WIDEST, _WIDEST))
            n //= small[-1]
        small.append(n)
    # One pass over the data for two small ones.
    parts = small[:1]
    for n in small[1:]:
        if parts[-1] * n <= _WIDEST:
            parts[-1] *= n
        else:
            parts.append(n)
    return tuple(parts)


def resolve_rotation(rotation: int | str | None, k: int) -> int:
    """The size of a block from what a recipe says: a number, "full", or nothing.

    Raises:
      ValueError: a block that does not divide k, or no Hadamard matrix of its size.
    """
    if not rotation:
        return 0
    if rotation == "full":
        return largest_block(k)
    if type(rotation) is not int or rotation < 2:
        raise ValueError(f"rotation={rotation!r}: use a size of blocks, or 'full'")
    if k % rotation:
        raise ValueError(
            f"has {k} weights along the contraction, which rotation={rotation} does "
            f"not divide: use {largest_block(k)} or 'full'"
        )
    hadamard_matrix(rotation)
    return rotation
