"""Ternary weights times many int8 tokens: Hopper's `wgmma` with weights in registers.

A thread block computes `rows` outputs x `tokens`. One warpgroup streams activations
into shared memory; each of the others takes 64 outputs, expands its packed words into
bytes +-64 or 0 in the layout of the left operand, and multiplies. The factor 64 and
both scales go into the float32 epilogue.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ptx as asm
from pallas_kernels._ptx import Int
from pallas_kernels.ternary_matmul._decode import masks

STAGE = 128  # activations along K in one copy: a row of the 128-byte swizzle
_WORDS = {"t2": 8, "sherry": 5}


@dataclasses.dataclass(frozen=True)
class Gemm:
    """Everything static about one kernel."""

    format: str
    m: int
    n: int
    k_tiles: int
    groups: int
    group_size: int
    out_dtype: str
    wide_scales: bool = False
    tokens: int = 256  # of a thread block
    warpgroups: int = 2  # that compute; 64 outputs each
    stages: int = 4
    tokens_first: bool = True  # neighbouring blocks share weights

    @property
    def rows(self) -> int:
        """Outputs of a thread block."""
        return 64 * self.warpgroups


@functools.cache
def build(c: Gemm) -> Callable[..., jax.Array]:
    """The kernel `(x, x_scale [M'], codes[, high], scale) -> y [M, N]`.

    `x` is int8 `[M, K']`, K' a multiple of 256; M' is M rounded up to `tokens`, N a
    multiple of 8, the rows of the packed planes are padded to `rows`.
    """
    grid = (-(-c.n // c.rows), -(-c.m // c.tokens))
    out = jnp.dtype(c.out_dtype)
    swizzle = (
        plgpu.TilingTransform((8, 128)),
        plgpu.SwizzleTransform(128),
    )
    out_swizzle = (
        plgpu.TilingTransform((8, 128 // out.itemsize)),
        plgpu.SwizzleTransform(128),
    )
    return plgpu.kernel(
        functools.partial(_body, c),
        out_type=jax.ShapeDtypeStruct((c.m, c.n), out),
        grid=grid[::-1] if not c.tokens_first else grid,
        grid_names=("a", "b"),
        num_threads=c.warpgroups + 1,
        thread_name="group",
        scratch_types=(
            plgpu.SMEM((c.stages, c.tokens, STAGE), jnp.int8, transforms=swizzle),
            plgpu.SMEM((c.warpgroups, 64, 64), out, transforms=out_swizzle),
            plgpu.Barrier(num_barriers=c.stages),
            plgpu.Barrier(num_arrivals=c.warpgroups, num_barriers=c.stages),
        ),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
        ),
    )


def _body(c: Gemm, *refs: Any) -> None:
    *ins, y, x_smem, y_smem, full, empty = refs
    x, x_scale, *weights, scale = ins
    group = lax.axis_index("group")
    first, second = lax.axis_index("a"), lax.axis_index("b")
    n_block, m_block = (first, second) if c.tokens_first else (second, first)
    steps = 2 * c.k_tiles

    @pl.when(group == c.warpgroups)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def step(s: Any, _: None) -> None:
            slot = lax.rem(s, c.stages)

            @pl.when(s >= c.stages)
            def _() -> None:
                plgpu.barrier_wait(empty.at[slot])

            plgpu.copy_gmem_to_smem(
                x.at[pl.ds(m_block * c.tokens, c.tokens), pl.ds(s * STAGE, STAGE)],
                x_smem.at[slot],
                full.at[slot],
            )

        lax.fori_loop(0, steps, step, None)

    @pl.when(group < c.warpgroups)
    def _multiply() -> None:
        plgpu.set_max_registers(232, action="increase")
        rows = n_block * c.warpgroups + group  # in blocks of 64 outputs

        def product(acc: Any) -> Any:
            def tile(t: Any, words: Any) -> Any:
                ahead = _fetch(c, weights, rows, jnp.minimum(t + 1, c.k_tiles - 1))
                for half in range(2):
                    s = 2 * t + half
                    slot = lax.rem(s, c.stages)
                    w = _expand(c, words, half)
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.wgmma(acc, w, x_smem.at[slot].T)
                    # The step before this one has read its activations.
                    plgpu.wgmma_wait(1)

                    @pl.when(s > 0)
                    def _(s: Any = s) -> None:
                        plgpu.barrier_arrive(empty.at[lax.rem(s - 1, c.stages)])

                return ahead

            lax.fori_loop(0, c.k_tiles, tile, _fetch(c, weights, rows, 0))
            plgpu.wgmma_wait(0)
            return acc[...]

        sums = pl.run_scoped(product, plgpu.ACC((64, c.tokens), jnp.int32))
        row = plgpu.Layout.WGMMA.reduce(1)
        column = plgpu.Layout.WGMMA.reduce(0)
        s_n = plgpu.load(scale, pl.ds(rows * 64, 64), layout=row, optimized=False) * (
            1 / 64
        )
        for part in range(c.tokens // 64):
            at = pl.ds(m_block * c.tokens + part * 64, 64)
            s_m = plgpu.load(x_scale, at, layout=column, optimized=False)
            piece = sums[:, part * 64 : (part + 1) * 64].astype(jnp.float32)
            piece = piece * lax.broadcast_in_dim(s_n, piece.shape, [0])
            piece = piece * lax.broadcast_in_dim(s_m, piece.shape, [1])
            piece = piece.astype(y_smem.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            y_smem.at[group].T[...] = plgpu.layout_cast(
                piece, plgpu.Layout.WGMMA_TRANSPOSED
            )
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y_smem.at[group], y.at[at, pl.ds(rows * 64, 64)])
        plgpu.wait_smem_to_gmem(0)


def _layout(words: int) -> Any:
    return plgpu.Layout.WG_STRIDED((128 * words,), vec_size=words)


def _fetch(c: Gemm, weights: list[Any], rows: Any, tile: Any) -> Any:
    """The words of this thread for a 64 x 256 tile, straight from global memory."""
    shapes = [4, 4] if c.format == "t2" else [4, 1]
    types = [
        plgpu.ShapeDtypeStruct((128 * w,), jnp.int32, layout=_layout(w)) for w in shapes
    ]

    @plgpu.inline_mgpu(
        arg_types=(
            (plgpu.RefType(),) * len(weights),
            plgpu.Layout.WG_SPLAT,
            plgpu.Layout.WG_SPLAT,
        ),
        return_type=types,
    )
    def load(_: Any, refs: Any, rows: Any, tile: Any) -> Any:
        thread = asm.special("tid.x") & 127
        lane = thread & 31
        (r,), (t,) = (v.registers.flat for v in (rows, tile))
        at = (Int(r) * 4 + (thread >> 5)) * c.k_tiles + Int(t)
        hint = "global.nc"
        codes = asm.pointer(refs[0])
        base = at * (64 if c.format == "t2" else 32) + lane
        got = [asm.load(codes, base, 16, words=4, hint=hint)]
        if c.format == "t2":
            got.append(asm.load(codes, base + 32, 16, words=4, hint=hint))
        else:
            high = asm.pointer(refs[1])
            got.append(asm.load(high, at * 32 + lane, 4, words=1, hint=hint))
        return [_array(words) for words in got]

    return load(tuple(weights), rows, jnp.asarray(tile, jnp.int32))


def _array(words: list[Int]) -> Any:
    layout = mgpu.WGStridedFragLayout((128 * len(words),), vec_size=len(words))
    vector = asm.vector(words)
    registers = np.empty((1,), object)
    registers[0] = vector
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)


def _expand(c: Gemm, words: Any, half: int) -> jax.Array:
    """int8 `[64, 128]` +-64 or 0: half a tile, as the left operand."""
    layout = plgpu.Layout.WGMMA_8BIT

    @plgpu.inline_mgpu(
        arg_types=([_layout(4), _layout(4 if c.format == "t2" else 1)],),
        return_type=plgpu.ShapeDtypeStruct((64, STAGE), jnp.int8, layout=layout),
    )
    def expand(_: Any, arrays: Any) -> Any:
        flat = [w for a in arrays for w in asm.unvector(a.registers.flat[0])]
        pos, keep = masks(c.format, flat)
        registers = []
        by_row = [_bytes(pos[h + 2 * half], keep[h + 2 * half]) for h in range(2)]
        for j in range(8):
            registers += [asm.as_bytes(by_row[h][j]) for h in range(2)]
        fragment = layout.to_mgpu()
        shape = fragment.registers_shape((64, STAGE))
        array = np.empty(len(registers), object)
        array[:] = registers
        return mgpu.FragmentedArray(
            _registers=array.reshape(shape), _layout=fragment, _is_signed=True
        )

    return expand(list(words))


def _bytes(pos: Int, keep: Int) -> list[Int]:
    """The eight groups of a word, each as four bytes: bit 7 negative, bit 6 not 0."""
    odd, even = 0xAAAAAAAA, 0x55555555
    negative = ~keep
    present = pos | negative
    upper = (negative & odd) | ((present >> 1) & even)  # groups 1, 3, 5, 7
    lower = ((negative << 1) & odd) | (present & even)  # groups 0, 2, 4, 6
    out = []
    for j in range(8):
        word, shift = (upper, 7 - j) if j & 1 else (lower, 6 - j)
        out.append((word << shift if shift else word) & 0xC0C0C0C0)
    return out
