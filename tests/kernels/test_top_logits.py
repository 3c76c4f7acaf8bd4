"""The largest logits against a sort in numpy, and for an H100."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KernelError, top_logits
from pallas_kernels._devices import elsewhere
from pallas_kernels.top_logits._warps import WARPS, emit, stages
from tests.kernels import _simt
from tests.kernels._h100 import check_no_spills, has_plugin


def oracle(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A stable sort in float64: of equal numbers the first comes first.

    Values, ids, and log-probabilities plus the number of the row.
    """
    wide = x.astype(np.float64)
    ids = np.argsort(-wide, axis=1, kind="stable")[:, :k]
    peak = wide.max(axis=1, keepdims=True)
    logs = wide - peak - np.log(np.exp(wide - peak).sum(axis=1, keepdims=True))
    logs = np.take_along_axis(logs, ids, axis=1) + np.arange(len(x))[:, None]
    return np.take_along_axis(x, ids, axis=1), ids, logs


def close(got: np.ndarray, want: np.ndarray) -> bool:
    return np.allclose(got, want, rtol=1e-6, atol=3e-6)


def emulated(x: np.ndarray, k: int, log_probs: bool) -> list[np.ndarray]:
    """What the threads of both launches make of it, on numpy arrays."""
    given = [x]
    for case in stages(*x.shape, k, log_probs=log_probs, offset=log_probs):
        places = case.rows, case.blocks * k
        made = [np.zeros(places, np.float32), np.zeros(places, np.int32)]
        if log_probs and case.first:
            made += [np.zeros((case.rows, case.blocks), np.float32) for _ in range(2)]
        if case.offset:
            given.append(np.arange(case.rows, dtype=np.float32))
        _simt.run(
            emit,
            case,
            grid=case.rows * case.blocks,
            threads=32 * WARPS,
            smem_words=case.smem_words,
            arrays=[*given, *made],
        )
        given = made
    return given


def logits(rows: int, n: int, kind: str) -> np.ndarray:
    rng = np.random.default_rng(n)
    x = rng.standard_normal((rows, n)).astype(np.float32) * 8
    if kind == "ties":
        x = np.round(x / 16) * np.float32(2)
        x[0] = np.where(rng.random(n) < 0.5, np.float32(-0.0), np.float32(0))
    if kind == "masked":
        x[:, rng.permutation(n)[5:]] = -np.inf
    if kind == "low":
        x -= 2000
    return x


CASES = [
    (1, 1536, 1, "normal"),
    (3, 6148, 4, "normal"),
    (2, 4096, 8, "ties"),
    (2, 3000, 15, "masked"),
    (1, 64, 32, "low"),
    # The second launch has four numbers or more for each thread.
    (1, 49152, 15, "normal"),
]


@pytest.mark.parametrize(("rows", "n", "k", "kind"), CASES)
def test_the_kernel_is_a_sort(rows: int, n: int, k: int, kind: str) -> None:
    x = logits(rows, n, kind)
    values, ids, logs = oracle(x, k)
    got = emulated(x, k, False)
    assert np.array_equal(got[0], values) and np.array_equal(got[1], ids)
    got = emulated(x, k, True)
    assert close(got[0], logs) and np.array_equal(got[1], ids)


@pytest.mark.parametrize(("rows", "n", "k", "kind"), CASES)
def test_xla_does_the_same(rows: int, n: int, k: int, kind: str) -> None:
    x = logits(rows, n, kind)
    values, _, logs = oracle(x, k)
    call = jax.jit(top_logits, static_argnames=("k", "log_probs"))
    got = call(x[:, None], k=k)
    assert got.values.shape == (rows, 1, k)
    assert np.array_equal(got.values[:, 0], values)
    # Zeros with a sign come after those without.
    negative = np.signbit(x) & (x == 0)
    places = np.broadcast_to(np.arange(n), x.shape)
    order = np.lexsort((places, negative, -x.astype(np.float64)), axis=1)
    assert np.array_equal(got.ids[:, 0], order[:, :k])
    rank = jnp.arange(rows, dtype=jnp.float32)
    assert close(call(x, k=k, log_probs=True, offset=rank).values, logs)


@pytest.mark.parametrize(
    ("x", "options", "words"),
    [
        (jnp.ones((2, 8), jnp.bfloat16), {"k": 1}, "float32"),
        (jnp.ones((2, 8)), {"k": 9}, "from 1 to the 8 logits"),
        (jnp.ones((2, 8)), {"k": 0}, "not 0"),
        (jnp.ones((2, 8)), {"k": 1, "offset": jnp.ones(3)}, "one for each row"),
        (jnp.ones((2, 8)), {"k": 1, "implementation": "mosaic_gpu"}, "Hopper GPUs"),
        (jnp.ones((2, 8)), {"k": 1, "implementation": "tpu"}, "mosaic_gpu, xla"),
    ],
)
def test_what_does_not_fit_is_refused(x: Any, options: Any, words: str) -> None:
    with pytest.raises(KernelError, match=words):
        top_logits(x, **options)


def test_rows_that_the_kernel_does_not_take() -> None:
    from pallas_kernels.top_logits.mosaic_gpu import refused

    assert refused(49152, 32) is None and refused(262144, 16) is None
    assert "up to 32" in (refused(49152, 33) or "")
    assert "multiple of 4" in (refused(50257, 4) or "")
    assert "shorter rows" in (refused(1 << 26, 32) or "")


_COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from pallas_kernels import top_logits
from tests.kernels._h100 import compile_for_h100

rows, n, k = json.loads(sys.argv[1])
compiled = compile_for_h100(
    lambda x, more: top_logits(x, k, log_probs=True, offset=more),
    *(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, n), (rows,))),
)
text = compiled.as_text()
assert text.count("top_logits_of_parts") >= 1 and " sort(" not in text
"""


@pytest.mark.gpu_compile
@pytest.mark.skipif(not has_plugin(), reason="needs jax[cuda13]")
@pytest.mark.parametrize("case", [(1, 16384, 4), (16, 49152, 8), (4, 151936, 32)])
def test_an_h100_gets_two_launches_without_spills(case: Any, tmp_path: Path) -> None:
    check_no_spills(_COMPILE, case, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "n", "k", "kind"), CASES)
def test_a_gpu_computes_it(rows: int, n: int, k: int, kind: str) -> None:
    if why := elsewhere("mosaic_gpu"):
        pytest.skip(why)
    x = logits(rows, n, kind)
    values, ids, logs = oracle(x, k)
    names = ("k", "log_probs", "implementation")
    call = jax.jit(top_logits, static_argnames=names)
    how = {"k": k, "implementation": "mosaic_gpu"}
    got = call(x, **how)
    assert np.array_equal(got.values, values) and np.array_equal(got.ids, ids)
    rank = jnp.arange(rows, dtype=jnp.float32)
    got = call(x, log_probs=True, offset=rank, **how)
    assert close(got.values, logs) and np.array_equal(got.ids, ids)
