"""What every format promises, whatever its numbers mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax.formats import format_names, get_format
from tests.formats._cases import CASES, ERROR, IDS, assert_trees_equal, normal

STORAGE = {
    "uint8",
    "int8",
    "float8_e4m3fn",
    "float8_e5m2",
    "bfloat16",
    "float16",
    "float32",
}
MEANS = ("t2", "t1_6", "sherry")
every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)


def relative_error(q, w):
    w = np.asarray(w, np.float32)
    d = np.asarray(q.dequantize(jnp.float32))
    return np.linalg.norm(d - w) / np.linalg.norm(w)


@every_case
def test_jit_eval_shape_and_error(name, options):
    w = normal((256, 24))
    f = jax.jit(lambda w: aj.quantize(w, format=name, **options))
    q = f(w)
    abstract = jax.eval_shape(f, w)
    assert jax.tree.structure(abstract) == jax.tree.structure(q)
    for a, x in zip(jax.tree.leaves(abstract), jax.tree.leaves(q), strict=True):
        assert (a.shape, a.dtype) == (x.shape, x.dtype)
    assert q.shape == w.shape and q.dtype == w.dtype and q.size == w.size
    assert {x.dtype.name for x in q.planes.values()} <= STORAGE
    counted = sum(np.asarray(x).nbytes for x in q.planes.values())
    assert q.nbytes == counted
    assert q.bits_per_weight == pytest.approx(8 * counted / w.size)
    bound = ERROR[name]
    if options.get("granularity") == "tensor" or "scale_rounding" in options:
        bound *= 2  # one scale for all, or the largest element saturates
    assert relative_error(q, w) < bound
    # Nothing is lost between the packed planes and a second look at them.
    np.testing.assert_array_equal(q.dequantize(), jax.jit(lambda q: q.dequantize())(q))


@every_case
def test_stacks_are_quantized_entry_by_entry(name, options):
    w = normal((2, 3, 128, 8))
    stack = aj.quantize(w, format=name, **options)
    assert stack.shape == w.shape and stack.spec.shape == (128, 8)
    one = aj.quantize(w[1, 2], format=name, **options)
    assert one.spec == stack.spec
    mapped = jax.vmap(jax.vmap(lambda w: aj.quantize(w, format=name, **options)))(w)
    assert jax.tree.structure(mapped) == jax.tree.structure(stack)
    for a, b in ((stack[1, 2], one), (mapped, stack)):
        for key, plane in a.planes.items():
            # A float32 mean may be summed in another order; nothing else may differ.
            tolerance = 1e-6 if key == "scale" and name in MEANS else 0
            x, y = (np.asarray(p, np.float32) for p in (plane, b.planes[key]))
            np.testing.assert_allclose(x, y, rtol=tolerance)
    whole = stack.dequantize()
    rows = jax.lax.scan(lambda c, q: (c, q.dequantize()), 0, stack)[1]
    np.testing.assert_array_equal(rows, whole)
    np.testing.assert_array_equal(
        jax.vmap(lambda q: q.dequantize())(stack[0]), whole[0]
    )


@pytest.mark.parametrize("k", [1, 5, 33, 100, 130])
@pytest.mark.parametrize("name", format_names())
def test_uneven_lengths_are_padded_inside_and_cut_outside(name, k):
    w = normal((k, 5))
    q = aj.quantize(w, format=name)
    assert q.shape == (k, 5)
    d = np.asarray(q.dequantize())
    assert np.isfinite(d).all()
    # The same weights with room after them must not change by it, where the unit of
    # the format allows both. A scale that counted the padding would.
    if k == 100:
        unit = 32
        whole = aj.quantize(w[: k // unit * unit], format=name, granularity=None)
        assert relative_error(q, w) < 1.1 * relative_error(whole, w[: k // unit * unit])


@pytest.mark.parametrize("name", format_names())
def test_padding_costs_less_than_one_unit(name):
    unit = get_format(name).unit
    options = {} if get_format(name).fixed_group else {"granularity": "channel"}
    small = aj.quantize(normal((64, 4)), format=name, **options)
    large = aj.quantize(normal((64 + 1, 4)), format=name, **options)
    codes = lambda q: q.planes["codes"].nbytes  # noqa: E731
    if name != "t1_6":
        assert codes(large) - codes(small) <= 4 * unit


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((40, 64), -1),
        ((64, 4, 16), -3),
        ((4, 16, 24), (-3, -2)),
        ((2, 4, 16, 24), (1, 2)),
        ((3, 3, 8, 16), (-4, -3, -2)),
        ((6, 64, 8), 1),
    ],
)
@pytest.mark.parametrize("name", format_names())
def test_contraction_axes(name, shape, axis):
    w = normal(shape)
    q = aj.quantize(w, format=name, axis=axis)
    assert q.shape == shape
    # Against the same numbers brought into the order [in, out] by hand.
    axes = [a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))]
    n_batch = len(shape) - len(q.spec.shape)
    rest = [a for a in range(n_batch, len(shape)) if a not in axes]
    order = [*range(n_batch), *axes, *rest]
    k = int(np.prod([shape[a] for a in axes]))
    n = int(np.prod([shape[a] for a in rest]))
    flat = jnp.transpose(w, order).reshape(*shape[:n_batch], k, n)
    want = aj.quantize(flat, format=name).dequantize()
    got = jnp.transpose(q.dequantize(), order).reshape(want.shape)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", format_names())
def test_logical_dtype_is_kept(name, dtype):
    w = normal((64, 8), jnp.dtype(dtype))
    q = aj.quantize(w, format=name)
    assert q.dtype == dtype and q.dequantize().dtype == dtype
    assert q.dequantize(jnp.float32).dtype == jnp.float32
    same = aj.quantize(w.astype(jnp.float32), format=name)
    for key, plane in q.planes.items():
        np.testing.assert_array_equal(plane, same.planes[key])


@every_case
def test_zeros_and_outliers_stay_finite(name, options):
    w = np.zeros((128, 4), np.float32)
    if name != "sherry":  # which has three signs in every four weights
        zeros = aj.quantize(jnp.asarray(w), format=name, **options).dequantize()
        np.testing.assert_array_equal(zeros, w)
    w[7, 2], w[9, 1] = 3e38, 1e-38
    d = np.asarray(aj.quantize(jnp.asarray(w), format=name, **options).dequantize())
    assert not np.isnan(d).any()


@pytest.mark.parametrize("name", format_names())
def test_quantizing_what_was_quantized_changes_nothing(name):
    # Ranges that leave room beside the largest weight, and means over zeros, move when
    # they are taken again; these options do not.
    options = {"t2": {"scale_method": "lstsq"}, "t1_6": {"scale_method": "lstsq"}}
    options |= {f"int{b}": {"narrow_range": "yes"} for b in (8, 4, 3, 2)}
    once = aj.quantize(normal((128, 16), seed=3), format=name, **options.get(name, {}))
    twice = aj.quantize(once.dequantize(), format=name, **options.get(name, {}))
    np.testing.assert_allclose(twice.dequantize(), once.dequantize(), rtol=1e-6)
    if name in ("sherry", "t2", "t1_6"):
        assert_trees_equal(twice, once)
