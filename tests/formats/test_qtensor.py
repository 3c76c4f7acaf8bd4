"""A QTensor where an array is expected, and the errors on the way to one."""

import copy
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax.formats import Format, Spec, format_names, get_format, make_spec
from angeljax.formats._registry import register
from tests.formats._cases import assert_trees_equal, normal


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
    assert isinstance(q[np.int64(1)], aj.QTensor) and isinstance(q[-1], aj.QTensor)
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


def test_copies(q):
    assert_trees_equal(copy.deepcopy(q), q)
    assert_trees_equal(pickle.loads(pickle.dumps(q)), q)
    structure = jax.tree.structure(q)
    assert pickle.loads(pickle.dumps(structure)) == structure


def test_as_a_shape_without_data(q):
    abstract = jax.eval_shape(lambda: q)
    for name in ("shape", "dtype", "ndim", "size", "nbytes", "bits_per_weight"):
        assert getattr(abstract, name) == getattr(q, name)
    assert jax.eval_shape(lambda q: q.dequantize(), abstract).shape == (64, 16)
    assert jax.eval_shape(lambda q: q.T @ q, abstract).shape == (16, 16)


def test_gradients_pass_by_the_codes_and_reach_the_scales():
    w, x = normal((64, 16)), normal((4, 64), seed=1)
    q = aj.quantize(w, format="int8")
    loss = lambda q, x: jnp.sum(jnp.sin(x @ q))  # noqa: E731
    dq, dx = jax.grad(loss, argnums=(0, 1), allow_int=True)(q, x)
    dy = jnp.cos(x @ q)
    np.testing.assert_allclose(dx, dy @ q.dequantize().T, rtol=1e-4, atol=1e-5)
    codes = np.asarray(q.planes["codes"], np.float32)
    want = (codes * np.asarray(x.T @ dy)).sum(0, keepdims=True)
    np.testing.assert_allclose(dq.planes["scale"], want, rtol=1e-3, atol=1e-2)
    assert dq.planes["codes"].dtype == jax.dtypes.float0


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
    for name in format_names():
        spec = make_spec((4, 64, 32), jnp.bfloat16, format=name)
        assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
        assert hash(Spec.from_dict(spec.to_dict())) == hash(spec)
    with pytest.raises(ValueError, match="missing or unknown fields: colour"):
        Spec.from_dict({**spec.to_dict(), "colour": 1})


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((64, 8), {"format": "int5"}, "unknown format 'int5': did you mean int"),
        (
            (64, 8),
            {"format": "zzz"},
            "unknown format 'zzz': known formats: binary, float8",
        ),
        ((), {"format": "int8"}, "has shape (): a weight needs at least 2 axes"),
        ((64,), {"format": "int8"}, "a weight needs at least 2 axes; skip it with"),
        ((64, 0), {"format": "int8"}, "has shape (64, 0): it is empty"),
        ((0, 64, 8), {"format": "int8"}, "has shape (0, 64, 8): it is empty"),
        (
            (60, 8),
            {"format": "int4", "group_size": 32, "pad": False},
            "has 60 weights along the contraction, which group_size=32 does not "
            "divide: use a divisor of 60 or allow padding (pad: true)",
        ),
        (
            (60, 8),
            {"format": "mxfp4", "pad": False},
            "group_size=32 does not divide: allow padding (pad: true)",
        ),
        ((64, 8), {"format": "int8", "axis": 2}, "axis 2 is out of range for an array"),
        ((64, 8), {"format": "int8", "axis": -3}, "axis -3 is out of range"),
        ((64, 8), {"format": "int8", "axis": ()}, "axis () is out of range"),
        ((4, 4, 8), {"format": "int8", "axis": (0, 2)}, "axes (0, 2) must be distinct"),
        ((4, 4, 8), {"format": "int8", "axis": (1, -2)}, "distinct and adjacent"),
        (
            (4, 64, 8),
            {"format": "int8", "batch_axes": 2},
            "batch_axes=2 reaches into the contraction axes (-2,) of shape (4, 64, 8)",
        ),
        ((4, 64, 8), {"format": "int8", "batch_axes": -1}, "batch_axes=-1 reaches"),
        (
            (64, 8),
            {"format": "nf4", "granularity": "block"},
            "format nf4 has no granularity 'block': it takes group, channel, tensor",
        ),
        (
            (64, 8),
            {"format": "float8_e4m3", "granularity": "block", "axis": (0, 1)},
            "granularity 'block' needs an output axis",
        ),
        (
            (64, 8),
            {"format": "int4", "granularity": "channel", "group_size": 32},
            "group_size=32 goes with granularity 'group', not 'channel'",
        ),
        ((64, 8), {"format": "int4", "group_size": 0}, "a positive integer, not 0"),
        ((64, 8), {"format": "int4", "group_size": True}, "positive integer, not True"),
        ((64, 8), {"format": "int4", "group_size": 32.0}, "integer, not 32.0"),
        ((64, 8), {"format": "mxfp4", "group_size": 16}, "groups of 32 by definition"),
        (
            (64, 8),
            {"format": "int3", "group_size": 12},
            "int3 packs 8 weights together: group_size=12 is not a multiple of 8",
        ),
        (
            (64, 8),
            {"format": "sherry", "group_size": 32, "group_stride": 16},
            "format sherry packs 64 weights together",
        ),
        ((64, 8), {"format": "nf4", "colour": 1}, "no option 'colour' (has: none)"),
        (
            (64, 8),
            {"format": "int4", "group_size": 32, "group_stride": 16},
            "format int4 has no option 'group_stride' (has: symmetric, narrow_range)",
        ),
        (
            (64, 8),
            {"format": "t2", "scale_method": "max"},
            "option scale_method='max' of format t2: use 'absmean' or 'twn' or 'lstsq'",
        ),
        (
            (64, 8),
            {"format": "int4", "symmetric": 1},
            "symmetric=1 of format int4: use",
        ),
        (
            (64, 8),
            {"format": "int8", "scale_dtype": "int8"},
            "unknown scale_dtype 'int8': use float32, bfloat16, float16",
        ),
        (
            (64, 8),
            {"format": "nvfp4", "scale_dtype": "float32"},
            "format nvfp4 defines its scales as float8_e4m3fn, scale_dtype='float32' "
            "does not exist",
        ),
    ],
)
def test_errors_of_quantize(shape, options, message):
    with pytest.raises(ValueError) as info:
        make_spec(shape, jnp.float32, **options)
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
