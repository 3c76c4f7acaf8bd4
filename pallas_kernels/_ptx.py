"""A few words of PTX for Mosaic kernels that do their own register work.

The functions run while a kernel is traced, inside `plgpu.inline_mgpu`, and emit MLIR.
`Int` and `Float` wrap 32-bit values so that kernels read as arithmetic.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, scf
from jax._src.lib.mlir.dialects import vector as mlir_vector
from jax.experimental.mosaic.gpu import utils


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _f32() -> Any:
    return ir.F32Type.get()


def _constant(value: Any) -> Any:
    make: Any = arith.constant  # its annotations know one of its two forms
    return make(value.type, value)


class Int:
    """A 32-bit integer register."""

    def __init__(self, value: Any) -> None:
        self.value = value

    @staticmethod
    def of(x: Int | int) -> Int:
        """A constant, or the register itself."""
        if isinstance(x, Int):
            return x
        signed = struct.unpack("<i", struct.pack("<I", x & 0xFFFFFFFF))[0]
        return Int(_constant(ir.IntegerAttr.get(_i32(), signed)))

    def _do(self, op: Callable[..., Any], other: Int | int) -> Int:
        return Int(op(self.value, Int.of(other).value))

    def __add__(self, o: Int | int) -> Int:
        return self._do(arith.addi, o)

    def __sub__(self, o: Int | int) -> Int:
        return self._do(arith.subi, o)

    def __mul__(self, o: Int | int) -> Int:
        return self._do(arith.muli, o)

    def __and__(self, o: Int | int) -> Int:
        return self._do(arith.andi, o)

    def __or__(self, o: Int | int) -> Int:
        return self._do(arith.ori, o)

    def __xor__(self, o: Int | int) -> Int:
        return self._do(arith.xori, o)

    def __lshift__(self, o: Int | int) -> Int:
        return self._do(arith.shli, o)

    def __rshift__(self, o: Int | int) -> Int:
        """Logical shift."""
        return self._do(arith.shrui, o)

    def divided(self, bits: int) -> Int:
        """Arithmetic shift right."""
        return self._do(arith.shrsi, bits) if bits else self

    def __invert__(self) -> Int:
        return self ^ 0xFFFFFFFF

    def __floordiv__(self, o: int) -> Int:
        return self._do(arith.divui, o)

    def __mod__(self, o: int) -> Int:
        return self._do(arith.remui, o)

    def less(self, o: Int | int) -> Any:
        """Predicate: signed less-than."""
        return arith.cmpi(arith.CmpIPredicate.slt, self.value, Int.of(o).value)

    def equals(self, o: Int | int) -> Any:
        """Predicate: equality."""
        return arith.cmpi(arith.CmpIPredicate.eq, self.value, Int.of(o).value)

    def to_float(self) -> Float:
        """Signed conversion."""
        return Float(arith.sitofp(_f32(), self.value))

    def as_float(self) -> Float:
        """The same bits."""
        return Float(arith.bitcast(_f32(), self.value))


class Float:
    """A float32 register."""

    def __init__(self, value: Any) -> None:
        self.value = value

    @staticmethod
    def of(x: Float | float) -> Float:
        """A constant, or the register itself."""
        if isinstance(x, Float):
            return x
        return Float(_constant(ir.FloatAttr.get(_f32(), float(x))))

    def __add__(self, o: Float | float) -> Float:
        return Float(arith.addf(self.value, Float.of(o).value))

    def __sub__(self, o: Float | float) -> Float:
        return Float(arith.subf(self.value, Float.of(o).value))

    def __mul__(self, o: Float | float) -> Float:
        return Float(arith.mulf(self.value, Float.of(o).value))

    def __truediv__(self, o: Float | float) -> Float:
        return Float(arith.divf(self.value, Float.of(o).value))

    def as_int(self) -> Int:
        """The same bits."""
        return Int(arith.bitcast(_i32(), self.value))


def select(predicate: Any, a: Any, b: Any) -> Any:
    """`a if predicate else b` without a branch; both of one type."""
    return type(a)(arith.select(predicate, a.value, b.value))


def select_pointer(predicate: Any, a: Any, b: Any) -> Any:
    """`select` for two addresses of one kind of memory."""
    return arith.select(predicate, a, b)


def ptx(
    code: str,
    *args: Any,
    out: Sequence[type] = (),
    pure: bool = False,
    convergent: bool = False,
) -> Any:
    """One PTX statement; `out` lists `Int` or `Float` for its results."""
    types: Any = [_f32() if t is Float else _i32() for t in out]
    raw = [a.value if isinstance(a, Int | Float) else a for a in args]
    emit: Any = utils.inline_ptx
    got = emit(
        code,
        *raw,
        result_types=types or None,
        has_side_effects=not pure,
        convergent=convergent,
    )
    if not types:
        return None
    values = [t(v) for t, v in zip(out, got, strict=True)]
    return values[0] if len(values) == 1 else values


def special(name: str) -> Int:
    """A special register such as `tid.x`."""
    return ptx(f"mov.u32 $0, %{name};", out=(Int,), pure=True)


def exp2(x: Float) -> Float:
    """2 to the power of x, within 2 ulp; subnormal numbers are 0."""
    return ptx("ex2.approx.ftz.f32 $0, $1;", x, out=(Float,), pure=True)


def log2(x: Float) -> Float:
    """The logarithm to base 2, to about 2^-22; subnormal numbers count as 0."""
    return ptx("lg2.approx.ftz.f32 $0, $1;", x, out=(Float,), pure=True)


def rsqrt(x: Float) -> Float:
    """1 / sqrt(x), to about 2^-22."""
    return ptx("rsqrt.approx.f32 $0, $1;", x, out=(Float,), pure=True)


def maximum(a: Float, b: Float) -> Float:
    """The larger number; a NaN loses."""
    return ptx("max.f32 $0, $1, $2;", a, b, out=(Float,), pure=True)


def pack_bf16(low: Float, high: Float) -> Int:
    """Two numbers as bfloat16, rounded to nearest even, in one word."""
    # The instruction names the high half first.
    return ptx("cvt.rn.bf16x2.f32 $0, $1, $2;", high, low, out=(Int,), pure=True)


def unpack_bf16(word: Int) -> list[Float]:
    """The low and the high bfloat16 of a word."""
    return [(word << 16).as_float(), (word & 0xFFFF0000).as_float()]


def mma_bf16(acc: Sequence[Float], a: Sequence[Int], b: Sequence[Int]) -> list[Float]:
    """`acc [16, 8] + a [16, 16] @ b [16, 8]` of bfloat16 by the lanes of a warp.

    With `g = lane >> 2` and `t = lane & 3` a lane holds, in this order and the lower
    index of a pair in the low half of its word:

      acc: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1);
      a: rows g, g+8, g, g+8 at the pairs k = 2t, 2t, 2t+8, 2t+8;
      b: column g at the pairs k = 2t, 2t+8.
    """
    return ptx(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, "
        "{$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        *a,
        *b,
        *acc,
        out=(Float,) * 4,
        pure=True,
        convergent=True,
    )


def vector(words: Sequence[Int]) -> Any:
    """A raw MLIR vector of 32-bit words."""
    return utils.vector_concat(
        [utils.bitcast(w.value, ir.VectorType.get((1,), _i32())) for w in words]
    )


def vector_of_float(x: Float) -> Any:
    """A raw MLIR vector of one float."""
    return mlir_vector.broadcast(ir.VectorType.get((1,), _f32()), x.value)


def unvector(value: Any) -> list[Int]:
    """The words of a raw MLIR vector."""
    count = ir.VectorType(value.type).shape[0]
    return [
        Int(mlir_vector.extract(value, dynamic_position=[], static_position=[i]))
        for i in range(count)
    ]


def as_bytes(word: Int) -> Any:
    """A word as a raw MLIR vector of four bytes."""
    i8 = ir.IntegerType.get_signless(8)
    return utils.bitcast(word.value, ir.VectorType.get((4,), i8))


def floats_of(value: Any) -> list[Float]:
    """The items of a raw MLIR vector of float32."""
    count = ir.VectorType(value.type).shape[0]
    return [
        Float(mlir_vector.extract(value, dynamic_position=[], static_position=[i]))
        for i in range(count)
    ]


def pair(a: Float, b: Float) -> Any:
    """A raw MLIR vector of two float32."""
    kind = ir.VectorType.get((2,), _f32())
    return mlir_vector.from_elements(kind, [a.value, b.value])


def word(value: Any) -> Int:
    """A raw MLIR vector of 32 bits as a word."""
    return Int(utils.bitcast(value, _i32()))


def as_float8(word: Int) -> Any:
    """A word as a raw MLIR vector of four e4m3."""
    kind = ir.Float8E4M3FNType.get()
    return utils.bitcast(word.value, ir.VectorType.get((4,), kind))


def barrier() -> None:
    """All threads of the block."""
    utils.inline_ptx("bar.sync 0;", convergent=True)


def pointer(ref: Any) -> Any:
    """Start of a memref; a pointer comes back as it is."""
    if isinstance(ref.type, ir.MemRefType):
        return utils.memref_ptr(ref)
    return ref


def offset(base: Any, index: Int, item_bytes: int) -> Any:
    """`base + index * item_bytes`; 64-bit arithmetic in global memory."""
    i8 = ir.IntegerType.get_signless(8)
    wide = arith.extui(ir.IntegerType.get_signless(64), index.value)
    size = _constant(ir.IntegerAttr.get(wide.type, item_bytes))
    return utils.getelementptr(base, [arith.muli(wide, size)], i8)


def load(base: Any, index: Int, item_bytes: int, *, words: int, hint: str) -> list[Int]:
    """`words` consecutive 32-bit words; `hint` such as `global.nc` or `shared`."""
    vector = "" if words == 1 else f".v{words}"
    names = ", ".join(f"${i}" for i in range(words))
    target = names if words == 1 else "{" + names + "}"
    got = ptx(
        f"ld.{hint}{vector}.u32 {target}, [${words}];",
        offset(base, index, item_bytes),
        out=(Int,) * words,
    )
    return [got] if words == 1 else got


def load_byte(base: Any, index: Int, hint: str) -> Int:
    """An unsigned byte; `hint` as for `load`."""
    return ptx(f"ld.{hint}.u8 $0, [$1];", offset(base, index, 1), out=(Int,))


def store(base: Any, index: Int, item_bytes: int, value: Any, kind: str) -> None:
    """One item of the PTX type `kind`, e.g. `shared.u32`, `global.f32`."""
    ptx(f"st.{kind} [$0], $1;", offset(base, index, item_bytes), value)


def store_words(base: Any, index: Int, words: Sequence[Int]) -> None:
    """Four words in one store to shared memory; `index` counts words."""
    ptx("st.shared.v4.u32 [$0], {$1, $2, $3, $4};", offset(base, index, 4), *words)


def store_words_global(
    base: Any, index: Int, item_bytes: int, words: Sequence[Int]
) -> None:
    """Four words in one store to global memory."""
    address = offset(base, index, item_bytes)
    ptx("st.global.v4.u32 [$0], {$1, $2, $3, $4};", address, *words)


def loop(
    count: int,
    body: Callable[..., Sequence[Any]],
    carry: Sequence[Any] = (),
    unroll: int = 4,
) -> list[Any]:
    """`for i in range(count): carry = body(i, *carry)`, in line if short."""
    values = list(carry)
    if count <= unroll:
        for i in range(count):
            values = list(body(Int.of(i), *values))
        return values
    kinds = [type(v) for v in values]
    zero, one, bound = (Int.of(i).value for i in (0, 1, count))
    make: Any = scf.ForOp
    op = make(zero, bound, one, [v.value for v in values])
    with ir.InsertionPoint(op.body):
        inner = [k(v) for k, v in zip(kinds, op.inner_iter_args, strict=True)]
        new = body(Int(op.induction_variable), *inner)
        scf.yield_([v.value for v in new])
    return [k(v) for k, v in zip(kinds, op.results, strict=True)]


def loop_tree(
    count: int, body: Callable[[Int, Any], Any], carry: Any, unroll: int = 1
) -> Any:
    """`loop` over a tree of lists: `for i in range(count): carry = body(i, carry)`."""
    flat, tree = jax.tree.flatten(carry)

    def step(i: Int, *values: Any) -> list[Any]:
        return jax.tree.leaves(body(i, jax.tree.unflatten(tree, values)))

    return jax.tree.unflatten(tree, loop(count, step, flat, unroll))


def both(a: Any, b: Any) -> Any:
    """Both predicates."""
    return arith.andi(a, b)


def either(a: Any, b: Any) -> Any:
    """At least one of two predicates."""
    return arith.ori(a, b)


def when(predicate: Any) -> Any:
    """`with when(p):` runs the block in the threads where `p` holds."""
    return utils.when(predicate)


def choose(
    predicate: Any, then: Callable[[], list[Any]], otherwise: Callable[[], list[Any]]
) -> list[Any]:
    """`then() if predicate else otherwise()` by a branch; `Int` or `Float` each."""
    # What the branches give is known once they are written, so they move house.
    make: Any = scf.IfOp  # its annotations are of another form
    draft = make(predicate, has_else=True)
    results = []
    for block, branch in ((draft.then_block, then), (draft.else_block, otherwise)):
        with ir.InsertionPoint(block):
            results.append(branch())
            scf.yield_([v.value for v in results[-1]])
    kinds = [type(v) for v in results[0]]
    if kinds != [type(v) for v in results[1]]:
        raise TypeError("the branches of choose must return the same types")
    op: Any = ir.Operation.create(
        "scf.if",
        results=[v.value.type for v in results[0]],
        operands=[predicate],
        regions=2,
    )
    draft.then_block.append_to(op.regions[0])
    draft.else_block.append_to(op.regions[1])
    draft.operation.erase()
    return [k(v) for k, v in zip(kinds, op.results, strict=True)]


def shuffle_xor(x: Any, distance: int) -> Any:
    """The value of the lane whose number differs by `distance` (a power of two)."""
    kind = type(x)
    return ptx(
        f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;",
        x,
        out=(kind,),
        convergent=True,
    )


def highest(x: Int) -> Int:
    """The signed maximum over the lanes of a warp, in all of them."""
    return _over_lanes("max", x)


def lowest(x: Int) -> Int:
    """The signed minimum over the lanes of a warp, in all of them."""
    return _over_lanes("min", x)


def _over_lanes(kind: str, x: Int) -> Int:
    code = f"redux.sync.{kind}.s32 $0, $1, 0xffffffff;"
    return ptx(code, x, out=(Int,), convergent=True)


__all__ = [
    "Float",
    "Int",
    "as_bytes",
    "as_float8",
    "barrier",
    "both",
    "choose",
    "either",
    "exp2",
    "floats_of",
    "highest",
    "load",
    "load_byte",
    "log2",
    "loop",
    "loop_tree",
    "lowest",
    "maximum",
    "mma_bf16",
    "offset",
    "pack_bf16",
    "pair",
    "pointer",
    "ptx",
    "rsqrt",
    "select",
    "select_pointer",
    "shuffle_xor",
    "special",
    "store",
    "store_words",
    "store_words_global",
    "unpack_bf16",
    "unvector",
    "vector",
    "vector_of_float",
    "when",
    "word",
]
