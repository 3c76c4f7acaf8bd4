"""Products with packed weights against the same products with dequantized ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax import ops
from angeljax.formats import format_names, get_format
from tests.formats._cases import assert_trees_equal, normal

TABLES = [
    (name, granularity)
    for name in format_names()
    for granularity in get_format(name).granularities
]


def assert_close(got, want, dtype=jnp.float32):
    assert got.shape == want.shape and got.dtype == want.dtype
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    tolerance = 2e-2 if dtype == "bfloat16" else 2e-5
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, "float32") for n in format_names()] + [("int4", "bfloat16")],
)
def test_products_are_those_of_the_dequantized_weight(name, dtype):
    x, w = normal((2, 3, 64), jnp.dtype(dtype)), normal((64, 4, 8), jnp.dtype(dtype))
    q = aj.quantize(w, format=name, axis=-3)
    d = np.asarray(q.dequantize(), np.float64)
    # float64: no product of the library is judged by another of its own.
    want = np.einsum("abk,knh->abnh", np.asarray(x, np.float64), d).astype(dtype)
    assert_close(ops.dot(x, q), want, dtype)
    assert_close(ops.einsum("abk,knh->abnh", x, q), want, dtype)
    assert_close(ops.dot(x, q.dequantize()), want, dtype)
    wide = ops.dot(x, q, preferred_element_type=jnp.float32)
    assert_close(wide, want.astype(np.float32), dtype)


@pytest.mark.parametrize("quantized", [True, False])
def test_the_weight_comes_to_the_dtype_of_the_activation(quantized):
    w = normal((64, 8))
    w = aj.quantize(w, format="int8") if quantized else w
    d = np.asarray(w.dequantize() if quantized else w)
    for x in (normal((2, 64), jnp.bfloat16), normal((2, 64), jnp.float16)):
        for y in (ops.dot(x, w), ops.einsum("bk,kn->bn", x, w)):
            assert y.dtype == x.dtype
    # ... but not to that of integers, where it would be 0.
    counts = np.arange(128).reshape(2, 64) % 5
    for x in (jnp.asarray(counts, jnp.int32), counts > 2, counts.astype(np.float64)):
        want = (np.asarray(x, np.float64) @ d).astype(np.float32)
        assert_close(ops.dot(x, w), want)
        assert_close(ops.einsum("bk,kn->bn", x, w), want)


def test_batch_dimensions_of_dot_general():
    x, w = normal((3, 5, 64)), normal((3, 64, 8))
    q = aj.quantize(w, format="mxfp8")
    numbers = (((2,), (1,)), ((0,), (0,)))
    want = jnp.einsum("ebk,ekn->ebn", x, q.dequantize())
    assert_close(jax.jit(ops.dot_general, static_argnums=2)(x, q, numbers), want)
    assert_close(ops.einsum("ebk,ekn->ebn", x, q), want)
    assert_close(ops.dot(x[0, 0], q[0]), want[0, 0])


@pytest.mark.parametrize(
    ("name", "granularity"), TABLES, ids=[f"{n}-{g}" for n, g in TABLES]
)
def test_embed_gathers_rows(name, granularity):
    table = normal((200, 48))
    q = aj.quantize(table, format=name, granularity=granularity, axis=-1)
    ids = jnp.asarray([[0, 199, 7], [130, 130, 5]])
    rows = ops.embed(q, ids)
    assert rows.dtype == q.dtype
    np.testing.assert_array_equal(rows, q.dequantize()[ids])


def test_embed_clips_ids_maps_and_casts():
    table = normal((200, 48))
    for options in ({"granularity": "block"}, {"granularity": "channel"}):
        q = aj.quantize(table, format="float8_e4m3", axis=-1, **options)
        d = q.dequantize()
        far = jnp.asarray([-1, 200, 10**6])
        np.testing.assert_array_equal(ops.embed(q, far), d[jnp.asarray([0, 199, 199])])
        np.testing.assert_array_equal(ops.embed(q, jnp.int32(131)), d[131])
        ids = jnp.asarray([[1, 2], [130, 3]])
        np.testing.assert_array_equal(jax.vmap(lambda i: ops.embed(q, i))(ids), d[ids])  # noqa: B023
        low = ops.embed(q, ids, dtype=jnp.bfloat16)
        assert_trees_equal(low, d[ids].astype(jnp.bfloat16))


def test_embed_of_one_row_and_of_a_stack():
    q = aj.quantize(normal((1, 64)), format="int4", axis=-1, group_size=32)
    ids = jnp.zeros((2, 2), jnp.int32)
    np.testing.assert_array_equal(ops.embed(q, ids), q.dequantize()[ids])
    stack = aj.quantize(normal((3, 20, 32)), format="int8", axis=-1)
    rows = jax.vmap(ops.embed, in_axes=(0, None))(stack, jnp.asarray([7, 19]))
    np.testing.assert_array_equal(rows, stack.dequantize()[:, jnp.asarray([7, 19])])


def test_embed_of_arrays_and_of_tables_packed_along_the_other_axis():
    table, ids = normal((20, 32)), jnp.asarray([3, 19])
    np.testing.assert_array_equal(ops.embed(table, ids), table[ids])
    q = aj.quantize(table, format="int8", axis=-2)
    np.testing.assert_array_equal(ops.embed(q, ids), q.dequantize()[ids])
    assert ops.embed(table, ids, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_embed_does_not_dequantize_the_table():
    q = aj.quantize(normal((4096, 64)), format="int4", axis=-1)
    compiled = jax.jit(ops.embed).lower(q, jnp.zeros(4, jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 64


def test_attend():
    x, table = normal((2, 5, 64), jnp.bfloat16), normal((30, 64))
    q = aj.quantize(table, format="int8", axis=-1)
    y = ops.attend(x, q)
    assert y.shape == (2, 5, 30) and y.dtype == jnp.float32
    want = jnp.einsum("abd,vd->abv", x.astype(jnp.float32), q.dequantize())
    np.testing.assert_allclose(y, want, atol=0.2)
    np.testing.assert_allclose(ops.attend(x, table), x @ table.T, atol=0.2)


@pytest.mark.parametrize("name", ["nvfp4", "t1_6", "sherry"])
def test_gradients_of_activations_and_of_other_parameters(name):
    x, w = normal((3, 64)), normal((64, 8))
    q = aj.quantize(w, format=name)
    others = {"norm": jnp.ones(64) * 1.5, "bias": normal((8,))}

    def loss(others, x, w):
        return jnp.sum((ops.dot(x * others["norm"], w) + others["bias"]) ** 2)

    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(others, x, q)
    want = jax.grad(loss, argnums=(0, 1))(others, x, q.dequantize())
    jax.tree.map(assert_close, got, want)


def test_gradients_of_embed_and_attend():
    table, ids = normal((20, 32)), jnp.asarray([3, 19, 3])
    got = jax.grad(lambda t: jnp.sum(ops.embed(t, ids) ** 2))(table)
    assert_close(got, jnp.zeros_like(table).at[ids].add(2 * table[ids]))
    q = aj.quantize(table, format="int8", axis=-1)
    got = jax.grad(lambda x: jnp.sum(ops.attend(x, q)))(table)
    assert_close(got, jnp.broadcast_to(q.dequantize().sum(0), (20, 32)))


def test_scan_and_vmap_over_a_stack():
    stack = aj.quantize(normal((3, 64, 64)), format="sherry", group_size=32)
    x = normal((2, 64))
    want = x
    for i in range(3):
        want = want @ stack[i].dequantize()
    got, _ = jax.lax.scan(lambda x, q: (ops.dot(x, q), None), x, stack)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-2)
    each = jax.vmap(ops.dot, in_axes=(None, 0))(x, stack)
    np.testing.assert_allclose(
        each, jnp.einsum("bk,lkn->lbn", x, stack.dequantize()), rtol=1e-4, atol=1e-4
    )


def test_lengths_that_differ():
    q = aj.quantize(normal((64, 8)), format="int8")
    message = "dot: x has 63 features and the weight takes 64"
    with pytest.raises(ValueError, match=message):
        ops.dot(jnp.ones((2, 63)), q)
    with pytest.raises(ValueError, match=message):
        ops.dot(jnp.ones((2, 63)), q.dequantize())
