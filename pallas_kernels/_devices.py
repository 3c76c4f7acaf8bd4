"""Which implementation belongs to a device."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax

# Names of GPUs of compute capability 9.0, for devices that are only described.
_HOPPER = ("H100", "H200", "H800", "H20", "GH200")
_WHERE = {
    "mosaic_gpu": "Hopper GPUs (H100, H200)",
    "triton": "NVIDIA GPUs with jax-triton installed",
    "tpu": "TPUs",
}


def current_device() -> Any:
    """The device that code is traced for: that of the abstract mesh, or the default."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described
    chosen = jax.config.jax_default_device
    if isinstance(chosen, str):
        return jax.devices(chosen)[0]
    return jax.devices()[0] if chosen is None else chosen


def is_gpu(device: Any = None) -> bool:
    """Whether a device is an NVIDIA GPU; default the one that code is traced for."""
    device = current_device() if device is None else device
    return getattr(device, "platform", "gpu") in ("gpu", "cuda")


def has_flash(device: Any = None) -> bool:
    """Whether a device runs cuDNN's flash attention: GPUs from Ampere on."""
    device = current_device() if device is None else device
    capability = getattr(device, "compute_capability", None)
    return is_gpu(device) and (capability is None or float(capability) >= 8.0)


def implementation_for(device: Any = None) -> str:
    """Name of the fastest implementation for a device.

    Args:
      device: a `jax.Device`; default the one that code is traced for.

    Returns:
      "mosaic_gpu", "triton", "tpu" or "xla".
    """
    device = current_device() if device is None else device
    if getattr(device, "platform", "gpu") == "tpu" or "TPU" in device.device_kind:
        return "tpu"
    if not is_gpu(device):
        return "xla"
    capability = getattr(device, "compute_capability", None)
    if capability == "9.0" or any(name in device.device_kind for name in _HOPPER):
        return "mosaic_gpu"
    return "triton" if importlib.util.find_spec("jax_triton") else "xla"


def elsewhere(name: str) -> str | None:
    """One clause if an implementation is for other devices than the current one."""
    if name not in _WHERE:
        return None
    device = current_device()
    best = implementation_for(device)
    if best == name or (name == "triton" and best == "mosaic_gpu"):
        return None
    return f"it is for {_WHERE[name]}, and this is a {device.device_kind}"
