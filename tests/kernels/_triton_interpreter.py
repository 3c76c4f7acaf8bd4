"""Runs the Triton kernel in Triton's interpreter, on numpy arrays, without torch.

A script, as the interpreter is chosen when triton is imported: TRITON_INTERPRET=1.
Prints one line for each case, `name error`, the error relative to the largest result.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels import _dense, _triton, _triton_kernel
from tests.kernels._cases import packed

# format, options, K, N, group, M, dtype of x
CASES: list[tuple[str, dict[str, Any], int, int, int | None, int, str]] = [
    ("t2", {}, 256, 40, None, 3, "float16"),
    ("t2", {}, 200, 40, None, 33, "int8"),
    ("t2", {}, 384, 70, 64, 3, "bfloat16"),
    ("t2", {}, 384, 70, 64, 20, "int8"),
    ("sherry", {}, 1056, 40, None, 3, "int8"),
    ("sherry", {}, 640, 40, 128, 20, "float16"),
    ("sherry", {"group_stride": 16}, 576, 40, 64, 3, "int8"),
    ("sherry", {"group_stride": 16}, 1024, 40, 256, 3, "bfloat16"),
    ("int8", {}, 200, 40, None, 3, "int8"),
    ("int8", {}, 200, 40, 64, 20, "bfloat16"),
    ("int8", {"symmetric": False}, 200, 40, None, 3, "int8"),
    ("int8", {"symmetric": False}, 200, 40, 32, 20, "int8"),
    ("int8", {"symmetric": False}, 200, 40, 32, 3, "float16"),
    ("int4", {}, 200, 40, None, 3, "float16"),
    ("int4", {}, 256, 40, 32, 20, "int8"),
    ("int4", {"symmetric": False}, 256, 40, 64, 3, "int8"),
    ("int4", {"symmetric": False}, 200, 40, 64, 20, "bfloat16"),
    ("float8_e4m3", {}, 200, 40, None, 3, "float16"),
    ("float8_e4m3", {}, 200, 40, 64, 20, "bfloat16"),
    ("float8_e5m2", {}, 200, 40, None, 3, "bfloat16"),
    ("mxfp8", {}, 200, 40, None, 3, "bfloat16"),
    ("nvfp4", {}, 200, 40, None, 3, "float16"),
    ("nvfp4", {}, 200, 40, None, 20, "int8"),
    ("mxfp4", {}, 200, 40, None, 3, "int8"),
    ("mxfp4", {}, 200, 40, None, 20, "bfloat16"),
    ("nf4", {}, 200, 40, None, 3, "float16"),
    ("nf4", {}, 200, 40, 64, 20, "int8"),
]
# Those of GPUs without usable tensor cores, compute capability 7.5.
SCALAR_CASES = [
    ("t2", {}, 384, 70, 64, 3, "bfloat16"),
    ("t2", {}, 200, 40, None, 2, "int8"),
    ("sherry", {}, 640, 40, 128, 2, "int8"),
    ("int8", {"symmetric": False}, 200, 40, 32, 2, "int8"),
    ("float8_e4m3", {}, 200, 40, None, 2, "float16"),
]


class Tensor:
    """As much of a torch tensor as the interpreter asks for."""

    def __init__(self, array: Any):
        self.array = np.require(np.asarray(array), requirements="CW")
        self.dtype = f"torch.{self.array.dtype.name}"

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return self.array.strides

    def storage_offset(self) -> int:
        return 0

    def untyped_storage(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return self

    def new_empty(self, *_: Any, **__: Any) -> Tensor:
        return self

    def set_(self, *_: Any) -> None: ...

    def copy_(self, _: Tensor) -> None: ...


class Interpreted:
    """Stands in for the module `jax_triton`."""

    @staticmethod
    def triton_call(
        *args: Any,
        kernel: Any,
        out_type: Any,
        grid: Any,
        name: str,
        num_warps: int,
        num_stages: int,
        compute_capability: int,
        **constants: Any,
    ) -> Any:
        outs = jax.tree.map(lambda o: Tensor(np.zeros(o.shape, o.dtype)), out_type)
        wrapped = [a if isinstance(a, int) else Tensor(a) for a in args]
        kernel[grid](*wrapped, *jax.tree.leaves(outs), **constants)
        return jax.tree.map(lambda o: jnp.asarray(o.array), outs)


def mend_bfloat16() -> None:
    """The interpreter keeps bfloat16 as uint16, and takes that for the number."""
    from triton.runtime import interpreter

    tl = _triton_kernel.tl
    kind = interpreter.InterpreterBuilder
    dot, from_int = kind.create_dot, kind.create_si_to_fp

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype == tl.bfloat16:
            a, b = (
                interpreter.TensorHandle(
                    t.data.view(ml_dtypes.bfloat16).astype(np.float32), tl.float32
                )
                for t in (a, b)
            )
        return dot(self, a, b, *rest)

    def create_si_to_fp(self: Any, value: Any, to: Any) -> Any:
        if to.scalar != tl.bfloat16:
            return from_int(self, value, to)
        data = value.data.astype(ml_dtypes.bfloat16).view(np.uint16)
        return interpreter.TensorHandle(data, tl.bfloat16)

    kind.create_dot, kind.create_si_to_fp = create_dot, create_si_to_fp


def error(case: Any, capability: int) -> float:
    """Largest difference from a float64 product, relative to its largest entry."""
    fmt, options, k, n, group, m, dtype = case
    planes, layout, w = packed(fmt, k, n, group, **options)
    rng = np.random.default_rng(1)
    x_scale = None
    if dtype == "int8":
        x = jnp.asarray(rng.integers(-127, 128, (m, k)), jnp.int8)
        x_scale = jnp.asarray(rng.uniform(0.5, 2, (m, 1)), jnp.float32)
    else:
        x = jnp.asarray(rng.standard_normal((m, k)), dtype)
    bias = jnp.asarray(rng.standard_normal(n), jnp.float32)
    prepared, order = _triton.prepare(planes, layout)
    y = _triton.matmul(
        x,
        prepared,
        order,
        x_scale=x_scale,
        bias=bias,
        activation=None,
        out_dtype=jnp.float32,
        capability=capability,
    )
    want = np.asarray(x, np.float64) @ np.asarray(_dense.dense(planes, layout), float)
    want = want * (1.0 if x_scale is None else np.asarray(x_scale)) + np.asarray(bias)
    return float(np.abs(np.asarray(y) - want).max() / np.abs(want).max())


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    _triton.library = Interpreted  # type: ignore[assignment]
    mend_bfloat16()
    for case, capability in [(c, 80) for c in CASES] + [(c, 75) for c in SCALAR_CASES]:
        print(*map(str, case), error(case, capability), sep="|", flush=True)


if __name__ == "__main__":
    main()
