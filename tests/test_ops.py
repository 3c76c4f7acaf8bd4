"""Products with packed weights against the same products with dequantized ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax import ops
from angeljax.formats import format_names, get_format
from tests.formats._cases import normal

TABLES = [
    (name, granularity)
    for name in format_names()
    for granularity in get_format(name).granularities
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", format_names())
def test_dot_and_einsum(name, dtype):
    x, w = normal((2, 3, 64), jnp.dtype(dtype)), normal((64, 4, 8), jnp.dtype(dtype))
    q = aj.quantize(w, format=name, axis=-3)
    d = q.dequantize(dtype)
    want = jnp.einsum("abk,knh->abnh", x, d)
    for got in (ops.dot(x, q), ops.einsum("abk,knh->abnh", x, q), ops.dot(x, d)):
        assert got.shape == want.shape and got.dtype == want.dtype
        np.testing.assert_allclose(
            np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=1e-2
        ) if dtype == "float32" else None
    wide = ops.dot(x, q, preferred_element_type=jnp.float32)
    assert wide.dtype == jnp.float32


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
    assert ops.embed(q, ids, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        jax.jit(lambda q, i: ops.embed(q, i))(q, ids[0]), q.dequantize()[ids[0]]
    )


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


def test_gradient_with_respect_to_the_activation():
    x, w = normal((3, 64)), normal((64, 8))
    q = aj.quantize(w, format="nvfp4")
    got = jax.grad(lambda x: jnp.sum(ops.dot(x, q) ** 2))(x)
    want = jax.grad(lambda x: jnp.sum((x @ q.dequantize()) ** 2))(x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


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
    with pytest.raises(ValueError, match="x has 63 features and the weight takes 64"):
        ops.dot(jnp.ones((2, 63)), q)
