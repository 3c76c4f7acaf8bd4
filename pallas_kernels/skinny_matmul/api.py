"""`skinny_matmul`: few tokens times a dense weight, with what stands around it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._choose import choose
from pallas_kernels._weights import KernelError
from pallas_kernels.skinny_matmul._blocks import Blocks

_DTYPES = ("bfloat16", "float16", "float32")


def skinny_matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    second: jax.Array | None = None,
    transposed: bool = False,
    norm: jax.Array | None = None,
    norm_eps: float = 1e-5,
    swiglu: bool = False,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = None,
    tiles: Blocks | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`residual + act(norm(x) @ w + bias)` in one launch, for about 1 to 16 tokens.

    A decoder reads that few tokens in a round of decoding, where starting kernels takes
    more time than running them. Sums are in float32 and rounded once. With `norm` the
    product takes `x * norm` in the dtype of `x`, and the sum is divided by the root of
    the mean square (arXiv 1910.07467).

    A row of the result is the same, bit for bit, whatever other rows there are and
    however many: rows are padded to 16, and tiles do not follow their number. ("xla"
    promises that only as far as XLA does.) "mosaic_gpu" has no gradient and no vmap.

    Args:
      x: `[..., K]`, bfloat16, float16 or float32.
      w: `[K, N]`, or `[N, K]` if `transposed`, of the dtype of `x`.
      second: of the shape of `x`, more inputs beside them, for the second half of `w`,
        which then has 2 K inputs. A norm, of 2 K too, takes each by itself:
        `norm(x) @ w[:K] + norm(second) @ w[K:]`.
      transposed: see `w`.
      norm: `[K]`, scale of a root-mean-square norm of `x`; None without.
      norm_eps: added to the mean square.
      swiglu: columns of `w` are N / 2 gates and then N / 2 values, and the result is
        `silu(gate) * value` (arXiv 2002.05202).
      bias: `[N]`.
      residual: of the shape of the result, added to it.
      out_dtype: default that of `x`.
      tiles: sizes to use instead of those in the table, for tuning.
      implementation: "mosaic_gpu" (Hopper, bfloat16, weights `[N, K]`, each K a
        multiple of 32) or "xla"; None takes the first where it can run, else the
        other.

    Returns:
      `[..., N]`, or `[..., N / 2]` with `swiglu`.

    Raises:
      KernelError: shapes, dtypes or options that do not go together, or an
        implementation that cannot run here.

    Example:
      >>> import jax.numpy as jnp
      >>> from pallas_kernels import skinny_matmul
      >>> x, w = jnp.ones((1, 3, 64)), jnp.ones((64, 32))
      >>> skinny_matmul(x, w, norm=jnp.ones(64), swiglu=True).shape
      (1, 3, 16)
    """
    k, n = _check(x, w, second, transposed, norm, swiglu, bias, residual)
    from pallas_kernels.skinny_matmul import mosaic_gpu

    why = mosaic_gpu.refused(k, n, w.dtype, transposed)
    name = choose(implementation, why)
    options: dict[str, Any] = dict(
        second=None if second is None else second.reshape(-1, k),
        n=n,
        transposed=transposed,
        norm=norm,
        eps=float(norm_eps),
        swiglu=swiglu,
        bias=bias,
        residual=None if residual is None else residual.reshape(-1, n),
        out_dtype=jnp.dtype(x.dtype if out_dtype is None else out_dtype),
    )
    rows = x.reshape(-1, k)
    if name == "xla":
        from pallas_kernels.skinny_matmul import xla

        y = xla.matmul(rows, w, **options)
    else:
        y = mosaic_gpu.matmul(rows, w, **options, tiles=tiles)
    return y.reshape(*x.shape[:-1], n)


def _check(
    x: Any,
    w: Any,
    second: Any,
    transposed: bool,
    norm: Any,
    swiglu: bool,
    bias: Any,
    residual: Any,
) -> tuple[int, int]:
    """K of one array of inputs, and the columns of the result."""
    if x.dtype not in _DTYPES or w.dtype != x.dtype:
        raise KernelError(
            f"x and w must have one dtype of {', '.join(_DTYPES)}, not {x.dtype} and "
            f"{w.dtype}"
        )
    if w.ndim != 2 or not w.size or not x.size:
        raise KernelError(
            f"w must be a matrix and nothing empty: x {list(x.shape)}, "
            f"w {list(w.shape)}"
        )
    k, n = w.shape[::-1] if transposed else w.shape
    if second is not None and (second.shape, second.dtype) != (x.shape, x.dtype):
        raise KernelError(
            f"second must be like x, {x.dtype} {list(x.shape)}, not {second.dtype} "
            f"{list(second.shape)}"
        )
    if x.shape[-1] * (1 if second is None else 2) != k:
        of = "x does" if second is None else "x and second do"
        raise KernelError(f"{of} not end in the {k} inputs of w: x {list(x.shape)}")
    for name, found, size in (("norm", norm, k), ("bias", bias, n)):
        if found is not None and found.shape != (size,):
            raise KernelError(
                f"{name} must have shape [{size}], not {list(found.shape)}"
            )
    if swiglu and n % 2:
        raise KernelError(f"swiglu takes an even number of columns, and w has {n}")
    n = n // 2 if swiglu else n
    if residual is not None and residual.shape != (*x.shape[:-1], n):
        raise KernelError(
            f"residual must have shape {[*x.shape[:-1], n]}, not {list(residual.shape)}"
        )
    return x.shape[-1], n
