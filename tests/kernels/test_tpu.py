"""The TPU kernels: their plane order, their arithmetic in Pallas' interpret mode, and
lowering for a TPU. What a TPU's compiler says is in `test_tpu_compile.py`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels import (
    KernelError,
    WeightLayout,
    _tpu,
    packed_matmul,
    prepare,
    restore,
)
from pallas_kernels._dense import codes, dense
from tests.kernels._cases import packed

ZEROS = {"symmetric": False}
CASES: list[tuple[str, int | None, dict[str, Any]]] = [
    ("t2", None, {}),
    ("t2", 32, {"scale_dtype": "float32"}),
    ("t2", 256, {}),
    ("sherry", None, {}),
    ("sherry", 128, {}),
    ("sherry", 64, {"group_stride": 16}),
    ("int8", None, {}),
    ("int8", 32, ZEROS),
    ("int4", None, ZEROS),
    ("int4", 128, {"scale_dtype": "float16"}),
    ("float8_e4m3", None, {}),
    ("float8_e5m2", 128, {}),
    ("mxfp8", None, {}),
    ("nvfp4", None, {}),
    ("mxfp4", None, {}),
    ("nf4", 64, {}),
]


def _name(case: Any) -> str:
    return "-".join([case[0], str(case[1]), *map(str, case[2].values())])


def _activations(kind: str, m: int, k: int) -> jax.Array:
    rng = np.random.default_rng(m)
    if kind == "int8":
        return jnp.asarray(rng.integers(-128, 128, (m, k)), jnp.int8)
    return jnp.asarray(rng.standard_normal((m, k)), jnp.dtype(kind))


def _product(x: jax.Array, ready: Any, there: WeightLayout, **options: Any) -> Any:
    options = {"x_scale": None, "bias": None, "activation": None, **options}
    options.setdefault("out_dtype", jnp.float32)
    return jax.jit(lambda x, p: _tpu.matmul(x, p, there, **options))(x, ready)


# Plane order


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_restore_is_the_exact_inverse_of_prepare(case: Any) -> None:
    fmt, group, options = case
    planes, layout, _ = packed(fmt, 200, 24, group, **options)

    def there_and_back(p: Any) -> Any:
        ready, there = prepare(p, layout, implementation="tpu")
        back, home = restore(ready, there)
        assert there.order == "tpu" and home == layout
        return back

    back = jax.jit(there_and_back)(planes)
    assert set(back) == set(planes)
    for name, plane in planes.items():
        assert back[name].dtype == plane.dtype
        a, b = (np.asarray(p).view(np.uint8) for p in (plane, back[name]))
        assert np.array_equal(a, b), name


@pytest.mark.parametrize("stride", [1, 16])
def test_any_bytes_are_a_sherry_weight(rng: Any, stride: int) -> None:
    k, n = 512, 40
    layout = WeightLayout(format="sherry", k=k, n=n, group_size=k, group_stride=stride)
    planes = {
        "codes": jnp.asarray(rng.integers(0, 256, (k // 8, n)), jnp.uint8),
        "high": jnp.asarray(rng.integers(0, 256, (k // 32, n)), jnp.uint8),
        "scale": jnp.ones((1, n), jnp.float32),
    }
    ready, there = prepare(planes, layout, implementation="tpu")
    back, _ = restore(ready, there)
    assert all(np.array_equal(back[name], planes[name]) for name in planes)
    w = np.asarray(codes(planes, layout), np.int64)
    assert set(np.unique(w)) == {-1, 0, 1} and (w == 0).sum() == k * n // 4
    x = _activations("int8", 3, k)
    want = np.asarray(x, np.int64) @ w
    assert np.array_equal(_product(x, ready, there), want)
    # As float8 the halves of an activation are multiplied one by one.
    assert np.array_equal(_product(x, ready, there, gen=7), want)


def test_packed_bytes_stay_packed() -> None:
    sizes = {"t2": 2, "sherry": 1.25, "int4": 4, "nvfp4": 4, "int8": 8, "mxfp8": 8}
    for fmt, bits in sizes.items():
        planes, layout, _ = packed(fmt, 1024, 128)
        ready = jax.eval_shape(
            lambda p, layout=layout: prepare(p, layout, implementation="tpu")[0],
            planes,
        )
        held = sum(
            p.size * p.dtype.itemsize
            for name, p in ready.items()
            if name in ("codes", "high")
        )
        assert held * 8 == bits * 1024 * 128


# Products


@pytest.mark.parametrize(
    ("fmt", "m", "shape", "options", "gen"),
    [
        ("t2", 1, (200, 24), {}, 5),
        ("t2", 300, (300, 140), {}, 7),
        ("sherry", 1, (2304, 24), {}, 5),
        ("sherry", 300, (300, 24), {}, 6),
        ("sherry", 3, (200, 24), {"group_stride": 16}, 7),
        ("int4", 3, (2304, 140), {}, 7),
        ("int4", 1, (200, 24), ZEROS, 7),
        ("int8", 300, (200, 24), {}, 7),
        ("int8", 3, (200, 24), ZEROS, 5),
    ],
)
def test_integer_products_are_exact(
    fmt: str, m: int, shape: Any, options: Any, gen: int
) -> None:
    planes, layout, _ = packed(fmt, *shape, **options)
    planes["scale"] = jnp.ones_like(planes["scale"])
    ready, there = prepare(planes, layout, implementation="tpu")
    back, home = restore(ready, there)
    assert home == layout and np.array_equal(back["codes"], planes["codes"])
    x = _activations("int8", m, shape[0])
    want = np.asarray(x, np.int64) @ np.asarray(codes(planes, layout), np.int64)
    assert np.array_equal(_product(x, ready, there, gen=gen), want)


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_products_equal_a_float64_product(case: Any) -> None:
    fmt, group, options = case
    k, n, m = 200, 24, 5
    planes, layout, _ = packed(fmt, k, n, group, **options)
    ready, there = prepare(planes, layout, implementation="tpu")
    bias = jnp.arange(n, dtype=jnp.float32)
    w = np.asarray(dense(planes, layout), np.float64)
    kinds = [("bfloat16", 5)]
    if fmt != "nf4":
        kinds.append(("float32", 6) if group == 32 else ("int8", 7 if group else 6))
    for kind, gen in kinds:
        x = _activations(kind, m, k)
        scale = jnp.linspace(0.0, 2.0, m)[:, None] if kind == "int8" else None
        y = _product(x, ready, there, x_scale=scale, bias=bias, gen=gen)
        want = np.asarray(x, np.float64) @ w
        want = want * (1 if scale is None else np.asarray(scale)) + np.asarray(bias)
        error = np.abs(np.asarray(y) - want).max() / np.abs(want).max()
        # Levels of nf4 are rounded to bfloat16, all other codes are exact in it.
        assert error < (3e-3 if fmt == "nf4" else 2e-6), (kind, gen, error)


@pytest.mark.parametrize(("fmt", "group"), [("t2", 64), ("int4", 32), ("mxfp4", None)])
def test_scaled_weights_give_the_same_product(fmt: str, group: int | None) -> None:
    planes, layout, _ = packed(fmt, 200, 24, group)
    ready, there = prepare(planes, layout, implementation="tpu")
    x = _activations("bfloat16", 80, 200)
    assert _tpu.plan(80, x.dtype, there, 6).scaled
    w = np.asarray(dense(planes, layout), np.float64)
    want = np.asarray(x, np.float64) @ w
    error = np.abs(_product(x, ready, there) - want).max() / np.abs(want).max()
    assert error < (5e-3 if fmt == "int4" else 2e-6)


def test_zero_scales_and_output_dtypes() -> None:
    planes, layout, _ = packed("sherry", 256, 24, 128)
    planes["scale"] = planes["scale"].at[:, :8].set(0)
    ready, there = prepare(planes, layout, implementation="tpu")
    x = _activations("float16", 2, 256)
    for dtype in (jnp.bfloat16, jnp.float16):
        y = _product(x, ready, there, activation="int8", out_dtype=dtype)
        assert y.dtype == dtype
        assert not np.asarray(y[:, :8], np.float32).any() and np.asarray(y)[:, 8:].any()


def test_vmap_and_grad_through_the_public_product() -> None:
    planes, layout, w = packed("t2", 256, 24)
    ready, there = prepare(planes, layout, implementation="tpu")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 256)), jnp.float32)
    x = x.at[1].set(0)

    def f(x: jax.Array, planes: Any = ready) -> jax.Array:
        return packed_matmul(x, planes, there, activation="int8", implementation="tpu")

    y = jax.jit(f)(x)
    np.testing.assert_allclose(y, x @ w, atol=0.2)
    assert not np.asarray(y)[1].any()
    np.testing.assert_allclose(jax.vmap(f)(x), y, rtol=1e-6)
    g = jax.grad(lambda x: f(x).sum())(x)
    np.testing.assert_allclose(g[0, 0], w.sum(1), rtol=1e-3, atol=1e-3)
    two = jax.tree.map(lambda p: jnp.stack([p, p]), dict(ready))
    np.testing.assert_allclose(jax.vmap(f)(x[:2], two), y[:2], rtol=1e-6)


# Devices, and what is left out


def _described(kind: str) -> Any:
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    mesh = AbstractMesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device
    )
    return jax.sharding.use_abstract_mesh(mesh)


def test_the_generation_is_that_of_the_device() -> None:
    assert _tpu.generation() == 6  # of what is no TPU
    kinds = {"TPU v4": 4, "TPU v5 lite": 5, "TPU v5p": 5, "TPU v6 lite": 6, "TPU7x": 7}
    for kind, gen in kinds.items():
        with _described(kind):
            assert _tpu.generation() == gen
    layout = WeightLayout(format="t2", k=256, n=128, group_size=256)
    assert _tpu.plan(16, "int8", layout, 6).operand == jnp.int8
    assert _tpu.plan(16, "int8", layout, 7).operand == jnp.float8_e4m3fn
    assert _tpu.plan(512, "int8", layout, 7).operand == jnp.bfloat16
    assert _tpu.plan(512, "int8", layout, 5).operand == jnp.int8


@pytest.mark.parametrize("fmt", ["t2", "sherry", "int4", "nvfp4", "nf4", "mxfp8"])
def test_lowers_for_a_tpu_from_a_cpu(fmt: str) -> None:
    planes, layout, _ = packed(fmt, 512, 128)
    ready, there = prepare(planes, layout, implementation="tpu")
    x = jax.ShapeDtypeStruct((4, 512), jnp.bfloat16)

    def f(x: jax.Array, planes: Any) -> jax.Array:
        return packed_matmul(x, planes, there, implementation="tpu")

    with _described("TPU v5 lite"):
        lowered = jax.jit(f).trace(x, ready).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


@pytest.mark.parametrize(
    ("layout", "rows", "clause"),
    [
        (
            WeightLayout(format="int8", k=256, n=8, group_size=24),
            None,
            "scale groups of 24 weights are no multiple of 32, as int8 needs here",
        ),
        (
            WeightLayout(format="sherry", k=256, n=8, group_size=96, group_stride=16),
            None,
            "scale groups of 96 weights are no multiple of 64, as sherry needs here",
        ),
        (
            WeightLayout(format="t2", k=2**18, n=8, group_size=2**18),
            None,
            "K is over 131072",
        ),
        (
            WeightLayout(format="t2", k=256, n=8, group_size=256),
            0,
            "an empty product",
        ),
    ],
)
def test_what_is_left_out_has_a_reason(layout: Any, rows: Any, clause: str) -> None:
    x = None if rows is None else jax.ShapeDtypeStruct((rows, layout.k), jnp.int8)
    assert _tpu.unsupported(x, layout, None).startswith(clause)


def test_a_weight_that_does_not_fit_is_not_prepared() -> None:
    planes, layout, _ = packed("int8", 384, 32, 24)
    with pytest.raises(KernelError, match="cannot hold this weight: scale groups"):
        prepare(planes, layout, implementation="tpu")
