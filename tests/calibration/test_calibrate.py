"""Statistics by interception, against numpy on inputs that were recorded by hand."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import angeljax as aj
from angeljax.calibration import Statistics, StatisticsError, _measure, merge
from angeljax.models import DecoderConfig, LanguageModel

KINDS = tuple(k for k in _measure.SHAPES if k not in ("batches", "mismatch"))
INT4 = aj.Recipe(rules=[aj.Rule(format="int4", group_size=32)])


def oracle(batches: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Everything, one token after another."""
    k = batches[0].shape[-1]
    out = {
        "count": 0.0, "nonfinite": 0.0, "amax": 0.0, "token_amax": 0.0, "ema": 0.0,
        "batches": 0.0, "amax_channel": np.zeros(k), "abs_sum": np.zeros(k),
        "hessian": np.zeros((k, k)), "histogram": np.zeros(_measure.BINS),
    }  # fmt: skip
    for batch in batches:
        rows = batch.reshape(-1, k).astype(np.float64)
        for x in rows:
            out["count"] += 1
            out["amax"] = max(out["amax"], np.abs(x).max())
            out["token_amax"] += np.abs(x).max()
            out["amax_channel"] = np.maximum(out["amax_channel"], np.abs(x))
            out["abs_sum"] += np.abs(x)
            out["hessian"] += np.outer(x, x)
        edges = np.exp2(np.arange(_measure.BINS + 1) * 40 / _measure.BINS - 24)
        out["histogram"] += np.histogram(np.abs(rows), edges)[0]
        out["ema"] = 0.98 * out["ema"] + 0.02 * np.abs(rows).max()
        out["batches"] += 1
    return out


def close(found: dict, want: dict) -> None:
    assert set(found) == set(want)
    for kind, value in found.items():
        if kind == "histogram":  # a value on an edge may fall to either side
            assert np.abs(np.asarray(value) - want[kind]).sum() <= 4
            continue
        np.testing.assert_allclose(
            value, want[kind], rtol=3e-5, atol=1e-5, err_msg=kind
        )


def inputs(count: int = 2, shape: tuple[int, ...] = (2, 6, 32)) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), count)
    return [jax.random.normal(k, shape) for k in keys]


class TestForeign:
    def test_linen(self) -> None:
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.Dense(8, name="b")(jnp.tanh(nn.Dense(32, name="a")(x)))

        xs = inputs()
        model = Net()
        variables = model.init(jax.random.key(1), xs[0])
        stats = aj.calibrate(model, variables, xs, INT4, statistics=KINDS)
        a = variables["params"]["a"]
        close(stats["params/a/kernel"], oracle([np.asarray(x) for x in xs]))
        hidden = [np.tanh(np.asarray(x @ a["kernel"] + a["bias"])) for x in xs]
        close(stats["params/b/kernel"], oracle(hidden))

    def test_linen_scan_over_layers(self) -> None:
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return jnp.tanh(nn.Dense(32, name="d")(x)), None

        stack = nn.scan(
            nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True},
            length=3,
        )  # fmt: skip

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                return stack(name="layers")(x, None)[0]

        (x,) = inputs(1)
        model = Net()
        variables = model.init(jax.random.key(1), x)
        stats = aj.calibrate(model, variables, [x], INT4, statistics=KINDS)
        layers = variables["params"]["layers"]["d"]
        found = stats["params/layers/d/kernel"]
        h = np.asarray(x)
        for i in range(3):
            close(jax.tree.map(lambda v, i=i: v[i], found), oracle([h]))
            h = np.tanh(h @ np.asarray(layers["kernel"][i]) + layers["bias"][i])

    def test_nnx(self) -> None:
        class Net(nnx.Module):
            def __init__(self, rngs):
                self.a = nnx.Linear(32, 32, rngs=rngs)
                self.b = nnx.Linear(32, 8, rngs=rngs)

            def __call__(self, x):
                return self.b(jnp.tanh(self.a(x)))

        xs, model = inputs(), Net(nnx.Rngs(0))
        stats = aj.calibrate(model, None, xs, INT4, statistics=KINDS)
        hidden = [np.tanh(np.asarray(model.a(x))) for x in xs]
        close(stats["a/kernel"], oracle([np.asarray(x) for x in xs]))
        close(stats["b/kernel"], oracle(hidden))
        assert isinstance(model.a.kernel[...], jax.Array)


def test_decoder_stacked_and_apart_agree_and_padding_does_not_count() -> None:
    config = DecoderConfig(
        model_type="llama", vocab_size=64, hidden_size=32, num_layers=2,
        intermediate_size=64, num_heads=2, num_kv_heads=1, head_dim=16,
    )  # fmt: skip
    apart = LanguageModel(config)
    params = apart.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 64)
    mask = jnp.arange(6) < jnp.asarray([[6], [4]])
    one = aj.calibrate(apart, params, [{"tokens": tokens, "mask": mask}], INT4,
                       statistics=KINDS)  # fmt: skip
    assert float(one["layers/0/attn/q_proj/kernel"]["count"]) == 10
    from angeljax.models import stack_layers

    stacked = aj.calibrate(
        LanguageModel(config, scan_layers=True), stack_layers(params),
        [{"tokens": tokens, "mask": mask}], INT4, statistics=KINDS,
    )  # fmt: skip
    for name in ("attn/q_proj", "attn/o_proj", "mlp/down_proj"):
        for i in range(2):
            a = one[f"layers/{i}/{name}/kernel"]
            b = stacked[f"layers/{name}/kernel"]
            b = {k: v[i] for k, v in b.items()}
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
                a,
                b,
            )


def test_experts_by_einsum_and_ragged() -> None:
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(3, 32, 8)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(3, 5, 32)), jnp.float32).at[1, 3:].set(0)
    x = x.at[2].set(0)

    def dispatched(params, x):
        return aj.ops.einsum("ETK,EKN->ETN", x, params["w"])

    stats = aj.calibrate(dispatched, {"w": w}, [x], INT4, statistics=KINDS)["w"]
    assert stats["count"].tolist() == [5, 3, 0]
    for e, rows in ((0, 5), (1, 3)):
        close({k: v[e] for k, v in stats.items()}, oracle([np.asarray(x[e, :rows])]))

    def ragged(params, rows, sizes):
        return aj.ops.ragged_dot(rows, params["w"], sizes)

    rows = jnp.concatenate([x[0], x[1, :3]])
    sizes = jnp.asarray([5, 3, 0])
    other = aj.calibrate(ragged, {"w": w}, [(rows, sizes)], INT4, statistics=KINDS)["w"]
    for kind in stats:
        np.testing.assert_allclose(stats[kind], other[kind], rtol=1e-5, atol=1e-5)

    everything = aj.calibrate(
        lambda params, x: aj.ops.einsum("TK,EKN->ETN", x, params["w"]),
        {"w": w}, [x[0]], INT4, statistics=KINDS,
    )["w"]  # fmt: skip
    for e in range(3):
        close({k: v[e] for k, v in everything.items()}, oracle([np.asarray(x[0])]))


def test_no_backward_pass_is_left() -> None:
    k, layers = 64, 4

    def model(params, x):
        def body(h, w):
            return jnp.tanh(aj.ops.dot(h, w)), None

        return jax.lax.scan(body, x, params["w"])[0]

    from angeljax.calibration._tap import TappedTensor

    w = jnp.ones((layers, k, k))
    spec = aj.plan({"w": w}, INT4)[0].spec
    assert spec is not None

    def calibrating(slots, w, x):
        tapped = TappedTensor.of(w, spec, {"hessian": slots})
        return jnp.sum(model({"w": tapped}, x))

    slots, x = jnp.zeros((layers, k, k)), jnp.ones((32, k))
    compiled = jax.jit(jax.grad(calibrating)).lower(slots, w, x).compile()
    # One product for the layer and one for the statistic; a gradient would add two.
    assert compiled.as_text().count(" dot(") == 2


class TestTree:
    def test_saved_merged_and_read_again(self, tmp_path) -> None:
        xs = inputs(4)
        model = nn.Dense(8)
        variables = model.init(jax.random.key(1), xs[0])
        run = lambda b: aj.calibrate(model, variables, b, INT4, statistics=KINDS)  # noqa: E731
        whole, halves = run(xs), merge(run(xs[:2]), run(xs[2:]))
        for kind, value in whole["params/kernel"].items():
            if kind != "ema":
                np.testing.assert_allclose(
                    halves["params/kernel"][kind], value, rtol=1e-5, err_msg=kind
                )
        whole.save(tmp_path / "stats.safetensors")
        again = Statistics.load(tmp_path / "stats.safetensors")
        assert jax.tree.structure(again) == jax.tree.structure(whole)
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
            assert np.array_equal(a, b)

    def test_sharded_batches_give_the_same(self) -> None:
        from jax.sharding import NamedSharding, PartitionSpec

        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        x = inputs(1, (8, 3, 32))[0]
        model = nn.Dense(8)
        variables = model.init(jax.random.key(1), x)
        want = aj.calibrate(model, variables, [x], INT4, statistics=("hessian",))
        split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        got = aj.calibrate(model, variables, [split], INT4, statistics=("hessian",))
        for kind, value in want["params/kernel"].items():
            np.testing.assert_allclose(
                got["params/kernel"][kind], value, rtol=1e-5, atol=1e-5
            )


class TestBadInput:
    def test_nan_names_the_weight(self) -> None:
        def model(params, x):
            return aj.ops.dot(jnp.log(aj.ops.dot(x, params["u"])), params["v"])

        params = {"u": -jnp.ones((32, 32)), "v": jnp.ones((32, 8))}
        with pytest.raises(StatisticsError, match="inputs of v hold NaN"):
            aj.calibrate(model, params, [jnp.ones((2, 32))], INT4)

    def test_a_weight_that_is_not_used(self) -> None:
        params = {"u": jnp.ones((32, 8)), "v": jnp.ones((32, 8))}
        with pytest.raises(StatisticsError, match="v was not multiplied"):
            aj.calibrate(
                lambda p, x: aj.ops.dot(x, p["u"]), params, [jnp.ones((2, 32))], INT4
            )

    def test_no_batches(self) -> None:
        with pytest.raises(StatisticsError, match="no batches"):
            aj.calibrate(lambda p, x: x @ p["u"], {"u": jnp.ones((32, 8))}, [], INT4)

    def test_statistics_of_another_model_and_of_another_recipe(self) -> None:
        static = aj.Recipe(
            rules=[
                aj.Rule(format="int8", activation="int8", activation_scale="amax"),
            ]
        )
        f = lambda p, x: aj.ops.dot(x, p["u"])  # noqa: E731
        x, params = jnp.ones((2, 32)), {"u": jnp.ones((32, 8))}
        stats = aj.calibrate(f, params, [x], static)
        assert "input_scale" in aj.compress(params, static, stats)["u"].planes
        with pytest.raises(StatisticsError, match="another model: its weights"):
            aj.compress({"u": 2 * jnp.ones((32, 8))}, static, stats)
        with pytest.raises(StatisticsError, match="no statistics of v"):
            aj.compress({"v": jnp.ones((32, 8))}, static, stats)
        with pytest.raises(StatisticsError, match="needs calibration"):
            aj.compress(params, static)

    def test_not_a_file_of_statistics(self, tmp_path) -> None:
        from safetensors.numpy import save_file

        save_file({"u": np.zeros(1)}, tmp_path / "x")
        with pytest.raises(StatisticsError, match="holds no statistics"):
            Statistics.load(tmp_path / "x")
        (tmp_path / "y").write_bytes(b"nonsense")
        with pytest.raises(StatisticsError, match="cannot be read"):
            Statistics.load(tmp_path / "y")


def test_experts_without_tokens_share_what_the_others_saw() -> None:
    from angeljax.calibration._statistics import for_weight

    found = {
        "count": jnp.asarray([[2.0, 0.0], [1.0, 3.0]]),
        "amax": jnp.asarray([[5.0, 0.0], [1.0, 2.0]]),
        "abs_sum": jnp.arange(8.0).reshape(2, 2, 2),
    }
    got = for_weight(Statistics({"w": found}), "w", 2, (2, 2), ("amax", "abs_sum"))
    assert got["amax"].tolist() == [[5, 5], [1, 2]]
    assert got["abs_sum"].tolist() == [[[0, 1], [2, 4]], [[4, 5], [6, 7]]]
    assert got["count"].tolist() == [[2, 2], [1, 3]]
