"""The public products: what they refuse, which implementation runs, how they transform.

Numbers of the implementations are in `test_xla.py` and in those of the devices.
"""

from __future__ import annotations

import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

import pallas_kernels
from pallas_kernels import (
    KernelError,
    WeightLayout,
    cannot_hold,
    implementation_for,
    packed_matmul,
    prepare,
    quantized_matmul,
    restore,
    ternary_matmul,
)
from pallas_kernels._devices import has_flash
from tests.kernels._cases import packed

K, N = 256, 24


@pytest.fixture(scope="module")
def t2() -> Any:
    return packed("t2", K, N)


@pytest.fixture(scope="module")
def int8() -> Any:
    return packed("int8", K, N)


def _x(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


def _described(kind: str, platform: str) -> Any:
    """Code is traced for a device that is not here."""
    device = jax.sharding.AbstractDevice(
        device_kind=kind, num_cores=1, platform=platform
    )
    mesh = AbstractMesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device
    )
    return jax.sharding.use_abstract_mesh(mesh)


# What is refused, in one line that names what would work


INT8 = jnp.ones((2, K), jnp.int8)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"x": jnp.ones((2, K), jnp.int32)}, "x must be a float array or int8, not int32"),
    ({"x": jnp.ones((2, K), bool)}, "x must be a float array or int8, not bool"),
    ({"x": jnp.ones((2, K), jnp.uint8)}, "float array or int8, not uint8"),
    (
        {"x": jnp.ones((2, 255))},
        "x [2, 255] does not end in the 256 features that the weight [256, 24] takes",
    ),
    ({"x": jnp.ones(())}, "x [] does not end in the 256 features"),
    ({"activation": "fp8"}, "activation must be None or 'int8', not 'fp8'"),
    ({"x_scale": jnp.ones((2, 1))}, "x_scale goes with int8 x only"),
    (
        {"x": INT8, "x_scale": jnp.ones(3)},
        "x_scale [3] has not one entry for each row of x [2, 256]",
    ),
    ({"bias": jnp.ones(N + 1)}, "bias must have shape [24], not [25]"),
    ({"bias": jnp.ones((1, N))}, "bias must have shape [24], not [1, 24]"),
    (
        {"implementation": "cuda"},
        "unknown implementation 'cuda': use mosaic_gpu, triton, tpu, xla, reference "
        "or None",
    ),
    (
        {"implementation": "mosaic_gpu"},
        "implementation 'mosaic_gpu' reads planes in the order 'hopper', these are in "
        "'canonical': prepare them with implementation='mosaic_gpu'",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_calls_that_are_refused(t2: Any, change: Any, message: str) -> None:
    planes, layout, _ = t2
    options = {"x": jnp.ones((2, K)), **change}
    x = options.pop("x")
    with pytest.raises(KernelError, match=re.escape(message)) as caught:
        ternary_matmul(x, planes, layout, **options)
    assert "\n" not in str(caught.value)


def test_formats_belong_to_one_operation(t2: Any, int8: Any) -> None:
    x = jnp.ones((2, K))
    with pytest.raises(KernelError, match="no product here for the format 'int8': th"):
        ternary_matmul(x, *int8[:2])
    with pytest.raises(KernelError, match="this one takes int8, int4, float8_e4m3"):
        quantized_matmul(x, *t2[:2])
    odd = t2[1].replace(format="t1_6")
    for call in (
        lambda: packed_matmul(x, t2[0], odd),
        lambda: prepare(t2[0], odd),
        lambda: restore(t2[0], odd),
        lambda: cannot_hold("xla", odd),
    ):
        with pytest.raises(KernelError, match="no kernel for the format 't1_6': there"):
            call()


def _without(planes: Any, name: str) -> Any:
    return {key: plane for key, plane in planes.items() if key != name}


PLANES = [
    ("t2", {}, lambda p: _without(p, "scale"), "t2 takes the planes codes, scale, not"),
    ("t2", {}, lambda p: {**p, "high": p["codes"]}, "not codes, high, scale"),
    ("sherry", {}, lambda p: _without(p, "high"), "takes the planes codes, high, sc"),
    ("nvfp4", {}, lambda p: _without(p, "scale2"), "takes the planes codes, scale, s"),
    (
        "int4",
        {"symmetric": False},
        lambda p: _without(p, "zero"),
        "int4 takes the planes codes, scale, zero, not codes, scale",
    ),
    (
        "t2",
        {},
        lambda p: {**p, "codes": p["codes"][1:]},
        "t2: plane codes of a [256, 24] weight has shape [64, 24], not [63, 24]",
    ),
    (
        "t2",
        {},
        lambda p: {**p, "codes": p["codes"][:, 1:]},
        "plane codes of a [256, 24] weight has shape [64, 24], not [64, 23]",
    ),
    (
        "t2",
        {},
        lambda p: {**p, "scale": p["scale"][0]},
        "plane scale of a [256, 24] weight has shape [1, 24], not [24]",
    ),
    (
        "int8",
        {},
        lambda p: {**p, "scale": jnp.ones((2, N))},
        "int8: plane scale of a [256, 24] weight has shape [1, 24], not [2, 24]",
    ),
    (
        "nvfp4",
        {},
        lambda p: {**p, "scale2": jnp.ones((1, N))},
        "nvfp4: plane scale2 of a [256, 24] weight has shape [1, 1], not [1, 24]",
    ),
]


@pytest.mark.parametrize(
    ("fmt", "options", "change", "message"),
    PLANES,
    ids=[f"{p[0]}-{i}" for i, p in enumerate(PLANES)],
)
def test_planes_that_do_not_fit(
    fmt: str, options: Any, change: Any, message: str
) -> None:
    planes, layout, _ = packed(fmt, K, N, **options)
    with pytest.raises(KernelError, match=re.escape(message)):
        packed_matmul(jnp.ones((2, K)), change(planes), layout)
    with pytest.raises(KernelError, match=re.escape(message)):
        prepare(change(planes), layout, implementation="xla")


def test_planes_hold_whole_units() -> None:
    x = jnp.ones((1, 200))
    for options, rows in (({}, 28), ({"group_stride": 16}, 32)):
        planes, layout, _ = packed("sherry", 200, N, 64, **options)
        assert planes["codes"].shape == (rows, N), "words of 32, runs of 64"
        short = {**planes, "codes": planes["codes"][:-1]}
        message = f"has shape [{rows}, 24], not [{rows - 1}, 24]"
        with pytest.raises(KernelError, match=re.escape(message)):
            ternary_matmul(x, short, layout)
    planes, layout, w = packed("t2", 200, N)
    assert layout.run == 8 and planes["codes"].shape == (50, N)
    np.testing.assert_allclose(
        ternary_matmul(x, planes, layout), w.sum(0)[None], rtol=1e-5, atol=1e-4
    )
    with pytest.raises(KernelError, match=re.escape("[64, 24], not [50, 24]")):
        ternary_matmul(x, planes, layout.replace(run=128))


def test_planes_may_hold_the_padding_of_the_last_group() -> None:
    planes, layout, w = packed("t2", 200, N, 64)
    more = jnp.pad(planes["codes"], ((0, 32), (0, 0)), constant_values=0xFF)
    x = _x(3, 200)
    for name in ("reference", "xla"):
        y = ternary_matmul(x, {**planes, "codes": more}, layout, implementation=name)
        np.testing.assert_allclose(y, x @ w, rtol=1e-4, atol=1e-4)


# Which implementation runs


def test_none_takes_the_implementation_of_the_order(monkeypatch: Any, t2: Any) -> None:
    from pallas_kernels import _implementation

    called = []
    real = _implementation.call

    def spy(package: str, name: str, *args: Any, **kwargs: Any) -> Any:
        called.append(name)
        return real(package, name, *args, **kwargs)

    monkeypatch.setattr(_implementation, "call", spy)
    planes, layout, w = t2
    x = _x(2, K)
    ternary_matmul(x, planes, layout)
    ternary_matmul(x, planes, layout, implementation="reference")
    hopper, there = prepare(planes, layout, implementation="mosaic_gpu")
    for name in ("xla", "reference"):
        y = ternary_matmul(x, hopper, there, implementation=name)
        np.testing.assert_allclose(y, x @ w, rtol=1e-4, atol=1e-4)
    assert called == ["xla", "reference", "xla", "reference"]


@pytest.mark.parametrize("name", ["mosaic_gpu", "triton"])
def test_planes_prepared_for_another_device(t2: Any, name: str) -> None:
    planes, layout, _ = t2
    ready, there = prepare(planes, layout, implementation=name)
    with pytest.raises(KernelError) as caught:
        ternary_matmul(jnp.ones((1, K)), ready, there)
    message = str(caught.value)
    assert f"prepared for implementation {name!r}, but it is for" in message
    assert "this is a cpu: restore it and prepare it here" in message
    with pytest.raises(KernelError, match="cannot run this: it is for"):
        ternary_matmul(jnp.ones((1, K)), ready, there, implementation=name)
    other = "triton" if name == "mosaic_gpu" else "mosaic_gpu"
    with pytest.raises(KernelError, match=f"prepare them with implementation='{other}"):
        ternary_matmul(jnp.ones((1, K)), ready, there, implementation=other)


def test_preparing_twice_is_refused(t2: Any) -> None:
    ready, there = prepare(*t2[:2], implementation="mosaic_gpu")
    with pytest.raises(KernelError, match="prepared already, in 'hopper'"):
        prepare(ready, there, implementation="mosaic_gpu")


def test_an_order_that_nobody_reads(t2: Any) -> None:
    layout = t2[1].replace(order="vax")
    with pytest.raises(KernelError, match="no implementation here reads planes in th"):
        ternary_matmul(jnp.ones((1, K)), t2[0], layout)


def test_what_is_not_installed_is_named(monkeypatch: Any, t2: Any) -> None:
    from pallas_kernels import _implementation

    def fail(name: str) -> Any:
        raise ImportError("No module named 'somewhere'")

    _implementation.implementation.cache_clear()
    monkeypatch.setattr(_implementation.importlib, "import_module", fail)
    message = "'triton' is not available here (No module named 'somewhere'): use "
    with pytest.raises(KernelError, match=re.escape(message)):
        ternary_matmul(jnp.ones((1, K)), *t2[:2], implementation="triton")
    assert "is not available here" in cannot_hold("triton", t2[1])
    monkeypatch.undo()
    _implementation.implementation.cache_clear()


def test_reference_and_xla_hold_everything_as_it_is() -> None:
    for fmt in pallas_kernels.TERNARY + pallas_kernels.QUANTIZED:
        planes, layout, _ = packed(fmt, 96, 8)
        for name in ("reference", "xla"):
            assert cannot_hold(name, layout) is None
            same, there = prepare(planes, layout, implementation=name)
            assert there == layout and same.keys() == planes.keys()
            assert all(same[key] is planes[key] for key in planes)
            assert restore(same, there)[1] == layout


def test_prepare_falls_back_where_the_device_has_no_place() -> None:
    planes, layout, _ = packed("nf4", 128, 8, 64)
    with _described("NVIDIA H100 80GB HBM3", "cuda"):
        assert implementation_for() == "mosaic_gpu"
        _, there = prepare(planes, layout)
        assert there.order == "canonical"
        _, there = prepare(*packed("t2", 128, 8)[:2])
        assert there.order == "hopper"


@pytest.mark.parametrize(
    ("kind", "platform", "name"),
    [
        ("NVIDIA H200", "cuda", "mosaic_gpu"),
        ("NVIDIA GH200 480GB", "cuda", "mosaic_gpu"),
        ("TPU v5 lite", "tpu", "tpu"),
        ("cpu", "cpu", "xla"),
    ],
)
def test_implementation_for(kind: str, platform: str, name: str) -> None:
    with _described(kind, platform):
        assert implementation_for() == name
    assert implementation_for(jax.devices("cpu")[0]) == "xla"
    with jax.default_device(jax.devices("cpu")[3]):
        assert implementation_for() == "xla"


# How products transform


@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 3, K), (0, K), (2, 0, K)])
def test_leading_axes(t2: Any, shape: tuple[int, ...]) -> None:
    planes, layout, w = t2
    x = _x(*shape)
    y = ternary_matmul(x, planes, layout)
    assert y.shape == (*shape[:-1], N) and y.dtype == jnp.float32
    np.testing.assert_allclose(y, np.asarray(x) @ w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_bias_and_scales_of_rows(int8: Any, name: str) -> None:
    planes, layout, w = int8
    x = jnp.asarray(np.random.default_rng(0).integers(-128, 128, (2, 3, K)), jnp.int8)
    bias = _x(N, dtype=jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    for scale in (None, 0.5, jnp.arange(1.0, 7), jnp.arange(1.0, 7).reshape(2, 3, 1)):
        scale = None if scale is None else jnp.asarray(scale)
        y = quantized_matmul(
            x, planes, layout, x_scale=scale, bias=bias, implementation=name
        )
        rows = 1 if scale is None else np.asarray(scale, np.float64)
        rows = rows if np.ndim(rows) == 0 else np.reshape(rows, (2, 3, 1))
        want = wide @ w * rows + np.asarray(bias, np.float64)
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "out", "want"),
    [
        ("float32", None, "float32"),
        ("bfloat16", None, "bfloat16"),
        ("float16", None, "float16"),
        ("int8", None, "float32"),
        ("int8", "bfloat16", "bfloat16"),
        ("float32", "float16", "float16"),
        ("float8_e4m3fn", "float32", "float32"),
    ],
)
def test_dtypes(t2: Any, x: str, out: str | None, want: str) -> None:
    planes, layout, w = t2
    small = (_x(2, K) * 3).astype(x)
    y = ternary_matmul(small, planes, layout, out_dtype=out)
    assert y.dtype == want
    exact = np.asarray(small.astype(jnp.float32), np.float64) @ w
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2e-2, atol=0.3)


def test_activation_int8_quantizes_each_token(t2: Any) -> None:
    planes, layout, w = t2
    x = _x(4, K) * jnp.asarray([[1e-3], [1.0], [0.0], [1e4]])
    y = ternary_matmul(x, planes, layout, activation="int8")
    want = np.asarray(x, np.float64) @ w
    error = np.abs(np.asarray(y) - want).max(1)
    assert not np.asarray(y)[2].any()
    assert (error <= 2e-2 * np.abs(want).max(1)).all()
    # ... and is what quantizing first gives.
    from pallas_kernels._implementation import quantize_activation

    q, scale = quantize_activation(x)
    again = ternary_matmul(q, planes, layout, x_scale=scale)
    np.testing.assert_array_equal(y, again)


def test_quantize_activation() -> None:
    from pallas_kernels._implementation import WIDE_TOP, quantize_activation

    x = jnp.asarray([[0.5, -1.0, 0.25, 0.0], [0.0, 0.0, 0.0, 0.0]], jnp.bfloat16)
    for num_bytes, top, dtype in ((1, 127, jnp.int8), (2, WIDE_TOP, jnp.int16)):
        q, scale = quantize_activation(x, num_bytes)
        assert q.dtype == dtype and scale.shape == (2, 1)
        assert int(q[0, 1]) == -top and not q[1].any() and float(scale[1, 0]) == 0
        wide = np.asarray(x, np.float32)
        half = float(scale[0, 0]) / 2 * 1.001
        assert np.abs(np.asarray(q) * np.asarray(scale) - wide).max() <= half


def test_vmap_over_activations_is_more_rows(t2: Any) -> None:
    planes, layout, w = t2
    x = _x(5, 2, K)

    def f(x: jax.Array) -> jax.Array:
        return ternary_matmul(x, planes, layout)

    y = jax.jit(jax.vmap(f))(x)
    np.testing.assert_allclose(y, np.asarray(x) @ w, rtol=1e-4, atol=1e-4)
    # One product of ten rows, no loop over five.
    jaxpr = str(jax.make_jaxpr(jax.vmap(f))(x))
    assert "10,24" in jaxpr.replace(" ", "") and "5,2,256]" in jaxpr
    twice = jax.vmap(jax.vmap(f))(x[:, :, None])
    np.testing.assert_allclose(twice[:, :, 0], y, rtol=1e-5, atol=1e-5)


def test_vmap_over_scales_of_rows(t2: Any) -> None:
    planes, layout, _ = t2
    x = jnp.asarray(np.random.default_rng(1).integers(-9, 9, (3, 2, K)), jnp.int8)
    s = jnp.arange(1.0, 7).reshape(3, 2, 1)

    def f(x: jax.Array, s: jax.Array) -> jax.Array:
        return ternary_matmul(x, planes, layout, x_scale=s)

    want = np.stack([f(x[i], s[i]) for i in range(3)])
    np.testing.assert_array_equal(jax.vmap(f)(x, s), want)
    want = np.stack([f(x[i], s[0]) for i in range(3)])
    np.testing.assert_array_equal(jax.vmap(f, (0, None))(x, s[0]), want)
    want = np.stack([f(x[0], s[i]) for i in range(3)])
    np.testing.assert_array_equal(jax.vmap(f, (None, 0))(x[0], s), want)


@pytest.mark.parametrize("fmt", ["sherry", "nvfp4"])
def test_experts_by_vmap(fmt: str) -> None:
    some = [packed(fmt, 128, 16, seed=i) for i in range(3)]
    layout = some[0][1]
    planes = jax.tree.map(lambda *p: jnp.stack(p), *(s[0] for s in some))
    x, bias = _x(3, 4, 128), _x(3, 16)
    for name in ("reference", "xla"):

        def f(x: Any, p: Any, b: Any = None, name: str = name) -> jax.Array:
            return packed_matmul(x, p, layout, bias=b, implementation=name)

        want = np.stack([np.asarray(x[i]) @ some[i][2] for i in range(3)])
        y = jax.jit(jax.vmap(f))(x, planes, bias)
        np.testing.assert_allclose(
            y, want + np.asarray(bias)[:, None], rtol=1e-4, atol=1e-3
        )
        y = jax.vmap(f, (None, 0))(x[0], planes)
        want = np.stack([np.asarray(x[0]) @ s[2] for s in some])
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-3)
        y = jax.vmap(f, (None, None, 0))(x[0], some[0][0], bias)
        want = np.asarray(x[0]) @ some[0][2] + np.asarray(bias)[:, None]
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("fmt", ["t2", "int4", "nf4"])
def test_gradients_are_those_of_the_dense_product(fmt: str) -> None:
    planes, layout, w = packed(fmt, 128, 16, 64)
    dense = jnp.asarray(w, jnp.float32)
    x, bias = _x(2, 3, 128), _x(16)

    def loss(x: jax.Array, bias: jax.Array) -> jax.Array:
        return jnp.sum(packed_matmul(x, planes, layout, bias=bias) ** 2)

    def plain(x: jax.Array, bias: jax.Array) -> jax.Array:
        return jnp.sum((x @ dense + bias) ** 2)

    got = jax.jit(jax.grad(loss, (0, 1)))(x, bias)
    want = jax.grad(plain, (0, 1))(x, bias)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    low = jax.grad(lambda x, b: loss(x, b).astype(jnp.float32), (0, 1))(
        x.astype(jnp.bfloat16), bias.astype(jnp.bfloat16)
    )
    assert [g.dtype for g in low] == [jnp.bfloat16] * 2


def test_gradients_pass_straight_through_quantized_activations() -> None:
    planes, layout, w = packed("t2", 128, 16)
    x = _x(3, 128)

    def total(x: jax.Array) -> jax.Array:
        return ternary_matmul(x, planes, layout, activation="int8").sum()

    want = np.broadcast_to(w.sum(1), (3, 128))
    np.testing.assert_allclose(jax.grad(total)(x), want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.vmap(jax.grad(total))(x), want, rtol=1e-4, atol=1e-4)


def test_planes_and_integers_have_no_gradient() -> None:
    planes, layout, _ = packed("int8", 64, 8)
    x = jnp.ones((2, 64))

    def f(scale: jax.Array) -> jax.Array:
        return quantized_matmul(x, {**planes, "scale": scale}, layout).sum()

    assert not jax.grad(f)(planes["scale"]).any()
    small = jnp.ones((2, 64), jnp.int8)

    def g(bias: jax.Array, s: jax.Array) -> jax.Array:
        return quantized_matmul(small, planes, layout, x_scale=s, bias=bias).sum()

    d_bias, d_scale = jax.grad(g, (0, 1))(jnp.zeros(8), jnp.ones(2))
    np.testing.assert_array_equal(d_bias, jnp.full(8, 2.0))
    assert not d_scale.any()


def test_shapes_without_numbers() -> None:
    planes, layout, _ = packed("sherry", 128, 16)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), planes)
    x = jax.ShapeDtypeStruct((5, 128), jnp.bfloat16)
    y = jax.eval_shape(lambda x, p: ternary_matmul(x, p, layout), x, shapes)
    assert y.shape == (5, 16) and y.dtype == jnp.bfloat16


def test_layouts_are_static_values() -> None:
    layout = WeightLayout(format="int4", k=130, n=8, group_size=64)
    assert layout.groups == 3 and layout.per_byte == 2
    assert layout == layout.replace() and hash(layout) == hash(layout.replace())
    assert layout.replace(n=4) != layout


@pytest.mark.parametrize(
    ("capability", "has"),
    [("7.5", False), ("8.0", True), ("9.0", True), ("12.0", True)],
)
def test_flash_attention_needs_ampere(capability: str, has: bool) -> None:
    """A T4 has none of cuDNN's."""
    device = types.SimpleNamespace(platform="gpu", compute_capability=capability)
    assert has_flash(device) is has
    assert not has_flash(types.SimpleNamespace(platform="cpu"))
