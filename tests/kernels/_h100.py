"""Compilation for an H100 on a machine without one.

Needs the wheels of `jax[cuda13]`; runs the whole pipeline of XLA, Mosaic and ptxas.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

_KIND = "NVIDIA H100 80GB HBM3"
_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  driver_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  kernel_mode_driver_version: "580.159.4"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@functools.cache
def topology() -> Any:
    """The description of one H100; raises where the CUDA plugin is absent."""
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", topology="1x1x1", target_config=_TARGET
    )


def compile_for_h100(f: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`jax.jit(f)` compiled for an H100; `args` are shapes or arrays."""
    mesh = Mesh(np.array(topology().devices), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    device = jax.sharding.AbstractDevice(
        device_kind=_KIND, num_cores=132, platform="cuda"
    )
    abstract = AbstractMesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device
    )
    with jax.sharding.use_abstract_mesh(abstract):
        traced = jax.jit(f, in_shardings=sharding).trace(*shapes)
        return traced.lower(lowering_platforms=("cuda",)).compile(options or None)
