"""PT2-LLM against its paper in float64 NumPy, one output at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax.algorithms import PT2LLMOptions, pt2_llm
from angeljax.algorithms.pt2_llm import fit_group
from angeljax.formats import make_spec

run = jax.jit(pt2_llm, static_argnums=(1, 3))
K, N, G = 40, 6, 16  # the last group of 16 holds 8


def problem(k: int = K, n: int = N, tokens: int = 96, seed: int = 0) -> tuple:
    """Heavy-tailed weights with an offset, and the Hessian of correlated inputs."""
    rng = np.random.default_rng(seed)
    w = (rng.laplace(size=(k, n)) + 0.2).astype(np.float32)
    x = rng.normal(size=(tokens, k)) @ (np.eye(k) + rng.normal(size=(k, k)) / 4)
    return w, (x.T @ x).astype(np.float32)


def ternary(w: np.ndarray, a: float, b: float) -> np.ndarray:
    """For each weight the t of -1, 0, 1 with the least |w - (a t + b)|."""
    return np.array([min((0, -1, 1), key=lambda t: abs(v - a * t - b)) for v in w])


def fitted(w: np.ndarray, t: np.ndarray, shift: bool, metric: np.ndarray) -> tuple:
    """The least squares of w = a t + b in a metric, by a square root of it."""
    values, vectors = np.linalg.eigh(metric)
    root = (vectors * np.sqrt(np.maximum(values, 0))).T
    basis = np.stack([t, np.ones_like(t)] if shift else [t], axis=1).astype(np.float64)
    found = np.linalg.lstsq(root @ basis, root @ w, rcond=None)[0]
    return (found[0], found[1] if shift else 0.0)


def fit(w: np.ndarray, shift: bool, iterations: int, metric) -> tuple:
    """ITF and AGA of one group of one output: (t, a, b)."""
    b = w.mean() if shift else 0.0
    size = np.abs(w - b)
    a = size[size >= 0.75 * size.mean()].mean()
    for _ in range(iterations):
        a, b = fitted(w, ternary(w, a, b), shift, np.eye(len(w)))
    t = ternary(w, a, b)
    return (t, *fitted(w, t, shift, metric))


def oracle(w, h, shift, options: PT2LLMOptions, group: int = G) -> np.ndarray:
    """The whole paper for `[K, N]`, with explicit inverses of what is left."""
    k = len(w)
    h = h.astype(np.float64) / np.diag(h).mean()
    damped = h + options.damping * np.eye(k)
    w, out = w.astype(np.float64).copy(), np.zeros(w.shape)
    for first in range(0, k, group):
        here = np.arange(first, min(first + group, k))
        metric = h[np.ix_(here, here)]
        for n in range(w.shape[1]):
            t, a, b = fit(w[here, n], shift, options.iterations, metric)
            if options.levels == "group":
                out[here, n] = a * t + b
                steps = [here]
            else:
                steps = [np.array([j]) for j in here]
            for at in steps:
                if options.levels == "column":
                    out[at, n] = a * ternary(w[at, n], a, b) + b
                after = np.arange(at[-1] + 1, k)
                # The least error that later weights leave of this one.
                wrong = w[at, n] - out[at, n]
                if len(after):
                    gain = np.linalg.solve(
                        damped[np.ix_(after, after)], damped[np.ix_(after, at)]
                    )
                    w[after, n] += gain @ wrong
    return out


@pytest.mark.parametrize(
    ("shift", "levels"), [(True, "group"), (True, "column"), (False, "column")]
)
def test_is_the_paper(shift: bool, levels: str) -> None:
    w, h = problem()
    options = PT2LLMOptions(levels=levels)
    spec = make_spec(
        w.shape, w.dtype, format="t2", group_size=G, scale_dtype="float32", shift=shift
    )
    q = run(w, spec, {"hessian": h}, options)
    want = oracle(w, h, shift, options)
    np.testing.assert_allclose(q.dequantize(), want, rtol=2e-4, atol=2e-5)


def test_fitting_is_a_fixed_point_of_both_steps(rng) -> None:
    w = rng.normal(size=(5, 64)).astype(np.float32)
    spec = make_spec((64, 5), "float32", format="t2", shift=True, scale_dtype="float32")
    inside = jnp.ones(64, bool)
    levels, planes = jax.jit(fit_group, static_argnums=(2, 3))(
        jnp.asarray(w), inside, spec, 40, jnp.eye(64)
    )
    for row, t, a, b in zip(
        w, levels, planes["scale"].ravel(), planes["shift"].ravel(), strict=True
    ):
        np.testing.assert_array_equal(t, ternary(row, float(a), float(b)))
        # The closed form of the paper, section 3.2.
        t, m = np.asarray(t, np.float64), len(row)
        den = m * (t * t).sum() - t.sum() ** 2
        alpha = (m * (row * t).sum() - t.sum() * row.sum()) / den
        mu = ((t * t).sum() * row.sum() - t.sum() * (row * t).sum()) / den
        np.testing.assert_allclose([a, b], [alpha, mu], rtol=1e-4, atol=1e-6)


def relative(q, w, h) -> float:
    d = np.asarray(q.dequantize(), np.float64) - w
    return float(np.sum(d * (h @ d)) / np.sum(w * (h @ w)))


@pytest.mark.parametrize(
    ("name", "options", "levels", "bound"),
    [
        ("sherry", {"group_stride": 16}, "column", 0.7),
        ("sherry", {"group_stride": 16}, "group", 0.8),
        ("ptqtp", {}, "column", 0.7),
    ],
)
def test_other_formats(name: str, options: dict, levels: str, bound: float) -> None:
    w, h = problem(128, 8, 256)
    spec = make_spec(w.shape, w.dtype, format=name, group_size=64, **options)
    plain = aj.quantize(jnp.asarray(w), format=name, group_size=64, **options)
    q = run(w, spec, {"hessian": h}, PT2LLMOptions(levels=levels))
    assert q.spec == plain.spec
    assert relative(q, w, h) < bound * relative(plain, w, h)


def test_batch_axes_and_several_output_axes() -> None:
    w, h = problem()
    stack = np.stack([w, 2 * w[::-1]]).reshape(2, K, 2, N // 2)
    hs = np.stack([h, h[::-1, ::-1]])
    spec = make_spec(
        stack.shape, stack.dtype, format="t2", group_size=G, axis=-3, batch_axes=1
    )
    q = run(stack, spec, {"hessian": hs})
    for i in range(2):
        one = run(stack[i], spec, {"hessian": hs[i]})
        np.testing.assert_array_equal(q[i].planes["codes"], one.planes["codes"])
        np.testing.assert_array_equal(q[i].planes["scale"], one.planes["scale"])


def test_inputs_that_are_always_zero_change_nothing() -> None:
    w, h = problem()
    h[3] = h[:, 3] = 0
    h[20:36] = h[:, 20:36] = 0
    spec = make_spec(
        w.shape, w.dtype, format="t2", group_size=G, scale_dtype="float32", shift=True
    )
    d = np.asarray(run(w, spec, {"hessian": h}, PT2LLMOptions()).dequantize())
    assert np.isfinite(d).all()
    assert np.abs(d - w).max() < np.abs(w).max()


def test_what_does_not_go_is_refused() -> None:
    with pytest.raises(aj.RecipeError, match=r"pt2_llm makes ptqtp, .*, t2, not int4"):
        aj.Rule(format="int4", algorithm="pt2_llm")
    recipe = aj.Recipe(
        rules=[aj.Rule(format="t2", granularity="channel", algorithm="pt2_llm")]
    )
    with pytest.raises(aj.RecipeError, match="group by group: use granularity 'group'"):
        aj.plan({"a": jnp.ones((64, 8))}, recipe)
    for bad in ({"levels": "row"}, {"iterations": -1}, {"damping": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
            PT2LLMOptions(**bad)
