"""`compress` on every kind of tree, and its promises: pure, traceable, lean."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import angeljax as aj
from angeljax.formats import format_names
from tests.formats._cases import OPTIMIZED

INT4 = aj.Recipe(rules=[aj.Rule(format="int4", group_size=32)])
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)


def params(dtype=jnp.float32):
    k1, k2 = jax.random.split(jax.random.key(0))
    return {
        "dense": {
            "kernel": jax.random.normal(k1, (64, 96), dtype),
            "bias": jnp.zeros(96, dtype),
        },
        "stack": {"kernel": jax.random.normal(k2, (3, 64, 32), dtype)},
        "norm": {"scale": jnp.ones(64, dtype)},
    }


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_replaces_weights_and_keeps_the_rest():
    p = params()
    c = aj.compress(p, INT4)
    assert isinstance(c["dense"]["kernel"], aj.QTensor)
    assert isinstance(c["stack"]["kernel"], aj.QTensor)
    assert c["dense"]["bias"] is p["dense"]["bias"]
    assert c["norm"]["scale"] is p["norm"]["scale"]
    assert c["dense"]["kernel"].shape == (64, 96)
    assert isinstance(p["dense"]["kernel"], jax.Array)


@pytest.mark.parametrize("fmt", format_names())
def test_eager_jit_and_eval_shape_agree(fmt):
    recipe = aj.Recipe(rules=[aj.Rule(format=fmt)])
    p = params(jnp.bfloat16)
    eager = aj.compress(p, recipe)
    compress = jax.jit(lambda p: aj.compress(p, recipe), compiler_options=OPTIMIZED)
    traced = compress(p)
    assert_same(eager, traced)
    abstract = jax.eval_shape(lambda p: aj.compress(p, recipe), p)
    assert jax.tree.structure(abstract) == jax.tree.structure(eager)
    for a, e in zip(jax.tree.leaves(abstract), jax.tree.leaves(eager), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)


def test_numpy_leaves():
    p = jax.tree.map(np.asarray, params())
    assert_same(
        aj.compress(p, INT4)["dense"]["kernel"],
        aj.compress(params(), INT4)["dense"]["kernel"],
    )


def test_containers_other_than_dicts():
    p = [{"kernel": jnp.ones((64, 64))}, (jnp.ones((64, 64)), jnp.ones(3))]
    c = aj.compress(p, INT4)
    assert isinstance(c, list) and isinstance(c[1], tuple)
    assert isinstance(c[0]["kernel"], aj.QTensor) and isinstance(c[1][0], aj.QTensor)
    assert [a.path for a in aj.plan(p, INT4)] == ["0/kernel", "1/0", "1/1"]


def test_tied_leaf_stays_one():
    w = jax.random.normal(jax.random.key(1), (64, 64))
    c = aj.compress({"a": {"kernel": w}, "b": {"kernel": w}}, INT4)
    assert c["a"]["kernel"] is c["b"]["kernel"]


def test_tied_leaf_can_be_donated():
    w = jax.random.normal(jax.random.key(1), (64, 64))
    c = aj.compress({"a": {"kernel": w}, "b": {"kernel": w}}, INT4, donate=True)
    assert w.is_deleted()
    assert c["a"]["kernel"] is c["b"]["kernel"]


def test_donate_deletes_only_what_was_taken():
    p = params()
    c = aj.compress(p, INT4, donate=True)
    assert p["dense"]["kernel"].is_deleted()
    assert not p["dense"]["bias"].is_deleted()
    assert np.isfinite(c["dense"]["kernel"].dequantize()).all()


def test_boxed_leaves_keep_their_box():
    box = nn.Partitioned(jnp.ones((64, 96)), names=("in", "out"))
    c = aj.compress({"kernel": box}, INT4)
    assert isinstance(c["kernel"], nn.Partitioned)
    assert isinstance(c["kernel"].value, aj.QTensor)
    assert nn.get_partition_spec(c)["kernel"] == P("in", "out")


def test_nnx_state_and_pure_dict_agree():
    model = nnx.Linear(64, 96, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    c = aj.compress(state, INT4)
    assert isinstance(c, nnx.State)
    assert isinstance(c["kernel"], nnx.Param)
    pure = aj.compress(nnx.to_pure_dict(state), INT4)
    assert_same(c["kernel"].get_value(), pure["kernel"])
    assert not isinstance(model.kernel.get_value(), aj.QTensor)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_named(bad):
    p = params()
    p["stack"]["kernel"] = p["stack"]["kernel"].at[1, 2, 3].set(bad)
    with pytest.raises(ValueError, match="stack/kernel holds NaN or infinity"):
        aj.compress(p, INT4)


def test_nothing_is_computed_before_the_whole_recipe_fits(monkeypatch):
    rules = [aj.Rule(format="int8"), aj.Rule(match="no/such/leaf", format="int8")]
    monkeypatch.setattr("angeljax.formats._quantize.quantize_to", None)
    with pytest.raises(aj.RecipeError, match="no/such/leaf"):
        aj.compress(params(), aj.Recipe(rules=rules))


def test_compressing_twice():
    once = aj.compress(params(), INT4)
    with pytest.raises(aj.RecipeError, match="quantized already"):
        aj.compress(once, INT4)
    again = aj.Recipe(rules=[aj.Rule(match="dense/kernel", format="int8")])
    with pytest.raises(aj.RecipeError, match="dense/kernel is int4 g32 already"):
        aj.compress(once, again)


def test_wrong_recipe_type_and_abstract_leaves():
    with pytest.raises(TypeError, match="use Recipe.load"):
        aj.compress(params(), "sherry")
    abstract = jax.eval_shape(params)
    with pytest.raises(TypeError, match="jax.eval_shape"):
        aj.compress(abstract, INT4)


@pytest.mark.parametrize("spec", [P("x", None), P(None, "y"), P("x", "y")])
@pytest.mark.parametrize("fmt", ["int4", "sherry", "t2", "nvfp4"])
def test_sharding_is_kept_without_collectives(spec, fmt):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("x", "y"))
    sharding = NamedSharding(mesh, spec)
    p = {"w": jax.device_put(jnp.ones((256, 64)), sharding)}
    group = None if fmt == "nvfp4" else 64
    recipe = aj.Recipe(rules=[aj.Rule(format=fmt, group_size=group)])
    f = jax.jit(lambda p: aj.compress(p, recipe))
    hlo = f.lower(p).compile().as_text()
    assert not [c for c in COLLECTIVES if c in hlo] or fmt == "nvfp4"
    for q in (f(p)["w"], aj.compress(p, recipe)["w"]):
        for name in ("codes", "scale"):
            got = q.planes[name].sharding
            assert got.is_equivalent_to(sharding, 2), (name, got)
    assert q.sharding.is_equivalent_to(sharding, 2)


def test_report_counts_bytes_and_errors():
    p = params()
    c = aj.compress(p, INT4)
    r = aj.report(p, c)
    assert [x.path for x in r.leaves] == [a.path for a in aj.plan(p, INT4)]
    total = sum(np.asarray(x).nbytes for x in jax.tree.leaves(c))
    assert r.nbytes == total
    assert r.weights == 64 * 96 + 96 + 3 * 64 * 32 + 64
    assert r.bits_per_weight == pytest.approx(8 * total / r.weights)
    leaf = next(x for x in r.leaves if x.path == "dense/kernel")
    w, d = np.asarray(p["dense"]["kernel"]), c["dense"]["kernel"].dequantize()
    want = np.linalg.norm(w - d) / np.linalg.norm(w)
    assert leaf.relative_error == pytest.approx(want, rel=1e-5)
    assert leaf.snr_db == pytest.approx(-20 * np.log10(want), rel=1e-5)
    assert leaf.bits_per_weight == 4.5
    assert next(x for x in r.leaves if x.path == "dense/bias").snr_db is None


def test_report_exports(tmp_path):
    import json

    pytest.importorskip("matplotlib")
    p = params()
    r = aj.report(p, aj.compress(p, INT4))
    r.to_json(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["bytes"] == r.nbytes
    page = r.to_html(tmp_path / "r.html", title="A <b> title")
    assert page.count("<svg") == 2 and "A &lt;b&gt; title" in page
    assert "dense/kernel" in page and 'src="http' not in page
    assert "dense/kernel" in str(r) and "whole tree" in str(r)


def test_report_of_different_models_names_the_leaf():
    p = params()
    c = aj.compress(p, INT4)
    other = {**p, "dense": {**p["dense"], "kernel": jnp.ones((64, 95))}}
    with pytest.raises(ValueError, match="dense/kernel has shape"):
        aj.report(other, c)
    with pytest.raises(ValueError, match="extra is missing from the compressed"):
        aj.report({**p, "extra": jnp.ones(2)}, c)
    with pytest.raises(ValueError, match="extra is missing from the original"):
        aj.report(p, {**c, "extra": jnp.ones(2)})


@pytest.mark.parametrize("donate", [True, False])
def test_peak_memory(donate, monkeypatch):
    """Weights and codes that exist at once, after each leaf."""
    job = importlib.import_module("angeljax._jobs").Job
    weights = [jnp.full((256, 64), i, jnp.float32) for i in range(1, 9)]
    made, sizes, run = [], [], job.run

    def watched(self, w):
        out = run(self, w)
        made.extend(jax.tree.leaves(out))
        alive = [x.nbytes for x in (*weights, *made) if not x.is_deleted()]
        sizes.append(sum(alive))
        return out

    monkeypatch.setattr(job, "run", watched)
    params = {str(i): {"kernel": w} for i, w in enumerate(weights)}
    c = aj.compress(params, aj.Recipe(rules=[aj.Rule(format="int8")]), donate=donate)
    leaf, packed = weights[0].nbytes, c["0"]["kernel"].nbytes
    kept = 0 if donate else leaf
    assert sizes == [
        (8 - i) * leaf + i * kept + (i + 1) * packed for i in range(len(weights))
    ]
    # Never more than the input and the output of one leaf; or all of both.
    assert max(sizes) == 8 * leaf + (packed if donate else 8 * packed)
