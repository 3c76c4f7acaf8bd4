"""`top_logits`: the largest logits of each row, in order."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._choose import choose
from pallas_kernels._weights import KernelError


class TopLogits(NamedTuple):
    """What `top_logits` returns.

    Attributes:
      values: float32 `[..., k]`, the largest first.
      ids: int32 `[..., k]`, where they stand.
    """

    values: jax.Array
    ids: jax.Array


def top_logits(
    x: jax.Array,
    k: int,
    *,
    log_probs: bool = False,
    offset: jax.Array | None = None,
    implementation: str | None = None,
) -> TopLogits:
    """The `k` largest of each row; of equal ones the first in the row comes first.

    ("xla" takes 0.0 before -0.0, which are equal to "mosaic_gpu".)

    Drafts for speculative decoding take a few of some ten thousand logits, for a few
    tokens. XLA sorts for that, or selects in a kernel that is made for more rows; here
    thread blocks take parts of a row, each warp picks its largest k times over, and a
    second launch does the same with what the parts gave.

    Args:
      x: float32 `[..., N]`; -inf is allowed, NaN and inf make a row meaningless.
      k: from 1 to N.
      log_probs: give logarithms of probabilities, `x - logsumexp(x)`, in place of `x`;
        "mosaic_gpu" takes the logarithm to about 2^-21.
      offset: float32 `[...]`, added to the values of a row, such as the log-probability
        of what the row follows.
      implementation: "mosaic_gpu" (Hopper; k up to 32, N a multiple of 4 and up to
        about 6 million / k) or "xla"; None takes the first where it can run, else the
        other. "mosaic_gpu" has no gradient and no vmap.

    Returns:
      A `TopLogits`.

    Raises:
      KernelError: another dtype or shape, a `k` that cannot be, or an implementation
        that cannot run here.

    Example:
      >>> import jax.numpy as jnp
      >>> from pallas_kernels import top_logits
      >>> found = top_logits(jnp.asarray([[1.0, 3.0, 2.0, 3.0]]), 3)
      >>> found.ids.tolist(), found.values.tolist()
      ([[1, 3, 2]], [[3.0, 3.0, 2.0]])
    """
    if x.dtype != jnp.float32 or not x.ndim or not x.size:
        raise KernelError(
            f"x must be float32 [..., N] and not empty, not {x.dtype} {list(x.shape)}"
        )
    *lead, count = x.shape
    if not 1 <= k <= count:
        raise KernelError(f"k must be from 1 to the {count} logits of a row, not {k}")
    if offset is not None and (*offset.shape, offset.dtype) != (*lead, jnp.float32):
        raise KernelError(
            f"offset must be float32 {lead}, one for each row, not {offset.dtype} "
            f"{list(offset.shape)}"
        )
    from pallas_kernels.top_logits import mosaic_gpu, xla

    how = choose(implementation, mosaic_gpu.refused(count, k))
    select = xla.select if how == "xla" else mosaic_gpu.select
    each = None if offset is None else offset.reshape(-1)
    values, ids = select(x.reshape(-1, count), k, log_probs, each)
    return TopLogits(values.reshape(*lead, k), ids.reshape(*lead, k))
