"""What training computes with is what will be packed, and its gradients are as stated.

All formats share one tree with a rule for each leaf, so that each statement about all
of them is one compiled function.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import angeljax as aj
from angeljax.formats import format_names, get_format

TOTAL = 10
# Of all formats together: to compile well would take longer than all that is run.
quick = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
SHAPE = (80, 6)  # the last group of 32 is padded


def cases():
    """(format, options) of every leaf, dynamic first and then learned."""
    found = []
    for name in format_names():
        fmt = get_format(name)
        if "channel" in fmt.granularities:
            found.append((name, {"granularity": "channel"}))
        if "group" in fmt.granularities:
            size = {} if fmt.fixed_group else {"group_size": 32}
            found.append((name, size))
    found += [
        ("sherry", {"group_size": 64, "group_stride": 16}),
        ("t2", {"shift": True, "group_size": 32}),
        ("t1_6", {"shift": True, "granularity": "channel"}),
        ("t2", {"scale_method": "twn", "group_size": 32}),
    ]
    learned = [
        (name, {**options, "qat": {"scale": "learned"}})
        for name, options in found
        if get_format(name).snap is not None
        # Integers and FP8 share their code: one of them by channel is enough.
        and (
            name in ("int4", "t2", "t1_6", "sherry", "seq2") or "group_size" in options
        )
    ]
    found += [
        ("int4", {"granularity": "tensor"}),
        ("int4", {"symmetric": False, "group_size": 32}),
        ("int8", {"group_size": 32, "scale_dtype": "float16"}),
        ("float8_e4m3", {"granularity": "block"}),
    ]
    return found + learned


CASES = {
    "-".join([str(i), name, *map(str, options.values())]).translate(
        str.maketrans("{}': ", "_____")
    ): (name, options)
    for i, (name, options) in enumerate(cases())
}

DYNAMIC = {path: case for path, case in CASES.items() if "qat" not in case[1]}


def normal(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def recipe(leaves, **more):
    rules = [
        aj.Rule(match=f"{path}/.*", format=name, **options)
        for path, (name, options) in leaves.items()
    ]
    return aj.Recipe(rules=rules, **more)


def perturbed(state, seed):
    """Another state: every learned plane moved by up to a third."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: s * jnp.asarray(rng.uniform(0.67, 1.33, s.shape), s.dtype), state
    )


@pytest.fixture(scope="module")
def everything():
    params = {path: {"kernel": normal(SHAPE, i)} for i, path in enumerate(CASES)}
    qat = aj.qat.make(recipe(CASES, arenas=aj.qat.Arenas(end=1)), total_steps=TOTAL)
    return qat, params, quick(qat.init)(params)


@pytest.fixture(scope="module")
def apply(everything):
    qat = everything[0]

    @quick
    def applied(params, state, step, g):
        def of_dynamic(part):
            return qat.apply({**params, **part}, state, step)

        out, back = jax.vjp(of_dynamic, {path: params[path] for path in DYNAMIC})
        return out, back(g)[0]

    return applied


@pytest.fixture(scope="module")
def packed():
    @quick
    def dequantized(params, state):
        tree = aj.qat.finalize(params, state)
        return {k: v["kernel"].dequantize(jnp.float32) for k, v in tree.items()}

    return dequantized


def test_the_end_of_training_is_what_is_packed(everything, apply, packed):
    _, params, state = everything
    assert len(state.learned) == sum("qat" in o for _, o in CASES.values()) >= 20
    some = dict(list(DYNAMIC.items())[::8])
    compressed = quick(
        lambda p: {
            k: v["kernel"].dequantize(jnp.float32)
            for k, v in aj.compress(p, recipe(some)).items()
        }
    )({path: params[path] for path in some})
    for seed in range(2):
        out, _ = apply(params, state, TOTAL, params)
        want = packed(params, state)
        for path in CASES:
            found = np.asarray(out[path]["kernel"])
            assert found.dtype == np.float32 and np.isfinite(found).all()
            np.testing.assert_array_equal(found, want[path], err_msg=path)
            if seed == 0 and path in some:
                # Without learned scales that is the data-free format.
                np.testing.assert_array_equal(found, compressed[path], err_msg=path)
        params = jax.tree.map(lambda w: 1.5 * w + 0.1, params)
        state = perturbed(state, seed)


def test_gradients_pass_through_exactly(everything, apply):
    _, params, state = everything
    g = jax.tree.map(lambda w: jnp.cos(37 * w), params)
    qat = everything[0]
    for step in (TOTAL, 5):
        weight = np.float32(qat.arenas(step))
        assert (weight > 0) == (step < TOTAL)
        _, dw = apply(params, state, step, g)
        for path in CASES:
            if path not in DYNAMIC:
                continue
            found, expected = dw[path]["kernel"], np.asarray(g[path]["kernel"])
            if step == TOTAL:
                np.testing.assert_array_equal(found, expected, err_msg=path)
            else:
                np.testing.assert_allclose(
                    found, (1 + weight) * expected, rtol=1e-6, err_msg=path
                )


def test_gradients_of_a_layer_with_arenas():
    leaves = {
        "a": ("int4", {"group_size": 32}),
        "b": ("sherry", {"granularity": "channel"}),
    }
    params = {k: {"kernel": normal((64, 4), i)} for i, k in enumerate(leaves)}
    x, g = normal((3, 64), 7), normal((3, 4), 8)
    for form in ("residual", "blend"):
        arenas = aj.qat.Arenas(schedule="linear", end=1, form=form)
        qat = aj.qat.make(recipe(leaves, arenas=arenas), total_steps=4)
        state = qat.init(params)

        def layers(params, x, qat=qat, state=state):
            w = qat.apply(params, state, 1)  # lambda = 3/4
            return {k: x @ w[k]["kernel"] for k in leaves}

        @jax.jit
        def run(params, layers=layers):
            _, back = jax.vjp(layers, params, x)
            first = back({"a": g, "b": jnp.zeros_like(g)})
            second = back({"a": jnp.zeros_like(g), "b": g})
            return {"a": first, "b": second}

        weight, found = 0.75, run(params)
        for k in leaves:
            w = np.asarray(params[k]["kernel"], np.float64)
            q = np.asarray(aj.qat.finalize(params, state)[k]["kernel"].dequantize())
            blend = form == "blend"
            used = (1 - weight) * q + weight * w if blend else q + weight * w
            dw, dx = found[k]
            whole = np.asarray(x.T @ g, np.float64) * (1 if blend else 1 + weight)
            np.testing.assert_allclose(dw[k]["kernel"], whole, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(
                dx, np.asarray(g, np.float64) @ used.T, rtol=1e-5, atol=1e-5
            )


def oracle(name, w, scale, g, estimator):
    """Gradients of one granule in float64: `w`, `g` [N], a scalar scale."""
    x = w / scale
    low, high = {"int4": (-8, 7), "seq2": (-1.98, 1.98)}.get(name, (-1, 1))
    if name == "sherry":
        q = np.where(w < 0, -1.0, 1.0)
        quads = np.abs(w).reshape(-1, 4)
        q.reshape(-1, 4)[np.arange(len(quads)), quads.argmin(1)] = 0
    elif name == "seq2":
        q = np.round(np.clip(x, low, high) - 0.5) + 0.5
    else:
        q = np.clip(np.round(x), low, high)
    inside = (x >= low) & (x <= high)
    clipped = estimator == "clipped"
    dw = np.where(inside, g, 0) if clipped else g
    near = inside if clipped else np.ones_like(inside)
    step = q if name == "sherry" else np.where(near, q - x, q)
    assert 0 < inside.mean() < 1  # both branches are tested
    return dw, (g * step).sum() / np.sqrt(len(w) * high)


def test_clipped_gradients_against_float64():
    learned, both = {"scale": "learned"}, {"scale": "learned"}
    both["estimator"] = "pass_through"
    leaves = {
        "int4": ("int4", {"group_size": 32, "qat": learned}),
        "t2": ("t2", {"granularity": "channel", "qat": learned}),
        "seq2": ("seq2", {"granularity": "channel", "qat": learned}),
        "sherry": ("sherry", {"granularity": "channel", "qat": learned}),
        "shift": ("t2", {"group_size": 32, "shift": True, "qat": learned}),
        "through": ("int4", {"group_size": 32, "qat": both}),
        "sherry_through": ("sherry", {"group_size": 32, "qat": both}),
        "dynamic": ("t2", {"group_size": 32, "qat": {"estimator": "clipped"}}),
    }
    params = {k: {"kernel": normal((64, 3), i)} for i, k in enumerate(leaves)}
    g = {k: {"kernel": normal((64, 3), i + 99)} for i, k in enumerate(leaves)}
    qat = aj.qat.make(recipe(leaves), total_steps=TOTAL)
    state = perturbed(qat.init(params), 0)
    # The amax of a group lies at the very edge of int4; a smaller scale clips more.
    state.learned["int4/kernel"]["scale"] *= 0.7
    state.learned["through/kernel"]["scale"] *= 0.7

    @jax.jit
    def run(params, state):
        out, back = jax.vjp(lambda p, s: qat.apply(p, s, TOTAL), params, state)
        return out, *back(g), aj.qat.finalize(params, state)

    out, dw, dstate, packed = run(params, state)
    for path in leaves:
        q = packed[path]["kernel"].dequantize()
        np.testing.assert_array_equal(out[path]["kernel"], q, err_msg=path)
    assert dstate.plan == state.plan
    for path, (name, options) in leaves.items():
        n = options.get("group_size", 64)
        planes = packed[path]["kernel"].planes
        scale = np.asarray(planes["scale"]).astype(np.float64)
        if f"{path}/kernel" in state.learned:
            stored = np.asarray(state.learned[f"{path}/kernel"]["scale"])
            dtype = ml_dtypes.bfloat16 if "group_size" in options else np.float32
            np.testing.assert_array_equal(scale, stored.astype(dtype))
        estimator = options["qat"].get("estimator", "clipped")
        for i, j in np.ndindex(64 // n, 3):
            at = (slice(i * n, (i + 1) * n), j)
            want, ds = oracle(
                name,
                np.asarray(params[path]["kernel"], np.float64)[at],
                scale[i, j],
                np.asarray(g[path]["kernel"], np.float64)[at],
                estimator,
            )
            np.testing.assert_array_equal(
                np.asarray(dw[path]["kernel"])[at], want, err_msg=path
            )
            if f"{path}/kernel" not in state.learned:
                continue
            found = dstate.learned[f"{path}/kernel"]
            np.testing.assert_allclose(
                found["scale"][i, j], ds, rtol=2e-4, atol=1e-5, err_msg=path
            )
            if "shift" in options:
                np.testing.assert_allclose(
                    found["shift"][i, j],
                    np.asarray(g[path]["kernel"], np.float64)[at].sum(),
                    rtol=1e-4,
                    atol=1e-5,
                )
    assert "shift" not in dstate.learned["t2/kernel"]


def test_padding_does_not_count_in_the_gradient_of_a_scale():
    learned = {"scale": "learned"}
    leaves = {
        "channel": ("sherry", {"granularity": "channel", "qat": learned}),
        "group": ("sherry", {"group_size": 32, "qat": learned}),
        "tensor": ("sherry", {"granularity": "tensor", "qat": learned}),
        "block": ("float8_e4m3", {"granularity": "block", "qat": learned}),
    }
    shape = (36, 3)
    params = {k: {"kernel": normal(shape, i)} for i, k in enumerate(leaves)}
    # Powers of two times the scale have no error in FP8 and no gradient but by G q.
    params["block"] = {"kernel": jnp.ones((200, 132))}
    qat = aj.qat.make(recipe(leaves), total_steps=TOTAL)

    @jax.jit
    def run(params):
        state = qat.init(params)
        out, back = jax.vjp(lambda s: qat.apply(params, s, TOTAL), state)
        small = jax.tree.map(lambda s: s * 0 + 1e-3, state)
        g = jax.tree.map(jnp.sign, out)
        _, back_small = jax.vjp(lambda s: qat.apply(params, s, TOTAL), small)
        return back(g)[0].learned, back_small(g)[0].learned

    found, clipped = run(params)

    def scale(tree, path):
        return np.asarray(tree[f"{path}/kernel"]["scale"])

    # With the levels for G, three of four weights of a granule count, of N in all.
    for path, n in (
        ("channel", np.full((1, 3), 36)),
        ("group", np.repeat([[32], [4]], 3, 1)),
        ("tensor", np.full((1, 1), 108)),
    ):
        want = 0.75 * np.sqrt(n)
        np.testing.assert_allclose(scale(found, path), want, rtol=1e-6, err_msg=path)
    # All weights are beyond 448 scales: G q = 448, over sqrt(448 N).
    n = np.outer([128, 72], [128, 4])
    want = np.sqrt(448 * n)
    np.testing.assert_allclose(scale(clipped, "block"), want, rtol=1e-5)
