"""Greedy selection on a GPU: its machine code with `-m gpu_compile`, choices with
`-m gpu`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _triton, greedy_select
from pallas_kernels.greedy_select import _gram, mosaic_gpu, triton
from pallas_kernels.greedy_select._terms import Settings
from tests.kernels._h100 import check_no_spills, compile_for_h100, has_plugin

needs_plugin = pytest.mark.skipif(not has_plugin(), reason="needs jax[cuda13]")

_SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
from tests.kernels._h100 import compile_for_h100
from pallas_kernels.greedy_select import mosaic_gpu
from pallas_kernels.greedy_select._terms import Settings

n, k, tuning = json.loads(sys.argv[1])
shapes = [(2, n, n), (2, n), (2, n), (2,)]
kinds = ["float32", "float32", "bool", "int32"]
args = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, kinds)]
compile_for_h100(
    lambda *a: mosaic_gpu.select(*a, Settings(k, "mmr", 0.3, 1), **tuning), *args
)
"""


@pytest.mark.gpu_compile
@needs_plugin
@pytest.mark.parametrize(
    "case",
    [(2696, 672, {}), (576, 64, {}), (101, 7, {"early": "prefetch"}), (16384, 99, {})],
    ids=str,
)
def test_mosaic_kernel_compiles_without_spills(case: Any, tmp_path: Path) -> None:
    check_no_spills(_SCRIPT, case, tmp_path)


@pytest.mark.gpu_compile
@needs_plugin
@pytest.mark.skipif(
    importlib.util.find_spec("jax_triton") is None, reason="needs jax-triton"
)
@pytest.mark.parametrize("capability", [80, 90])
def test_triton_kernel_is_one_launch(capability: int) -> None:
    args = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((2, 1000, 1000), jnp.float32),
            ((2, 1000), jnp.float32),
            ((2, 1000), jnp.bool_),
            ((2,), jnp.int32),
        )
    ]
    settings = Settings(64, "mmr", 0.3, 1)
    compiled = compile_for_h100(
        lambda *a: triton.select(*a, settings, capability=capability), *args
    )
    assert compiled.as_text().count("custom_call_target=") == 1


@pytest.mark.gpu_compile
@needs_plugin
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_h100_gets_the_kernel_and_products_of_16_bits(dtype: str) -> None:
    x = jax.ShapeDtypeStruct((2, 333, 256), dtype)
    v = jax.ShapeDtypeStruct((2, 333), jnp.float32)
    text = compile_for_h100(lambda x, v: greedy_select(x, v, 40), x, v).as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 1
    # Nothing goes to the host between choices.
    assert "while(" not in text and "callback" not in text


def _inputs(b: int, n: int, d: int, kind: str) -> tuple[Any, Any]:
    keys = jax.random.split(jax.random.key(n), 3)
    x = jax.random.normal(keys[0], (b, n, d)) + jax.random.normal(keys[1], (b, 1, d))
    v = jax.random.uniform(keys[2], (b, n))
    if kind == "ties":  # many equal tokens, few different numbers
        x = x[:, jnp.arange(n) % max(n // 7, 1)]
        v = jnp.round(v * 4) / 4
    if kind == "rubbish":
        x = x.at[:, 3].set(jnp.nan).at[:, 5].set(0.0)
        v = v.at[:, 2].set(jnp.nan).at[:, 4].set(jnp.inf)
    return x, v


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mosaic_gpu", "triton", "xla"])
@pytest.mark.parametrize(
    ("b", "n", "k", "kind"),
    [
        (1, 2691, 672, "random"),
        (3, 576, 64, "ties"),
        (2, 100, 100, "rubbish"),
        (2, 5000, 300, "ties"),
        (5, 9, 9, "random"),
        (1, 1, 1, "random"),
    ],
)
def test_choices_are_those_of_the_reference(
    name: str, b: int, n: int, k: int, kind: str
) -> None:
    why = _triton.missing() if name == "triton" else None
    if why is not None:
        pytest.skip(why)
    x, v = _inputs(b, n, 64, kind)
    gram = jax.jit(_gram.cosine, static_argnums=1)(x, "highest")
    mask = jax.random.bernoulli(jax.random.key(0), 0.9, (b, n)).at[-1].set(True)
    counts = jnp.asarray([k, max(k - 3, 0), 0, 1, k][:b], jnp.int32)
    for weight in (0.5, 0.3, 0.0, 1.0):
        for options in ({}, {"mask": mask, "counts": counts}):
            got, want = (
                greedy_select(
                    None,
                    v,
                    k,
                    gram=gram,
                    weight=weight,
                    implementation=which,
                    **options,
                )
                for which in (name, "reference")
            )
            assert np.array_equal(got, want), (weight, options)


@pytest.mark.gpu
@pytest.mark.parametrize("warps", [4, 8, 16])
@pytest.mark.parametrize("early", ["", "copy", "prefetch"])
def test_tuning_changes_nothing(warps: int, early: str) -> None:
    x, v = _inputs(2, 1500, 32, "ties")
    gram = jax.jit(_gram.cosine, static_argnums=1)(x, "highest")
    valid, limit = jnp.ones((2, 1500), bool), jnp.asarray([200, 7])
    args = gram, v, valid, limit, Settings(200, "mmr", 0.5, 1)
    want = greedy_select(
        None, v, 200, gram=gram, counts=limit, implementation="reference"
    )
    assert np.array_equal(mosaic_gpu.select(*args, warps=warps, early=early), want)
    if _triton.missing() is None:
        assert np.array_equal(triton.select(*args, warps=warps), want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cosines_are_those_of_float64(dtype: str) -> None:
    x, _ = _inputs(2, 300, 3584, "random")
    x = x.astype(dtype)
    rows = np.asarray(x, np.float64)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True) + 1e-8
    want = rows @ rows.transpose(0, 2, 1)
    got = np.asarray(jax.jit(_gram.cosine, static_argnums=1)(x, "highest"))
    assert np.abs(got - want).max() < 1e-5
    assert np.array_equal(got, got.transpose(0, 2, 1))
