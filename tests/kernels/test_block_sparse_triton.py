"""Block-sparse attention in Triton: in Triton's interpreter where triton is installed,
its machine code with `-m gpu_compile`, numbers on a GPU with `-m gpu`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BlockLists, _triton, block_sparse_attention
from pallas_kernels.block_sparse_attention import triton
from pallas_kernels.block_sparse_attention._steps import steps
from tests.kernels import _attention, _h100

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton (pip install triton)",
)


def _shapes(
    dim: int = 64, dtype: str = "bfloat16", block_q: int = 128, block_k: int = 128
) -> tuple[Any, ...]:
    """q, k, v and lists of 1024 rows, 8 query and 2 key heads."""
    q, k = (jax.ShapeDtypeStruct((2, 1024, heads, dim), dtype) for heads in (8, 2))
    rows = jax.ShapeDtypeStruct((2, 8, 1024 // block_q), jnp.int32)
    entries = jax.ShapeDtypeStruct((*rows.shape, 8), jnp.int32)
    return q, k, k, BlockLists(entries, rows, block_q, block_k)


# How far lists are read


@pytest.mark.parametrize(
    ("t", "s", "blocks", "rows", "keys", "offsets"),
    [
        (150, 150, (64, 64), 32, 32, [0, 0]),
        (70, 200, (48, 32), 16, 32, [37, 130]),
        (40, 140, (16, 128), 16, 64, [90, 3]),
    ],
)
def test_steps_are_those_that_each_row_sees(
    rng: Any, t: int, s: int, blocks: Any, rows: int, keys: int, offsets: Any
) -> None:
    lists = _attention.random_lists(rng, 2, 2, t, s, *blocks, 0.5, offsets)
    found = steps(lists, t, s, jnp.asarray(offsets), rows=rows, keys=keys)
    indices, counts = np.asarray(lists.indices), np.asarray(lists.counts)
    whole, total = (np.asarray(x) for x in found)
    assert whole.shape == (2, 2, counts.shape[2] * blocks[0] // rows)
    for b, h, tile in np.ndindex(*whole.shape):
        line = b, h, tile * rows // blocks[0]
        last = min((tile + 1) * rows, t) - 1 + offsets[b]
        starts = [
            j * blocks[1] + part
            for j in indices[line][: counts[line]]
            for part in range(0, blocks[1], keys)
        ]
        if tile * rows >= t:
            assert total[b, h, tile] == 0  # no query is there
            continue
        assert whole[b, h, tile] == sum(
            x + keys <= tile * rows + offsets[b] + 1 for x in starts
        )
        assert total[b, h, tile] == sum(x <= last for x in starts)


# What is refused


@pytest.mark.parametrize(
    ("changes", "clause"),
    [
        ({"block_q": 8}, "lists.block_q is 8 (it takes multiples of 16)"),
        ({"block_k": 4}, "lists.block_k is 4 (it takes multiples of 16)"),
        ({"dim": 264}, "heads of 264 channels (it takes up to 256)"),
        ({"dtype": "float64"}, "q is float64 (it takes bfloat16, float16, float32)"),
        ({}, _triton.missing()),
    ],
)
def test_what_is_left_out_has_a_reason(changes: Any, clause: str | None) -> None:
    assert triton.unsupported(*_shapes(**changes)) == clause


# The kernel


@needs_triton
def test_the_kernel_in_the_interpreter(tmp_path: Path) -> None:
    # A process of its own: triton decides at import whether it interprets.
    script = ROOT / "tests" / "kernels" / "_block_sparse_interpreter.py"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script)],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": path,
            "TRITON_CACHE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    # Weights are rounded to the dtype of v, and so is y.
    most = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}
    for line in lines:
        _, dtype, y, lse = line.split("|")
        assert float(y) < most[dtype] and float(lse) < 2e-6, line


_TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}


def _source(dim: int, dtype: str, block: int, capability: int) -> Any:
    """What jax-triton compiles, and its tiles."""
    from triton.compiler import ASTSource

    from pallas_kernels.block_sparse_attention import _triton_kernel

    q, k, _, lists = _shapes(dim, dtype, block, block)
    tile = triton.tiles(q, lists, capability)
    kernel = _triton_kernel.block_sparse_attention
    types = dict.fromkeys(("q", "k", "v", "y"), _TYPES[dtype])
    types |= dict.fromkeys(("indices", "whole", "total", "q_offset"), "*i32")
    types |= dict.fromkeys(("T", "S", "NUM_LISTS", "WIDTH"), "i32")
    types["lse"] = "*fp32"
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if "*" in signature[name]
    }
    constants = triton.constants(q, k, lists, tile, 0.1, None)
    named = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    return ASTSource(kernel, signature, named, aligned), tile


@pytest.mark.gpu_compile
@needs_triton
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiles_into_a_gpus_memories(
    dtype: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton as compiler
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9 warns without it
    for dim, block in ((64, 128), (80, 64), (128, 128), (128, 64), (256, 128)):
        source, tile = _source(dim, dtype, block, capability)
        built = compiler.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options=dict(num_warps=tile.warps, num_stages=tile.stages),
        )
        most = {80: 163, 89: 99, 90: 227}[capability]
        assert built.metadata.shared <= most * 1024, (dim, block)
        (tmp_path / "kernel.ptx").write_text(built.asm["ptx"])
        arch = f"--gpu-name=sm_{capability}{'a' if capability == 90 else ''}"
        # The second one of triton's assemblers knows the version that it writes.
        tools = knobs.nvidia.ptxas, knobs.nvidia.ptxas_blackwell
        done = subprocess.run(
            [tools[capability >= 90].path, "-v", arch, "kernel.ptx", "-o", "out"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        spilled = re.search(r"(\d+) bytes spill stores", done.stderr)
        assert spilled, done.stderr
        # At 255 registers ptxas parks what the loop does not need. In float32 the
        # parts of its operands stand beside the output.
        limit = 100 if dtype == "bfloat16" else 300
        assert int(spilled[1]) <= limit, (dim, block, done.stderr)


@pytest.mark.gpu_compile
@needs_triton
@pytest.mark.skipif(not _h100.has_plugin(), reason="needs jax[cuda13]")
def test_one_kernel_and_no_copies_on_an_h100() -> None:
    def f(q: Any, k: Any, v: Any, lists: BlockLists) -> Any:
        return triton.attention(
            q, k, v, lists,
            scale=0.1, q_offset=jnp.zeros(2, jnp.int32), soft_cap=None, capability=90,
        )  # fmt: skip

    compiled = _h100.compile_for_h100(f, *_shapes(128))
    assert compiled.as_text().count("custom_call_target=") == 1
    # Only how far each list is read stands in memory.
    assert compiled.memory_analysis().temp_size_in_bytes < 8192


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dim", "dtype", "most"),
    [
        (64, "float16", 3e-3),
        (80, "bfloat16", 2e-2),
        (128, "bfloat16", 2e-2),
        (256, "bfloat16", 2e-2),
        (96, "float32", 1e-4),
    ],
)
@pytest.mark.parametrize("block_k", [64, 128])
def test_numbers_on_a_gpu(dim: int, dtype: str, most: float, block_k: int) -> None:
    why = _triton.missing()
    if why is not None:
        pytest.skip(why)
    rng = np.random.default_rng(0)
    offsets = (173, 40)
    lists = _attention.random_lists(rng, 2, 4, 500, 700, 128, block_k, 0.5, offsets)
    counts = lists.counts.at[1, 0, 0].set(0).at[0, -1, -1].add(-1)
    lists = BlockLists(lists.indices, counts, 128, block_k)
    q, k, v = _attention.random_qkv(rng, 2, 500, 700, 4, 2, dim, dtype)

    def run(implementation: str) -> Any:
        def f(q: Any, k: Any, v: Any) -> Any:
            y, lse = block_sparse_attention(
                q, k, v, lists,
                q_offset=jnp.asarray(offsets), soft_cap=20.0, return_lse=True,
                implementation=implementation,
            )  # fmt: skip
            return jnp.sum(y.astype(jnp.float32) ** 2), (y, lse)

        return jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(q, k, v)

    (got_g, got), (want_g, want) = run("triton"), run("reference")
    for a, b, limit in [(got[0], want[0], most), (got[1], want[1], 1e-4)]:
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.array_equal(np.isinf(a), np.isinf(b))
        real = np.isfinite(b)
        assert np.abs(a[real] - b[real]).max() < limit
    for a, b in zip(got_g, want_g, strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.abs(a - b).max() < 3 * most * np.abs(b).max()
