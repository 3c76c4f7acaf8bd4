"""The likeliest of a vocabulary, by the kernel where rounds have kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from angeljax.models._fused_rows import FusedRows
from pallas_kernels import TopLogits, top_logits
from pallas_kernels.top_logits.mosaic_gpu import refused


def top_tokens(
    logits: jax.Array,
    k: int,
    *,
    rows: FusedRows | None,
    log_probs: bool = False,
    offset: jax.Array | None = None,
) -> TopLogits:
    """`top_logits` for what reads with `rows`; XLA does it for all others.

    Args:
      logits: float `[..., V]`.
      k, log_probs, offset: as in `top_logits`.
      rows: of the model or the drafter that gives the logits.
    """
    served = rows is not None and refused(logits.shape[-1], k) is None
    how = rows.implementation if served and rows is not None else "xla"
    x = logits.astype(jnp.float32)
    return top_logits(x, k, log_probs=log_probs, offset=offset, implementation=how)


def target_rows(model: object) -> FusedRows | None:
    """How a target reads few tokens, if by kernels."""
    rows = getattr(model, "rows", None)
    return rows if isinstance(rows, FusedRows) else None
