"""What `greedy_select` refuses, before any work."""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax.numpy as jnp

from pallas_kernels._weights import KernelError

OBJECTIVES = ("mmr", "dpp", "facility")
PRECISIONS = ("highest", "fast")


def shapes(
    embeds: Any,
    importance: Any,
    gram: Any,
    mask: Any,
    counts: Any,
) -> tuple[int, int]:
    """Batch size and number of tokens of arguments that go together.

    Raises:
      KernelError: one line that names the argument.
    """
    if embeds is None and gram is None:
        raise KernelError("give embeds [B, N, D] or their gram [B, N, N]")
    for name, x in (("embeds", embeds), ("gram", gram)):
        if x is None:
            continue
        if x.ndim != 3:
            last = "D" if name == "embeds" else "N"
            raise KernelError(
                f"{name} must be [B, N, {last}], not {list(x.shape)}: add an axis for "
                "a batch of one"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise KernelError(f"{name} must be a float array, not {x.dtype}")
    batch, n = (gram if embeds is None else embeds).shape[:2]
    if gram is not None and gram.shape != (batch, n, n):
        what = "be square" if embeds is None else f"be [{batch}, {n}, {n}] like embeds"
        raise KernelError(f"gram {list(gram.shape)} must {what}")
    if not n:
        raise KernelError("there are no tokens to select from: N is 0")
    for name, x in (("importance", importance), ("mask", mask)):
        if x is not None and x.shape != (batch, n):
            raise KernelError(f"{name} must be [{batch}, {n}], not {list(x.shape)}")
    if importance is not None and not jnp.issubdtype(importance.dtype, jnp.floating):
        raise KernelError(f"importance must be a float array, not {importance.dtype}")
    if mask is not None and mask.dtype != jnp.bool_:
        raise KernelError(f"mask must be boolean, not {mask.dtype}")
    if counts is not None:
        if not jnp.issubdtype(counts.dtype, jnp.integer):
            raise KernelError(f"counts must be integers, not {counts.dtype}")
        if counts.shape != (batch,):
            raise KernelError(f"counts must be [{batch}], not {list(counts.shape)}")
    return batch, n


def settings(
    num_select: Any,
    n: int,
    objective: str,
    weight: Any,
    parallel: Any,
    precision: str,
    has_importance: bool,
) -> None:
    """What is static.

    Raises:
      KernelError: one line that names the argument.
    """
    for name, value in (("num_select", num_select), ("parallel", parallel)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise KernelError(f"{name}={value!r} must be a static integer")
        if not 1 <= int(value) <= n:
            raise KernelError(f"{name}={value} must be from 1 to the {n} tokens")
    if objective not in OBJECTIVES:
        raise KernelError(f"objective={objective!r} must be {_either(OBJECTIVES)}")
    if precision not in PRECISIONS:
        raise KernelError(f"precision={precision!r} must be {_either(PRECISIONS)}")
    if objective != "mmr" and not has_importance:
        raise KernelError(
            f"objective={objective!r} needs importance [B, N]; ones make all tokens "
            "alike"
        )
    if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
        raise KernelError(f"weight={weight!r} must be a static number")
    number = float(weight)
    if objective == "mmr" and not 0 <= number <= 1:
        raise KernelError(f"weight={weight} of 'mmr' must be from 0 to 1")
    if objective == "facility" and not (0 <= number < math.inf):
        raise KernelError(f"weight={weight} of 'facility' must be 0 or more")


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}"
