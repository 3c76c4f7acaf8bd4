"""The choice between a kernel for Hopper and what XLA makes of the same."""

from __future__ import annotations

from pallas_kernels._devices import elsewhere, implementation_for
from pallas_kernels._weights import KernelError

IMPLEMENTATIONS = ("mosaic_gpu", "xla")


def choose(name: str | None, refused: str | None) -> str:
    """The implementation to use; None takes "mosaic_gpu" where that can run.

    Args:
      name: what was asked for.
      refused: one clause if the kernel does not serve these arguments.

    Raises:
      KernelError: there is none of this name, or it cannot run here.
    """
    if name is None:
        best = implementation_for() == "mosaic_gpu" and refused is None
        return "mosaic_gpu" if best else "xla"
    if name not in IMPLEMENTATIONS:
        raise KernelError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)} or None, "
            f"not {name!r}"
        )
    if name == "mosaic_gpu" and (why := elsewhere(name) or refused) is not None:
        raise KernelError(
            f"implementation 'mosaic_gpu' cannot run this: {why}; use "
            "implementation='xla' or None"
        )
    return name
