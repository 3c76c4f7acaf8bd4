"""What `_hopper_gemm` needs to take windows of rows of experts, see `ragged_matmul`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ptx as asm
from pallas_kernels._ptx import Int

ALIGN = 8  # rows of a swizzled tile: copies start at multiples of it


class Visit:
    """The window of rows of one thread block, from the table of `visits`."""

    def __init__(self, c: Any, table: Any, index: Any) -> None:
        self.c = c
        self.expert, self.first, self.lo, self.hi = (table[index, i] for i in range(4))
        self.some = self.lo < self.hi
        self.work = self.some & (self.expert < c.experts)
        self.clear = self.some & (self.expert == c.experts)

    def write(self, y_smem: Any, y: Any, part: int, rows: Any, swizzle: Any) -> None:
        """64 tokens x 64 outputs from shared memory, those rows that are meant."""
        start = part * 64
        inside = (self.lo <= start) & (self.hi >= start + 64)
        at = pl.ds(pl.multiple_of(self.first + start, ALIGN), 64)

        @pl.when(inside)
        def _whole() -> None:
            plgpu.copy_smem_to_gmem(y_smem, y.at[at, pl.ds(rows * 64, 64)])

        @pl.when(jnp.logical_not(inside))
        def _some() -> None:
            _store(
                self.c, y, rows, self.first + start, self._rows(part), y_smem, swizzle
            )

    def zeros(self, y: Any, rows: Any) -> None:
        """Zeros for 64 outputs of rows that have no expert."""
        for part in range(self.c.tokens // 64):
            _store(self.c, y, rows, self.first + part * 64, self._rows(part))

    def _rows(self, part: int) -> tuple[Any, Any]:
        return self.lo - part * 64, self.hi - part * 64


def _store(
    c: Any,
    y: Any,
    rows: Any,
    first: Any,
    span: tuple[Any, Any],
    y_smem: Any = None,
    swizzle: Any = (),
) -> None:
    """16 bytes of a thread at a time; without `y_smem` they are 0."""
    scalar = plgpu.Layout.WG_SPLAT
    item = jnp.dtype(c.out_dtype).itemsize
    chunks = 4 * item  # of 16 bytes in a row of 64 outputs
    smem_type = () if y_smem is None else (plgpu.RefType(swizzle),)

    @plgpu.inline_mgpu(arg_types=((plgpu.RefType(), *smem_type), (scalar,) * 4))
    def store(_: Any, refs: Any, scalars: Any) -> None:
        row, start, lo, hi = (Int(s.registers.flat[0]) for s in scalars)
        thread = asm.special("tid.x") & 127
        out = asm.offset(asm.pointer(refs[0]), start, c.n * item)
        with asm.when((row * 64).less(c.n)):
            for step in range(chunks // 2):
                i = thread + 128 * step
                token, chunk = i // chunks, i % chunks
                words = [Int.of(0)] * 4
                if y_smem is not None:
                    words = _chunk(asm.pointer(refs[1]), token, chunk, item)
                inside = asm.both((lo - 1).less(token), token.less(hi))
                at = token * (c.n // 4 * item) + row * (16 * item) + chunk * 4
                with asm.when(inside):
                    asm.ptx(
                        "st.global.v4.u32 [$0], {$1, $2, $3, $4};",
                        asm.offset(out, at, 4),
                        *words,
                    )

    scalars = (rows, first, *span)
    refs = (y,) if y_smem is None else (y, y_smem)
    store(refs, tuple(jnp.asarray(s, jnp.int32) for s in scalars))


def _chunk(smem: Any, token: Int, chunk: Int, item: int) -> list[Int]:
    """16 bytes of a row in tiles of 8 rows x 128 bytes, swizzled."""
    tile = (token >> 3) * (item // 2) + (chunk >> 3)
    place = (chunk & 7) ^ (token & 7)
    at = tile * 64 + (token & 7) * 8 + place
    return asm.load(smem, at, 16, words=4, hint="shared")


__all__ = ["ALIGN", "Visit"]
