"""GPTQ, GPTAQ and their 3:4 kin against literal numpy, and what must hold of them."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import angeljax as aj
from angeljax.algorithms import (
    GPTAQOptions,
    GPTQOptions,
    Lstsq34Options,
    get_algorithm,
    gptaq,
    gptq,
    lstsq34,
    rtn,
)
from angeljax.algorithms._blocks import as_matrix, from_matrix, to_matrix
from angeljax.formats import get_format, make_spec
from tests.algorithms import _gptq_numpy as oracle

BF16 = ml_dtypes.bfloat16
K, N = 128, 16


@functools.cache
def data(k: int = K, n: int = N, tokens: int = 512) -> tuple[np.ndarray, ...]:
    """A weight `[k, n]`, correlated inputs, and those of a model before it."""
    rng = np.random.default_rng(0)
    mix = np.eye(k) + 0.3 * rng.normal(size=(k, k))
    x = rng.normal(size=(tokens, k)) @ mix * np.exp(0.3 * rng.normal(size=k))
    full = x + 0.2 * rng.normal(size=(tokens, k)) @ mix
    w = rng.normal(size=(k, n))
    return tuple(np.asarray(a, np.float32) for a in (w, x, full))


def hessian(x: np.ndarray) -> np.ndarray:
    return np.asarray(x.T @ x, np.float32)


@functools.partial(jax.jit, static_argnames=("name", "spec", "options"))
def run(name, w, spec, stats, options=None):
    algorithm = get_algorithm(name)
    return algorithm.quantize(w, spec, stats, algorithm.parse(options))


def decoded(q) -> np.ndarray:
    return np.asarray(q.dequantize(jnp.float32), np.float64)


def output_error(w, q, h) -> float:
    wrong = np.asarray(w, np.float64) - decoded(q)
    return float(np.sum(wrong * (h.astype(np.float64) @ wrong)))


def same_codes(got: np.ndarray, want: np.ndarray) -> bool:
    """Values of equal codes differ by rounding only, of others by whole steps."""
    differ = np.abs(got - want) > 1e-3 * np.abs(want).max()
    return np.mean(differ) <= 1e-4


STATIC, ACT = {"static": True}, {"static": True, "act_order": True}
CASES = {
    # Groups longer than a block, shorter, and with a short one at the end.
    "g128": ("int4", {"group_size": 128}, oracle.Int4(BF16), 128, {}, K),
    "padded": ("int4", {"group_size": 32}, oracle.Int4(BF16), 32, {}, 100),
    "static": ("int4", {"group_size": 32}, oracle.Int4(BF16), 32, STATIC, 100),
    "act-order": ("int4", {"group_size": 32}, oracle.Int4(BF16), 32, ACT, K),
    "channel": ("int4", {"granularity": "channel"}, oracle.Int4(np.float32), K, {}, K),
    "asymmetric": (
        "int4",
        {"group_size": 32, "symmetric": False},
        oracle.Int4Asymmetric(BF16),
        32,
        {},
        K,
    ),
    "nvfp4": ("nvfp4", {}, oracle.NVFP4(), 16, {}, K),
}


@pytest.mark.parametrize("case", CASES)
def test_against_numpy(case: str) -> None:
    name, of_format, fmt, group, how, k = CASES[case]
    w, x, _ = data(k)
    spec = make_spec(w.shape, w.dtype, format=name, **of_format)
    options = GPTQOptions(
        static_groups="static" in how, act_order="act_order" in how, block_size=48
    )
    got = decoded(run("gptq", w, spec, {"hessian": hessian(x)}, options))
    want = oracle.gptq(w.T, hessian(x), fmt, group, **how)[1]
    assert same_codes(got.T, want)
    assert not same_codes(decoded(rtn(jnp.asarray(w), spec)).T, want)


@pytest.mark.parametrize("act_order", [False, True])
def test_codes_of_a_larger_weight(act_order: bool) -> None:
    """Float32 against float64: fewer than one code in 10,000 is another one."""
    rng = np.random.default_rng(2)
    k, n = 512, 64
    mix = np.eye(k) + 0.3 * rng.normal(size=(k, k)) / np.sqrt(k)
    h = hessian(rng.normal(size=(2 * k, k)) @ mix)
    w = np.asarray(rng.normal(size=(k, n)), np.float32)
    spec = make_spec(w.shape, w.dtype, format="int4", group_size=128)
    options = GPTQOptions(act_order=act_order)
    got = decoded(run("gptq", w, spec, {"hessian": h}, options))
    levels, _ = oracle.gptq(
        w.T, h, oracle.Int4(BF16), 128, act_order=act_order, static=True
    )
    # One scale for 128 inputs: a value over it is its code.
    blocks = w.reshape(-1, 128, n)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / np.float32(7.5)).astype(BF16)
    codes = np.rint(got.reshape(blocks.shape) / scale.astype(np.float64))
    assert np.mean(codes.reshape(k, n) == levels.T) > 0.9999
    nearest = np.rint(blocks / scale.astype(np.float64)).reshape(k, n)
    assert np.mean(nearest == levels.T) < 0.95


def test_gptaq_against_numpy() -> None:
    w, x, full = data(64)
    spec = make_spec(w.shape, w.dtype, format="int4", group_size=32)
    mismatch = (full - x).T @ x
    stats = {"hessian": hessian(x), "mismatch": mismatch}
    options = GPTAQOptions(static_groups=True, act_order=True, alpha=0.5)
    q = run("gptaq", w, spec, stats, options)
    how = {"static": True, "act_order": True, "mismatch": mismatch, "alpha": 0.5}
    want = oracle.gptq(w.T, hessian(x), oracle.Int4(BF16), 32, **how)[1]
    assert same_codes(decoded(q).T, want)
    plain = oracle.gptq(w.T, hessian(x), oracle.Int4(BF16), 32, **ACT)[1]
    error = np.linalg.norm(full @ w - x @ decoded(q))
    assert error < 0.995 * np.linalg.norm(full @ w - x @ plain.T)


@pytest.mark.parametrize("stride", [1, 16])
def test_three_of_four_against_numpy(stride: int) -> None:
    w, x, _ = data(K, 3)
    spec = make_spec(
        w.shape, w.dtype, format="sherry", group_size=64, group_stride=stride
    )
    options = GPTQOptions(static_groups=False)
    got = decoded(run("gptq", w, spec, {"hessian": hessian(x)}, options))
    assert same_codes(got.T, oracle.gptq34(w.T, hessian(x), 64, stride))


def test_lstsq34_against_numpy() -> None:
    w, x, _ = data(K, 8)
    spec = make_spec(w.shape, w.dtype, format="sherry", group_size=64)
    h = hessian(x)
    scaled = h / np.diag(h).mean() + 0.01 * np.eye(K)
    q = run("lstsq34", w, spec, {"hessian": h})
    want = oracle.lstsq34(w.T, np.diag(scaled), scaled, 64)
    np.testing.assert_allclose(decoded(q).T, want, rtol=1e-2)
    assert output_error(w, q, h) < output_error(w, rtn(jnp.asarray(w), spec), h)


FORMATS = {
    "int2": {"group_size": 32, "symmetric": False},
    "float8_e4m3": {"granularity": "block"},
    "mxfp4": {},
    "nf4": {"group_size": 32},
    "t2": {"group_size": 32, "shift": True},
    "seq2": {"granularity": "tensor"},
    "binary": {"group_size": 32},
    "sherry": {"group_size": 32},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name: str) -> None:
    # Three of four weights are chosen together; there padding has a say.
    k = 96 if name == "sherry" else 90
    w, x, _ = data(k, 8)
    spec = make_spec(w.shape, w.dtype, format=name, **FORMATS[name])
    blocks, fmt = to_matrix(jnp.asarray(w), spec), get_format(name)
    scales = fmt.scales(blocks, as_matrix(spec))
    levels = fmt.nearest(blocks, scales, as_matrix(spec))
    nearest = from_matrix(levels, scales, spec)
    options = GPTQOptions(static_groups=False)
    q = run("gptq", w, spec, {"hessian": hessian(x)}, options)
    assert jax.tree.structure(q) == jax.tree.structure(nearest)
    assert output_error(w, q, hessian(x)) < 0.9 * output_error(w, nearest, hessian(x))
    # Inputs that do not go together leave nothing to make up for; all else equal, that
    # is rounding to nearest. Three of four also weigh by how large inputs are.
    diagonal = np.ones(k) if name == "sherry" else np.diag(hessian(x))
    h = np.diag(diagonal).astype(np.float32)
    apart = run("gptq", w, spec, {"hessian": h}, options)
    np.testing.assert_array_equal(decoded(apart), decoded(nearest))


def test_inputs_that_are_always_zero() -> None:
    w, x, _ = data()
    w = w.copy()
    dead = np.array([0, 17, 127])
    w[dead] *= 0.01  # no scale is theirs
    x = x.copy()
    x[:, dead] = 0
    spec = make_spec(w.shape, w.dtype, format="int4", granularity="channel")
    got = decoded(run("gptq", w, spec, {"hessian": hessian(x)}))
    live = np.delete(np.arange(K), dead)
    want = oracle.gptq(w[live].T, hessian(x[:, live]), oracle.Int4(np.float32), K - 3)[
        1
    ]
    assert same_codes(got[live].T, want)
    np.testing.assert_array_equal(got[dead], decoded(rtn(jnp.asarray(w), spec))[dead])
    # No inputs at all: all weights are as rounding leaves them.
    none = run("gptq", w, spec, {"hessian": np.zeros((K, K), np.float32)})
    np.testing.assert_array_equal(decoded(none), decoded(rtn(jnp.asarray(w), spec)))


class TestBatch:
    def test_one_by_one_and_all_together(self) -> None:
        rng = np.random.default_rng(1)
        w = rng.normal(size=(2, 64, 4, 4)).astype(np.float32)
        x = rng.normal(size=(2, 96, 64)) @ rng.normal(size=(64, 64))
        h = np.einsum("btk,btj->bkj", x, x).astype(np.float32)
        spec = make_spec(
            w.shape, w.dtype, format="int4", group_size=32, axis=-3, batch_axes=1
        )
        together = run("gptq", w, spec, {"hessian": h})
        for i in range(2):
            alone = run("gptq", w[i], spec, {"hessian": h[i]})
            np.testing.assert_array_equal(decoded(together[i]), decoded(alone))
        shapes = jax.eval_shape(lambda: run("gptq", w, spec, {"hessian": h}))
        assert shapes.shape == w.shape


class TestRefit:
    def test_one_scale_is_least_squares(self) -> None:
        w, x, _ = data()
        h = hessian(x)
        spec = make_spec(w.shape, w.dtype, format="int2", granularity="channel")
        plain = run("gptq", w, spec, {"hessian": h})
        q = run("gptq", w, spec, {"hessian": h}, GPTQOptions(refit_scales=True))
        old, new = decoded(plain), decoded(q)
        damped = h + 0.01 * np.diag(h).mean() * np.eye(K)
        ratio = np.einsum("kn,kj,jn->n", old, damped, w.astype(np.float64))
        ratio /= np.einsum("kn,kj,jn->n", old, damped, old)
        np.testing.assert_allclose(new, old * ratio, rtol=1e-4, atol=1e-6)
        assert output_error(w, q, h) < output_error(w, plain, h)

    @pytest.mark.parametrize("name", ["nvfp4", "t2"])
    def test_no_error_grows(self, name: str) -> None:
        w, x, _ = data(90, 8)
        h = hessian(x)
        more = {"group_size": 32, "shift": True} if name == "t2" else {}
        spec = make_spec(w.shape, w.dtype, format=name, **more)
        errors = []
        for refit in (False, True):
            options = GPTQOptions(refit_scales=refit, damping=1e-4)
            q = run("gptq", w, spec, {"hessian": h}, options)
            wrong = w - decoded(q)
            errors.append(np.einsum("kn,kj,jn->n", wrong, h, wrong))
        assert np.all(errors[1] <= 1.001 * errors[0])
        assert errors[1].sum() < 0.99 * errors[0].sum()


@pytest.mark.parametrize("name", ["int4", "nvfp4", "sherry"])
def test_outputs_on_other_devices_need_no_collective(name: str) -> None:
    mesh = Mesh(np.array(jax.devices("cpu")[:8]), ("model",))
    outputs = NamedSharding(mesh, P(None, "model"))
    w = jax.ShapeDtypeStruct((K, 64), jnp.float32, sharding=outputs)
    everywhere = NamedSharding(mesh, P())
    h = jax.ShapeDtypeStruct((K, K), jnp.float32, sharding=everywhere)
    more = {} if name == "nvfp4" else {"group_size": 64}
    spec = make_spec(w.shape, w.dtype, format=name, **more)
    options = GPTQOptions(block_size=64, static_groups=False)
    compiled = run.lower("gptq", w, spec, {"hessian": h}, options).compile()
    text = compiled.as_text()
    found = {
        c
        for c in ("all-gather", "all-reduce", "all-to-all", "collective-permute")
        if c in text
    }
    # One number: the scale of the whole tensor.
    assert found == ({"all-reduce"} if name == "nvfp4" else set())
    codes = compiled.output_shardings.planes["codes"]
    assert codes.is_equivalent_to(outputs, 2)


class TestRecipe:
    w = np.asarray(data(64, 8)[0])

    def compress(self, h: np.ndarray, tokens: int, **rule):
        recipe = aj.Recipe(rules=[aj.Rule(**{"algorithm": "gptq", **rule})])
        found = {"count": jnp.asarray(float(tokens)), "hessian": jnp.asarray(h)}
        stats = aj.calibration.Statistics({"dense/kernel": found})
        params = {"dense": {"kernel": jnp.asarray(self.w)}}
        return aj.compress(params, recipe, stats)["dense"]["kernel"]

    def test_from_calibration_to_weights(self) -> None:
        model, x = nn.Dense(8), jax.random.normal(jax.random.key(0), (16, 64))
        variables = model.init(jax.random.key(1), x)
        options = {"damping": 0.1, "scales": "mse"}
        rule = aj.Rule(format="int4", algorithm="gptq", options=options)
        recipe = aj.Recipe(rules=[rule])
        assert aj.Recipe.from_dict(recipe.to_dict()) == recipe
        stats = aj.calibrate(model, variables, [x], recipe)
        # Fewer tokens than inputs work, with one warning.
        with pytest.warns(UserWarning, match="kernel saw 16 tokens for 64 inputs") as r:
            q = aj.compress(variables, recipe, stats)["params"]["kernel"]
        assert len([w for w in r if "tokens" in str(w.message)]) == 1
        w, h = variables["params"]["kernel"], np.asarray(x.T @ x)
        assert output_error(w, q, h) < 0.7 * output_error(w, rtn(w, q.spec), h)

    def test_no_damping_is_enough(self) -> None:
        h = np.eye(64, dtype=np.float32) - 1e6
        with pytest.raises(ValueError, match="^dense/kernel: the Hessian .* not pos"):
            self.compress(h, 64, format="mxfp4")

    def test_gptaq_needs_a_mismatch(self) -> None:
        with pytest.raises(ValueError, match="mismatch"):
            self.compress(np.eye(64), 64, format="int4", algorithm="gptaq")


class TestOptions:
    @pytest.mark.parametrize(
        ("make", "said"),
        [
            (lambda: GPTQOptions(damping=0), "damping=0: use a positive number"),
            (lambda: GPTQOptions(damping_tries=0), "damping_tries=0"),
            (lambda: GPTQOptions(block_size=1.5), "block_size=1.5"),
            (lambda: GPTQOptions(act_order=1), "act_order must be true or false"),
            (
                lambda: GPTQOptions(act_order=True, static_groups=False),
                "needs static_groups: true",
            ),
            (lambda: GPTQOptions(scales="best"), "scales='best': use amax"),
            (lambda: GPTAQOptions(alpha=2), "alpha=2: use a number from 0 to 1"),
            (lambda: Lstsq34Options(rounds=0), "rounds=0: use a positive integer"),
            (lambda: Lstsq34Options(damping=-1), "damping=-1"),
            (
                lambda: aj.Rule(format="int4", algorithm="lstsq34"),
                "lstsq34 makes sherry, not int4",
            ),
        ],
    )
    def test_what_is_refused(self, make, said: str) -> None:
        with pytest.raises(ValueError, match=said):
            make()

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ({"format": "mxfp4"}, "powers of two"),
            ({"format": "int8", "granularity": "tensor"}, "not tensor"),
            ({"format": "float8_e4m3", "granularity": "block"}, "not block"),
        ],
    )
    def test_scales_that_cannot_be_refitted(self, more: dict, said: str) -> None:
        rule = aj.Rule(algorithm="gptq", options={"refit_scales": True}, **more)
        with pytest.raises(ValueError, match=said):
            aj.plan({"w": jnp.ones((64, 32))}, aj.Recipe(rules=[rule]))


def test_public_functions_are_what_recipes_run() -> None:
    for function in (gptq, gptaq, lstsq34):
        assert get_algorithm(function.__name__).quantize is function
