"""Products by the reference and by XLA against numpy in float64, for every format."""

from __future__ import annotations

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import WeightLayout, _xla, packed_matmul
from pallas_kernels._dense import E2M1_LEVELS, codes, dense
from pallas_kernels.tune import random_weights
from tests.kernels._cases import packed

CASES: list[tuple[str, int | None, dict[str, Any]]] = [
    ("t2", None, {}),
    ("t2", 48, {}),
    ("t2", 128, {}),
    ("t2", 512, {"scale_dtype": "float32"}),
    ("sherry", None, {}),
    ("sherry", 64, {}),
    ("sherry", 128, {"group_stride": 16}),
    ("int8", None, {}),
    ("int8", 100, {}),
    ("int8", 32, {"symmetric": False}),
    ("int4", None, {"symmetric": False}),
    ("int4", 64, {"symmetric": False}),
    ("int4", 128, {}),
    ("float8_e4m3", None, {}),
    ("float8_e5m2", 128, {}),
    ("mxfp8", None, {}),
    ("nvfp4", None, {}),
    ("mxfp4", None, {}),
    ("nf4", 64, {}),
]
INTEGERS = [c for c in CASES if c[0] in ("t2", "sherry", "int8", "int4")]
# Divides nothing, in blocks of several groups.
SHAPE = (1037, 7)
NAMES = ("reference", "xla")


def _name(case: Any) -> str:
    fmt, group, options = case
    return "-".join([fmt, str(group), *(f"{v}" for v in options.values())])


def _error(y: Any, want: Any) -> float:
    y = np.asarray(y, np.float64)
    assert np.isfinite(y).all()
    return float(np.abs(y - want).max() / np.abs(want).max())


def _both(x: Any, planes: Any, layout: WeightLayout) -> Any:
    """Products of every implementation here, compiled at once."""

    def run(x: jax.Array, planes: Any) -> list[jax.Array]:
        return [packed_matmul(x, planes, layout, implementation=n) for n in NAMES]

    return jax.jit(run)(x, planes)


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_float_activations(case: Any, rng: Any) -> None:
    fmt, group, options = case
    planes, layout, w = packed(fmt, *SHAPE, group, **options)
    x = rng.standard_normal((3, SHAPE[0])).astype(np.float32)
    for y in _both(x, planes, layout):
        assert _error(y, x.astype(np.float64) @ w) < 2e-6


@pytest.mark.parametrize("m", [1, 300])
@pytest.mark.parametrize("fmt", ["t2", "sherry", "int4", "float8_e4m3", "nvfp4"])
def test_one_token_and_many(fmt: str, m: int, rng: Any) -> None:
    planes, layout, w = packed(fmt, 1000, 72)
    x = rng.standard_normal((m, 1000)).astype(np.float32)
    y = jax.jit(lambda x, p: packed_matmul(x, p, layout))(x, planes)
    assert _error(y, x.astype(np.float64) @ w) < 2e-6


@pytest.mark.parametrize("case", INTEGERS, ids=_name)
def test_integer_activations(case: Any, rng: Any) -> None:
    fmt, group, options = case
    planes, layout, _ = packed(fmt, 1037, 7, group, **options)
    x = rng.integers(-128, 128, (3, 1037)).astype(np.int8)
    scale = np.asarray(dense(planes, layout), np.float64)
    want = x.astype(np.float64) @ scale
    for y in _both(x, planes, layout):
        # Scales are float32; the sums are exact.
        assert _error(y, want) < 1e-6


@pytest.mark.parametrize(
    ("fmt", "symmetric", "code"),
    [("int8", True, 127), ("int8", False, 255), ("int4", False, 15), ("t2", True, 1)],
)
def test_sums_beyond_the_integers_of_float32_are_exact(
    fmt: str, symmetric: bool, code: int
) -> None:
    # Odd numbers above 2^24 are no float32 sums: one step too long would round them.
    k = {127: 4000, 255: 4000, 15: 20000, 1: 140000}[code]
    options = {} if symmetric else {"symmetric": False}
    planes, layout, _ = packed(fmt, k, 2, **options)
    full = {"t2": 0b10101010, "int4": 0xFF}.get(fmt, code)
    planes = {
        name: jnp.full_like(p, {"codes": full, "scale": 1, "zero": 0}[name])
        for name, p in planes.items()
    }
    x = np.full((1, k), 127, np.int8)
    x[0, ::3] = 126
    want = int(x.astype(np.int64).sum()) * code
    assert want > 1 << 24
    # Scales are applied to float32; look at the integers before that.
    seen = []
    real = _xla.lax.fori_loop

    def spy(*args: Any) -> Any:
        seen.append(real(*args))
        return seen[-1]

    with mock.patch.object(_xla.lax, "fori_loop", spy):
        total = _xla._by_blocks(jnp.asarray(x), planes, layout)
    assert seen[0].dtype == jnp.int32 and seen[0].tolist() == [[want, want]]
    assert total.tolist() == [[float(np.float32(want))] * 2]
    y = packed_matmul(jnp.asarray(x), planes, layout, implementation="xla")
    np.testing.assert_array_equal(y, total)


@pytest.mark.parametrize("fmt", ["t2", "sherry", "int8", "int4"])
def test_integer_products_equal_int64(fmt: str, rng: Any) -> None:
    planes, layout, _ = packed(fmt, 2336, 40)
    planes["scale"] = jnp.ones_like(planes["scale"])
    layout = layout.replace(group_size=2336) if layout.groups == 1 else layout
    w = np.asarray(codes(planes, layout), np.int64)
    x = rng.integers(-128, 128, (3, 2336)).astype(np.int8)
    want = (x.astype(np.int64) @ w).astype(np.float32)
    for y in _both(x, planes, layout):
        np.testing.assert_array_equal(y, want)


def test_every_code_of_the_small_floats() -> None:
    """One-hot activations read the weight back, bit for bit."""
    eye = jnp.eye(256, dtype=jnp.float32)
    for fmt, dtype in (
        ("float8_e4m3", jnp.float8_e4m3fn),
        ("float8_e5m2", jnp.float8_e5m2),
    ):
        bits = jnp.arange(256, dtype=jnp.uint8)[:, None]
        stored = jax.lax.bitcast_convert_type(bits, dtype)
        wide = np.asarray(stored).astype(np.float32)
        stored = jnp.where(jnp.isfinite(wide), stored, jnp.zeros_like(stored))
        wide = np.where(np.isfinite(wide), wide, 0)
        layout = WeightLayout(format=fmt, k=256, n=1, group_size=256)
        planes = {"codes": stored, "scale": jnp.ones((1, 1))}
        y = packed_matmul(eye, planes, layout)
        np.testing.assert_array_equal(y, wide)
        np.testing.assert_array_equal(
            _xla._expand({"codes": bits}, layout),
            np.asarray(jax.lax.bitcast_convert_type(bits, dtype)).astype(np.float32),
        )
    pairs = jnp.arange(256, dtype=jnp.uint8)[:, None]
    layout = WeightLayout(format="mxfp4", k=512, n=1, group_size=32)
    planes = {"codes": pairs, "scale": jnp.full((16, 1), 127, jnp.uint8)}
    y = packed_matmul(jnp.eye(512), planes, layout)
    levels = np.asarray([*E2M1_LEVELS, *(-v for v in E2M1_LEVELS)], np.float32)
    want = np.stack([levels[np.arange(256) & 15], levels[np.arange(256) >> 4]], 1)
    np.testing.assert_array_equal(y[:, 0], want.ravel())


@pytest.mark.parametrize("fmt", ["float8_e4m3", "float8_e5m2"])
def test_nan_in_a_weight_is_not_lost(fmt: str) -> None:
    planes, layout, _ = packed(fmt, 64, 8)
    codes_ = planes["codes"].at[3, 2].set(jnp.nan)
    for name in NAMES:
        y = packed_matmul(
            jnp.ones((1, 64)), {**planes, "codes": codes_}, layout, implementation=name
        )
        assert np.isnan(np.asarray(y)[0]).tolist() == [i == 2 for i in range(8)]


@pytest.mark.parametrize("name", NAMES)
def test_scales_of_zero_and_denormal_scales(name: str) -> None:
    x = jnp.ones((2, 256))
    for fmt in ("t2", "sherry", "int8", "int4"):
        planes, layout, w = packed(fmt, 256, 8, 64)
        scale = planes["scale"].at[:, 3].set(0)
        y = packed_matmul(x, {**planes, "scale": scale}, layout, implementation=name)
        assert not y[:, 3].any() and jnp.isfinite(y).all()
    # The least scale of MX formats is 2^-127, a denormal float32.
    planes, layout, _ = packed("mxfp8", 256, 8)
    for low, scale in ((0, 2.0**-127), (1, 2.0**-126), (2, 2.0**-125)):
        tiny = {**planes, "scale": jnp.full_like(planes["scale"], low)}
        values = np.asarray(planes["codes"]).astype(np.float64)
        y = packed_matmul(x * 2.0**100, tiny, layout, implementation=name)
        want = (values.sum(0) * 2.0**100 * scale)[None].repeat(2, 0)
        # CPUs flush denormals: weights below 2^-126 count as 0, or all of them.
        if low or np.asarray(y).any():
            np.testing.assert_allclose(y, want, rtol=1e-4, atol=256 * 2.0**-26)


def test_float16_and_bfloat16_keep_the_precision_of_the_weight(rng: Any) -> None:
    planes, layout, w = packed("int8", 512, 32)
    for dtype in (jnp.bfloat16, jnp.float16):
        x = jnp.asarray(rng.standard_normal((4, 512)), dtype)
        y = packed_matmul(x, planes, layout, out_dtype=jnp.float32)
        assert _error(y, np.asarray(x, np.float64) @ w) < 2e-6


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_at_once_is_the_same_product(case: Any, rng: Any) -> None:
    """What other devices than CPUs compile."""
    fmt, group, options = case
    planes, layout, w = packed(fmt, 200, 24, group, **options)
    x = rng.standard_normal((3, 200)).astype(np.float32)
    small = rng.integers(-127, 128, (3, 200)).astype(np.int8)
    some = [x, small, jnp.asarray(x, jnp.bfloat16), jnp.asarray(x, jnp.float8_e4m3fn)]
    run = jax.jit(lambda some, p: [_xla._at_once(x, p, layout) for x in some])
    for y, x, limit in zip(
        run(some, planes), some, (2e-6,) * 2 + (1e-2,) * 2, strict=True
    ):
        assert _error(y, np.asarray(x).astype(np.float64) @ w) < limit


@pytest.mark.parametrize("fmt", ["t2", "sherry", "int8", "int4", "nvfp4", "nf4"])
@pytest.mark.parametrize("m", [1, 256])
def test_the_dense_weight_never_exists(fmt: str, m: int) -> None:
    k = n = 2048
    group = {"int4": 128, "nvfp4": 16, "nf4": 64}.get(fmt, k)
    layout = WeightLayout(format=fmt, k=k, n=n, group_size=group)
    (planes,), _ = random_weights(layout, 1, "xla")
    x = jax.ShapeDtypeStruct((m, k), jnp.float32)
    product = jax.jit(lambda x, p: packed_matmul(x, p, layout))
    temp = product.lower(x, planes).compile().memory_analysis().temp_size_in_bytes
    # A block of rows, its codes, and the sums: a quarter of the weight for one token.
    assert temp < k * n * (1 if m == 1 else 3)


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.asarray(jax.devices("cpu")[:8]).reshape(2, 4), ("a", "b"))


@pytest.mark.parametrize("fmt", ["t2", "sherry", "int4"])
@pytest.mark.parametrize("axes", [("a", None), (None, "b"), ("b", "a")])
def test_sharded_by_the_compiler(mesh: Mesh, fmt: str, axes: Any, rng: Any) -> None:
    """No device gets rows or columns of the weight that another has."""
    k, n = 1024, 64
    planes, layout, w = packed(fmt, k, n, 128 if fmt == "t2" else None)
    spread = {}
    for name, p in planes.items():
        whole = name == "scale2" or (name == "scale" and layout.groups == 1)
        spec = P(None if whole else axes[0], None if name == "scale2" else axes[1])
        spread[name] = jax.device_put(p, NamedSharding(mesh, spec))
    x = rng.standard_normal((3, k)).astype(np.float32)
    there = jax.device_put(x, NamedSharding(mesh, P(None, axes[0])))
    product = jax.jit(lambda x, p: packed_matmul(x, p, layout))
    compiled = product.lower(there, spread).compile()
    assert _error(compiled(there, spread), x.astype(np.float64) @ w) < 2e-6
    text = compiled.as_text()
    for moved in ("all-gather(", "all-to-all(", "collective-permute("):
        assert moved not in text
    assert ("all-reduce(" in text) == (axes[0] is not None)
