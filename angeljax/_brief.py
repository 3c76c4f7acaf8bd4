"""`brief_jit`: `jax.jit` for programs that run a few times only.

On a GPU XLA tries several kernels for each matrix product of a program while it
compiles it. That pays where products are large, as those that measure Hessians are; for
the program that quantizes a weight it is most of the time that a whole model takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

_GPU_OPTIONS = {"xla_gpu_autotune_level": 0}


def brief_jit(
    f: Callable[..., Any], *, static_argnums: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """As `jax.jit`; called on arrays on a GPU it is compiled without autotuning."""
    tuned = jax.jit(f, static_argnums=static_argnums)
    untuned = jax.jit(f, static_argnums=static_argnums, compiler_options=_GPU_OPTIONS)

    @functools.wraps(f)
    def call(*args: Any) -> Any:
        # A program inside of another is compiled with that one's options, and other
        # backends do not know this one.
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args))
        if traced or jax.default_backend() != "gpu":
            return tuned(*args)
        return untuned(*args)

    return call
