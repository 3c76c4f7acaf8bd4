"""SmoothQuant and the graph of scales, against loops in numpy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax.models import fuse_projections, stack_layers
from angeljax.transforms import SmoothQuant, apply_transforms
from angeljax.transforms._rescale import output_error
from tests.transforms._models import (
    CONFIG,
    KINDS,
    MODEL,
    TOKENS,
    logits,
    measured,
    same_logits,
    stacked,
)

W8A8 = aj.Rule(format="int8", activation="int8")
EVERY = ("norm", "value", "up")


def recipe(rule: aj.Rule = W8A8, **options) -> aj.Recipe:
    return aj.Recipe(rules=[rule], transforms=[{"name": "smoothquant", **options}])


@pytest.fixture(scope="module")
def params():
    return measured()[0]


@pytest.fixture(scope="module")
def stats():
    return measured()[1]


def same_statistics(got, want) -> None:
    for path, found in want.items():
        for kind in ("count", "nonfinite", "amax", *KINDS):
            scale = float(jnp.max(jnp.abs(found[kind]))) + 1e-12
            np.testing.assert_allclose(
                got[path][kind] / scale, found[kind] / scale, atol=1e-4,
                err_msg=f"{path} {kind}",
            )  # fmt: skip
        np.testing.assert_allclose(got.norms[path], want.norms[path], rtol=1e-5)


def test_function_and_statistics_stay(params, stats) -> None:
    new, after = apply_transforms(params, recipe(parts=EVERY, head_dim=8), stats)
    same_logits(MODEL, params, new)
    layer, old = new["layers"][1], params["layers"][1]
    for part in ("attn_norm", "mlp_norm"):
        assert float(jnp.max(jnp.abs(layer[part]["scale"] - old[part]["scale"]))) > 0.1
    assert layer["attn"]["v_proj"]["bias"] is not old["attn"]["v_proj"]["bias"]
    plain = aj.Recipe(rules=[W8A8])
    again = aj.calibrate(MODEL, new, [TOKENS], plain, statistics=KINDS)
    same_statistics(after, again)


def test_scales_by_loops(params, stats) -> None:
    """The paper's equation, one feature after another; values by head."""
    alpha = 0.6
    options = {"alpha": alpha, "parts": EVERY, "head_dim": 8}
    new, _ = apply_transforms(params, recipe(**options), stats)
    old, layer = params["layers"][0], new["layers"][0]
    got = np.asarray(old["attn_norm"]["scale"] / layer["attn_norm"]["scale"])
    top = np.asarray(stats["layers/0/attn/q_proj/kernel"]["amax_channel"])
    for j in range(CONFIG.hidden_size):
        w = 0.0
        for name in ("q_proj", "k_proj", "v_proj"):
            for value in np.asarray(old["attn"][name]["kernel"])[j]:
                w = max(w, abs(value))
        np.testing.assert_allclose(got[j], top[j] ** alpha / w ** (1 - alpha), 1e-5)

    # v_proj has been multiplied by the norm's scales, then divided by its own.
    before = np.asarray(old["attn"]["v_proj"]["bias"])
    got = before / np.asarray(layer["attn"]["v_proj"]["bias"])
    top = np.asarray(stats["layers/0/attn/o_proj/kernel"]["amax_channel"])
    o = np.asarray(old["attn"]["o_proj"]["kernel"])
    for head in range(2):
        for d in range(8):
            x = w = 0.0
            for query in (2 * head, 2 * head + 1):
                x = max(x, top[query * 8 + d])
                w = max(w, np.abs(o[query * 8 + d]).max())
            want = x**alpha / w ** (1 - alpha)
            np.testing.assert_allclose(got[head * 8 + d], want, 1e-5)


def test_stacked_and_fused(params, stats) -> None:
    fixed = recipe(parts=("norm", "up"))
    new, _ = apply_transforms(params, fixed, stats)
    other, _ = apply_transforms(stack_layers(params), fixed, stacked(stats))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        stack_layers(new), other,
    )  # fmt: skip
    # A fused layer has one consumer, which is the three side by side.
    fixed = recipe(alpha=0.5)
    one, _ = apply_transforms(params, fixed, stats)
    fused = fuse_projections(params)
    layers = {
        p.replace("q_proj", "qkv_proj").replace("up_proj", "gate_up_proj"): f
        for p, f in stats.items()
    }
    two, _ = apply_transforms(fused, fixed, aj.Statistics(layers))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        fuse_projections(one), two,
    )  # fmt: skip


def fake(x: np.ndarray, top: float, axis: int) -> np.ndarray:
    scale = np.abs(x).max(axis=axis, keepdims=True) / top
    return np.round(x / scale) * scale


def test_search_by_loops() -> None:
    """Errors from the Hessian are those of real products; the best alpha is taken."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(64, 32)) * np.where(np.arange(32) % 11 == 3, 30.0, 1.0)
    w = rng.normal(size=(32, 24))
    params = {
        "norm": {"scale": jnp.ones(32)},
        "q": {"kernel": jnp.asarray(w, jnp.float32)},
    }
    pairs = [{"from": "norm/scale", "to": ["q/kernel"]}]
    rule = aj.Rule(format="int4", activation="int8", narrow_range="yes",
                   granularity="channel", scale_dtype="float32")  # fmt: skip
    how = recipe(rule, alpha="search", pairs=pairs)
    model = lambda p, x: aj.ops.dot(x * p["norm"]["scale"], p["q"]["kernel"])  # noqa: E731
    stats = aj.calibrate(model, params, [jnp.asarray(x, jnp.float32)], how)
    spec = aj.plan(params, how)[1].spec
    losses, real, grid = [], [], np.linspace(0.3, 1, 8)
    for alpha in grid:
        s = np.abs(x).max(0) ** alpha / np.abs(w).max(1) ** (1 - alpha)
        q = fake(w * s[:, None], 7, 0)
        weights = np.square(x @ (q / s[:, None] - w)).sum()
        step = np.abs(x / s).max() / 127
        noise = np.minimum(np.square(x / s).mean(0), step**2 / 12)
        losses.append(weights + 64 * (noise * np.square(q).sum(1)).sum())
        static = np.clip(np.round(x / s / step), -127, 127) * step
        real.append(np.square(static @ q - x @ w).sum())
    tried = [np.abs(x).max(0) ** a / np.abs(w).max(1) ** (1 - a) for a in grid]
    got = output_error(
        params["q"]["kernel"], stats["q/kernel"], jnp.asarray(tried, jnp.float32),
        spec=spec, lead=0, activations=True,
    )  # fmt: skip
    np.testing.assert_allclose(got, losses, rtol=2e-3)
    # The model of rounding is near what static rounding really does.
    np.testing.assert_allclose(losses, real, rtol=0.15)
    new, _ = apply_transforms(params, how, stats)
    best = tried[int(np.argmin(losses))]
    np.testing.assert_allclose(new["norm"]["scale"], 1 / best, rtol=1e-4)
    assert 0 < np.argmin(losses) < 7


def experts(params, x):
    """A norm with a bias, a router, experts of their own and one that all share."""
    p = params["block"]
    h = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    h = h * p["norm"]["scale"] + p["norm"]["bias"]
    gate = jax.nn.softmax(aj.ops.dot(h, p["router"]["kernel"]))
    y = aj.ops.einsum("TK,EKN->ETN", h, p["experts"])
    return jnp.einsum("ETN,TE->TN", y, gate) + aj.ops.dot(h, p["shared"]["kernel"])


PAIR = {
    "from": "(.*)/norm/scale",
    "to": [r"\1/router/kernel", r"\1/experts", r"\1/shared/kernel"],
}


@pytest.fixture(scope="module")
def moe():
    rng = np.random.default_rng(5)
    shapes = {
        "experts": (3, 32, 16), "norm": {"bias": (32,), "scale": (32,)},
        "router": {"kernel": (32, 3)}, "shared": {"kernel": (32, 16)},
    }  # fmt: skip
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        {"block": shapes}, is_leaf=lambda x: isinstance(x, tuple),
    )  # fmt: skip
    x = jnp.asarray(rng.normal(size=(20, 32)), jnp.float32)
    plain = aj.Recipe(
        rules=[aj.Rule(match=r".*/(experts|shared/kernel)", format="int8")]
    )
    return params, x, plain, aj.calibrate(experts, params, [x], plain, statistics=KINDS)


def test_router_experts_and_bias_of_the_norm(moe) -> None:
    params, x, plain, stats = moe
    for alpha in (0.5, "search"):
        how = dataclasses.replace(
            plain, transforms=[SmoothQuant(alpha=alpha, pairs=[PAIR])]
        )
        new, after = apply_transforms(params, how, stats)
        moved = new["block"]["experts"] / params["block"]["experts"]
        assert float(jnp.std(moved)) > 0.05
        want = experts(params, x)
        np.testing.assert_allclose(experts(new, x), want, atol=5e-5)
        again = aj.calibrate(experts, new, [x], plain, statistics=KINDS)
        same_statistics(after, again)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([{"from": "(.*)/nrom/scale", "to": [r"\1/router/kernel"]}],
         r"matches no leaf; the closest paths are block/norm/scale"),
        ([{**PAIR, "to": [r"\1/rooter/kernel"]}],
         r"norm/scale has no reader .*closest paths are block/router/kernel"),
        ([{**PAIR, "to": [r"\1/norm/bias"]}], r"norm/bias"),
        ([PAIR, PAIR], r"named by two pairs"),
        ([{**PAIR, "to": [r"\1/router/kernel"]}], r"no reader .* is quantized"),
    ],
)  # fmt: skip
def test_pairs_that_do_not_fit(moe, pairs, message) -> None:
    params, _, plain, stats = moe
    with pytest.raises(aj.RecipeError, match=message):
        how = dataclasses.replace(plain, transforms=[SmoothQuant(pairs=pairs)])
        apply_transforms(params, how, stats)


def test_a_reader_that_no_pair_names(params, stats) -> None:
    pairs = [{"from": "(.*)/attn_norm/scale", "to": [r"\1/attn/[qk]_proj/kernel"]}]
    with pytest.raises(
        aj.RecipeError, match="layers/0/attn/v_proj/kernel has the same"
    ):
        apply_transforms(params, recipe(pairs=pairs), stats)


def test_needs(params, stats) -> None:
    with pytest.raises(aj.StatisticsError, match="smoothquant needs calibration"):
        aj.compress(params, recipe())
    with pytest.raises(aj.RecipeError, match="give head_dim"):
        aj.compress(params, recipe(parts=("value",)), stats)
    other = jax.tree.map(lambda w: 2 * w, params)
    with pytest.raises(ValueError, match="of another model"):
        aj.compress(other, recipe(), stats)
    for options, message in (
        ({"alpha": 1.5}, "alpha=1.5"), ({"parts": "norm"}, "parts="),
        ({"beta": 1}, "beta"), ({"pairs": [{"from": "a"}]}, "from and to"),
        ({"head_dim": 0}, "head_dim"), ({"parts": []}, "nothing to scale"),
    ):  # fmt: skip
        with pytest.raises(aj.RecipeError, match=message):
            recipe(**options)
    rotated = recipe(aj.Rule(format="int8", activation="int8", rotation=8))
    with pytest.raises(aj.RecipeError, match="rotated inputs"):
        aj.compress(params, rotated, stats)


def test_compress_in_one_call_and_under_jit(params, stats) -> None:
    rule = aj.Rule(format="int8", activation="int8", activation_scale="amax")
    how = recipe(rule, parts=("norm", "up"))
    q = aj.compress(params, how, stats)
    traced = jax.jit(lambda p, s: aj.compress(p, how, s))(params, stats)
    weight = "down_proj"
    one = q["layers"][1]["mlp"][weight]["kernel"].planes
    two = traced["layers"][1]["mlp"][weight]["kernel"].planes
    np.testing.assert_allclose(one["input_scale"], two["input_scale"], rtol=1e-5)
    np.testing.assert_allclose(one["scale"], two["scale"], rtol=1e-5)
    plain = aj.compress(params, aj.Recipe(rules=[rule]), stats)
    want = logits(MODEL, params)

    def error(tree):
        return float(jnp.mean(jnp.square(logits(MODEL, tree) - want)))

    assert error(q) < 0.7 * error(plain)
