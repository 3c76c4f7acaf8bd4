"""Kernels for Hopper that are written thread by thread, in the words of `_ptx`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def kernel(
    emit: Callable[..., None],
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    *,
    grid: int,
    warps: int,
    words: int,
    name: str,
) -> Callable[..., Any]:
    """What calls the kernel that `emit` writes.

    Args:
      emit: `(*inputs, *outputs[, shared memory])`, each a reference.
      outputs: their shapes. Inputs that are `jax.Ref` may be written as well.
      grid: thread blocks.
      warps: of a thread block, a multiple of 4.
      words: of shared memory; 0 for none.
      name: of the kernel.

    Returns:
      `(*inputs) -> outputs`. Build it once for what is static: each one is compiled.
    """

    def body(*refs: Any) -> None:
        types = (plgpu.RefType(),) * len(refs)
        plgpu.inline_mgpu(arg_types=types)(lambda _, *refs: emit(*refs))(*refs)

    def scoped(*refs: Any) -> None:
        scratch = (plgpu.SMEM((words,), jnp.int32),) if words else ()
        pl.run_scoped(functools.partial(body, *refs), *scratch, collective_axes="group")

    return pl.kernel(
        scoped,
        out_type=outputs,
        mesh=plgpu.Mesh(
            grid=(grid,),
            grid_names=("blocks",),
            num_threads=warps // 4,
            thread_name="group",
            kernel_name=name,
        ),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        name=name,
    )
