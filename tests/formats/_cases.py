"""The product of formats, granularities and options that the contract tests run on."""

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.formats import format_names, get_format

CASES = [
    (name, {"granularity": granularity})
    for name in format_names()
    for granularity in get_format(name).granularities
]
CASES += [
    ("int8", {"symmetric": False}),
    ("int4", {"symmetric": False, "group_size": 32, "scale_dtype": "float16"}),
    ("int4", {"narrow_range": "yes", "group_size": 64}),
    ("int3", {"symmetric": False, "granularity": "channel"}),
    ("int2", {"symmetric": False, "group_size": 64, "scale_dtype": "float32"}),
    ("mxfp4", {"scale_rounding": "floor"}),
    ("mxfp8", {"scale_rounding": "floor"}),
    ("t2", {"scale_method": "twn", "group_size": 256}),
    ("t2", {"scale_method": "lstsq", "group_size": 32}),
    ("t1_6", {"scale_method": "lstsq", "group_size": 64}),
    ("t2", {"shift": True, "group_size": 64}),
    ("seq2", {"scale_method": "amax", "group_size": 64}),
    ("ptqtp", {"tied": True, "group_size": 64}),
    ("sherry", {"group_stride": 16, "group_size": 64}),
    ("sherry", {"group_size": 32, "scale_dtype": "float32"}),
]
IDS = [f"{n}-{'-'.join(map(str, o.values()))}" for n, o in CASES]

# For `jax.jit`: compiled as users do, where tests do without LLVM's optimizations and
# XLA's newer emitters.
OPTIMIZED = {
    "xla_backend_extra_options": "",
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
}
# Relative error ||w - w'|| / ||w|| that a normal weight may have, with some air.
ERROR = {
    "int8": 0.012,
    "int4": 0.17,
    "int4_fp8": 0.17,
    "int3": 0.36,
    "int2": 0.8,
    "float8_e4m3": 0.03,
    "float8_e5m2": 0.06,
    "mxfp8": 0.04,
    "mxfp4": 0.15,
    "nvfp4": 0.12,
    "nf4": 0.13,
    "t2": 0.53,
    "t1_6": 0.53,
    "sherry": 0.55,
    "seq2": 0.37,
    "binary": 0.63,
    "ptqtp": 0.2,
}


def normal(shape, dtype=jnp.float32, seed=0):
    """Seeded normal weights."""
    w = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return jnp.asarray(w).astype(dtype)


def assert_trees_equal(a, b):
    """Same structure (specs included), dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(
            np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8)
        )
