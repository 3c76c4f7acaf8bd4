"""The pair of functions on trees of all kinds, on several devices, and its errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import angeljax as aj
from angeljax.formats import format_names, get_format
from angeljax.qat import Arenas, QATOptions

LEARNED = {"scale": "learned"}
INT4 = aj.Recipe(rules=[aj.Rule(format="int4", group_size=32)], arenas=Arenas())


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def learning(**options):
    return aj.Recipe(rules=[aj.Rule(qat=LEARNED, **options)])


def dequantized(tree):
    def is_leaf(x):
        return isinstance(x, aj.QTensor)

    return jax.tree.map(
        lambda x: x.dequantize() if is_leaf(x) else x, tree, is_leaf=is_leaf
    )


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = nn.scan(
            lambda dense, x, _: (dense(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return body(nn.Dense(64, name="layers"), x, None)[0]


def test_a_scanned_stack_in_linen():
    model, x = Stack(), normal((2, 64))
    params = jax.jit(model.init)(jax.random.key(0), x)
    qat = aj.qat.make(learning(format="int4", group_size=32), total_steps=4)
    state = qat.init(params)
    (path,) = state.learned
    assert path == "params/layers/kernel"
    assert state.learned[path]["scale"].shape == (3, 2, 64)
    assert state.learned[path]["scale"].dtype == jnp.float32

    @jax.jit
    def step(params, state, t):
        def loss(params, state):
            run = jax.checkpoint(lambda p, s: model.apply(qat.apply(p, s, t), x))
            return jnp.mean(run(params, state) ** 2)

        grads = jax.grad(loss, argnums=(0, 1))(params, state)
        assert jax.tree.structure(grads) == jax.tree.structure((params, state))
        return jax.tree.map(lambda p, g: p - 0.01 * g, (params, state), grads)

    new, moved = step(params, state, 1)
    (before,), (after,) = jax.tree.leaves(state), jax.tree.leaves(moved)
    assert (before != after).any()
    packed = aj.qat.finalize(new, moved)
    assert packed["params"]["layers"]["kernel"].shape == (3, 64, 64)
    apply = jax.jit(qat.apply, static_argnames="dtype")
    assert_same(apply(new, moved, 4), dequantized(packed))
    # In half precision: packed leaves by their logical dtype, others cast.
    half = aj.qat.finalize(new, moved, dtype=jnp.bfloat16)["params"]["layers"]
    assert half["kernel"].dtype == half["bias"].dtype == jnp.bfloat16
    out = apply(new, moved, 4, dtype=jnp.bfloat16)["params"]["layers"]
    assert out["kernel"].dtype == jnp.bfloat16 and out["bias"].dtype == jnp.float32
    np.testing.assert_array_equal(out["kernel"], half["kernel"].dequantize())


def test_an_nnx_state():
    model = nnx.Linear(32, 4, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    qat = aj.qat.make(INT4, total_steps=4)
    state = qat.init(params)
    apply = jax.jit(qat.apply)
    out = apply(params, state, 0)
    assert isinstance(out, nnx.State) and isinstance(out["kernel"], nnx.Param)
    packed = aj.qat.finalize(params, state)
    assert isinstance(packed, nnx.State)
    assert isinstance(packed["kernel"][...], aj.QTensor)
    q = packed["kernel"][...].dequantize()
    np.testing.assert_array_equal(apply(params, state, 4)["kernel"][...], q)
    np.testing.assert_array_equal(out["bias"][...], params["bias"][...])
    # A tenth of four steps is no step: lambda is 1 at once.
    residual = np.asarray(out["kernel"][...]) - q
    np.testing.assert_allclose(residual, params["kernel"][...], atol=1e-6)
    grads = jax.grad(lambda p: apply(p, state, 4)["kernel"][...].sum())(params)
    np.testing.assert_array_equal(grads["kernel"][...], np.ones((32, 4)))


def test_a_state_is_empty_without_learned_scales():
    params = {"a": {"kernel": normal((32, 4))}, "norm": {"scale": jnp.ones(4)}}
    state = aj.qat.make(INT4, total_steps=1).init(params)
    assert state.learned == {} and jax.tree.leaves(state) == []
    assert [p.path for p in state.plan] == ["a/kernel"]
    hash(state.plan)


@pytest.fixture(scope="module")
def mesh():
    if len(jax.devices("cpu")) < 8:
        pytest.skip("needs 8 devices")
    return Mesh(np.array(jax.devices("cpu")[:8]), ("x",))


def test_sharded_on_outputs(mesh):
    params = {"a": {"kernel": normal((64, 16))}}
    qat = aj.qat.make(learning(format="t2", granularity="channel"), total_steps=4)
    qat = aj.qat.make(qat.recipe, total_steps=4, arenas=Arenas())
    state, run = qat.init(params), jax.jit(qat.apply)
    want = run(params, state, 2)
    split = NamedSharding(mesh, P(None, "x"))
    args = jax.device_put((params, state), split)
    text = run.lower(*args, 2).compile().as_text()
    for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert name not in text
    found = run(*args, 2)
    assert found["a"]["kernel"].sharding.is_equivalent_to(split, 2)
    assert_same(found, want)
    packed = aj.qat.finalize(*args)
    assert_same(dequantized(packed), run(params, state, 4))


def test_shard_map(mesh):
    def sharded(recipe, spec, params):
        qat = aj.qat.make(recipe, total_steps=4)
        state = qat.init(params)
        local = jax.shard_map(
            lambda p, s: qat.apply(p, s, 2),
            mesh=mesh,
            in_specs=(spec, spec),
            out_specs=spec,
        )
        return jax.jit(local)(params, state), jax.jit(qat.apply)(params, state, 2)

    inputs, outputs = P("x", None), P(None, "x")
    params = {"a": {"kernel": normal((256, 16))}}
    for spec in (inputs, outputs):
        recipe = learning(format="int4", group_size=32)
        assert_same(
            *sharded(dataclasses.replace(recipe, arenas=Arenas()), spec, params)
        )
    assert_same(*sharded(learning(format="t2", granularity="channel"), outputs, params))
    whole = r"a/kernel has shape .* and \(256, 16\) in the state: .* whole granules"
    for options, spec in (
        ({"format": "t2", "granularity": "channel"}, inputs),
        ({"format": "t2", "granularity": "tensor"}, outputs),
        ({"format": "int4", "group_size": 64}, inputs),
        # Its outer scale is for the whole weight.
        ({"format": "nvfp4"}, outputs),
    ):
        with pytest.raises(ValueError, match=whole):
            sharded(aj.Recipe(rules=[aj.Rule(**options)]), spec, params)


def test_errors_of_make():
    for steps in (True, 3.0, "3", None):
        with pytest.raises(ValueError, match="total_steps must be an integer, not"):
            aj.qat.make(INT4, total_steps=steps)
    for steps in (0, -1):
        with pytest.raises(ValueError, match="total_steps must be at least 1, not"):
            aj.qat.make(INT4, total_steps=steps)
    with pytest.raises(TypeError, match="recipe must be a Recipe, not dict"):
        aj.qat.make({"rules": []}, total_steps=3)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"format": "mxfp4", "qat": LEARNED}, "mxfp4 cannot be trained with qat scale"),
        ({"format": "nf4", "qat": LEARNED}, "format nf4 cannot be trained"),
        (
            {"format": "int4", "symmetric": False, "qat": LEARNED},
            "int4 with a zero point cannot be trained with qat scale: learned",
        ),
        (
            {"format": "nvfp4", "qat": {"estimator": "clipped"}},
            "cannot be trained with qat estimator: clipped",
        ),
        ({"format": "int4", "qat": {"scale": "fixed"}}, "one of dynamic, learned, not"),
        (
            {"format": "int4", "qat": {"estimator": "ste"}},
            "of pass_through, clipped",
        ),
        ({"format": "int4", "qat": {"arena": True}}, "did you mean 'arenas'"),
        ({"format": "int4", "qat": {"arenas": 1}}, "qat.arenas must be true or false"),
        ({"format": "int4", "qat": "learned"}, "qat must be a mapping of scale"),
        ({"qat": LEARNED}, "qat needs a format"),
    ],
)
def test_errors_of_a_rule(rule, message):
    with pytest.raises(aj.RecipeError, match=message):
        aj.Rule(**rule)


def test_errors_of_a_state_and_of_weights():
    params = {"a": {"kernel": normal((32, 4))}}
    qat = aj.qat.make(learning(format="int4", group_size=32), total_steps=4)
    state = qat.init(params)
    other = {"b": params["a"]}
    for run in (
        lambda: qat.apply(other, state, 0),
        lambda: aj.qat.finalize(other, state),
    ):
        with pytest.raises(
            ValueError, match="state is of another tree: it has a/kernel"
        ):
            run()
    with pytest.raises(aj.RecipeError, match="a/kernel is not the dense weight"):
        qat.apply(aj.qat.finalize(params, state), state, 0)
    for bad in (np.nan, np.inf):
        broken = {"a": {"kernel": params["a"]["kernel"].at[3, 1].set(bad)}}
        with pytest.raises(
            ValueError, match="^a/kernel holds NaN or infinity: take an"
        ):
            aj.qat.finalize(broken, state)
        lost = jax.tree.map(lambda s, bad=bad: s.at[0, 1].set(bad), state)
        with pytest.raises(ValueError, match="learned scale of a/kernel holds NaN"):
            aj.qat.finalize(params, lost)


def test_a_recipe_keeps_what_it_says_about_training():
    recipe = aj.Recipe(
        rules=[
            aj.Rule(
                match="a/.*",
                format="t2",
                shift=True,
                activation="int8",
                qat={"scale": "learned", "estimator": "pass_through", "arenas": False},
            ),
            aj.Rule(format="t1_6", qat=QATOptions(tequila=1e-3)),
            aj.Rule(match="c/.*", format="int4", qat={}),
        ],
        arenas={"schedule": "linear", "end": 0.5, "form": "blend"},
    )
    assert recipe.rules[0].qat.gradient == "pass_through"
    assert recipe.arenas == Arenas(schedule="linear", end=0.5, form="blend")
    assert aj.Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert hash(aj.Recipe.from_yaml(recipe.to_yaml())) == hash(recipe)
    assert recipe != dataclasses.replace(recipe, arenas=None)
    with pytest.raises(aj.RecipeError, match="train has no field 'arena'.*'arenas'"):
        aj.Recipe.from_dict({"rules": [{"format": "t2"}], "train": {"arena": {}}})


def test_every_format_learns():
    """A layer that is quantized fits a teacher better than it did untrained."""
    names = format_names()
    x, target = normal((64, 64)), normal((64, 8), 1)
    rules, params = [], {}
    for name in names:
        fmt = get_format(name)
        size = (
            {}
            if fmt.fixed_group or "group" not in fmt.granularities
            else {"group_size": 32}
        )
        kinds = ["learned"] if fmt.snap else ["dynamic"]
        for kind in kinds + ["dynamic"] * (name in ("int4", "sherry", "t2")):
            leaf = f"{name}_{kind}"
            rule = aj.Rule(match=f"{leaf}/.*", format=name, qat={"scale": kind}, **size)
            rules.append(rule)
            params[leaf] = {"kernel": 0.5 * target + 0.5 * normal((64, 8), 2)}
    recipe = aj.Recipe(rules=rules, arenas=Arenas(end=0.5))
    steps = 30
    qat, optimizer = aj.qat.make(recipe, total_steps=steps), optax.adam(0.03)

    # To compile it well takes longer than to run it.
    quick = {"xla_backend_optimization_level": 0}

    @functools.partial(jax.jit, compiler_options=quick)
    def train(params):
        state = qat.init(params)

        def losses(params, state, t):
            weights = qat.apply(params, state, t)
            return {
                k: jnp.mean((x @ (w["kernel"] - target)) ** 2)
                for k, w in weights.items()
            }

        def one(carry, t):
            trained, moments = carry
            grads = jax.grad(lambda v: sum(losses(*v, t).values()))(trained)
            updates, moments = optimizer.update(grads, moments)
            return (optax.apply_updates(trained, updates), moments), None

        first = (params, state), optimizer.init((params, state))
        (last, _), _ = jax.lax.scan(one, first, jnp.arange(steps))
        return losses(params, state, steps), losses(*last, steps)

    before, after = train(params)
    for leaf in params:
        assert after[leaf] < 0.8 * before[leaf], leaf
