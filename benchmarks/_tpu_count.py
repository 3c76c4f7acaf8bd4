"""Compiles products for a TPU that is not there and counts their VLIW bundles.

Run as `python -m benchmarks._tpu_count JSON` in the environment that
`benchmarks.tpu_bundles.count` makes: libtpu reads it once, when it is loaded.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

from pallas_kernels import (
    BlockLists,
    WeightLayout,
    block_sparse_attention,
    greedy_select,
    packed_matmul,
    prepare,
)

_CODES = {
    "float8_e4m3": jnp.float8_e4m3fn,
    "float8_e5m2": jnp.float8_e5m2,
    "mxfp8": jnp.float8_e4m3fn,
}
_SCALES = {"nvfp4": jnp.float8_e4m3fn, "mxfp4": jnp.uint8, "mxfp8": jnp.uint8}


def shapes(layout: WeightLayout) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of canonical planes with bfloat16 scales."""
    fmt, n = layout.format, layout.n
    dtype = _CODES.get(fmt, jnp.uint8)
    if fmt == "int8" and layout.symmetric:
        dtype = jnp.int8
    out = {
        "codes": ((layout.k // layout.per_byte, n), dtype),
        "scale": ((layout.groups, n), _SCALES.get(fmt, jnp.bfloat16)),
    }
    if fmt == "sherry":
        out["high"] = (layout.k // 32, n), jnp.uint8
    if fmt == "nvfp4":
        out["scale2"] = (1, 1), jnp.float32
    if not layout.symmetric:
        out["zero"] = (layout.groups, n), jnp.uint8
    return {name: jax.ShapeDtypeStruct(*plane) for name, plane in out.items()}


def product(case: dict[str, Any]) -> tuple[Any, list[Any]]:
    """A function to compile and the shapes of its arguments."""
    if case["format"] == "attention":
        return _attention(case)
    if case["format"] == "greedy_select":
        return _greedy(case)
    m, k, n = case["m"], case["k"], case["n"]
    x = jax.ShapeDtypeStruct((m, k), jnp.dtype(case["activations"]))
    if case["format"] == "bfloat16":
        return _dense, [x, jax.ShapeDtypeStruct((k, n), jnp.bfloat16)]
    layout = WeightLayout(
        format=case["format"],
        k=k,
        n=n,
        group_size=case.get("group") or k,
        symmetric=case.get("symmetric", True),
    )
    order: list[WeightLayout] = []

    def ready(planes: Any) -> Any:
        planes, there = prepare(planes, layout, implementation="tpu")
        order.append(there)
        return planes

    planes = jax.eval_shape(ready, shapes(layout))
    x_scale = None
    if x.dtype == jnp.int8:
        x_scale = jax.ShapeDtypeStruct((m, 1), jnp.float32)

    def f(x: jax.Array, planes: Any, x_scale: Any) -> jax.Array:
        return packed_matmul(
            x,
            planes,
            order[0],
            x_scale=x_scale,
            out_dtype=jnp.bfloat16,
            implementation="tpu",
        )

    return f, [x, planes, x_scale]


def _attention(case: dict[str, Any]) -> tuple[Any, list[Any]]:
    def shape(*sizes: int, dtype: str = "int32") -> Any:
        return jax.ShapeDtypeStruct((1, *sizes), dtype)

    dim, dtype = case["dim"], case.get("dtype", "bfloat16")
    block_q, block_k = case["blocks"]
    q = shape(case["t"], case["heads"], dim, dtype=dtype)
    k = shape(case["s"], case["kv_heads"], dim, dtype=dtype)
    counts = case["list_heads"], -(-case["t"] // block_q)
    lists = BlockLists(shape(*counts, case["width"]), shape(*counts), block_q, block_k)

    def f(q: jax.Array, k: jax.Array, v: jax.Array, lists: BlockLists) -> jax.Array:
        y, _ = block_sparse_attention(
            q,
            k,
            v,
            lists,
            q_offset=case["s"] - case["t"],
            soft_cap=case.get("soft_cap"),
            return_lse=True,
            implementation="tpu",
        )
        return y

    return f, [q, k, k, lists]


def _greedy(case: dict[str, Any]) -> tuple[Any, list[Any]]:
    batch, n = case["batch"], case["n"]

    def f(gram: jax.Array, importance: jax.Array) -> jax.Array:
        return greedy_select(
            None, importance, case["k"], gram=gram, implementation="tpu"
        )

    shapes = (batch, n, n), (batch, n)
    return f, [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]


def _dense(x: jax.Array, w: jax.Array) -> jax.Array:
    def kernel(x: Any, w: Any, y: Any) -> None:
        part = jnp.dot(x[...], w[...], preferred_element_type=jnp.float32)
        y[...] = part.astype(y.dtype)

    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), jnp.bfloat16)
    return pl.pallas_call(kernel, out_shape=shape, name="dense_matmul")(x, w)


def bundles(device: Any, dump: Path, case: dict[str, Any]) -> int:
    """Final VLIW bundles of the one kernel of a product."""
    for path in dump.glob("*"):
        path.unlink()
    described = AbstractDevice(
        device_kind=device.device_kind, num_cores=1, platform="tpu"
    )
    mesh = AbstractMesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=described
    )
    with jax.sharding.use_abstract_mesh(mesh):
        f, args = product(case)
        sharding = SingleDeviceSharding(device)
        traced = jax.jit(f, in_shardings=sharding, out_shardings=sharding).trace(*args)
        traced.lower(lowering_platforms=("tpu",)).compile()
    (log,) = (
        path
        for path in dump.glob("*schedule-analysis_final_bundles*")
        if any(word in path.name for word in ("_matmul", "block_sparse", "greedy"))
    )
    found = re.search(r"total scheduled bundles:\s+(\d+)", log.read_text())
    assert found is not None
    return int(found[1])


def main() -> None:
    """Counts the cases of the request and prints a list."""
    request = json.loads(sys.argv[1])
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=request["topology"]
    )
    dump = Path(os.environ["TPU_BUNDLES_DUMP"])
    counts = [bundles(topology.devices[0], dump, c) for c in request["cases"]]
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
