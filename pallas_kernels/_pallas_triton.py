"""Kernels written in Pallas and compiled by the Triton inside of XLA.

Unlike those of `_triton` they need nothing but JAX on an NVIDIA GPU. JAX 0.11 calls
this way deprecated; where it is gone, XLA does the work.
"""

from __future__ import annotations

import importlib.util

from pallas_kernels._devices import current_device, is_gpu
from pallas_kernels._weights import KernelError

IMPLEMENTATIONS = ("triton", "xla", "interpret")


def unsupported() -> str | None:
    """One clause if the current device cannot run them, else None."""
    device = current_device()
    if not is_gpu(device):
        return f"it is for NVIDIA GPUs, and this is a {device.device_kind}"
    found = getattr(device, "compute_capability", None)
    if found is not None and float(found) < 8:
        return f"compute capability {found} (it takes 8.0 and later)"
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return "this version of JAX has no Pallas for Triton"
    return None


def choose(name: str | None) -> str:
    """The implementation to use; None takes "triton" where that can run, else "xla".

    Raises:
      KernelError: there is none of this name, or it cannot run here.
    """
    if name is None:
        return "xla" if unsupported() else "triton"
    if name not in IMPLEMENTATIONS:
        raise KernelError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)} or None, "
            f"not {name!r}"
        )
    if name == "triton" and (why := unsupported()) is not None:
        raise KernelError(
            f"implementation 'triton' cannot run this: {why}; use "
            "implementation='xla' or None"
        )
    return name
