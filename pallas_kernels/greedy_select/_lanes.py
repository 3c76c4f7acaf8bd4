"""Words of PTX that the Hopper kernel adds to `_ptx`: what goes across lanes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, scf

from pallas_kernels._ptx import (
    Float,
    Int,
    barrier,
    highest,
    load,
    lowest,
    offset,
    pointer,
    ptx,
    select,
    special,
    store,
    when,
)


def larger(a: Float, b: Float) -> Float:
    """The maximum of two numbers."""
    return ptx("max.f32 $0, $1, $2;", a, b, out=(Float,), pure=True)


def times(a: Float, b: Float | float) -> Float:
    """A product that no sum is fused with."""
    return ptx("mul.rn.f32 $0, $1, $2;", a, Float.of(b), out=(Float,), pure=True)


def minus(a: Float, b: Float) -> Float:
    """A difference that no product is fused with."""
    return ptx("sub.rn.f32 $0, $1, $2;", a, b, out=(Float,), pure=True)


def exceeds(a: Float, b: Float) -> Any:
    """Predicate: greater-than."""
    return arith.cmpf(arith.CmpFPredicate.OGT, a.value, b.value)


def store_pair(base: Any, index: Int, a: Int, b: Int) -> None:
    """Two words to shared memory; `index` counts pairs."""
    ptx("st.shared.v2.u32 [$0], {$1, $2};", offset(base, index, 8), a, b)


def start_copy(base: Any, index: Int, source: Any) -> None:
    """One word from global to shared memory, through the caches; nobody waits."""
    ptx("cp.async.ca.shared.global [$0], [$1], 4;", offset(base, index, 4), source)


def wait_for_copies() -> None:
    """All that this thread started."""
    ptx("cp.async.wait_all;")


def prefetch(source: Any) -> None:
    """Asks for what is at an address of global memory in the L1 cache."""
    ptx("prefetch.global.L1 [$0];", source)


def span(
    start: Int | int,
    stop: Int,
    body: Callable[..., Sequence[Any]],
    carry: Sequence[Any],
) -> list[Any]:
    """`for i in range(start, stop): carry = body(i, *carry)`, never in line."""
    kinds = [type(v) for v in carry]
    first, one = Int.of(start).value, Int.of(1).value
    make: Any = scf.ForOp
    op = make(first, stop.value, one, [v.value for v in carry])
    with ir.InsertionPoint(op.body):
        inner = [k(v) for k, v in zip(kinds, op.inner_iter_args, strict=True)]
        new = body(Int(op.induction_variable), *inner)
        scf.yield_([v.value for v in new])
    return [k(v) for k, v in zip(kinds, op.results, strict=True)]


__all__ = [
    "Float",
    "Int",
    "barrier",
    "exceeds",
    "highest",
    "larger",
    "load",
    "lowest",
    "minus",
    "offset",
    "pointer",
    "prefetch",
    "select",
    "span",
    "special",
    "start_copy",
    "store",
    "store_pair",
    "times",
    "wait_for_copies",
    "when",
]
