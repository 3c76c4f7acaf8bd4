"""A QTensor where an array is expected, and the errors on the way to one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import angeljax as aj
from angeljax.formats import Format, Spec, format_names, get_format, make_spec
from angeljax.formats._registry import register
from tests.formats._cases import assert_trees_equal, normal

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)


@pytest.fixture
def q():
    return aj.quantize(normal((64, 16)), format="int4", group_size=32)


def test_looks_like_its_array(q):
    d = q.dequantize()
    assert (q.shape, q.ndim, q.size, len(q)) == ((64, 16), 2, 1024, 64)
    assert q.dtype == d.dtype and len(list(q)) == 64
    np.testing.assert_array_equal(np.asarray(q), d)
    np.testing.assert_array_equal(q.T, d.T)
    np.testing.assert_array_equal(q.transpose(1, 0), d.T)
    np.testing.assert_array_equal(q.reshape(16, 64), d.reshape(16, 64))
    np.testing.assert_array_equal(q.reshape((8, -1)), d.reshape(8, -1))
    assert q.astype(jnp.bfloat16).dtype == jnp.bfloat16
    assert q[...] is q
    np.testing.assert_array_equal(q[3], d[3])
    np.testing.assert_array_equal(q[:, jnp.asarray([1, 2])], d[:, jnp.asarray([1, 2])])
    assert repr(q) == "QTensor(int4 g32 [64,16] float32, 4.500 bit/weight)"
    assert q.sharding == q.planes["codes"].sharding


def test_batch_axes_index_without_unpacking():
    w = normal((3, 2, 64, 16))
    q = aj.quantize(w, format="int8")
    assert isinstance(q[1], aj.QTensor) and q[1].shape == (2, 64, 16)
    assert isinstance(q[1:], aj.QTensor) and q[1:].shape == (2, 2, 64, 16)
    assert isinstance(q[1, 0], aj.QTensor)
    assert isinstance(q[1, 0, 3], jax.Array) and q[1, 0, 3].shape == (16,)
    np.testing.assert_array_equal(q[2, 1].dequantize(), q.dequantize()[2, 1])


def test_arithmetic(q):
    d, x = q.dequantize(), normal((4, 64), seed=1)
    rows = np.asarray(x)
    for got, want in (
        (x @ q, x @ d),
        (rows @ q, x @ d),
        (q @ jnp.ones(16), d @ jnp.ones(16)),
        (q + 1, d + 1),
        (1 - q, 1 - d),
        (2 * q, 2 * d),
        (q / 2, d / 2),
        (-q, -d),
        (q + q, d + d),
        (jnp.einsum("bk,kn->bn", x, q), x @ d),
        (jnp.take(q, jnp.asarray([1, 5]), axis=0), d[jnp.asarray([1, 5])]),
        (jnp.sum(jnp.asarray(q), 0), d.sum(0)),
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_lax_primitives_say_what_to_do(q):
    x = jnp.ones((2, 64))
    numbers = (((1,), (0,)), ((), ()))
    for f in (jax.lax.dot_general, jax.jit(jax.lax.dot_general, static_argnums=2)):
        with pytest.raises(ValueError, match="angeljax.ops.dot / dot_general"):
            f(x, q, numbers)
    got = aj.ops.dot_general(x, q, numbers)
    np.testing.assert_allclose(got, x @ q.dequantize(), rtol=1e-5, atol=1e-6)


def test_pytree(q):
    leaves, treedef = jax.tree.flatten(q)
    assert_trees_equal(jax.tree.unflatten(treedef, leaves), q)
    assert isinstance(repr(jax.tree.map(lambda x: None, q)), str)
    assert isinstance(repr(jax.tree.unflatten(treedef, [object(), object()])), str)
    assert isinstance(repr(jax.tree.map(jnp.shape, q)), str)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(q)]
    assert paths == [".planes['codes']", ".planes['scale']"]
    donated = jax.jit(lambda q: jax.tree.map(lambda x: x, q), donate_argnums=0)(q)
    assert donated.shape == (64, 16)


def test_spec_round_trips_through_json():
    import json

    for name in format_names():
        spec = aj.quantize(normal((4, 64, 32)), format=name).spec
        assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
        assert hash(Spec.from_dict(spec.to_dict())) == hash(spec)
    with pytest.raises(ValueError, match="missing or unknown fields: colour"):
        Spec.from_dict({**spec.to_dict(), "colour": 1})


GROUPS = [
    (name, {} if get_format(name).fixed_group else {"group_size": 32})
    for name in format_names()
    if "group" in get_format(name).granularities and name != "nvfp4"
]


@pytest.mark.parametrize("pspec", [P("x", None), P(None, "y"), P("x", "y")])
@pytest.mark.parametrize(("name", "options"), GROUPS, ids=[n for n, _ in GROUPS])
def test_group_formats_need_no_collective(name, options, pspec):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("x", "y"))
    sharding = NamedSharding(mesh, pspec)
    w = jax.ShapeDtypeStruct((256, 64), jnp.float32, sharding=sharding)
    compiled = (
        jax.jit(lambda w: aj.quantize(w, format=name, **options)).lower(w).compile()
    )
    hlo = compiled.as_text()
    assert not [c for c in COLLECTIVES if c in hlo]
    planes = compiled.output_shardings.planes
    for key in ("codes", "scale"):
        assert planes[key].is_equivalent_to(sharding, 2), key


def test_expert_axis_keeps_its_sharding():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(8), ("e",))
    sharding = NamedSharding(mesh, P("e", None, None))
    w = jax.ShapeDtypeStruct((8, 64, 32), jnp.float32, sharding=sharding)
    for name in format_names():
        f = jax.jit(lambda w, name=name: aj.quantize(w, format=name))
        compiled = f.lower(w).compile()
        assert not [c for c in COLLECTIVES if c in compiled.as_text()], name
        codes = compiled.output_shardings.planes["codes"]
        assert codes.is_equivalent_to(sharding, 3), name


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((64, 8), {"format": "int5"}, "unknown format 'int5': did you mean"),
        ((64,), {"format": "int8"}, "needs at least 2 axes"),
        ((64, 0), {"format": "int8"}, "it is empty"),
        ((60, 8), {"format": "int4", "group_size": 32, "pad": False}, "divisor of 60"),
        ((64, 8), {"format": "int8", "axis": 2}, "out of range"),
        ((4, 4, 8), {"format": "int8", "axis": (0, 2)}, "distinct and adjacent"),
        ((4, 4, 8), {"format": "int8", "axis": (1, 1)}, "distinct and adjacent"),
        ((4, 64, 8), {"format": "int8", "batch_axes": 2}, "reaches into"),
        ((64, 8), {"format": "nf4", "granularity": "block"}, "no granularity 'block'"),
        ((64, 8), {"format": "mxfp4", "group_size": 16}, "groups of 32 by definition"),
        ((64, 8), {"format": "int4", "group_size": 33}, "not a multiple of 2"),
        ((64, 8), {"format": "int4", "colour": 1}, "no option 'colour'"),
        ((64, 8), {"format": "t2", "scale_method": "max"}, "use 'absmean'"),
        ((64, 8), {"format": "int8", "scale_dtype": "int8"}, "unknown scale_dtype"),
    ],
)
def test_errors_of_quantize(shape, options, message):
    with pytest.raises(ValueError) as info:
        aj.quantize(jnp.ones(shape), **options)
    assert message in str(info.value) and "\n" not in str(info.value)


def test_integer_weights_are_refused():
    with pytest.raises(ValueError, match="is int32: only floating-point"):
        make_spec((64, 8), jnp.int32, format="int8")


def test_a_format_is_registered_once():
    fmt = get_format("int8")
    with pytest.raises(ValueError, match="registered already"):
        register(
            Format(name="int8", payload_bits=8, encode=fmt.encode, decode=fmt.decode)
        )
