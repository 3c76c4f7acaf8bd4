"""Every Hopper kernel through Mosaic and ptxas, on a machine without a GPU.

Needs the wheels of `jax[cuda13]` (`JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1`), else skips.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu_compile

_SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
from tests.kernels._cases import packed
from tests.kernels._h100 import compile_for_h100
from pallas_kernels.ternary_matmul import mosaic_gpu as ternary
from pallas_kernels.quantized_matmul import mosaic_gpu as quantized

fmt, group, m, kind, activation, symmetric = json.loads(sys.argv[1])
options = {} if symmetric else {"symmetric": False}
module = ternary if fmt in ("t2", "sherry") else quantized
planes, layout, _ = packed(fmt, 1024, 256, group, **options)
ready, there = module.prepare(planes, layout)
x = jax.ShapeDtypeStruct((m, 1024), jnp.dtype(kind))

def product(x, planes):
    return module.matmul(
        x, planes, there, x_scale=None, bias=None, activation=activation,
        out_dtype=jnp.bfloat16,
    )

compiled = compile_for_h100(product, x, ready)
dense = 1024 * 256
assert compiled.memory_analysis().temp_size_in_bytes < dense, "a dense weight"
"""

CASES = [
    ("t2", None, 1, "bfloat16", "int8", True),
    ("t2", 64, 8, "int8", None, True),
    ("t2", None, 300, "int8", None, True),
    ("sherry", None, 1, "bfloat16", None, True),
    ("sherry", 128, 2, "float32", "int8", True),
    ("sherry", None, 100, "int8", None, True),
    ("sherry", 128, 300, "int8", None, True),
    ("int8", None, 1, "bfloat16", None, True),
    ("int8", None, 300, "int8", None, True),
    ("int4", 128, 1, "bfloat16", None, True),
    ("int4", 128, 100, "bfloat16", None, True),
    ("int4", 64, 4, "bfloat16", "int8", False),
    ("float8_e4m3", None, 1, "bfloat16", None, True),
    ("nvfp4", None, 1, "bfloat16", None, True),
    ("mxfp4", None, 8, "bfloat16", "int8", True),
]


def _has_plugin() -> bool:
    try:
        return bool(metadata.version("jax-cuda13-plugin"))
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(not _has_plugin(), reason="needs jax[cuda13]")
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-m{c[2]}-{c[3]}")
def test_compiles_for_an_h100_without_spills(case: tuple, tmp_path: Path) -> None:
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    env = {
        "MOSAIC_GPU_DUMP_TO": str(tmp_path),
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "JAX_PLATFORMS": "cpu",
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    # A process of its own: the dump directory is read once, and so is the platform.
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, json.dumps(case)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (log,) = (p.read_text() for p in tmp_path.glob("*.ptxas"))
    assert " 0 bytes spill stores, 0 bytes spill loads" in log
    assert "C75" not in log, "ptxas serializes wgmma: " + log
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    assert registers <= 168
