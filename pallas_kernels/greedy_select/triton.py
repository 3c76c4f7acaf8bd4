"""Greedy selection in one launch as a Triton kernel, through jax-triton: for NVIDIA
GPUs from Ampere on. Nothing of Triton is imported before a call.

A thread block takes one row of the batch and keeps its scores in registers for all of
the choices; a step is a maximum over the block and one row of the Gram matrix.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _triton
from pallas_kernels._devices import current_device
from pallas_kernels.greedy_select import _terms
from pallas_kernels.greedy_select._terms import Settings

_MOST = 32768  # tokens whose scores fit in the registers of a block


def unsupported(batch: int, n: int, settings: Settings) -> str | None:
    """Why this cannot run here, or None."""
    del batch
    why = _terms.one_launch(n, settings, _MOST)
    found = getattr(current_device(), "compute_capability", None)
    if why is None and found is not None and float(found) < 8:
        why = f"compute capability {found} (it takes 8.0 and later)"
    return why or _triton.missing()


def select(
    gram: jax.Array,
    importance: jax.Array,
    valid: jax.Array,
    limit: jax.Array,
    settings: Settings,
    *,
    warps: int | None = None,
    capability: int | None = None,
) -> jax.Array:
    """See `_terms`.

    Args:
      gram, importance, valid, limit, settings: as there.
      warps: of a thread block, for tuning.
      capability: of the GPU to compile for, such as 80; default that of the device.
    """
    if capability is None:
        major, minor = str(jax.devices()[0].compute_capability).split(".")
        capability = 10 * int(major) + int(minor)
    batch, n = importance.shape
    first, base = _terms.mmr_start(importance, valid, settings)
    from pallas_kernels.greedy_select import _triton_kernel

    return _triton.library().triton_call(
        gram, first, base, limit,
        kernel=_triton_kernel.greedy_select,
        out_type=jax.ShapeDtypeStruct((batch, settings.num_select), jnp.int32),
        grid=(batch,),
        name="greedy_select",
        num_warps=warps or warps_for(n),
        num_stages=1,
        compute_capability=capability,
        **constants(n, settings),
    )  # fmt: skip


def warps_for(n: int) -> int:
    """Eight scores of a thread, as long as that takes 4 to 16 warps."""
    return min(max(_power(n) // 256, 4), 16)


def constants(n: int, settings: Settings) -> dict[str, Any]:
    """What `_triton_kernel.greedy_select` is specialized for."""
    return dict(
        N=n,
        WIDTH=max(_power(n), 128),
        SLOTS=settings.num_select,
        BLOCK_SLOTS=_power(settings.num_select),
        FACTOR=_terms.mmr_factor(settings),
    )


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()
