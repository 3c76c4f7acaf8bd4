"""The Triton kernel: its plane order anywhere, its arithmetic in Triton's interpreter
where triton is installed, its machine code with `-m gpu_compile`, numbers on a GPU with
`-m gpu`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels import (
    KernelError,
    WeightLayout,
    _triton,
    implementation_for,
    packed_matmul,
    prepare,
    restore,
)
from pallas_kernels._dense import codes
from pallas_kernels.quantized_matmul import triton as quantized_triton
from pallas_kernels.ternary_matmul import reference
from pallas_kernels.ternary_matmul import triton as ternary_triton
from tests.kernels._cases import packed

ROOT = Path(__file__).parents[2]
CASES: list[tuple[str, int | None, dict[str, Any]]] = [
    ("t2", None, {}),
    ("t2", 64, {}),
    ("t2", 128, {"scale_dtype": "float32"}),
    ("sherry", None, {}),
    ("sherry", 128, {}),
    ("sherry", None, {"group_stride": 16}),
    ("sherry", 64, {"group_stride": 16}),
    ("int8", None, {}),
    ("int8", 32, {"symmetric": False}),
    ("int4", None, {"symmetric": False}),
    ("int4", 128, {}),
    ("float8_e4m3", None, {}),
    ("float8_e5m2", 128, {}),
    ("mxfp8", None, {}),
    ("nvfp4", None, {}),
    ("mxfp4", None, {}),
    ("nf4", None, {}),
    ("nf4", 64, {}),
]
FLOATS = ("float8_e4m3", "float8_e5m2", "mxfp8", "nvfp4", "mxfp4", "nf4")


def _name(case: Any) -> str:
    fmt, group, options = case
    return "-".join([fmt, str(group), *(f"{v}" for v in options.values())])


def _module(fmt: str) -> ModuleType:
    return ternary_triton if fmt in ("t2", "sherry") else quantized_triton


def _layout(**changes: Any) -> WeightLayout:
    sizes = dict(format="int8", k=256, n=64, group_size=256)
    return WeightLayout(**{**sizes, **changes})


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# Plane order


@pytest.mark.parametrize("case", CASES, ids=_name)
@pytest.mark.parametrize("shape", [(512, 48), (200, 24), (65, 7)])
def test_restore_is_the_exact_inverse_of_prepare(case: Any, shape: Any) -> None:
    fmt, group, options = case
    planes, layout, _ = packed(fmt, *shape, group, **options)
    ready, there = prepare(planes, layout, implementation="triton")
    back, home = restore(ready, there)
    assert there.order == "triton" and home == layout
    assert set(back) == set(planes)
    for name, plane in planes.items():
        assert back[name].dtype == plane.dtype
        a, b = (np.asarray(p).view(np.uint8) for p in (plane, back[name]))
        assert np.array_equal(a, b), name


@pytest.mark.parametrize(
    ("fmt", "bits"),
    [("t2", 2), ("sherry", 1.25), ("int4", 4), ("nvfp4", 4), ("int8", 8), ("mxfp8", 8)],
)
def test_packed_bytes_stay_packed(fmt: str, bits: float) -> None:
    planes, layout, _ = packed(fmt, 1024, 128)
    ready, _ = prepare(planes, layout, implementation="triton")
    held = sum(p.nbytes for name, p in ready.items() if name in ("codes", "high"))
    assert held * 8 == bits * 1024 * 128


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_prepared_planes_run_on_xla_where_there_is_no_gpu(case: Any) -> None:
    fmt, group, options = case
    planes, layout, w = packed(fmt, 200, 24, group, **options)
    ready, there = prepare(planes, layout, implementation="triton")
    x = np.random.default_rng(0).standard_normal((3, 200)).astype(np.float32)
    y = packed_matmul(jnp.asarray(x), ready, there, implementation="xla")
    np.testing.assert_allclose(y, x @ w, rtol=1e-4, atol=1e-4)


def test_prepare_and_restore_trace_and_batch() -> None:
    planes, layout, _ = packed("sherry", 200, 24, 128)
    two = jax.tree.map(lambda p: jnp.stack([p, p]), planes)

    @jax.jit
    @jax.vmap
    def there_and_back(p: Any) -> Any:
        return restore(*prepare(p, layout, implementation="triton"))[0]

    for name, plane in there_and_back(two).items():
        assert np.array_equal(plane, two[name]), name


# What is refused, and how


@pytest.mark.parametrize(
    ("layout", "x", "clause"),
    [
        (
            _layout(group_size=24),
            None,
            "scale groups of 24 weights are no multiple of 16, as int8 needs here",
        ),
        (
            _layout(format="sherry", group_size=96),
            None,
            "scale groups of 96 weights are no multiple of 64, as sherry needs here",
        ),
        (_layout(k=2**18, group_size=2**18), None, "K is over 131072"),
        (_layout(), ((1, 256), "float32"), "float32 activations (it takes bfloat16"),
        (_layout(), ((0, 256), "bfloat16"), "an empty product"),
        (_layout(n=0), ((1, 256), "bfloat16"), "an empty product"),
    ],
)
def test_what_is_left_out_has_a_reason(layout: Any, x: Any, clause: str) -> None:
    if x is not None:
        x = jax.ShapeDtypeStruct(*x)
    assert _module(layout.format).unsupported(x, layout, None).startswith(clause)


def test_any_float_may_be_quantized() -> None:
    x = jax.ShapeDtypeStruct((1, 256), jnp.float32)
    why = _triton.unsupported(x, _layout(), "int8")
    assert why == _triton.missing()


def test_a_weight_that_does_not_fit_is_not_prepared() -> None:
    planes, layout, _ = packed("int8", 384, 32, 24)
    with pytest.raises(
        KernelError, match="cannot hold this weight: scale groups of 24"
    ):
        prepare(planes, layout, implementation="triton")


def test_without_a_gpu_the_message_names_what_works() -> None:
    planes, layout, _ = packed("t2", 256, 32)
    ready, there = prepare(planes, layout, implementation="triton")
    x = jnp.ones((1, 256), jnp.bfloat16)
    if implementation_for() in ("triton", "mosaic_gpu"):
        pytest.skip("this machine runs Triton kernels")
    with pytest.raises(KernelError) as error:
        packed_matmul(x, ready, there, implementation="triton")
    message = str(error.value)
    assert "NVIDIA GPUs with jax-triton installed" in message
    assert "use implementation='xla'" in message and "\n" not in message
    with pytest.raises(KernelError, match="or use implementation='xla'") as error:
        packed_matmul(x, ready, there)
    assert "\n" not in str(error.value)


def _l4() -> Any:
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA L4", num_cores=58, platform="cuda"
    )
    mesh = AbstractMesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device
    )
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize("installed", [True, False])
def test_a_gpu_takes_it_where_jax_triton_is_installed(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, *rest: Any) -> Any:
        if name == "jax_triton":
            return object() if installed else None
        return real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    planes, layout, _ = packed("t2", 256, 32)
    ready, there = prepare(planes, layout, implementation="triton")
    x = jax.ShapeDtypeStruct((1, 256), jnp.bfloat16)

    def product(x: jax.Array) -> jax.Array:
        return packed_matmul(x, ready, there, implementation="triton")

    with _l4():
        assert implementation_for() == ("triton" if installed else "xla")
        if not installed:
            with pytest.raises(KernelError, match="jax-triton installed") as error:
                jax.eval_shape(product, x)
            assert "NVIDIA L4; use implementation='xla'" in str(error.value)
    if not installed:
        assert "pip install jax-triton" in str(_triton.missing())


# The kernel itself


@pytest.mark.skipif(not _has("triton"), reason="needs triton (pip install triton)")
def test_the_kernel_in_the_interpreter(tmp_path: Path) -> None:
    # A process of its own: triton decides at import whether it interprets.
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kernels" / "_triton_interpreter.py")],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": str(ROOT),
            "TRITON_CACHE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len({line.split("|")[0] for line in lines}) == 10, "a format is missing"
    for line in lines:
        fmt, *_, error = line.split("|")
        # Levels of nf4 are rounded to 16 bits; all else is exact before the sums.
        assert float(error) < (5e-3 if fmt == "nf4" else 1e-6), line


# M, dtype of x, scales along K, for each GPU.
LAUNCHES = [
    (m, dtype, group)
    for m in (1, 8, 24, 64, 100, 2048)
    for dtype in ("bfloat16", "int8")
    for group in (None, 128)
]
_TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "int8": "*i8"}
COMPILED = ["t2", "sherry", "int8", "int8+zero", "int4", "int4+zero"]
COMPILED += ["float8_e4m3", "nvfp4", "mxfp4", "nf4"]


def _source(layout: WeightLayout, m: int, dtype: str, capability: int) -> Any:
    """What jax-triton compiles for one product, and its tiles."""
    from triton.compiler import ASTSource

    from pallas_kernels import _triton_kernel

    k = layout.k
    if layout.format == "sherry":
        k = _triton._by_lanes(jnp.zeros((1, k), jnp.int8), layout).shape[1]
    x = jax.ShapeDtypeStruct((m, k), dtype)
    options, tile = _triton.plan(x, layout, capability)
    constants = dict(
        options,
        HAS_SCALE2=layout.format == "nvfp4",
        HAS_X_SCALE=dtype == "int8",
        HAS_BIAS=True,
    )
    bytes_ = layout.format in ("nvfp4", "mxfp4", "mxfp8")
    scale = "*u8" if bytes_ else "*bf16" if layout.groups > 1 else "*fp32"
    types = dict(x=_TYPES[dtype], codes="*u8", high="*u8", scale=scale, zero="*u8")
    types |= dict(scale2="*fp32", levels="*fp32", x_scale="*fp32", bias="*bf16")
    types["out"] = "*bf16"
    if m == 1:
        constants["M"] = 1  # as every 1 that a caller passes
    else:
        types["M"] = "i32"
    kernel = _triton_kernel.packed_matmul
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in types and (name != "M" or m % 16 == 0)
    }
    named = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    return ASTSource(kernel, signature, named, aligned), tile


@pytest.mark.gpu_compile
@pytest.mark.skipif(not _has("triton"), reason="needs triton (pip install triton)")
@pytest.mark.parametrize("capability", [75, 80, 89, 90])
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_spills(
    name: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fmt, _, zero = name.partition("+")
    target = GPUTarget("cuda", capability, 32)
    seen = set()
    for m, dtype, group in LAUNCHES:
        if capability < 80 and m > 1:
            continue  # the same kernel, one row at a time
        group = {"nvfp4": 16, "mxfp4": 32}.get(fmt, group) or 4096
        layout = WeightLayout(
            format=fmt,
            k=4096,
            n=4096,
            group_size=group,
            symmetric=not zero,
            order="triton",
        )
        source, tile = _source(layout, m, dtype, capability)
        key = (dtype, group, tile, m == 1)
        if key in seen:
            continue
        seen.add(key)
        built = triton.compile(
            source,
            target=target,
            options=dict(num_warps=tile.warps, num_stages=tile.stages),
        )
        assert len(built.asm["cubin"]) > 1000
        # Shared memory of a block: 64 KiB on Turing, 99 on Ada.
        assert built.metadata.shared <= (64 if capability == 75 else 99) * 1024
        log = _ptxas(built.asm["ptx"], capability, tmp_path)
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        registers = re.search(r"Used (\d+) registers", log)
        assert spilled and registers, log
        # ptxas stops at 96 or 128 registers for one more block on a processor, even at
        # the cost of a few words. At 255 it has no choice: then the tiles are too big.
        few = 16 if int(registers[1]) < 200 else 0
        assert max(map(int, spilled.groups())) <= few, (key, log)


def _ptxas(ptx: str, capability: int, folder: Path) -> str:
    """What ptxas says of registers: triton knows it once a GPU has loaded them."""
    from triton import knobs

    file = folder / "kernel.ptx"
    file.write_text(ptx)
    arch = f"sm_{capability}{'a' if capability == 90 else ''}"
    done = subprocess.run(
        [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={arch}", file.name, "-o", "out"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stderr


# On a GPU


def _needs_jax_triton() -> None:
    why = _triton.missing()
    if why is not None:
        pytest.skip(why)


def _run(fmt: str) -> Any:
    return jax.jit(
        _module(fmt).matmul, static_argnames=("layout", "activation", "out_dtype")
    )


# Shapes that divide nothing, and shapes that do, on both sides of 16 rows.
PRODUCTS = [
    (1, 1000, 264, "bfloat16-a8"),
    (5, 200, 24, "int8"),
    (16, 1024, 256, "bfloat16"),
    (100, 1000, 264, "int8"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=_name)
def test_products_equal_the_reference(case: Any) -> None:
    _needs_jax_triton()
    fmt, group, options = case
    run = _run(fmt)
    for m, k, n, kind in PRODUCTS:
        planes, layout, _ = packed(fmt, k, n, group, **options)
        ready, there = prepare(planes, layout, implementation="triton")
        rng = np.random.default_rng(m)
        x_scale = None
        if kind == "int8":
            x = jnp.asarray(rng.integers(-127, 128, (m, k)), jnp.int8)
            x_scale = jnp.asarray(rng.uniform(0.5, 2, (m, 1)), jnp.float32)
        else:
            x = jnp.asarray(rng.standard_normal((m, k)), jnp.bfloat16)
        kwargs = dict(
            x_scale=x_scale,
            bias=jnp.arange(n, dtype=jnp.float32),
            activation="int8" if kind.endswith("-a8") else None,
            out_dtype=jnp.float32,
        )
        y = run(x, ready, layout=there, **kwargs)
        again = run(x, ready, layout=there, **kwargs)
        assert np.array_equal(y, again), "two runs differ"
        want = reference.matmul(x, planes, layout, **kwargs)
        error = float(jnp.max(jnp.abs(y - want)) / jnp.max(jnp.abs(want)))
        # Integers are exact up to the scales; floats differ in the order of sums, and
        # an activation on the edge may be rounded either way.
        limit = 1e-6 if kind == "int8" and fmt not in FLOATS else 1e-4
        if kind == "bfloat16-a8":
            limit = 2e-3
        assert error < (5e-3 if fmt == "nf4" else limit), (m, k, n, kind, error)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ["t2", "sherry", "int8", "int4"])
def test_integer_products_are_exact(fmt: str) -> None:
    _needs_jax_triton()
    k, n = 1056, 136
    planes, layout, _ = packed(fmt, k, n, None)
    planes["scale"] = jnp.ones_like(planes["scale"])
    ready, there = prepare(planes, layout, implementation="triton")
    w = np.asarray(codes(planes, layout), np.int64)
    for m in (3, 40):
        x = np.random.default_rng(m).integers(-127, 128, (m, k)).astype(np.int8)
        y = packed_matmul(jnp.asarray(x), ready, there, implementation="triton")
        want = (x.astype(np.int64) @ w).astype(np.float32)
        assert np.array_equal(np.asarray(y), want)


@pytest.mark.gpu
def test_vmap_and_grad_on_the_device() -> None:
    _needs_jax_triton()
    planes, layout, w = packed("sherry", 512, 128, 128)
    ready, there = prepare(planes, layout, implementation="triton")
    x = np.random.default_rng(0).standard_normal((3, 2, 512))
    x = jnp.asarray(x, jnp.bfloat16)

    def f(x: jax.Array) -> jax.Array:
        return packed_matmul(
            x, ready, there, implementation="triton", out_dtype=jnp.float32
        )

    np.testing.assert_allclose(jax.vmap(f)(x), f(x), rtol=1e-5, atol=1e-5)
    g = jax.grad(lambda x: f(x).sum())(x)
    np.testing.assert_allclose(
        np.asarray(g[0, 0], np.float32), w.sum(1), rtol=2e-2, atol=2e-2
    )
