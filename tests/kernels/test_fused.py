"""A norm, a gate and a residual as part of a product."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KernelError, packed_matmul, prepare
from pallas_kernels._fused import before
from tests.kernels._cases import packed

EPS = 1e-5
KINDS = ("norm", "gate", "residual", "norm residual", "gate residual")


def _case(kind: str, m: int, k: int, n: int, dtype: Any) -> tuple[Any, dict[str, Any]]:
    rng = np.random.default_rng(m)
    width = 2 * k if "gate" in kind else k
    x = jnp.asarray(3 * rng.standard_normal((m, width)), dtype)
    options: dict[str, Any] = {}
    if "norm" in kind:
        weight = jnp.asarray(rng.standard_normal(k), dtype)
        options |= {"norm": weight, "norm_eps": EPS}
    if "gate" in kind:
        options["gate"] = "silu"
    if "residual" in kind:
        options["residual"] = jnp.asarray(rng.standard_normal((m, n)), dtype)
    return x, options


def _want(x: Any, w: np.ndarray, options: dict[str, Any], bias: Any) -> np.ndarray:
    """float64, by the definitions."""
    x = np.asarray(x, np.float64)
    if "norm" in options:
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)
        x = x * np.asarray(options["norm"], np.float64)
    if "gate" in options:
        a, b = np.split(x, 2, axis=-1)
        x = a / (1 + np.exp(-a)) * b
    y = x @ np.asarray(w, np.float64) + np.asarray(bias, np.float64)
    return y + np.asarray(options.get("residual", 0), np.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_written_out_around_a_product(kind: str) -> None:
    planes, layout, w = packed("int8", 96, 40)
    x, options = _case(kind, 3, 96, 40, jnp.float32)
    bias = jnp.arange(40.0)

    def f(x: jax.Array) -> jax.Array:
        return packed_matmul(x, planes, layout, bias=bias, **options)

    np.testing.assert_allclose(f(x), _want(x, w, options, bias), rtol=1e-4, atol=1e-3)
    batches = jax.vmap(lambda x: packed_matmul(x, planes, layout, bias=bias))(
        jnp.ones((2, 3, 96))
    )
    assert batches.shape == (2, 3, 40)

    def dense(x: jax.Array) -> jax.Array:
        y = before(x, options.get("norm"), EPS, options.get("gate")) @ w
        return (y * jnp.arange(40.0)).sum()

    got = jax.grad(lambda x: (f(x) * jnp.arange(40.0)).sum())(x)
    np.testing.assert_allclose(got, jax.grad(dense)(x), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "clause"),
    [
        ({"gate": "relu"}, "gate must be None or 'silu', not 'relu'"),
        ({"gate": "silu"}, r"x must end in 2 x 96 features.*not \[3, 96\]"),
        ({"norm": jnp.ones(95)}, r"norm must have shape \[96\], not \[95\]"),
        ({"norm": jnp.ones(96), "gate": "silu"}, "not both"),
        ({"residual": jnp.ones((3, 39))}, r"residual must have shape \[3, 40\]"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], clause: str) -> None:
    planes, layout, _ = packed("int8", 96, 40)
    with pytest.raises(KernelError, match=clause):
        packed_matmul(jnp.ones((3, 96)), planes, layout, **options)
    with pytest.raises(KernelError, match="takes float x, not int8"):
        x = jnp.ones((3, 96), jnp.int8)
        packed_matmul(x, planes, layout, norm=jnp.ones(96))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("fmt", "group"),
    [
        ("t2", None),
        ("t2", 64),
        ("sherry", None),
        ("sherry", 128),
        ("int8", None),
        ("int4", 64),
        ("float8_e4m3", None),
        ("nvfp4", None),
    ],
)
def test_kernels_do_it_themselves(fmt: str, group: int | None) -> None:
    for k, n in ((576, 56), (2048, 384)):
        planes, layout, w = packed(fmt, k, n, group)
        ready, there = prepare(planes, layout, implementation="mosaic_gpu")
        for m, kind in ((1, "norm residual"), (1, "gate residual"), (7, "norm")):
            for activation, dtype in (("int8", jnp.bfloat16), (None, jnp.float32)):
                if fmt == "float8_e4m3" and activation:
                    continue
                x, options = _case(kind, m, k, n, dtype)
                bias = jnp.arange(float(n))

                arrays = {k: v for k, v in options.items() if isinstance(v, jax.Array)}
                rest = {k: v for k, v in options.items() if k not in arrays}
                run = functools.partial(
                    packed_matmul, layout=there, activation=activation, **rest
                )
                f = jax.jit(lambda x, p, o, run=run: run(x, p, **o))
                given = (x, ready, {"bias": bias, **arrays})
                text = f.lower(*given).as_text()
                assert text.count("custom_call") and "stablehlo.rsqrt" not in text
                want = _want(x, w, options, bias)
                error = np.abs(np.asarray(f(*given), np.float64) - want).max()
                limit = 3e-2 if activation else 1e-3
                if fmt in ("float8_e4m3", "nvfp4"):
                    limit = 3e-2
                assert error < limit * np.abs(want).max(), (k, m, kind, activation)
