"""The Hopper kernels: orders and plans anywhere, numbers on a GPU (`-m gpu`)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    KernelError,
    WeightLayout,
    quantized_matmul,
    ternary_matmul,
)
from pallas_kernels.quantized_matmul import api as quantized
from pallas_kernels.quantized_matmul import mosaic_gpu as quantized_gpu
from pallas_kernels.ternary_matmul import api as ternary
from pallas_kernels.ternary_matmul import mosaic_gpu as ternary_gpu
from pallas_kernels.ternary_matmul import reference
from tests.kernels._cases import packed

CASES: list[tuple[str, int | None, dict[str, Any]]] = [
    ("t2", None, {}),
    ("t2", 32, {}),
    ("t2", 128, {}),
    ("t2", 256, {}),
    ("t2", 64, {"scale_dtype": "float32"}),
    ("sherry", None, {}),
    ("sherry", 64, {}),
    ("sherry", 128, {}),
    ("sherry", 128, {"group_stride": 16}),
    ("int8", None, {}),
    ("int8", 128, {}),
    ("int8", 128, {"symmetric": False}),
    ("int4", 128, {}),
    ("int4", 32, {}),
    ("int4", None, {"symmetric": False}),
    ("int4", 64, {"symmetric": False}),
    ("float8_e4m3", None, {}),
    ("float8_e5m2", 128, {}),
    ("mxfp8", None, {}),
    ("nvfp4", None, {}),
    ("mxfp4", None, {}),
]


def _name(case: Any) -> str:
    fmt, group, options = case
    return "-".join([fmt, str(group), *(f"{v}" for v in options.values())])


def _modules(fmt: str) -> tuple[ModuleType, ModuleType]:
    if fmt in ("t2", "sherry"):
        return ternary, ternary_gpu
    return quantized, quantized_gpu


def _public(fmt: str) -> Any:
    return ternary_matmul if fmt in ("t2", "sherry") else quantized_matmul


@pytest.mark.parametrize("case", CASES, ids=_name)
@pytest.mark.parametrize("shape", [(512, 48), (200, 24)])
def test_restore_is_the_exact_inverse_of_prepare(case: Any, shape: Any) -> None:
    fmt, group, options = case
    api, _ = _modules(fmt)
    planes, layout, _ = packed(fmt, *shape, group, **options)
    found: list[WeightLayout] = []

    # Compiled as one: much faster than operation by operation.
    @jax.jit
    def there_and_back(planes: Any) -> Any:
        ready, there = api.prepare(planes, layout, implementation="mosaic_gpu")
        back, home = api.restore(jax.lax.optimization_barrier(dict(ready)), there)
        found.extend((there, home))
        return dict(back)

    back = there_and_back(planes)
    there, home = found
    assert there.order == "hopper" and home == layout
    assert set(back) == set(planes)
    for name, plane in planes.items():
        assert back[name].dtype == plane.dtype
        a, b = (np.asarray(p).view(np.uint8) for p in (plane, back[name]))
        assert np.array_equal(a, b), name


def test_packed_bytes_stay_packed() -> None:
    for fmt, bits in (("t2", 2), ("sherry", 1.25), ("int4", 4), ("int8", 8)):
        planes, layout, _ = packed(fmt, 512, 128)
        ready, _ = _modules(fmt)[0].prepare(planes, layout, implementation="mosaic_gpu")
        held = sum(p.nbytes for name, p in ready.items() if name != "scale")
        assert held * 8 == bits * 512 * 128


def test_prepared_planes_run_on_xla_where_there_is_no_hopper() -> None:
    planes, layout, w = packed("sherry", 256, 64, 128)
    ready, there = ternary.prepare(planes, layout, implementation="mosaic_gpu")
    x = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    y = ternary_matmul(jnp.asarray(x), ready, there, implementation="xla")
    np.testing.assert_allclose(y, x @ w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fmt", "group", "clause"),
    [("t2", 96, "group_size 96"), ("nf4", 64, "nf4 has no kernel")],
)
def test_what_no_kernel_takes_is_refused(fmt: str, group: int, clause: str) -> None:
    planes, layout, _ = packed(fmt, 384, 32, group)
    with pytest.raises(KernelError, match=clause):
        _modules(fmt)[0].prepare(planes, layout, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("module", "fmt", "most"),
    [(ternary_gpu, "sherry", 65536), (quantized_gpu, "int8", 131072)],
)
def test_sums_that_may_overflow_are_refused(
    module: ModuleType, fmt: str, most: int
) -> None:
    layout = WeightLayout(format=fmt, k=most, n=128, group_size=2 * most)
    assert module.unsupported(None, layout, None) is None
    why = module.unsupported(None, layout.replace(k=most + 256), None)
    assert f"K is over {most}" in why


def _activations(kind: str, m: int, k: int) -> tuple[jax.Array, str | None]:
    rng = np.random.default_rng(m)
    if kind == "int8":
        return jnp.asarray(rng.integers(-127, 128, (m, k)), jnp.int8), None
    x = jnp.asarray(rng.standard_normal((m, k)), jnp.dtype(kind.removesuffix("-a8")))
    return x, "int8" if kind.endswith("-a8") else None


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=_name)
def test_products_equal_the_reference(case: Any) -> None:
    fmt, group, options = case
    api, gpu = _modules(fmt)
    run = jax.jit(
        gpu.matmul,
        static_argnames=("layout", "activation", "out_dtype"),
    )
    # Uneven K and N, several warps on a token, several tokens on a warp, the big
    # product with one block and with several.
    shapes = [(200, 24, (5,)), (2048, 384, (1, 7)), (1024, 256, (16, 300))]
    for k, n, ms in shapes:
        planes, layout, _ = packed(fmt, k, n, group, **options)
        ready, there = api.prepare(planes, layout, implementation="mosaic_gpu")
        for m in ms:
            kinds = ["bfloat16", "int8"] if m > 1 else ["bfloat16-a8", "float32"]
            if fmt in ("float8_e4m3", "float8_e5m2", "mxfp8"):
                kinds = ["bfloat16"]
            for kind in kinds:
                x, activation = _activations(kind, m, k)
                kwargs = dict(
                    x_scale=None,
                    bias=jnp.arange(n, dtype=jnp.float32),
                    activation=activation,
                    out_dtype=jnp.float32,
                )
                y = run(x, ready, layout=there, **kwargs)
                again = run(x, ready, layout=there, **kwargs)
                want = reference.matmul(x, planes, layout, **kwargs)
                assert np.array_equal(y, again), "two runs differ"
                error = jnp.max(jnp.abs(y - want)) / jnp.max(jnp.abs(want))
                # int8 is exact; others are 16-bit fixed point, and int8 weights and
                # the scales of groups meet in float32 sums.
                exact = kind in ("int8", "bfloat16-a8")
                limit = 1e-6 if exact else 5e-5 if kind == "float32" else 1e-3
                if fmt in ("float8_e4m3", "float8_e5m2", "mxfp8", "nvfp4", "mxfp4"):
                    limit = 2e-2 if activation else 5e-3
                assert error < limit, (k, n, m, kind, float(error))


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ["t2", "sherry", "int8"])
def test_integer_products_are_exact(fmt: str) -> None:
    api, gpu = _modules(fmt)
    for m in (1, 4, 40):
        planes, layout, _ = packed(fmt, 2304, 272)
        planes["scale"] = jnp.ones_like(planes["scale"])
        ready, there = api.prepare(planes, layout, implementation="mosaic_gpu")
        from pallas_kernels._dense import codes

        w = np.asarray(codes(planes, layout), np.int64)
        x = np.random.default_rng(m).integers(-127, 128, (m, 2304)).astype(np.int8)
        y = _public(fmt)(jnp.asarray(x), ready, there, implementation="mosaic_gpu")
        want = x.astype(np.int64) @ w
        assert np.array_equal(np.asarray(y), want.astype(np.float32))


@pytest.mark.gpu
def test_vmap_grad_and_zero_tokens_on_the_device() -> None:
    planes, layout, w = packed("sherry", 512, 128, 128)
    ready, there = ternary.prepare(planes, layout, implementation="mosaic_gpu")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 512)), jnp.float32)
    x = x.at[1].set(0)

    def f(x: jax.Array) -> jax.Array:
        return ternary_matmul(x, ready, there, activation="int8")

    np.testing.assert_allclose(jax.vmap(f)(x), f(x), rtol=1e-6)
    assert not np.asarray(f(x))[1].any()
    g = jax.grad(lambda x: f(x).sum())(x)
    np.testing.assert_allclose(g[0, 0], w.sum(1), rtol=1e-3, atol=1e-3)
    two = jax.tree.map(lambda p: jnp.stack([p, p]), dict(ready))
    y = jax.vmap(lambda x, p: ternary_matmul(x, p, there, activation="int8"))(
        x[:2], two
    )
    np.testing.assert_allclose(y, f(x)[:2], rtol=1e-6)
