"""One implementation with its rule for `vmap`; see `_terms` for what they take."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from pallas_kernels._implementation import implementation
from pallas_kernels.greedy_select._terms import Settings

PACKAGE = "pallas_kernels.greedy_select"


@functools.lru_cache(maxsize=256)
def function(name: str, settings: Settings) -> Any:
    """`(gram, importance, valid, limit) -> order`; made once for each setting."""
    module = implementation(PACKAGE, name)

    @custom_vmap
    def run(*args: Any) -> Any:
        return module.select(*args, settings)

    @run.def_vmap
    def _(size: int, batched: Any, *args: Any) -> Any:
        joined = (
            (x if mapped else jnp.broadcast_to(x, (size, *x.shape))).reshape(
                -1, *x.shape[2 if mapped else 1 :]
            )
            for x, mapped in zip(args, batched, strict=True)
        )
        order = run(*joined)
        return order.reshape(size, -1, order.shape[-1]), True

    return run
