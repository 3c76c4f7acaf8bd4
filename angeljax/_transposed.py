"""Dense matrices with their inputs last, and products of one token with them.

XLA for GPUs turns the product of one token with a small matrix into a multiplication
and a sum. Over the last axis of the matrix that is one kernel at the speed of memory;
over the first axis the products are written to memory and read again.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TransposedTensor:
    """A matrix `[*batch, K, N]` that is stored as `[*batch, N, K]`.

    It stands wherever the matrix stood: `jax.numpy` and `angeljax.ops` take it as an
    array of the logical shape. XLA folds the transposition into a product.

    Attributes:
      array: the stored array.
    """

    array: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        *batch, n, k = self.array.shape
        return (*batch, k, n)

    @property
    def dtype(self) -> Any:
        """Of the elements."""
        return self.array.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.array.ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.array.size

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.array.nbytes

    def restored(self) -> jax.Array:
        """The matrix in its logical order."""
        return jnp.swapaxes(self.array, -1, -2)

    def astype(self, dtype: Any) -> jax.Array:
        """The matrix in another dtype."""
        return self.restored().astype(dtype)

    def __getitem__(self, index: Any) -> Any:
        return self if index is Ellipsis else self.restored()[index]

    def __jax_array__(self) -> jax.Array:
        return self.restored()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        return np.asarray(self.restored(), dtype)


def transposed(w: jax.Array) -> TransposedTensor:
    """`w [*batch, K, N]` with its inputs last in memory."""
    return TransposedTensor(jnp.swapaxes(w, -1, -2))


def takes_token(w: Any, x: jax.Array) -> TypeGuard[TransposedTensor]:
    """Whether `token_dot` takes the product of `x` with a weight."""
    if not isinstance(w, TransposedTensor) or w.ndim != 2:
        return False
    # The sums are in float32.
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype != jnp.float64
    return narrow and math.prod(x.shape[:-1]) == 1


def token_dot(
    x: jax.Array,
    w: TransposedTensor,
    *,
    norm: jax.Array | None = None,
    norm_eps: float = 1e-6,
    out_dtype: Any = None,
) -> jax.Array:
    """`norm(x) @ w` for one token, summed in float32.

    Args:
      x: float `[..., K]`, one row.
      w: `[K, N]`.
      norm: weight `[K]` of a root-mean-square norm of `x` (arXiv 1910.07467).
      norm_eps: added to the mean square.
      out_dtype: default that of `x`.

    Returns:
      `[..., N]`.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    h = x.reshape(1, -1).astype(jnp.float32)
    rows = w.array.astype(jnp.float32)
    if norm is None:
        y = jnp.sum(h * rows, axis=-1)
    else:
        # A sum of squares of its own would be a kernel of its own: XLA does not fuse
        # one reduction into another. Each output therefore sums the squares beside its
        # products, and is divided afterwards. Both sums are one reduction, as XLA would
        # take the squares, which are the same for all outputs, out of it.
        products = h * norm.astype(jnp.float32) * rows
        squares = jnp.broadcast_to(h * h, products.shape)
        zero = jnp.float32(0)
        y, total = jax.lax.reduce(
            (products, squares),
            (zero, zero),
            lambda a, b: (a[0] + b[0], a[1] + b[1]),
            dimensions=(1,),
        )
        y = y * jax.lax.rsqrt(total / h.shape[-1] + norm_eps)
    return y.astype(out_dtype).reshape(*x.shape[:-1], -1)
