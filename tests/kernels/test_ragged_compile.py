"""The Hopper kernels of ragged products through Mosaic and ptxas, without a GPU.

Needs the wheels of `jax[cuda13]` (`JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1`), else skips.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels._h100 import check_no_spills, has_plugin

pytestmark = pytest.mark.gpu_compile

_SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
from tests.kernels._cases import packed
from tests.kernels._h100 import compile_for_h100
from pallas_kernels import prepare
from pallas_kernels.ragged_matmul import mosaic_gpu

fmt, group, rows, kind, activation, kernel = json.loads(sys.argv[1])
planes, layout, _ = packed(fmt, 1024, 256, group)
ready, there = prepare(planes, layout, implementation="mosaic_gpu")
experts = {
    name: jax.ShapeDtypeStruct((8, *p.shape), p.dtype) for name, p in ready.items()
}
x = jax.ShapeDtypeStruct((rows, 1024), jnp.dtype(kind))
wide = kind != "int8" and activation is None
assert mosaic_gpu.choose(rows, 8, there, wide)["kernel"] == kernel

def product(x, planes, sizes):
    return mosaic_gpu.matmul(
        x, planes, there, sizes, x_scale=None, activation=activation,
        out_dtype=jnp.bfloat16,
    )

sizes = jax.ShapeDtypeStruct((8,), jnp.int32)
compiled = compile_for_h100(product, x, experts, sizes)
inputs_and_outputs = rows * (1024 * 2 * 2 + 256 * 4 * 4)
dense = 1024 * 256
assert compiled.memory_analysis().temp_size_in_bytes < dense + inputs_and_outputs
"""

CASES = [
    ("t2", None, 1, "bfloat16", "int8", "bits"),
    ("t2", 64, 64, "int8", None, "bytes"),
    ("t2", None, 300, "int8", None, "gemm"),
    ("sherry", None, 5, "bfloat16", None, "bits"),
    ("sherry", 128, 300, "float32", None, "gemm"),
    ("int8", None, 2000, "int8", None, "gemm"),
    ("int8", None, 3, "bfloat16", None, "bytes"),
    ("int4", 128, 2, "bfloat16", None, "bytes"),
    ("int4", 128, 300, "bfloat16", "int8", "gemm"),
    ("int4", 32, 64, "bfloat16", "int8", "bytes"),
    ("float8_e4m3", None, 8, "bfloat16", None, "bytes"),
    ("nvfp4", None, 64, "bfloat16", None, "bytes"),
]


@pytest.mark.skipif(not has_plugin(), reason="needs jax[cuda13]")
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-m{c[2]}-{c[3]}")
def test_compiles_for_an_h100_without_spills(case: tuple, tmp_path: Path) -> None:
    check_no_spills(_SCRIPT, case, tmp_path)
