"""Products of few tokens against a transcription in numpy, and for an H100."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KernelError, skinny_matmul
from pallas_kernels._devices import elsewhere
from pallas_kernels.skinny_matmul._blocks import Blocks
from pallas_kernels.skinny_matmul._warps import Case, emit
from tests.kernels import _simt
from tests.kernels._h100 import check_no_spills, has_plugin

BF16 = jnp.bfloat16


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
def run(x, w, norm, bias, residual, *, second=None, transposed, swiglu, name):
    return skinny_matmul(
        x,
        w.T if transposed else w,
        second=second,
        transposed=transposed,
        norm=norm,
        norm_eps=1e-3,
        swiglu=swiglu,
        bias=bias,
        residual=residual,
        implementation=name,
    )


def emulated(x, w, norm, bias, residual, *, swiglu, out_dtype, blocks):
    """What the threads of the kernel make of it, on numpy arrays."""
    (m, k), n = x.shape, w.shape[1] // (2 if swiglu else 1)
    given = [a for a in (norm, bias, residual) if a is not None]
    case = Case(
        *(m, k, n, norm is not None, swiglu, bias is not None, residual is not None),
        *(out_dtype == jnp.float32, 1e-3, blocks.warps, blocks.tiles),
    )
    y = np.zeros((m, n), out_dtype)
    _simt.run(
        emit,
        case,
        grid=case.grid,
        threads=32 * case.warps,
        smem_words=case.smem_words,
        arrays=[np.asarray(a) for a in (x, w.T, *given)] + [y],
    )
    return y


def check(got: Any, want: np.ndarray, bound: float) -> None:
    assert np.abs(np.asarray(got, np.float64) - want).max() < bound * np.abs(want).max()


@pytest.mark.parametrize(
    ("m", "dtype", "transposed", "swiglu", "given"),
    [
        (3, jnp.float32, False, True, (1, 1, 1)),
        (19, jnp.float32, True, False, (1, 0, 0)),
        (16, BF16, False, False, (0, 1, 1)),
    ],
)
def test_it_is_the_product(
    m: int, dtype: Any, transposed: bool, swiglu: bool, given: Any
) -> None:
    x, w, *rest = inputs(m, 72, 56, dtype, swiglu)
    norm, bias, residual = (
        r if there else None for r, there in zip(rest, given, strict=True)
    )
    got = run(
        *(x, w, norm, bias, residual), transposed=transposed, swiglu=swiglu, name="xla"
    )
    assert got.dtype == dtype
    want = oracle(x, w, norm, swiglu, bias, residual, 1e-3)
    check(got, want, 2e-6 if dtype == jnp.float32 else 1.5e-2)


# Turns that no warp takes, tiles that end outside, more tokens than a thread block has.
@pytest.mark.parametrize(
    ("m", "k", "n", "swiglu", "given", "blocks"),
    [
        (3, 96, 40, False, (1, 0, 0), Blocks(4, 1)),
        (19, 160, 44, True, (1, 1, 1), Blocks(4, 1)),
        (16, 288, 50, False, (0, 1, 1), Blocks(4, 2)),
        (9, 4384, 24, True, (0, 0, 0), Blocks(8, 1)),
    ],
)
def test_the_kernel_is_the_product(
    m: int, k: int, n: int, swiglu: bool, given: Any, blocks: Blocks
) -> None:
    x, w, *rest = inputs(m, k, n, BF16, swiglu)
    norm, bias, residual = (
        r if there else None for r, there in zip(rest, given, strict=True)
    )
    how = dict(swiglu=swiglu, out_dtype=jnp.float32, blocks=blocks)
    got = emulated(x, w, norm, bias, residual, **how)
    want = oracle(x, w, norm, swiglu, bias, residual, 1e-3)
    # Inputs are rounded once more where they are multiplied by a norm.
    check(got, want, 1e-2 if given[0] else 1e-5)


def test_a_row_does_not_depend_on_others() -> None:
    x, w, norm, bias, residual = inputs(18, 96, 48, BF16, True)
    how = dict(swiglu=True, out_dtype=BF16, blocks=Blocks(4, 1))
    whole = emulated(x, w, norm, bias, residual, **how)
    check(whole, oracle(x, w, norm, True, bias, residual, 1e-3), 1.5e-2)
    for m, at in ((8, 0), (8, 8), (1, 5), (1, 17)):
        part = slice(at, at + m)
        got = emulated(x[part], w, norm, bias, residual[part], **how)
        assert np.array_equal(got, whole[part]), (m, at)


def halves(m: int, k: int, n: int, dtype: Any, swiglu: bool) -> tuple[Any, ...]:
    """Two arrays of inputs, and what float64 makes of them."""
    x, w, norm, bias, residual = inputs(m, 2 * k, n, dtype, swiglu)
    first, second = x[:, :k], x[:, k:]
    parts = [(first, w[:k], norm[:k]), (second, w[k:], norm[k:])]
    want = sum(oracle(*part, False, None, None, 1e-3) for part in parts)
    want = want + np.asarray(bias, np.float64)
    if swiglu:
        gate, value = np.split(want, 2, axis=1)
        want = gate / (1 + np.exp(-gate)) * value
    want = want + np.asarray(residual, np.float64)
    return first, second, w, norm, bias, residual, want


@pytest.mark.parametrize("transposed", [False, True])
def test_inputs_of_two_arrays_have_a_norm_each(transposed: bool) -> None:
    x, second, w, norm, bias, residual, want = halves(5, 40, 24, jnp.float32, True)
    how = dict(second=second, transposed=transposed, swiglu=True, name="xla")
    check(run(x, w, norm, bias, residual, **how), want, 2e-6)


@pytest.mark.parametrize(
    ("m", "k", "n", "swiglu", "blocks"),
    [
        (3, 96, 40, False, Blocks(4, 1)),
        (11, 160, 44, True, Blocks(8, 1)),
        (16, 576, 48, False, Blocks(8, 2)),
    ],
)
def test_the_kernel_takes_two_arrays(
    m: int, k: int, n: int, swiglu: bool, blocks: Blocks
) -> None:
    x, second, w, norm, bias, residual, want = halves(m, k, n, BF16, swiglu)
    count = n // 2 if swiglu else n
    case = Case(
        *(m, k, count, True, swiglu, True, True, True, 1e-3),
        *(blocks.warps, blocks.tiles, 2),
    )
    y = np.zeros((m, count), np.float32)
    _simt.run(
        emit,
        case,
        grid=case.grid,
        threads=32 * case.warps,
        smem_words=case.smem_words,
        arrays=[np.asarray(a) for a in (x, second, w.T, norm, bias, residual)] + [y],
    )
    check(y, want, 1e-2)


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
        ({"second": jnp.ones((2, 7))}, "second must be like x"),
        ({"second": jnp.ones((2, 8))}, "x and second do not end in the 8"),
        ({"norm": jnp.ones(6)}, r"norm must have shape \[8\]"),
        ({"bias": jnp.ones(5)}, r"bias must have shape \[6\]"),
        ({"residual": jnp.ones((2, 6)), "swiglu": True}, r"shape \[2, 3\]"),
        ({"w": jnp.ones((8, 5)), "swiglu": True}, "even number"),
        ({"implementation": "tpu"}, "mosaic_gpu, xla"),
        ({"implementation": "mosaic_gpu"}, "Hopper GPUs"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, words: str) -> None:
    args = {"x": jnp.ones((2, 8)), "w": jnp.ones((8, 6)), **change}
    with pytest.raises(KernelError, match=words):
        skinny_matmul(**args)


_COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from pallas_kernels import skinny_matmul
from tests.kernels._h100 import compile_for_h100

m, k, n, swiglu, *parts = json.loads(sys.argv[1])
shape = jax.ShapeDtypeStruct
whole = 2 * k if parts else k
compiled = compile_for_h100(
    lambda w, norm, x, *second: skinny_matmul(
        x, w, second=second[0] if second else None, transposed=True, norm=norm,
        swiglu=swiglu,
    ),
    *(shape(s, jnp.bfloat16) for s in ((n, whole), (whole,), *[(m, k)] * (whole // k))),
)
text = compiled.as_text()
assert text.count("mosaic_gpu") >= 1 and " fusion(" not in text and " copy(" not in text
assert compiled.memory_analysis().temp_size_in_bytes == 0
"""


@pytest.mark.gpu_compile
@pytest.mark.skipif(not has_plugin(), reason="needs jax[cuda13]")
@pytest.mark.parametrize(
    "case",
    [
        (8, 576, 960, False),
        (16, 576, 3072, True),
        (8, 1536, 576, False),
        (16, 576, 49152, False),
        (16, 4096, 28672, True),
        (16, 576, 960, False, 2),
    ],
)
def test_an_h100_gets_one_launch_without_spills(case: Any, tmp_path: Path) -> None:
    check_no_spills(_COMPILE, case, tmp_path)


@pytest.mark.gpu
def test_a_gpu_takes_two_arrays() -> None:
    if why := elsewhere("mosaic_gpu"):
        pytest.skip(why)
    x, second, w, norm, bias, residual, want = halves(9, 576, 960, BF16, False)
    how = dict(second=second, transposed=True, swiglu=False, name="mosaic_gpu")
    check(run(x, w, norm, bias, residual, **how), want, 1.5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [576, 1536])
@pytest.mark.parametrize("swiglu", [False, True])
def test_a_gpu_computes_it(k: int, swiglu: bool) -> None:
    if why := elsewhere("mosaic_gpu"):
        pytest.skip(why)
    x, w, norm, bias, residual = inputs(18, k, 192, BF16, swiglu)
    one = functools.partial(run, transposed=True, swiglu=swiglu, name="mosaic_gpu")
    got = np.asarray(one(x, w, norm, bias, residual), np.float64)
    check(got, oracle(x, w, norm, swiglu, bias, residual, 1e-3), 1.5e-2)
    for m, at in ((8, 0), (8, 8), (1, 5), (1, 17)):
        part = slice(at, at + m)
        found = one(x[part], w, norm, bias, residual[part])
        assert np.array_equal(np.asarray(found, np.float64), got[part]), (m, at)
