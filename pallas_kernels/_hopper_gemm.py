"""Packed weights times many int8 tokens: Hopper's `wgmma` with weights in registers.

A thread block computes `rows` outputs x `tokens`. One warpgroup streams activations
into shared memory; each of the others takes 64 outputs, expands its packed words into
bytes in the layout of the left operand, and multiplies. What the bytes count too much
(64 for ternary codes, 16 for 4-bit codes) and the scales of outputs and tokens go into
the float32 epilogue; scales of groups are applied to the integer sum of each group.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _hopper_ragged as ragged
from pallas_kernels import _ptx as asm
from pallas_kernels._implementation import quantize_activation
from pallas_kernels._ptx import Int
from pallas_kernels._weights import Planes, WeightLayout
from pallas_kernels.ternary_matmul._codes import signed_bytes

_tiling: Any = plgpu.TilingTransform  # for mypy they are abstract
_swizzle: Any = plgpu.SwizzleTransform

STAGE = 128  # activations along K in one copy: a row of the 128-byte swizzle
# Words of a thread for a 64 x 256 tile, by loads.
_LOADS = {"t2": (4, 4), "sherry": (4, 1), "int4": (4,) * 4, "int8": (4,) * 8}
_FACTOR = {"t2": 64, "sherry": 64, "int4": 16, "int8": 1}


def takes(layout: WeightLayout) -> bool:
    """Whether a weight can be multiplied here."""
    if layout.format not in _LOADS or not layout.symmetric:
        return False
    group = layout.group_size
    return layout.groups == 1 or group == 128 or group % 256 == 0


def plan(m: int, layout: WeightLayout) -> dict[str, Any]:
    """Tile sizes for `m` tokens."""
    if m <= 64:
        sizes = {"tokens": 64, "stages": 6}
    elif m <= 128 or layout.groups > 1:
        sizes = {"tokens": 128, "stages": 6}
    else:
        sizes = {"tokens": 256, "stages": 4}
    # Where half of the processors would have nothing to do: half as much for each.
    if -(-layout.n // 128) * -(-m // sizes["tokens"]) <= 66:
        sizes["warpgroups"] = 1
    return sizes


def candidates(m: int, layout: WeightLayout) -> Iterator[dict[str, Any]]:
    """Plans worth timing for `m` rows of int8 activations."""
    most = 128 if layout.groups > 1 else 256
    for tokens, stages in ((64, 6), (128, 6), (256, 3), (256, 4)):
        if tokens > most or tokens >= 2 * max(m, 64):
            continue
        for first in (False, True) if m > tokens else (False,):
            sizes = {"tokens": tokens, "stages": stages, "tokens_first": first}
            yield {"kernel": "gemm", **sizes}
            if -(-layout.n // 128) * -(-m // tokens) <= 132:
                yield {"kernel": "gemm", **sizes, "warpgroups": 1}


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
    tokens_first: bool = False  # neighbouring blocks share activations
    experts: int = 0  # weights of experts, in windows of rows: see `ragged_matmul`
    visits: int = 0

    @property
    def rows(self) -> int:
        """Outputs of a thread block."""
        return 64 * self.warpgroups


@functools.cache
def build(c: Gemm) -> Callable[..., jax.Array]:
    """The kernel `([visits,] x, x_scale [M'], codes[, high], scale) -> y [M, N]`.

    `x` is int8 `[M, K']`, K' a multiple of 256; M' is M rounded up to `tokens`, N a
    multiple of 64, the rows of the packed planes are padded to `rows`.
    """
    grid = (-(-c.n // c.rows), c.visits or -(-c.m // c.tokens))
    out = jnp.dtype(c.out_dtype)
    swizzle = (
        _tiling((8, 128)),
        _swizzle(128),
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
            plgpu.SMEM((c.warpgroups, 64, 64), out, transforms=_out_transforms(c)),
            plgpu.Barrier(num_barriers=c.stages),
            plgpu.Barrier(num_arrivals=c.warpgroups, num_barriers=c.stages),
        ),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
        ),
    )


def _out_transforms(c: Gemm) -> Any:
    return _tiling((8, 128 // jnp.dtype(c.out_dtype).itemsize)), _swizzle(128)


def _body(c: Gemm, *refs: Any) -> None:
    *ins, y, x_smem, y_smem, full, empty = refs
    table = ins.pop(0) if c.visits else None
    x, x_scale, *weights, scale = ins
    grouped = c.groups > 1
    group = lax.axis_index("group")
    first, second = lax.axis_index("a"), lax.axis_index("b")
    n_block, m_block = (first, second) if c.tokens_first else (second, first)
    visit = ragged.Visit(c, table, m_block) if c.visits else None
    first_row = visit.first if visit else m_block * c.tokens
    work = visit.work if visit else True
    steps = 2 * c.k_tiles

    @pl.when(work & (group == c.warpgroups))
    def _copy() -> None:
        if c.warpgroups > 1:  # else all have as many as there can be
            plgpu.set_max_registers(40, action="decrease")

        def step(s: Any, _: None) -> None:
            slot = lax.rem(s, c.stages)

            @pl.when(s >= c.stages)
            def _wait() -> None:
                plgpu.barrier_wait(empty.at[slot])

            plgpu.copy_gmem_to_smem(
                x.at[pl.ds(first_row, c.tokens), pl.ds(s * STAGE, STAGE)],
                x_smem.at[slot],
                full.at[slot],
            )

        lax.fori_loop(0, steps, step, None)

    rows = n_block * c.warpgroups + group  # in blocks of 64 outputs
    if visit:

        @pl.when(visit.clear & (group < c.warpgroups))
        def _clear() -> None:
            visit.zeros(y, rows)

    @pl.when(work & (group < c.warpgroups))
    def _multiply() -> None:
        if c.warpgroups > 1:
            plgpu.set_max_registers(232, action="increase")
        held = rows + (visit.expert * (-(-c.n // 128) * 2) if visit else 0)

        def half(acc: Any, words: Any, t: Any, part: int) -> None:
            s = 2 * t + part
            slot = lax.rem(s, c.stages)
            w = _expand(c, words, part)
            plgpu.barrier_wait(full.at[slot])
            plgpu.wgmma(acc, w, x_smem.at[slot].T)
            # All but this step have read their activations.
            # int8 needs no expansion: its registers are loaded anew while a product
            # is under way, and ptxas would then run all of them one by one.
            late = int(c.format != "int8")
            plgpu.wgmma_wait(late)

            @pl.when(s >= late)
            def _() -> None:
                plgpu.barrier_arrive(empty.at[lax.rem(s - late, c.stages)])

        def ahead(t: Any) -> Any:
            return _fetch(c, weights, held, jnp.minimum(t + 1, c.k_tiles - 1))

        def product(acc: Any) -> Any:
            def tile(t: Any, words: Any) -> Any:
                following = ahead(t)
                for part in range(2):
                    half(acc, words, t, part)
                return following

            lax.fori_loop(0, c.k_tiles, tile, _fetch(c, weights, held, 0))
            plgpu.wgmma_wait(0)
            return acc[...].astype(jnp.float32)

        def grouped_product() -> Any:
            pieces = ((0,), (1,)) if c.group_size == STAGE else ((0, 1),)

            def tile(t: Any, carry: Any) -> Any:
                words, sums = carry
                following = ahead(t)
                for parts in pieces:
                    group = (2 * t + parts[0]) * STAGE // c.group_size
                    # Padding along K has no scale; what it multiplies is 0.
                    group = jnp.minimum(group, c.groups - 1)
                    s_g = _group_scale(c, scale, held, group)

                    def one(acc: Any, parts: Any = parts) -> Any:
                        for part in parts:
                            half(acc, words, t, part)
                        plgpu.wgmma_wait(0)
                        return acc[...].astype(jnp.float32)

                    new = pl.run_scoped(one, plgpu.ACC((64, c.tokens), jnp.int32))
                    sums = sums + new * lax.broadcast_in_dim(s_g, new.shape, [0])
                return following, sums

            zero = plgpu.layout_cast(
                jnp.zeros((64, c.tokens), jnp.float32), plgpu.Layout.WGMMA
            )
            first = _fetch(c, weights, held, 0)
            return lax.fori_loop(0, c.k_tiles, tile, (first, zero))[1]

        if grouped:
            sums = grouped_product()
        else:
            sums = pl.run_scoped(product, plgpu.ACC((64, c.tokens), jnp.int32))
        row = plgpu.Layout.WGMMA.reduce(1)
        column = plgpu.Layout.WGMMA.reduce(0)
        unit = 1 / _FACTOR[c.format]
        if not grouped:
            at = pl.ds(held * 64, 64)
            s_n = plgpu.load(scale.at[at], layout=row, optimized=False) * unit
        for part in range(c.tokens // 64):
            at = pl.ds(first_row + part * 64, 64)
            s_m = plgpu.load(x_scale.at[at], layout=column, optimized=False)
            piece = sums[:, part * 64 : (part + 1) * 64]
            if grouped:
                piece = piece * unit
            else:
                piece = piece * lax.broadcast_in_dim(s_n, piece.shape, [0])
            piece = piece * lax.broadcast_in_dim(s_m, piece.shape, [1])
            piece = piece.astype(y_smem.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            y_smem.at[group].T[...] = plgpu.layout_cast(
                piece, plgpu.Layout.WGMMA_TRANSPOSED
            )
            plgpu.commit_smem()
            if visit:
                visit.write(y_smem.at[group], y, part, rows, _out_transforms(c))
                continue
            plgpu.copy_smem_to_gmem(y_smem.at[group], y.at[at, pl.ds(rows * 64, 64)])
        plgpu.wait_smem_to_gmem(0)


def _layout(words: int) -> Any:
    return plgpu.Layout.WG_STRIDED((128 * words,), vec_size=words)


def _inline(types: Any, results: Any) -> Any:
    return plgpu.inline_mgpu(arg_types=types, return_type=results)


def _fetch(c: Gemm, weights: list[Any], rows: Any, tile: Any) -> Any:
    """The words of this thread for a 64 x 256 tile, straight from global memory."""
    loads = _LOADS[c.format]
    scalar = plgpu.Layout.WG_SPLAT
    types = [
        plgpu.ShapeDtypeStruct((128 * w,), jnp.int32, layout=_layout(w)) for w in loads
    ]

    @_inline(((plgpu.RefType(),) * len(weights), scalar, scalar), types)
    def load(_: Any, refs: Any, rows: Any, tile: Any) -> Any:
        thread = asm.special("tid.x") & 127
        lane = thread & 31
        (r,), (t,) = (v.registers.flat for v in (rows, tile))
        at = (Int(r) * 4 + (thread >> 5)) * c.k_tiles + Int(t)
        codes = asm.pointer(refs[0])
        full = loads.count(4)
        got = []
        for i in range(full):
            base = at * (32 * full) + (lane + 32 * i)
            got.append(asm.load(codes, base, 16, words=4, hint="global.nc"))
        if c.format == "sherry":
            high = asm.pointer(refs[1])
            got.append(asm.load(high, at * 32 + lane, 4, words=1, hint="global.nc"))
        return [_array(words) for words in got]

    return load(tuple(weights), rows, jnp.asarray(tile, jnp.int32))


def _group_scale(c: Gemm, scale: Any, rows: Any, group: Any) -> jax.Array:
    """float32 `[64]`: the scales of one group, from pairs of outputs g and g + 8."""
    scalar = plgpu.Layout.WG_SPLAT
    row = plgpu.Layout.WGMMA.reduce(1)

    @_inline(
        (plgpu.RefType(), scalar, scalar),
        plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=row),
    )
    def load(_: Any, ref: Any, rows: Any, group: Any) -> Any:
        thread = asm.special("tid.x") & 127
        (r,), (g,) = (v.registers.flat for v in (rows, group))
        block = (Int(r) * 4 + (thread >> 5)) * c.groups + Int(g)
        at = block * 8 + ((thread & 31) >> 2)
        words = 2 if c.wide_scales else 1
        pair = asm.load(asm.pointer(ref), at, 4 * words, words=words, hint="global.nc")
        if not c.wide_scales:
            pair = [pair[0] << 16, pair[0] & 0xFFFF0000]
        fragment = row.to_mgpu()
        array = np.empty(2, object)
        array[:] = [asm.vector_of_float(p.as_float()) for p in pair]
        return mgpu.FragmentedArray(
            _registers=array.reshape(fragment.registers_shape((64,))),
            _layout=fragment,
            _is_signed=None,
        )

    return load(scale, rows, jnp.asarray(group, jnp.int32))


def _array(words: list[Int]) -> Any:
    layout = mgpu.WGStridedFragLayout((128 * len(words),), vec_size=len(words))
    vector = asm.vector(words)
    registers = np.empty((1,), object)
    registers[0] = vector
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)


def _expand(c: Gemm, words: Any, half: int) -> jax.Array:
    """int8 `[64, 128]`, half a tile as the left operand."""
    layout = plgpu.Layout.WGMMA_8BIT

    @_inline(
        ([_layout(w) for w in _LOADS[c.format]],),
        plgpu.ShapeDtypeStruct((64, STAGE), jnp.int8, layout=layout),
    )
    def expand(_: Any, arrays: Any) -> Any:
        flat = [w for a in arrays for w in asm.unvector(a.registers.flat[0])]
        fragment = layout.to_mgpu()
        registers = [asm.as_bytes(w) for w in _operand(c.format, flat, half)]
        array = np.empty(len(registers), object)
        array[:] = registers
        return mgpu.FragmentedArray(
            _registers=array.reshape(fragment.registers_shape((64, STAGE))),
            _layout=fragment,
            _is_signed=True,
        )

    return expand(list(words))


def _operand(format: str, words: list[Int], half: int) -> list[Int]:
    """16 words, in the order (16 weights along K, outputs g or g + 8)."""
    if format == "int8":
        return words[16 * half : 16 * half + 16]
    if format == "int4":
        out: list[Int] = []
        for u in range(2):
            packed = words[8 * half + 4 * u : 8 * half + 4 * u + 4]
            out += [(w << 4) & 0xF0F0F0F0 for w in packed]
            out += [w & 0xF0F0F0F0 for w in packed]
        return out
    rows = [signed_bytes(format, words, h + 2 * half) for h in range(2)]
    return [rows[h][j] for j in range(8) for h in range(2)]


def product(
    x: jax.Array,
    x_scale: jax.Array | None,
    planes: Planes,
    layout: WeightLayout,
    *,
    bias: jax.Array | None,
    wide: bool,
    out_dtype: Any,
    k_tiles: int,
    **tiling: Any,
) -> jax.Array:
    """`x [M, K]` times a weight in the order `hopper`, quantizing float `x` first.

    Args:
      x: int8 or float.
      x_scale: of int8 `x`, float32 `[M, 1]`.
      planes: prepared.
      layout: of the planes.
      bias: `[N]`.
      wide: 16-bit activations; both bytes of a token are rows of one product.
      out_dtype: of the result.
      k_tiles: tiles of 256 along K.
      **tiling: fields of `Gemm`.

    Returns:
      `[M, N]`.
    """
    m = x.shape[0]
    if x.dtype != jnp.int8:
        x, x_scale = quantize_activation(x, 2 if wide else 1)
    if x_scale is None:
        x_scale = jnp.ones((m, 1), jnp.float32)
    if wide:
        high = (x.astype(jnp.int32) + 128) >> 8
        low = x.astype(jnp.int32) - (high << 8)
        x = jnp.concatenate([high, low]).astype(jnp.int8)
        x_scale = jnp.concatenate([x_scale * 256, x_scale])
    # Copies go by 8 tokens and whole swizzled rows of outputs.
    x = jnp.pad(x, ((0, -x.shape[0] % 8), (0, 256 * k_tiles - x.shape[1])))
    inner = jnp.dtype(jnp.float32) if wide or bias is not None else out_dtype
    c = Gemm(
        format=layout.format,
        m=x.shape[0],
        n=-(-layout.n // 64) * 64,
        k_tiles=k_tiles,
        groups=layout.groups,
        group_size=layout.group_size,
        out_dtype=inner.name,
        wide_scales=layout.groups > 1 and layout.scale_dtype != "bfloat16",
        **tiling,
    )
    rows = -(-c.m // c.tokens) * c.tokens
    scales = jnp.pad(x_scale.reshape(-1), (0, rows - x_scale.size))
    names = ("codes", "high") if layout.format == "sherry" else ("codes",)
    y = build(c)(x, scales, *(planes[name] for name in names), planes["scale"])
    y = (y[:m] + y[m : 2 * m] if wide else y[:m])[:, : layout.n]
    return (y if bias is None else y + bias.astype(inner)).astype(out_dtype)
