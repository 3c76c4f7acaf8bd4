"""Formats of a KV cache against numpy, and the cache of a linen model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import angeljax as aj
from angeljax.kv_cache import (
    KVCacheOptions,
    KVFormat,
    fake_quantize_kv,
    quantize_kv,
    update_kv,
)
from tests.kv_cache._oracle import stored

F = KVFormat
FORMATS = [
    F(format="float8_e4m3", granularity="tensor"),
    F(format="float8_e4m3", granularity="head"),
    F(format="float8_e4m3"),
    F(format="int8", granularity="head"),
    F(format="int8"),
    F(format="int8", symmetric=False),
    F(format="int4"),
    F(format="int4", symmetric=False, group_size=64),
    F(format="int4", granularity="token"),
]


@pytest.mark.parametrize(
    "fmt", FORMATS, ids=lambda f: "-".join(map(str, vars(f).values()))
)
def test_a_cache_gives_back_what_numpy_says(rng: np.random.Generator, fmt: Any) -> None:
    x = rng.standard_normal((2, 7, 3, 64)).astype(np.float32)
    x *= np.exp2(rng.integers(-6, 6, (2, 7, 3, 1))).astype(np.float32)
    x[..., 5] *= 20  # a channel of outliers, as keys have
    x[0, 2] = 0
    x[1, 3, 1] = 2.5  # constant
    scale = None
    if fmt.static:
        axes = (0, 1, 2, 3) if fmt.granularity == "tensor" else (0, 1, 3)
        # Some magnitudes are out of range of a scale that is too small.
        amax = 0.7 * np.abs(x).max(axes, keepdims=True)
        scale = amax.astype(np.float32) / np.float32(
            448 if fmt.format == "float8_e4m3" else 127
        )
    want = stored(x, fmt, scale)
    kv = jax.jit(lambda x, s: quantize_kv(x, fmt, scale=s))(x, scale)
    assert kv.shape == x.shape
    np.testing.assert_allclose(kv.dequantize(), want, rtol=1e-6, atol=1e-6)
    # bfloat16 in, bfloat16 out; the scales are those of float32 arithmetic.
    half = jnp.asarray(x, jnp.bfloat16)
    back = fake_quantize_kv(half, fmt, scale=scale)
    assert back.dtype == jnp.bfloat16
    want = stored(np.asarray(half, np.float32), fmt, scale)
    np.testing.assert_allclose(
        np.asarray(back, np.float32), want, rtol=2**-8, atol=1e-6
    )
    bits = {"float8_e4m3": 8, "int8": 8, "int4": 4}[fmt.format]
    assert kv.codes.nbytes == x.size * bits // 8
    beside = 0 if fmt.static else x.size // (fmt.group_size or 64) * 2
    extra = kv.scale.nbytes if fmt.static else beside * (1 if fmt.symmetric else 2)
    assert kv.nbytes == kv.codes.nbytes + extra


@pytest.mark.parametrize(("axis", "fmt"), [(-3, FORMATS[1]), (-2, FORMATS[7])])
def test_tokens_are_written_where_they_belong(
    rng: np.random.Generator, fmt: Any, axis: int
) -> None:
    shape = (2, 3, 5, 64) if axis == -2 else (2, 5, 3, 64)
    x = rng.standard_normal(shape).astype(np.float32)
    new = rng.standard_normal(shape).astype(np.float32)
    head = -3 if axis == -2 else -2
    cache = quantize_kv(jnp.asarray(x), fmt, head_axis=head)
    scale = np.asarray(cache.scale) if fmt.static else None
    slots: list[Any] = [slice(None)] * 4
    slots[axis] = slice(2, 4)
    at = tuple(slots)
    update = jax.jit(lambda c, n, i: update_kv(c, n, i, axis=axis), donate_argnums=0)
    want = stored(x, fmt, scale)
    want[at] = stored(new[at], fmt, scale)
    found = update(cache, new[at], 2).dequantize()
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-6)


def test_the_cache_of_a_linen_model_is_kept_quantized(rng: np.random.Generator) -> None:
    """Decoding with a cache that lives in codes between the steps."""
    layer = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=64, decode=True)
    x = jnp.asarray(rng.standard_normal((1, 5, 32)), jnp.float32)
    variables = layer.init(jax.random.key(0), x)
    params, cache = variables["params"], variables["cache"]
    names = {"cached_key": F(format="int8"), "cached_value": F(format="int4")}

    @jax.jit
    def step(cache: Any, x: jax.Array) -> Any:
        both = {"params": params, "cache": cache}
        return layer.apply(both, x, mutable=["cache"])

    @jax.jit
    def packed_step(packed: Any, cache: Any, x: jax.Array) -> Any:
        index = cache["cache_index"]
        whole = {name: packed[name].dequantize() for name in names}
        y, new = step({**cache, **whole}, x)
        new = new["cache"]
        packed = {
            name: update_kv(
                packed[name],
                jax.lax.dynamic_slice_in_dim(new[name], index, 1, 1),
                index,
            )
            for name in names
        }
        return y, packed, {"cache_index": new["cache_index"]}

    packed = {name: quantize_kv(cache[name], fmt) for name, fmt in names.items()}
    rest = {"cache_index": cache["cache_index"]}
    want_cache, exact = cache, cache
    for i in range(5):
        y, packed, rest = packed_step(packed, rest, x[:, i : i + 1])
        want, after = step(want_cache, x[:, i : i + 1])
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
        want_cache = dict(after["cache"])
        for name, fmt in names.items():
            value = np.array(want_cache[name])
            value[:, i] = stored(value[:, i], fmt)
            want_cache[name] = jnp.asarray(value)
        plain, after = step(exact, x[:, i : i + 1])
        exact = after["cache"]
    assert 1e-4 < float(jnp.abs(plain - y).max()) < 0.2


def test_a_quantized_cache_is_a_pytree_of_static_shapes() -> None:
    x = jax.ShapeDtypeStruct((4, 2, 16, 64), jnp.bfloat16)
    kv = jax.eval_shape(lambda x: quantize_kv(x, "int4"), x)
    assert kv.codes.shape == (4, 2, 16, 32) and kv.scale.shape == (4, 2, 16, 2)
    assert kv.scale.dtype == jnp.bfloat16 and kv.dtype == "bfloat16"
    assert kv.nbytes == 4 * 2 * 16 * (32 + 4)
    mapped = jax.eval_shape(jax.vmap(lambda x: quantize_kv(x, "int8")), x)
    assert mapped.codes.shape == x.shape


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: quantize_kv(x, "int5"), "did you mean 'int"),
        (lambda x: quantize_kv(x, "none"), "nothing to quantize"),
        (lambda x: quantize_kv(x, F(format="int4", group_size=20)), "does not divide"),
        (
            lambda x: quantize_kv(x[..., :3], F(format="int4", granularity="token")),
            "odd",
        ),
        (lambda x: quantize_kv(x, "int8", scale=jnp.ones(1)), "leave scale out"),
        (
            lambda x: quantize_kv(
                x, F(format="int8", granularity="head"), scale=jnp.ones((5, 1))
            ),
            "does not broadcast",
        ),
        (lambda x: update_kv(quantize_kv(x, "int8"), x[0], 0), "does not fit"),
        (
            lambda x: update_kv(
                quantize_kv(x, F(format="int8", granularity="head"), head_axis=1), x, 0
            ),
            "static scales along axis -3",
        ),
        (lambda x: F(format="int8", granularity="row"), "granularity must be one of"),
        (lambda x: F(format="int8", group_size=32), "goes with granularity: group"),
        (lambda x: F(symmetric=False), "symmetric: false is for int8 and int4"),
        (lambda x: F(format="none", granularity="token"), "none has no granularity"),
        (lambda x: KVCacheOptions(format="none"), "leave the section out"),
        (lambda x: KVCacheOptions(keys={"fmt": 1}), "has no field 'fmt'"),
        (lambda x: KVCacheOptions(skip_layers=[1.5]), "list of numbers"),
        (lambda x: KVCacheOptions(scale_method="max"), "did you mean 'amax'"),
        (lambda x: KVCacheOptions(percentile=20), "percentile must be a number"),
        (lambda x: KVCacheOptions(skip_layers=[2]).skips(2), "layer 2 is none"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as e:
        call(jnp.ones((2, 4, 3, 32)))
    assert "\n" not in str(e.value)


def test_recipes_have_a_section_for_the_cache() -> None:
    text = "kv_cache: {format: int8, values: int4, skip_layers: [0, -1]}"
    recipe = aj.Recipe.from_yaml(text)
    options = recipe.kv_cache
    assert options == KVCacheOptions(
        format="int8", values=F(format="int4", group_size=32), skip_layers=(0, -1)
    )
    assert options.skips(4) == {0, 3} and not options.static
    assert aj.Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert hash(recipe) == hash(aj.Recipe.from_dict(recipe.to_dict()))
    static = aj.Recipe(kv_cache={"granularity": "head", "scale_method": "percentile"})
    assert static.kv_cache.static == ("k", "v")
    assert aj.Recipe.from_dict(static.to_dict()) == static
    for wrong, message in (
        ("kv_cache: {formt: int8}", "did you mean 'format'"),
        ("kv_cache: int8", "must be a mapping"),
    ):
        with pytest.raises(aj.RecipeError, match=message):
            aj.Recipe.from_yaml(wrong)
