"""Layer by layer, against a loop of `calibrate` and `compress` over partial trees."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax.calibration import StatisticsError, _layer_run
from angeljax.calibration._kept_layers import KeptLayers
from angeljax.models import DecoderConfig, LanguageModel, stack_layers
from tests.models._random_params import random_params

CONFIG = DecoderConfig(
    model_type="llama", vocab_size=64, hidden_size=32, num_layers=3,
    intermediate_size=64, num_heads=2, num_kv_heads=1, head_dim=16,
    windows=(0, 3, 0),
)  # fmt: skip
MODEL = LanguageModel(CONFIG)
STATIC = aj.Recipe(
    rules=[aj.Rule(format="int4", activation="int8", activation_scale="amax")]
)
TOKENS = np.random.default_rng(0).integers(0, 64, (5, 6)).astype(np.int32)
LONG = np.random.default_rng(1).integers(0, 64, (8, 12)).astype(np.int32)
MASK = np.arange(6) < np.asarray([[6], [4], [6], [2], [5]])
BATCHES = [
    {"tokens": TOKENS[:3], "mask": MASK[:3]},
    {"tokens": TOKENS[3:], "mask": MASK[3:]},
]


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(MODEL, std=0.3)


@pytest.fixture(scope="module")
def done(params: Any) -> Any:
    return aj.compress_sequential(MODEL, params, STATIC, BATCHES)


def by_hand(params: Any, recipe: aj.Recipe, batches: Any) -> Any:
    """Layer i from statistics of the model whose layers before are quantized."""
    partial = {**params, "layers": dict(params["layers"])}
    for i in range(CONFIG.num_layers):
        stats = aj.calibrate(MODEL, partial, batches, recipe)
        whole = aj.compress(partial, recipe, stats)
        partial["layers"][i] = whole["layers"][i]
    return partial


def same(a: Any, b: Any, *, exact: bool = False) -> None:
    """The same tree: codes equal, scales but for rounding."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert x.dtype == y.dtype
        if exact or not jnp.issubdtype(x.dtype, jnp.floating):
            assert np.array_equal(x, y), path
        else:
            np.testing.assert_allclose(x, y, rtol=2e-5, err_msg=str(path))


def test_equals_a_loop_of_calibrate_and_compress(params: Any, done: Any) -> None:
    same(done, by_hand(params, STATIC, BATCHES))
    # It is not what one pass over the full-precision model gives.
    stats = aj.calibrate(MODEL, params, BATCHES, STATIC)
    once = aj.compress(params, STATIC, stats)
    scale = lambda t: t["layers"][2]["mlp"]["down_proj"]["kernel"].planes["input_scale"]  # noqa: E731
    assert not np.allclose(scale(done), scale(once), rtol=1e-3)
    full = aj.compress_sequential(MODEL, params, STATIC, BATCHES, inputs="full")
    same(full, once)


def test_scanned_layers_equal_layers_apart(params: Any, done: Any) -> None:
    scanned = LanguageModel(CONFIG, scan_layers=True)
    got = aj.compress_sequential(scanned, stack_layers(params), STATIC, BATCHES)
    same(got, stack_layers(done))


def test_numpy_params_and_the_memory_of_the_host(params: Any, done: Any) -> None:
    on_host = jax.tree.map(np.asarray, params)
    got = aj.compress_sequential(MODEL, on_host, STATIC, BATCHES, host=True)
    same(got, done, exact=True)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(got["layers"]))
    logits = MODEL.logits(done, TOKENS)
    np.testing.assert_allclose(MODEL.logits(got, TOKENS), logits, rtol=1e-5, atol=1e-5)


class TestGPTQ:
    RECIPE = aj.Recipe(rules=[aj.Rule(format="int4", group_size=16, algorithm="gptq")])

    def test_equals_the_loop_and_compiles_once(self, params: Any) -> None:
        _layer_run.observe.clear_cache()
        got = aj.compress_sequential(MODEL, params, self.RECIPE, LONG, batch_size=4)
        # All layers, whatever their windows, in one program.
        assert _layer_run.observe._cache_size() == 1
        same(got, by_hand(params, self.RECIPE, [LONG[:4], LONG[4:]]))

    def test_true_sequential_measures_between_subsets(self, params: Any) -> None:
        got = aj.compress_sequential(
            MODEL, params, self.RECIPE, LONG, batch_size=4, true_sequential=True
        )
        # By hand for layer 0: each subset from the tree with those before it done.
        partial = jax.tree.map(lambda x: x, params)
        for names in (
            ("attn/q_proj", "attn/k_proj", "attn/v_proj"), ("attn/o_proj",),
            ("mlp/gate_proj", "mlp/up_proj"), ("mlp/down_proj",),
        ):  # fmt: skip
            stats = aj.calibrate(MODEL, partial, [LONG[:4], LONG[4:]], self.RECIPE)
            whole = aj.compress(partial, self.RECIPE, stats)
            for name in names:
                a, b = name.split("/")
                partial["layers"][0][a][b] = whole["layers"][0][a][b]
        same(got["layers"][0], partial["layers"][0])

    def test_mismatch_is_of_both_models_side_by_side(self, params: Any) -> None:
        recipe = aj.Recipe(
            rules=[aj.Rule(format="int4", group_size=16, algorithm="gptaq")]
        )
        mask = np.arange(12) < np.arange(5, 13)[:, None]
        masked = {"tokens": LONG, "mask": mask}
        seen: list[Any] = []
        pairs = _layer_run.observe_pairs

        def spy(*args: Any) -> Any:
            seen.append((args, pairs(*args)))
            return seen[-1][1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_layer_run, "observe_pairs", spy)
            done = aj.compress_sequential(MODEL, params, recipe, [masked])
        found = [f[0]["mismatch"] for _, f in seen]
        assert len(found) == 3 and not np.any(found[0])
        # What the last layer's first weight sees: by hand, token by token.
        layers = MODEL.layerwise()

        def input_of(tree: Any) -> np.ndarray:
            x, context = layers.embed(tree, masked)
            for i in range(2):
                x = layers.layer(tree["layers"][i], x, context, i)
            scale = params["layers"][2]["mlp_norm"]["scale"]
            # With an MLP of zeros a layer gives what its MLP reads.
            layer = dict(params["layers"][2])
            layer["mlp"] = jax.tree.map(jnp.zeros_like, layer["mlp"])
            x = layers.layer(layer, x, context, 2)
            x = np.asarray(x, np.float64)
            rms = np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_eps)
            return (x / rms * np.asarray(scale))[mask]

        full, own = input_of(params), input_of({**params, "layers": done["layers"]})
        want = sum(np.outer(f - x, x) for f, x in zip(full, own, strict=True))
        (args, last) = seen[2]
        names = [
            "/".join(str(k.key) for k in path[:2])
            for path, _ in jax.tree_util.tree_leaves_with_path(params["layers"][2])
        ]
        place = [names[tap.leaf] for tap in args[1]].index("mlp/gate_proj")
        np.testing.assert_allclose(last[place]["mismatch"], want, rtol=1e-3, atol=1e-3)


@dataclasses.dataclass(frozen=True)
class Stack:
    """A foreign model: residual layers in a list, a projection before, one after."""

    depth: int = 3

    @property
    def num_layers(self) -> int:
        return self.depth

    def layer_path(self, i: int) -> str:
        return f"body/{i}"

    def embed(self, params: Any, batch: Any) -> tuple[Any, Any]:
        return aj.ops.dot(batch, params["first"]["w"]), ()

    def layer(self, params: Any, state: Any, context: Any, i: Any) -> Any:
        hidden = jnp.tanh(aj.ops.dot(state, params["up"]))
        return state + aj.ops.dot(hidden, params["down"])

    def head(self, params: Any, state: Any, context: Any) -> Any:
        return aj.ops.dot(state, params["last"]["w"])

    def __call__(self, params: Any, batch: Any) -> Any:
        x, context = self.embed(params, batch)
        for i in range(self.depth):
            x = self.layer(params["body"][i], x, context, i)
        return self.head(params, x, context)


def test_a_foreign_model_with_weights_before_and_after_its_layers() -> None:
    model, rng = Stack(), np.random.default_rng(1)
    w = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32) * 0.4  # noqa: E731
    params = {
        "first": {"w": w(32, 48)},
        "body": [{"up": w(48, 64), "down": w(64, 48)} for _ in range(3)],
        "last": {"w": w(48, 32)},
    }
    recipe = aj.Recipe(
        rules=[aj.Rule(format="int8", activation="int8", activation_scale="amax")]
    )
    xs = [w(4, 7, 32), w(4, 7, 32)]
    got = aj.compress_sequential(model, params, recipe, xs)
    want: Any = {**params, "body": list(params["body"])}
    for place in ("first", 0, 1, 2, "last"):
        stats = aj.calibrate(model, want, xs, recipe)
        whole = aj.compress(want, recipe, stats)
        if isinstance(place, int):
            want["body"][place] = whole["body"][place]
        else:
            want[place] = whole[place]
    same(got, want)
    with pytest.raises(TypeError, match="LayerwiseModel, which function does not"):
        aj.compress_sequential(lambda p, x: x, params, recipe, xs)


class TestResume:
    def test_goes_on_after_a_kill_and_gives_the_same(
        self, params: Any, done: Any, tmp_path: Any
    ) -> None:
        saved, save = [], KeptLayers.save

        def killed(self: Any, i: int, leaves: Any) -> None:
            if i == 2:
                raise KeyboardInterrupt
            save(self, i, leaves)
            saved.append(i)

        run = lambda **more: aj.compress_sequential(  # noqa: E731
            MODEL, params, STATIC, BATCHES, folder=tmp_path, **more
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(KeptLayers, "save", killed)
            with pytest.raises(KeyboardInterrupt):
                run()
        assert saved == [0, 1]
        calls, observe = [], _layer_run.observe
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                _layer_run, "observe", lambda *a: (calls.append(1), observe(*a))[1]
            )
            same(run(), done, exact=True)
        assert len(calls) == len(BATCHES)  # the last layer only
        same(run(), done, exact=True)

        with pytest.raises(ValueError, match="begun with data"):
            aj.compress_sequential(MODEL, params, STATIC, BATCHES[:1], folder=tmp_path)
        with pytest.raises(ValueError, match="begun with options"):
            run(inputs="full")
        file = tmp_path / "layer-00001.npz"
        file.write_bytes(file.read_bytes()[:-200])
        with pytest.raises(ValueError, match=r"layer-00001\.npz cannot be read"):
            run()


def test_sharded_over_outputs_and_data(params: Any, done: Any) -> None:
    from jax.sharding import NamedSharding, PartitionSpec

    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=auto)
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))  # noqa: E731
    spread = jax.tree.map(lambda x: put(x, *(None, "model")[-x.ndim :]), params)
    tokens = LONG
    recipe = TestGPTQ.RECIPE
    want = aj.compress_sequential(MODEL, params, recipe, [tokens])
    got = aj.compress_sequential(MODEL, spread, recipe, [put(tokens, "data")])
    same(got, want)
    codes = got["layers"][0]["mlp"]["up_proj"]["kernel"].planes["codes"]
    assert "model" in codes.sharding.spec


def test_transforms_inside_layers_and_before_them(params: Any) -> None:
    rules = [aj.Rule(format="int4", activation="int8", activation_scale="amax")]
    recipe = aj.Recipe(rules=rules, transforms=[{"name": "smoothquant"}])
    got = aj.compress_sequential(MODEL, params, recipe, BATCHES, inputs="full")
    stats = aj.calibrate(MODEL, params, BATCHES, recipe)
    same(got, aj.compress(params, recipe, stats))


class TestRefused:
    def test_before_any_work(self, params: Any) -> None:
        with pytest.raises(StatisticsError, match="no batches"):
            aj.compress_sequential(MODEL, params, STATIC, [])
        with pytest.raises(ValueError, match="inputs must be"):
            aj.compress_sequential(MODEL, params, STATIC, BATCHES, inputs="both")  # type: ignore[arg-type]
        with pytest.raises(aj.RecipeError, match="put it first"):
            recipe = dataclasses.replace(
                STATIC, transforms=[{"name": "smoothquant"}, {"name": "rotation"}]
            )
            aj.compress_sequential(MODEL, params, recipe, BATCHES)

    def test_nan_names_the_layer(self, params: Any) -> None:
        bad = {**params, "layers": {**params["layers"]}}
        bad["layers"][1] = jax.tree.map(lambda x: x * jnp.nan, params["layers"][1])
        with pytest.raises(ValueError, match=r"layer 1: .*layers/1"):
            aj.compress_sequential(MODEL, bad, STATIC, BATCHES)
