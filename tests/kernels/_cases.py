"""Random packed weights for the kernel tests, and their dense twin in numpy."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import angeljax as aj
from pallas_kernels import WeightLayout


def packed(
    fmt: str, k: int, n: int, group: int | None = None, seed: int = 0, **options: Any
) -> tuple[dict[str, jax.Array], WeightLayout, np.ndarray]:
    """Canonical planes and layout of a random weight, and the weight in float64."""
    made = _packed(fmt, k, n, group, seed, tuple(sorted(options.items())))
    planes, layout, w = made
    return dict(planes), layout, w


@functools.lru_cache(maxsize=256)
def _packed(
    fmt: str, k: int, n: int, group: int | None, seed: int, options: Any
) -> tuple[dict[str, jax.Array], WeightLayout, np.ndarray]:
    w = np.random.default_rng(seed).standard_normal((k, n)).astype(np.float32)
    kwargs: dict[str, Any] = dict(options)
    if fmt not in ("nvfp4", "mxfp4", "mxfp8"):
        kwargs["granularity"] = "channel" if group is None else "group"
        if group is not None:
            kwargs["group_size"] = group

    # Compiled as one: much faster than operation by operation.
    def make(w: jax.Array) -> tuple[Any, jax.Array]:
        q = aj.quantize(w, format=fmt, **kwargs)
        return q, q.dequantize(jnp.float32)

    q, dense = jax.jit(make)(jnp.asarray(w))
    planes = dict(q.planes)
    layout = WeightLayout(
        format=fmt,
        k=k,
        n=n,
        group_size=q.spec.group_size,
        symmetric="zero" not in planes,
        run=_run(q),
        group_stride=q.spec.option("group_stride", 1),
    )
    return planes, layout, np.asarray(dense, np.float64)


def _run(q: Any) -> int:
    from angeljax.formats.ternary import run_length

    return run_length(q.spec) if q.spec.format == "t2" else 128
