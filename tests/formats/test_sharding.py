"""Weights that lie on several devices are quantized where they lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import angeljax as aj
from angeljax import ops
from angeljax.formats import format_names, get_format
from tests.formats._cases import assert_trees_equal, normal

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
GROUPS = [
    (name, {} if get_format(name).fixed_group else {"group_size": 32})
    for name in format_names()
]
OPTIONS = [
    ("int8", {"group_size": 32, "symmetric": False}),
    ("int3", {"group_size": 32, "symmetric": False}),
    ("t2", {"group_size": 32, "scale_method": "lstsq"}),
    ("sherry", {"group_size": 64, "group_stride": 16}),
]


def ids(cases):
    return ["-".join([c[0], *map(str, c[1].values())]) for c in cases]


@pytest.fixture(scope="module")
def mesh():
    if len(jax.devices("cpu")) < 8:
        pytest.skip("needs 8 devices")
    return Mesh(np.array(jax.devices("cpu")[:8]).reshape(2, 4), ("a", "b"))


def collectives(compiled):
    text = compiled.as_text()
    return {c for c in COLLECTIVES if c in text}


def expected(name):
    # The scale of the whole tensor is a maximum over it; nothing else may be sent.
    return {"all-reduce"} if name in ("nvfp4", "int4_fp8") else set()


def compile_on(sharding, shape, name, options):
    w = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    quantize = jax.jit(lambda w: aj.quantize(w, format=name, **options))
    compiled = quantize.lower(w).compile()
    assert collectives(compiled) == expected(name)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(quantize, w),
        compiled.output_shardings,
    )


def check_way_back(q, sharding):
    compiled = jax.jit(lambda q: q.dequantize()).lower(q).compile()
    assert not collectives(compiled)
    assert compiled.output_shardings.is_equivalent_to(sharding, q.ndim)


@pytest.mark.parametrize("pspec", [P("a", None), P(None, "b"), P("a", "b")], ids=str)
@pytest.mark.parametrize(("name", "options"), GROUPS, ids=ids(GROUPS))
def test_groups_need_no_collective(mesh, name, options, pspec):
    sharding = NamedSharding(mesh, pspec)
    q = compile_on(sharding, (256, 64), name, options)
    for key in q.planes.keys() - {"scale2"}:
        assert q.planes[key].sharding.is_equivalent_to(sharding, 2), key
    if pspec == P("a", "b"):
        check_way_back(q, sharding)


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=ids(OPTIONS))
def test_options_need_no_collective(mesh, name, options):
    sharding = NamedSharding(mesh, P("a", "b"))
    q = compile_on(sharding, (256, 64), name, options)
    for key, plane in q.planes.items():
        assert plane.sharding.is_equivalent_to(sharding, 2), key
    check_way_back(q, sharding)


@pytest.mark.parametrize(
    ("shape", "pspec", "axis"),
    [
        ((8, 64, 64), P("b", None, "a"), (-3, -2)),  # attention's way out, over heads
        ((256, 8, 16), P("a", "b", None), -3),  # and in
        ((64, 256), P("b", "a"), -1),  # an embedding table
        ((4, 64, 64), P("b", None, "a"), None),  # experts
    ],
    ids=["heads-out", "heads-in", "table", "experts"],
)
@pytest.mark.parametrize("name", ["int4", "nvfp4", "sherry"])
def test_shapes_of_a_transformer(mesh, name, shape, pspec, axis):
    options = dict(GROUPS)[name] | {"axis": axis}
    sharding = NamedSharding(mesh, pspec)
    check_way_back(compile_on(sharding, shape, name, options), sharding)


@pytest.mark.parametrize(
    ("granularity", "pspec"), [("channel", P(None, "b")), ("block", P("a", "b"))]
)
def test_shards_that_hold_whole_granules(mesh, granularity, pspec):
    sharding = NamedSharding(mesh, pspec)
    options = {"granularity": granularity}
    q = compile_on(sharding, (256, 512), "float8_e4m3", options)
    check_way_back(q, sharding)


@pytest.mark.parametrize("name", ["int3", "nvfp4", "t2", "sherry"])
def test_shards_hold_what_one_device_would(mesh, name):
    w = normal((256, 64))
    spread = jax.device_put(w, NamedSharding(mesh, P("a", "b")))
    q = aj.quantize(w, format=name, **dict(GROUPS)[name])
    assert_trees_equal(
        jax.device_get(aj.quantize(spread, format=name, **dict(GROUPS)[name])),
        jax.device_get(q),
    )


def test_a_product_over_a_sharded_contraction_sends_only_its_result(mesh):
    sharding = NamedSharding(mesh, P("a", None))
    q = compile_on(sharding, (256, 64), "int4", {"group_size": 32})
    x = jax.ShapeDtypeStruct(
        (8, 256), jnp.float32, sharding=NamedSharding(mesh, P(None, "a"))
    )
    assert collectives(jax.jit(ops.dot).lower(x, q).compile()) == {"all-reduce"}
