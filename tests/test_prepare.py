"""`prepare` and its inverse: trees, stacks, meshes, checkpoints, refusals."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import angeljax as aj
from angeljax import ops
from angeljax.prepare import PreparedTensor, has_kernel, kernel_view
from pallas_kernels import QUANTIZED, TERNARY, KernelError
from tests.formats._cases import assert_trees_equal, normal

# Orders that a CPU can write; "xla" leaves planes as they are.
ORDERS = ("xla", "mosaic_gpu", "triton")
FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("t2", {}),
    ("t2", {"granularity": "tensor"}),
    ("sherry", {"group_size": 64, "group_stride": 16}),
    ("int8", {}),
    ("int8", {"granularity": "tensor"}),
    ("int4", {"group_size": 64, "symmetric": False}),
    ("float8_e4m3", {"granularity": "tensor"}),
    ("float8_e4m3", {"granularity": "block"}),
    ("nvfp4", {}),
    ("mxfp8", {}),
]


def _close(got: Any, want: Any, tolerance: float = 2e-5) -> None:
    assert got.shape == want.shape
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max(), rtol=0)


def _prepare(q: Any, **options: Any) -> Any:
    return jax.jit(functools.partial(aj.prepare, **options))(q)


# One order for each: the tests of the kernels go through all pairs.
@pytest.mark.parametrize(
    ("fmt", "options", "order"),
    [(*case, order) for case, order in zip(FORMATS, itertools.cycle(ORDERS))],
    ids=[f"{f}-{'-'.join(map(str, o.values()))}" for f, o in FORMATS],
)
def test_restore_is_the_exact_inverse(fmt: str, options: Any, order: str) -> None:
    for shape, axis in (((200, 136), -2), ((2, 64, 8, 16), -3)):
        if options.get("granularity") == "block" and axis != -2:
            continue
        q = aj.quantize(normal(shape), format=fmt, axis=axis, **options)
        w = _prepare(q, implementation=order)
        assert isinstance(w, PreparedTensor) and isinstance(w, aj.QTensor)
        assert w.shape == q.shape and w.dtype == q.dtype and w.ndim == q.ndim
        assert_trees_equal(jax.jit(aj.restore)(w), q)


def test_formats_without_a_kernel_stay() -> None:
    for fmt in ("int3", "int2", "t1_6"):
        q = aj.quantize(normal((128, 16)), format=fmt)
        assert not has_kernel(q) and aj.prepare({"kernel": q})["kernel"] is q
    for fmt in TERNARY + QUANTIZED:
        q = aj.quantize(normal((128, 16)), format=fmt)
        assert has_kernel(q) and isinstance(aj.prepare(q), PreparedTensor)
    # No kernel for nf4 on Hopper: canonical planes, and a product by XLA.
    q = aj.quantize(normal((128, 16)), format="nf4")
    hopper = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100", num_cores=132, platform="cuda"
    )
    w = aj.prepare(q, device=hopper)
    assert w.layout.order == "canonical"
    with pytest.raises(
        KernelError, match="tensor: 'mosaic_gpu' cannot hold it: nf4 ha"
    ):
        aj.prepare(q, implementation="mosaic_gpu")
    with pytest.raises(KernelError, match="a/b: 'mosaic_gpu' cannot hold it: nf4 has"):
        aj.prepare({"a": {"b": q}}, implementation="mosaic_gpu")


def test_trees_keep_their_structure() -> None:
    q = aj.quantize(normal((128, 16)), format="t2")
    table = aj.quantize(normal((50, 64)), format="int8", axis=-1)
    tree = {"a": [q, (q, jnp.ones(3))], "b": None, "embedding": table, "c": jnp.ones(2)}
    ready = aj.prepare(tree, implementation="mosaic_gpu")
    assert ready["embedding"] is table, "a table is looked up, not multiplied"
    assert ready["a"][0] is ready["a"][1][0], "tied weights stay one"
    assert isinstance(ready["a"][0], PreparedTensor)
    assert ready["b"] is None and ready["c"] is tree["c"]
    assert_trees_equal(aj.restore(ready), tree)
    assert aj.restore(tree)["a"][0] is q


def test_what_is_refused() -> None:
    q = aj.quantize(normal((128, 16)), format="t2")
    ready = aj.prepare({"x": {"kernel": q}})
    with pytest.raises(KernelError, match="x/kernel is prepared already: restore it"):
        aj.prepare(ready)
    with pytest.raises(KernelError, match="activation must be None or 'int8', not 'f"):
        aj.prepare(q, activation="fp8")
    with pytest.raises(KernelError, match="unknown implementation 'cuda': use mosaic"):
        aj.prepare(q, implementation="cuda")


def test_under_jit_and_eval_shape() -> None:
    w = normal((256, 32))

    def make(w: jax.Array) -> Any:
        q = aj.quantize(w, format="sherry", granularity="channel")
        return aj.prepare(q, implementation="mosaic_gpu", activation="int8")

    shapes = jax.eval_shape(make, w)
    ready = jax.jit(make)(w)
    assert jax.tree.structure(shapes) == jax.tree.structure(ready)
    for shape, plane in zip(*map(jax.tree.leaves, (shapes, ready)), strict=True):
        assert shape.shape == plane.shape and shape.dtype == plane.dtype
    back = jax.jit(aj.restore)(ready)
    assert_trees_equal(back, jax.jit(lambda w: make(w).restored())(w))


@pytest.mark.parametrize("activation", [None, "int8"])
def test_products_of_prepared_weights(activation: str | None) -> None:
    x = normal((3, 5, 256))
    for fmt in ("t2", "int4"):
        q = aj.quantize(normal((256, 6, 8)), format=fmt, axis=-3)
        w = aj.prepare(q, activation=activation)
        dense = np.asarray(q.dequantize(), np.float64)
        want = np.einsum("abk,knh->abnh", np.asarray(x, np.float64), dense)
        tolerance = 2e-5 if activation is None else 2e-2
        dot = jax.jit(ops.dot)(x, w)
        _close(dot, want, tolerance)
        _close(ops.einsum("abk,knh->abnh", x, w), want, tolerance)
        _close(ops.einsum("...k,knh->...nh", x, w), want, tolerance)
        low = ops.dot(x.astype(jnp.bfloat16), w, preferred_element_type=jnp.float32)
        assert low.dtype == jnp.float32
        # What no kernel does comes from the dense weight.
        _close(
            ops.einsum("abk,knh->nhab", x, w), np.moveaxis(want, (2, 3), (0, 1)), 2e-5
        )
    assert not np.array_equal(dot, ops.dot(x, q)) or activation is None


def test_stacks_and_experts() -> None:
    q = aj.quantize(normal((3, 128, 128)), format="sherry")
    w = _prepare(q, implementation="mosaic_gpu")
    assert w.ndim == 3 and w.planes["codes"].shape[0] == 3
    plain = aj.prepare(q)
    x = normal((2, 128))

    def run(stack: Any) -> jax.Array:
        return jax.lax.scan(lambda x, w: (ops.dot(x, w) / 8, None), x, stack)[0]

    _close(jax.jit(run)(plain), run(q))
    each = jax.vmap(ops.dot, in_axes=(None, 0))(x, plain)
    _close(each, jnp.einsum("bk,ekn->ebn", x, q.dequantize()))
    one = jax.tree.map(lambda p: p[1], w)
    assert one.shape == (128, 128)
    back = jax.jit(aj.restore)(one)
    assert_trees_equal(back, jax.tree.map(lambda p: p[1], q))


def test_gradients_pass_prepared_weights() -> None:
    q = aj.quantize(normal((128, 16)), format="t2")
    w, x = aj.prepare(q, activation="int8"), normal((3, 128))
    got = jax.grad(lambda x: ops.dot(x, w).sum())(x)
    _close(got, np.broadcast_to(np.asarray(q.dequantize()).sum(1), (3, 128)))


def test_embed_of_a_prepared_table() -> None:
    q = aj.quantize(normal((64, 32)), format="int8", axis=-2)
    w = aj.prepare(q)
    ids = jnp.asarray([3, 60])
    np.testing.assert_array_equal(ops.embed(w, ids), q.dequantize()[ids])
    _close(ops.attend(normal((2, 32)), w), normal((2, 32)) @ q.dequantize().T)


def test_bound_models_take_prepared_weights() -> None:
    from flax import linen as nn

    model, x = nn.Dense(16), normal((2, 128))
    params = model.init(jax.random.key(0), x)
    small = aj.compress(params, aj.Recipe(rules=[aj.Rule(format="int4")]))
    ready = aj.prepare(small)
    want = model.apply(small, x)
    _close(jax.jit(aj.bind(model))(ready, x), want)
    _close(model.apply(ready, x), want)


def test_a_checkpoint_is_canonical(tmp_path: Any) -> None:
    q = aj.quantize(normal((256, 16)), format="t2")
    tree = {"a": {"kernel": q, "bias": jnp.ones(16)}}
    ready = aj.prepare(tree, implementation="mosaic_gpu", activation="int8")
    aj.save(tmp_path / "c", ready, None)
    back, _ = aj.load(tmp_path / "c")
    assert type(back["a"]["kernel"]) is aj.QTensor
    assert_trees_equal(back, tree)


def test_kernel_view_is_a_matrix() -> None:
    q = aj.quantize(normal((4, 25, 5, 3)), format="int8", axis=(-4, -3))
    planes, layout = kernel_view(q)
    assert (layout.k, layout.n) == (100, 15) and planes["codes"].shape == (100, 15)
    want = np.asarray(q.dequantize()).reshape(100, 15)
    np.testing.assert_array_equal(planes["codes"] * planes["scale"], want)


# On a mesh


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.asarray(jax.devices("cpu")[:8]).reshape(4, 2), ("a", "b"))


SHARDED: list[tuple[str, dict[str, Any]]] = [
    ("t2", {"granularity": "channel"}),
    ("sherry", {"group_size": 64}),
    ("int8", {}),
    ("int4", {"group_size": 32, "symmetric": False}),
    ("nvfp4", {}),
]


@pytest.mark.parametrize("spec", [P("a"), P(None, "a")], ids=["inputs", "outputs"])
@pytest.mark.parametrize(("fmt", "options"), SHARDED, ids=[f for f, _ in SHARDED])
def test_sharded_weights(mesh: Mesh, fmt: str, options: Any, spec: Any) -> None:
    # One format in the order of another device, for its time.
    order = "mosaic_gpu" if fmt == "int8" else "xla"
    w = jax.device_put(normal((512, 64)), NamedSharding(mesh, spec))
    q = jax.jit(lambda w: aj.quantize(w, format=fmt, **options))(w)
    ready = aj.prepare(q, implementation=order)
    assert ready.shards is not None
    assert ready.shards.side == ("inputs" if spec == P("a") else "outputs")
    for plane in ready.planes.values():
        assert plane.shape[0] == 4 and plane.sharding.spec[0] == "a"
    assert_trees_equal(jax.device_get(jax.jit(aj.restore)(ready)), jax.device_get(q))
    if order != "xla":
        return
    x = normal((2, 3, 512))
    for activation, tolerance in ((None, 2e-5), ("int8", 3e-2)):
        ready = aj.prepare(q, implementation=order, activation=activation)
        compiled = jax.jit(ops.dot).lower(x, ready).compile()
        _close(compiled(x, ready), jnp.dot(x, q.dequantize()), tolerance)
        text = compiled.as_text()
        assert ("all-reduce(" in text) == (spec == P("a"))
        assert "all-gather(" not in text and "all-to-all(" not in text


def test_sharded_weights_in_a_checkpoint(mesh: Mesh, tmp_path: Any) -> None:
    w = jax.device_put(normal((512, 64)), NamedSharding(mesh, P(None, "a")))
    q = jax.jit(lambda w: aj.quantize(w, format="t2"))(w)
    aj.save(tmp_path / "c", {"kernel": aj.prepare(q)}, None)
    back, _ = aj.load(tmp_path / "c")
    assert_trees_equal(jax.device_get(back["kernel"]), jax.device_get(q))


REFUSED = [
    ((512, 64), P("a", "b"), {}, "k is sharded as P('a', 'b'): a matrix s"),
    ((512, 64), P(None, ("a", "b")), {}, "over one mesh axis, along its inputs or out"),
    (
        (384, 64),
        P("a"),
        {"granularity": "channel"},
        "k: 4 parts of 384 inputs are no whole number of 128; shard the outputs instea",
    ),
    ((3, 512, 64), P(None, "a"), {}, "a matrix sharded over one mesh axis"),
]


@pytest.mark.parametrize(("shape", "spec", "options", "message"), REFUSED)
def test_shardings_that_are_refused(
    mesh: Mesh, shape: Any, spec: Any, options: Any, message: str
) -> None:
    w = jax.device_put(normal(shape), NamedSharding(mesh, spec))
    q = jax.jit(lambda w: aj.quantize(w, format="t2", **options))(w)
    # As asked for, where the compiler would rather have something else.
    codes = jax.device_put(q.planes["codes"], NamedSharding(mesh, spec))
    q = dataclasses.replace(q, planes={**q.planes, "codes": codes})
    with pytest.raises(KernelError, match=re.escape(message)):
        aj.prepare({"k": q})
