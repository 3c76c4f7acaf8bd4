"""Compilation for an H100 on a machine without one.

Needs the wheels of `jax[cuda13]`; runs the whole pipeline of XLA, Mosaic and ptxas.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
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


def has_plugin() -> bool:
    """Whether the wheels are here."""
    try:
        return bool(metadata.version("jax-cuda13-plugin"))
    except metadata.PackageNotFoundError:
        return False


def check_no_spills(script: str, case: Any, folder: Path, most: int = 0) -> None:
    """Runs a script that compiles kernels and reads what ptxas says of it.

    Args:
      script: Python; finds the case as JSON in `sys.argv[1]`.
      case: of the script.
      folder: an empty one.
      most: bytes that may be spilled, where that is outside of all loops.
    """
    path = os.environ.get("PYTHONPATH", "")
    env = {
        "MOSAIC_GPU_DUMP_TO": str(folder),
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "JAX_PLATFORMS": "cpu",
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), path]),
    }
    # A process of its own: the dump directory is read once, and so is the platform.
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(case)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    logs = sorted(folder.glob("*.ptxas"))
    assert logs, done.stdout
    for path in logs:
        log, code = path.read_text(), path.with_suffix(".ptx").read_text()
        spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
        assert spilled and max(map(int, spilled)) <= most, log
        assert "C75" not in log, "ptxas serializes wgmma: " + log
        found = re.search(r"Used (\d+) registers", log)
        threads = re.search(r"\.maxntid (\d+)", code)
        assert found is not None and threads is not None
        assert int(found[1]) * int(threads[1]) <= 65536, "a block does not fit"
