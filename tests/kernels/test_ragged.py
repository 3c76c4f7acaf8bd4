"""Ragged products: rows sorted by expert times the packed weight of their expert."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax.prepare import kernel_view
from pallas_kernels import (
    KernelError,
    WeightLayout,
    _hopper_gemm,
    prepare,
    ragged_matmul,
)
from pallas_kernels._dense import codes
from pallas_kernels.ragged_matmul import mosaic_gpu, reference
from pallas_kernels.ragged_matmul._visits import visit_bound, visits

CASES: list[tuple[str, int | None, dict[str, Any]]] = [
    ("t2", None, {}),
    ("sherry", 64, {"group_stride": 16}),
    ("int8", None, {}),
    ("int4", 128, {}),
    ("int4", 64, {"symmetric": False}),
    ("nvfp4", None, {}),
]
# Empty experts, one expert for all rows, rows left over, no rows for anybody.
SIZES = [[3, 0, 7, 1], [0, 0, 13, 0], [1, 2, 0, 4], [0, 0, 0, 0], [2, 5, 3, 3]]
ROWS, EXPERTS = 13, 4


def _name(case: Any) -> str:
    fmt, group, options = case
    return "-".join([fmt, str(group), *(f"{v}" for v in options.values())])


def experts(
    fmt: str, k: int, n: int, count: int, group: int | None = None, **options: Any
) -> tuple[dict[str, jax.Array], WeightLayout, np.ndarray]:
    """Canonical planes of random weights of experts, and the weights in float64."""
    if fmt != "nvfp4":
        options["granularity"] = "channel" if group is None else "group"
    if group is not None:
        options["group_size"] = group
    w = _normal((count, k, n), 7)

    @jax.jit
    def make(w: jax.Array) -> Any:
        q = aj.quantize(w, format=fmt, **options)
        return q, q.dequantize(jnp.float32)

    q, dense = make(w)
    planes, layout = kernel_view(q)
    return dict(planes), layout, np.asarray(dense, np.float64)


def loop(x: np.ndarray, w: np.ndarray, sizes: Any) -> np.ndarray:
    """The product in the precision of its arguments, row by row."""
    y = np.zeros((x.shape[0], w.shape[2]), np.result_type(x, w))
    owners = np.repeat(np.arange(w.shape[0]), sizes)
    for row, expert in enumerate(owners):
        y[row] = x[row] @ w[expert]
    return y


def _normal(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _close(y: Any, want: Any, limit: float = 1e-5) -> None:
    y, want = np.asarray(y, np.float64), np.asarray(want, np.float64)
    assert y.shape == want.shape
    assert np.abs(y - want).max() <= limit * max(np.abs(want).max(), 1e-3)


@pytest.mark.parametrize("align", [1, 8])
def test_visits_cover_every_row_once(align: int) -> None:
    rng = np.random.default_rng(align)
    run = jax.jit(visits, static_argnums=(1, 2, 3))
    for count, rows, block in ((1, 5, 8), (4, 33, 8), (6, 40, 16)):
        for _ in range(20):
            cuts = np.sort(rng.integers(0, rows + 1, count))
            sizes = np.diff(cuts, prepend=0).astype(np.int32)
            block = min(block, rows) if align == 1 else block
            table, busy = run(sizes, rows, block, align)
            assert table.shape == (visit_bound(rows, count, block, align), 4)
            owners = np.full(rows, -1)
            for expert, first, lo, hi in np.asarray(table):
                assert 0 <= lo <= hi <= block and first % align == 0
                assert align > 1 or first + block <= rows
                assert (owners[first + lo : first + hi] == -1).all()
                owners[first + lo : first + hi] = expert
            want = np.repeat(np.arange(count + 1), np.append(sizes, rows - cuts[-1]))
            assert np.array_equal(owners, want)
            meant = (table[:, 0] < count) & (table[:, 2] < table[:, 3])
            assert meant[: int(busy)].all() and meant.sum() == busy


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_products_are_those_of_the_definition(case: Any) -> None:
    fmt, group, options = case
    planes, layout, w = experts(fmt, 256, 24, EXPERTS, group, **options)
    x = _normal((ROWS, 256))
    run = jax.jit(lambda x, sizes: ragged_matmul(x, planes, layout, sizes))
    for sizes in SIZES:
        _close(run(x, jnp.asarray(sizes)), loop(np.asarray(x, np.float64), w, sizes))
    sizes = jnp.asarray(SIZES[0])
    want = ragged_matmul(x, planes, layout, sizes, implementation="reference")
    _close(run(x, sizes), want)
    dense = jax.lax.ragged_dot(x, jnp.asarray(w, jnp.float32), sizes)
    _close(want, dense)


def test_windows_of_many_rows() -> None:
    planes, layout, w = experts("int4", 128, 16, 3, 64)
    x = _normal((300, 128))
    for sizes in ([150, 0, 149], [299, 1, 0], [10, 20, 30]):
        y = ragged_matmul(x, planes, layout, jnp.asarray(sizes))
        _close(y, loop(np.asarray(x, np.float64), w, sizes))


@pytest.mark.parametrize(
    ("fmt", "name"), [("t2", "xla"), ("sherry", "xla"), ("int8", "reference")]
)
def test_integer_products_are_exact(fmt: str, name: str) -> None:
    planes, layout, _ = experts(fmt, 512, 24, EXPERTS)
    planes["scale"] = jnp.ones_like(planes["scale"])
    q = jax.jit(jax.vmap(lambda p: codes(p, layout)))(planes)
    x = np.random.default_rng(0).integers(-127, 128, (ROWS, 512)).astype(np.int8)
    sizes = SIZES[0]
    y = ragged_matmul(
        jnp.asarray(x), planes, layout, jnp.asarray(sizes), implementation=name
    )
    want = loop(x.astype(np.int64), np.asarray(q, np.int64), sizes)
    assert y.dtype == jnp.float32 and np.array_equal(y, want.astype(np.float32))


def test_one_row_no_row_and_dtypes() -> None:
    planes, layout, w = experts("t2", 128, 8, EXPERTS)
    x = _normal((1, 128)).astype(jnp.bfloat16)
    for expert in range(EXPERTS):
        sizes = jnp.zeros(EXPERTS, jnp.int32).at[expert].set(1)
        y = ragged_matmul(x, planes, layout, sizes)
        assert y.dtype == jnp.bfloat16
        _close(y, np.asarray(x, np.float64) @ w[expert], 1e-2)
        wide = ragged_matmul(x, planes, layout, sizes, out_dtype=jnp.float32)
        assert wide.dtype == jnp.float32
    none = ragged_matmul(x[:0], planes, layout, sizes)
    assert none.shape == (0, 8) and none.dtype == jnp.bfloat16


def test_scales_and_quantization_of_rows() -> None:
    planes, layout, w = experts("int8", 128, 8, EXPERTS)
    sizes = jnp.asarray(SIZES[2])
    x = np.random.default_rng(0).integers(-127, 128, (ROWS, 128)).astype(np.int8)
    scale = jnp.arange(1, ROWS + 1, dtype=jnp.float32)[:, None]
    y = ragged_matmul(jnp.asarray(x), planes, layout, sizes, x_scale=scale)
    _close(y, loop(x.astype(np.float64), w, SIZES[2]) * np.asarray(scale))
    one = ragged_matmul(jnp.asarray(x), planes, layout, sizes, x_scale=jnp.float32(2))
    _close(one, 2 * loop(x.astype(np.float64), w, SIZES[2]))
    real = _normal((ROWS, 128))
    for name in ("xla", "reference"):
        a8 = ragged_matmul(
            real, planes, layout, sizes, activation="int8", implementation=name
        )
        _close(a8, loop(np.asarray(real, np.float64), w, SIZES[2]), 2e-2)


def test_gradient_is_that_of_the_dense_weight() -> None:
    planes, layout, w = experts("sherry", 128, 16, EXPERTS, 64)
    dense, c = jnp.asarray(w, jnp.float32), _normal((ROWS, 16), 1)

    def packed_loss(x: jax.Array, sizes: jax.Array) -> jax.Array:
        return jnp.sum(c * ragged_matmul(x, planes, layout, sizes) ** 2)

    def dense_loss(x: jax.Array, sizes: jax.Array) -> jax.Array:
        return jnp.sum(c * jax.lax.ragged_dot(x, dense, sizes) ** 2)

    x, gradient = _normal((ROWS, 128)), jax.jit(jax.grad(packed_loss))
    for sizes in SIZES[:3]:
        args = (x, jnp.asarray(sizes))
        got = gradient(*args)
        _close(got, jax.jit(jax.grad(dense_loss))(*args), 1e-4)
        assert not np.asarray(got)[sum(sizes) :].any()


def test_vmap_over_rows_sizes_and_weights() -> None:
    planes, layout, w = experts("int4", 128, 8, EXPERTS, 64)
    x, sizes = _normal((3, ROWS, 128)), jnp.asarray(SIZES[:3])

    def f(x: jax.Array, sizes: jax.Array, planes: Any = planes) -> jax.Array:
        return ragged_matmul(x, planes, layout, sizes)

    want = [loop(np.asarray(x[i], np.float64), w, SIZES[i]) for i in range(3)]
    _close(jax.jit(jax.vmap(f))(x, sizes), np.stack(want))
    both = {name: np.stack([p, p[::-1]]) for name, p in planes.items()}
    got = jax.jit(jax.vmap(f, (None, None, 0)))(x[0], sizes[0], both)
    _close(got[1], loop(np.asarray(x[0], np.float64), w[::-1], SIZES[0]))
    grad = jax.jit(jax.vmap(jax.grad(lambda x, s: f(x, s).sum())))(x, sizes)
    _close(grad[0, 0], w[0].sum(1))


def test_one_expert_is_expanded_at_a_time() -> None:
    planes, layout, _ = experts("t2", 512, 512, 16)
    sizes = jnp.full(16, 4)
    run = jax.jit(lambda x, p: ragged_matmul(x, p, layout, sizes))
    compiled = run.lower(jnp.ones((64, 512)), planes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 512 * 512 * 2


def test_prepared_planes() -> None:
    planes, layout, w = experts("sherry", 256, 24, EXPERTS, 128)
    ready, there = _prepared(planes, layout)
    x, sizes = _normal((ROWS, 256)), jnp.asarray(SIZES[0])
    y = ragged_matmul(x, ready, there, sizes, implementation="xla")
    _close(y, loop(np.asarray(x, np.float64), w, SIZES[0]))
    with pytest.raises(KernelError, match="prepared for implementation 'mosaic_gpu'"):
        ragged_matmul(x, ready, there, sizes)
    with pytest.raises(KernelError, match="it is for Hopper GPUs.*implementation='xla"):
        ragged_matmul(x, ready, there, sizes, implementation="mosaic_gpu")
    single = {name: p[0] for name, p in ready.items()}
    with pytest.raises(KernelError, match="first axis must be that of the experts"):
        ragged_matmul(x, single, there, sizes)


def test_what_does_not_go_together() -> None:
    planes, layout, _ = experts("int8", 128, 8, EXPERTS)
    x, sizes = jnp.ones((ROWS, 128)), jnp.asarray(SIZES[0])

    def refused(match: str, *args: Any, **options: Any) -> None:
        with pytest.raises(KernelError, match=match) as e:
            ragged_matmul(*args, **options)
        assert "\n" not in str(e.value)

    refused(r"x must be \[T, 128\], not \[2, 13, 128\]", x[None].repeat(2, 0), planes,
            layout, sizes)  # fmt: skip
    refused("does not end in the 128 features", x[:, :64], planes, layout, sizes)
    refused("group_sizes must be an int32 array", x, planes, layout, sizes * 1.0)
    refused("group_sizes must be an int32 array", x, planes, layout, sizes[None])
    refused("first axis must be that of the experts", x, planes, layout, sizes[:3])
    single = {name: p[0] for name, p in planes.items()}
    refused("first axis must be that of the experts", x, single, layout, sizes)
    deep = {name: p[:, None] for name, p in planes.items()}
    refused("axes besides that of the experts", x, deep, layout, sizes)
    short = planes | {"codes": planes["codes"][:, :64]}
    refused("do not fit their layout: int8: plane codes", x, short, layout, sizes)
    refused("takes the planes codes, scale", x, {"codes": 0}, layout, sizes)
    refused("x_scale goes with int8", x, planes, layout, sizes, x_scale=x[:, :1])
    refused("prepare them with", x, planes, layout, sizes, implementation="mosaic_gpu")
    refused("use implementation='xla' or None", x, planes, layout, sizes,
            implementation="triton")  # fmt: skip
    refused("no kernel for the format 'int3'", x, planes, layout.replace(format="int3"),
            sizes)  # fmt: skip


@pytest.mark.parametrize("fmt", ["sherry", "int3"])
def test_ragged_dot_of_arrays_and_quantized_weights(fmt: str) -> None:
    x, sizes = _normal((ROWS, 128)), jnp.asarray(SIZES[0])
    w = _normal((EXPERTS, 128, 16), 1)
    plain = aj.ops.ragged_dot(x, w, sizes)
    assert np.array_equal(plain, jax.lax.ragged_dot(x, w, sizes))
    q = aj.quantize(w, format=fmt, group_size=64)
    want = loop(np.asarray(x, np.float64), np.asarray(q.dequantize()), SIZES[0])
    _close(jax.jit(aj.ops.ragged_dot)(x, q, sizes), want)
    low = aj.ops.ragged_dot(x.astype(jnp.bfloat16), q, sizes)
    assert low.dtype == jnp.bfloat16
    wide = aj.ops.ragged_dot(
        x.astype(jnp.bfloat16), q, sizes, preferred_element_type=jnp.float32
    )
    assert wide.dtype == jnp.float32
    ready = aj.prepare({"experts": q})["experts"]
    _close(aj.ops.ragged_dot(x, ready, sizes), want)


@pytest.mark.parametrize("quantized", [True, False])
def test_ragged_dot_refuses_what_does_not_go_together(quantized: bool) -> None:
    w: Any = _normal((EXPERTS, 128, 16))
    w = aj.quantize(w, format="int8") if quantized else w
    sizes = jnp.asarray(SIZES[0])
    with pytest.raises(ValueError, match=r"ragged_dot: x \[13, 64\] .* \[4, 128, 16\]"):
        aj.ops.ragged_dot(jnp.ones((ROWS, 64)), w, sizes)
    with pytest.raises(ValueError, match="ragged_dot: .* weights of experts"):
        aj.ops.ragged_dot(jnp.ones((ROWS, 128)), w[0], sizes)


def _prepared(planes: Any, layout: WeightLayout) -> tuple[Any, WeightLayout]:
    found = []

    def one(p: Any) -> Any:
        ready, there = prepare(p, layout, implementation="mosaic_gpu")
        found.append(there)
        return dict(ready)

    return jax.jit(jax.vmap(one))(planes), found[0]


def test_plans() -> None:
    layout = WeightLayout(format="t2", k=4096, n=14336, group_size=4096)
    small = WeightLayout(format="int4", k=2048, n=768, group_size=128)
    odd = small.replace(group_size=32)

    def kernel(*args: Any) -> Any:
        plan = mosaic_gpu.choose(*args)
        return plan["kernel"], plan.get("m") or plan.get("tokens")

    assert kernel(2, 8, layout, False) == ("bits", 1)
    assert kernel(16, 8, layout, True) == ("bytes", 4)
    assert kernel(2048, 8, layout, False) == ("gemm", 256)
    assert kernel(8, 128, small, True) == ("bytes", 1)
    assert kernel(512, 128, small, True) == ("bytes", 8)
    assert kernel(2048, 8, small, True) == ("gemm", 128)
    assert kernel(128, 8, odd, True) == ("bytes", 16)
    assert kernel(2048, 8, odd, True) == ("expand", None)


GPU_CASES: list[tuple[str, int | None, dict[str, Any]]] = [
    ("t2", None, {}),
    ("t2", 128, {}),
    ("sherry", None, {}),
    ("sherry", 128, {"group_stride": 16}),
    ("int8", None, {}),
    ("int8", 128, {}),
    ("int4", 128, {}),
    ("int4", 32, {}),
    ("int4", 64, {"symmetric": False}),
    ("float8_e4m3", None, {}),
    ("nvfp4", None, {}),
]


def _plan(kernel: str, m: int, *sizes: int) -> dict[str, Any]:
    names = ("warps", "rows_per_block", "prefetch")
    return {"kernel": kernel, "m": m, **dict(zip(names, sizes, strict=True))}


def _gemm(tokens: int, stages: int, **more: bool) -> dict[str, Any]:
    return {"kernel": "gemm", "tokens": tokens, "stages": stages, **more}


# Each with its number of rows and kind of activations.
GPU_PLANS: list[tuple[dict[str, Any], int, str]] = [
    (_plan("bits", 1, 8, 1, 4), 1, "a8"),
    (_plan("bits", 2, 16, 2, 4), 37, "bfloat16"),
    (_plan("bytes", 1, 8, 1, 4), 7, "int8"),
    (_plan("bytes", 4, 8, 2, 2), 37, "bfloat16"),
    (_plan("bytes", 16, 16, 1, 4), 37, "a8"),
    (_gemm(64, 4), 37, "bfloat16"),
    (_gemm(64, 6), 333, "a8"),
    (_gemm(128, 6, tokens_first=True), 333, "int8"),
]


def _random_sizes(rows: int, count: int, used: int, seed: int) -> np.ndarray:
    """Sizes of `count` groups with `used` rows in all, some of them empty."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(count)) * (rng.random(count) < 0.7)
    sizes = np.floor(shares * min(rows, used)).astype(np.int32)
    sizes[count // 2] += min(rows, used) - sizes.sum()
    return sizes


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=_name)
def test_kernels_equal_the_reference(case: Any) -> None:
    fmt, group, options = case
    k, n, count = 520, 336, 6
    planes, layout, _ = experts(fmt, k, n, count, group, **options)
    ready, there = _prepared(planes, layout)
    statics = ("layout", "activation", "out_dtype")

    def run(
        x: Any, planes: Any, layout: Any, sizes: Any, *, tuning: Any, **kwargs: Any
    ) -> Any:
        return mosaic_gpu.matmul(x, planes, layout, sizes, **kwargs, **dict(tuning))

    kernel = jax.jit(run, static_argnames=(*statics, "tuning"))
    plain = jax.jit(reference.matmul, static_argnames=statics)
    for plan, rows, kind in GPU_PLANS:
        if plan["kernel"] == "gemm" and not _hopper_gemm.takes(layout):
            continue
        if plan["kernel"] == "bits" and fmt not in ("t2", "sherry"):
            continue
        kind = "bfloat16" if fmt.startswith("float8") else kind
        x: Any = _normal((rows, k), rows)
        x = (x * 40).astype(jnp.int8 if kind == "int8" else jnp.bfloat16)
        scale = jnp.arange(1.0, rows + 1)[:, None] / rows
        kwargs = {
            "x_scale": scale if kind == "int8" else None,
            "activation": "int8" if kind == "a8" else None,
            "out_dtype": jnp.bfloat16 if kind == "a8" else jnp.float32,
        }
        for seed, used in enumerate((rows, rows - rows // 3, 0)):
            sizes = jnp.asarray(_random_sizes(rows, count, used, seed))
            tuning = tuple(plan.items())
            y = kernel(x, ready, there, sizes, tuning=tuning, **kwargs)
            want = plain(x, planes, layout, sizes, **kwargs)
            y, want = (np.asarray(a, np.float32) for a in (y, want))
            assert not y[used:].any(), (plan, rows, kind, used)
            error = np.abs(y - want).max() / max(np.abs(want).max(), 1e-6)
            limit = {"a8": 1e-2, "int8": 1e-5, "bfloat16": 2e-3}[kind]
            limit = 2e-2 if fmt in ("nvfp4", "float8_e4m3") else limit
            assert error < limit, (plan, rows, kind, used, float(error))


@pytest.mark.gpu
def test_the_device_takes_its_own_kernels() -> None:
    planes, layout, w = experts("int4", 512, 128, 4, 128)
    ready, there = _prepared(planes, layout)
    x = _normal((24, 512)).astype(jnp.bfloat16)

    def f(x: jax.Array, sizes: jax.Array) -> jax.Array:
        return ragged_matmul(x, ready, there, sizes)

    sizes = jnp.asarray([5, 0, 11, 2])
    want = loop(np.asarray(x, np.float64), w, sizes)
    _close(jax.jit(f)(x, sizes), want, 1e-2)
    two = jax.jit(jax.vmap(f))(jnp.stack([x, x]), jnp.stack([sizes, sizes[::-1]]))
    _close(two[0], want, 1e-2)
    g = jax.jit(jax.grad(lambda x: f(x, sizes).astype(jnp.float32).sum()))(x)
    _close(g[0], w[0].sum(1), 2e-2)
    assert not np.asarray(g, np.float32)[18:].any()
