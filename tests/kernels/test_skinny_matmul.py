"""Products of few tokens against a transcription in numpy, and for an H100."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KernelError, skinny_matmul
from pallas_kernels._pallas_triton import unsupported
from pallas_kernels.skinny_matmul._blocks import Blocks
from tests.kernels._h100 import compile_for_h100, has_plugin

TILES = Blocks(16, 32, 4, 2)
BF16 = jnp.bfloat16
# JAX announces that kernels of Pallas will no longer be lowered to Triton one day.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)


def oracle(x, w, norm, swiglu, bias, residual, eps):
    """Loops in float64 over `x [M, K]` and `w [K, N]`."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    rows = []
    for i, row in enumerate(x):
        out = []
        root = np.sqrt(np.mean(row**2) + eps)
        for column in w.T:
            terms = row * column
            if norm is not None:
                terms = terms * np.asarray(norm, np.float64) / root
            out.append(terms.sum())
        found = np.asarray(out)
        if bias is not None:
            found = found + np.asarray(bias, np.float64)
        if swiglu:
            gate, value = np.split(found, 2)
            found = gate / (1 + np.exp(-gate)) * value
        if residual is not None:
            found = found + np.asarray(residual, np.float64)[i]
        rows.append(found)
    return np.stack(rows)


def inputs(m: int, k: int, n: int, dtype: Any, swiglu: bool) -> tuple[Any, ...]:
    keys = jax.random.split(jax.random.key(m), 5)
    normal = functools.partial(jax.random.normal, dtype=dtype)
    w = normal(keys[1], (k, n)) * jnp.asarray(k**-0.5, dtype)
    out = n // 2 if swiglu else n
    norm, bias, residual = (
        normal(key, shape)
        for key, shape in zip(keys[2:], ((k,), (n,), (m, out)), strict=True)
    )
    return normal(keys[0], (m, k)), w, norm, bias, residual


@functools.partial(jax.jit, static_argnames=("transposed", "swiglu", "name"))
def run(x, w, norm, bias, residual, *, transposed, swiglu, name):
    return skinny_matmul(
        x,
        w.T if transposed else w,
        transposed=transposed,
        norm=norm,
        norm_eps=1e-3,
        swiglu=swiglu,
        bias=bias,
        residual=residual,
        tiles=TILES,
        implementation=name,
    )


# Nothing is a multiple of a tile in these.
@pytest.mark.parametrize("name", ["interpret", "xla"])
@pytest.mark.parametrize(
    ("m", "dtype", "transposed", "swiglu", "given"),
    [
        (3, jnp.float32, False, True, (1, 1, 1)),
        (19, jnp.float32, True, False, (1, 0, 0)),
        (1, BF16, True, True, (1, 0, 1)),
        (16, BF16, False, False, (0, 1, 1)),
    ],
)
def test_it_is_the_product(
    name: str, m: int, dtype: Any, transposed: bool, swiglu: bool, given: Any
) -> None:
    x, w, *rest = inputs(m, 72, 56, dtype, swiglu)
    norm, bias, residual = (
        r if there else None for r, there in zip(rest, given, strict=True)
    )
    got = run(
        *(x, w, norm, bias, residual), transposed=transposed, swiglu=swiglu, name=name
    )
    want = oracle(x, w, norm, swiglu, bias, residual, 1e-3)
    assert got.dtype == dtype
    # Once rounded, and with a norm the inputs once more.
    bound = 2e-6 if dtype == jnp.float32 else 1.5e-2
    scale = np.abs(want).max()
    assert np.abs(np.asarray(got, np.float64) - want).max() < bound * scale


@pytest.mark.parametrize("dtype", [BF16, jnp.float32])
def test_a_row_does_not_depend_on_others(dtype: Any) -> None:
    x, w, norm, bias, residual = inputs(18, 72, 64, dtype, True)
    one = functools.partial(run, transposed=True, swiglu=True, name="interpret")
    whole = np.asarray(one(x, w, norm, bias, residual), np.float32)
    for m, at in ((8, 0), (8, 8), (1, 5), (1, 17)):
        part = slice(at, at + m)
        got = one(x[part], w, norm, bias, residual[part])
        assert np.array_equal(np.asarray(got, np.float32), whole[part]), (m, at)


def test_leading_axes_and_the_dtype_of_the_result() -> None:
    x, w, *_ = inputs(6, 72, 56, BF16, False)
    y = skinny_matmul(x.reshape(2, 3, 72), w, out_dtype=jnp.float32)
    assert y.shape == (2, 3, 56) and y.dtype == jnp.float32
    want = oracle(x, w, None, False, None, None, 0)
    assert np.abs(np.asarray(y).reshape(6, 56) - want).max() < 1e-5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"w": jnp.ones((8, 6), BF16)}, "one dtype"),
        ({"w": jnp.ones((7, 6))}, "8 x|7 inputs"),
        ({"norm": jnp.ones(6)}, r"norm must have shape \[8\]"),
        ({"bias": jnp.ones(5)}, r"bias must have shape \[6\]"),
        ({"residual": jnp.ones((2, 6)), "swiglu": True}, r"shape \[2, 3\]"),
        ({"w": jnp.ones((8, 5)), "swiglu": True}, "even number"),
        ({"implementation": "tpu"}, "triton, xla, interpret"),
        ({"implementation": "triton"}, "NVIDIA GPUs"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, words: str) -> None:
    args = {"x": jnp.ones((2, 8)), "w": jnp.ones((8, 6)), **change}
    with pytest.raises(KernelError, match=words):
        skinny_matmul(**args)


@pytest.mark.gpu_compile
@pytest.mark.skipif(not has_plugin(), reason="needs jax[cuda13]")
@pytest.mark.parametrize(
    ("k", "n", "swiglu", "dtype", "transposed"),
    [
        (576, 960, False, BF16, True),
        (576, 3072, True, BF16, True),
        (1536, 576, False, BF16, False),
        (576, 49152, False, BF16, True),
        (4096, 28672, True, BF16, True),
        (576, 3072, True, jnp.float32, False),
    ],
)
def test_an_h100_gets_one_launch_without_spills(
    k: int, n: int, swiglu: bool, dtype: Any, transposed: bool
) -> None:
    shape = jax.ShapeDtypeStruct
    w = shape((n, k) if transposed else (k, n), dtype)
    compiled = compile_for_h100(
        lambda x, w, norm: skinny_matmul(
            x, w, transposed=transposed, norm=norm, swiglu=swiglu
        ),
        *(shape((8, k), dtype), w, shape((k,), dtype)),
        xla_gpu_fail_ptx_compilation_on_register_spilling=True,
    )
    text = compiled.as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 1
    assert " fusion(" not in text and " copy(" not in text
    assert compiled.memory_analysis().temp_size_in_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [BF16, jnp.float32])
def test_a_gpu_computes_it(dtype: Any, transposed: bool) -> None:
    if why := unsupported():
        pytest.skip(why)
    x, w, norm, bias, residual = inputs(18, 576, 192, dtype, True)
    one = functools.partial(run, transposed=transposed, swiglu=True, name="triton")
    got = np.asarray(one(x, w, norm, bias, residual), np.float64)
    want = oracle(x, w, norm, True, bias, residual, 1e-3)
    bound = 1e-5 if dtype == jnp.float32 else 1.5e-2
    assert np.abs(got - want).max() < bound * np.abs(want).max()
    for m, at in ((8, 0), (8, 8), (1, 5), (1, 17)):
        part = slice(at, at + m)
        found = one(x[part], w, norm, bias, residual[part])
        assert np.array_equal(np.asarray(found, np.float64), got[part]), (m, at)
