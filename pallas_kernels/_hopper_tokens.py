"""What the kernels for a few tokens do with them: read, quantize, scale, write.

Activations become integers of 8 or 16 bits inside the kernel while the first weights
are on their way. What comes before the product in a decoder can be done on the way:
a root-mean-square norm, whose factor leaves the integers as they are and goes into the
scale of the token, or a gate. What comes after it, too: bias and residual.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _ptx as asm
from pallas_kernels._ptx import Float, Int

# Adding 1.5 * 2^23 rounds to nearest even and leaves the integer in the low bits.
ROUND = 12582912.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """What is static about the tokens of a kernel.

    Attributes:
      m, n: tokens and outputs.
      valid_k: activations of a token as they lie in memory.
      x_dtype, out_dtype: of activations and outputs.
      bias, residual: whether they are added.
      prologue: "norm" multiplies by a weight and the inverse root mean square; "silu"
        multiplies silu of the first half of a row of 2 K by the second; "": neither.
      eps: of the norm.
      warps: of a thread block.
    """

    m: int
    n: int
    valid_k: int
    x_dtype: str
    out_dtype: str
    bias: bool
    residual: bool = False
    prologue: str = ""
    eps: float = 0.0
    warps: int = 8

    @property
    def warps_per_token(self) -> int:
        """Warps that quantize one token together."""
        return max(1, self.warps // self.m)

    @property
    def stride(self) -> int:
        """Items from one row of activations to the next."""
        return self.valid_k * (2 if self.prologue == "silu" else 1)

    @property
    def stat_words(self) -> int:
        """Shared memory for sums, maxima and squares of tokens, in words."""
        return (3 if self.prologue == "norm" else 2) * self.m * self.warps


def launch(c: Any, emit: Callable[..., None], inputs: int) -> Callable[..., jax.Array]:
    """The kernel `(*inputs) -> y [M, N]` that `emit(c, context, *refs)` writes.

    `c` is a `Tokens` with `row_blocks`, `rows_per_block` and `smem_words`; a thread
    block takes `rows_per_block` of the row blocks.
    """

    def body(*refs: Any) -> None:
        types = (plgpu.RefType(),) * (inputs + 2)  # the output and shared memory
        plgpu.inline_mgpu(arg_types=types)(functools.partial(emit, c))(*refs)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((c.m, c.n), jnp.dtype(c.out_dtype)),
        grid=(-(-c.row_blocks // c.rows_per_block),),
        grid_names=("rows",),
        num_threads=c.warps // 4,
        thread_name="group",
        scratch_types=(plgpu.SMEM((c.smem_words,), jnp.int32),),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )


def around(
    valid_k: int, norm: Any, eps: float, gate: str | None, residual: Any
) -> dict[str, Any]:
    """Fields of `Tokens` for what stands around a product."""
    return {
        "valid_k": valid_k,
        "prologue": "norm" if norm is not None else gate or "",
        "eps": eps if norm is not None else 0.0,
        "residual": residual is not None,
    }


def extra_arguments(
    x: jax.Array, norm: Any, bias: Any, residual: Any, out_dtype: Any
) -> list[jax.Array]:
    """The last arguments of a kernel."""
    out = [] if norm is None else [norm.astype(x.dtype)]
    if bias is not None:
        out.append(bias.astype(jnp.float32))
    if residual is not None:
        out.append(residual.astype(out_dtype))
    return out


def clamp(i: Int, count: int) -> Int:
    """What is past the end reads the last one again; its activations are 0."""
    return asm.select(i.less(count), i, Int.of(count - 1))


def among(rows: tuple[Int, Int] | None, token: Int, inside: Any) -> Any:
    """`inside`, for the tokens of `rows` only."""
    if rows is None:
        return inside
    return asm.both(inside, asm.both((rows[0] - 1).less(token), token.less(rows[1])))


def operands(c: Tokens, x: Any, norm: Any) -> list[tuple[Any, Int | int, bool]]:
    """Arrays that activations are made of: pointer, first item, rows or one row."""
    if c.prologue == "norm":
        return [(x, 0, True), (norm, 0, False)]
    if c.prologue == "silu":
        return [(x, 0, True), (x, c.valid_k, True)]
    return [(x, 0, True)]


def quantize(
    c: Tokens,
    smem: Any,
    stats: int,
    thread: Int,
    *,
    items: int,
    words: int,
    at_once: int,
    top: float,
    read: Callable[[Int, Int], list[Int]],
    cut: Callable[[Int, Int, list[Int], Float], Int],
    count: bool,
) -> None:
    """Brings all tokens into shared memory; ends with a barrier.

    Args:
      c: the tokens.
      smem: shared memory.
      stats: where statistics lie in it, in words.
      thread: of the block.
      items: pieces of a token, padding included.
      words: of a piece in registers.
      at_once: words that a thread reads before it uses the first.
      top: integer of the largest activation.
      read: `(token, item) -> words`.
      cut: `(token, item, words, inverse scale) -> sum of its integers`; writes them.
      count: whether sums are kept.
    """
    lane, warp = thread & 31, thread >> 5
    team = 32 * c.warps_per_token
    together = c.warps // c.warps_per_token
    rounds = -(-c.m // together)
    rows = [clamp(warp // c.warps_per_token + r * together, c.m) for r in range(rounds)]
    member = warp % c.warps_per_token
    first = member * 32 + lane
    steps = -(-items // team)
    chunk = min(steps, max(1, at_once // words))

    def fetch(token: Int, i: Int) -> list[Int]:
        return read(token, clamp(i * team + first, items))

    # Few enough to stay in registers: one trip to memory for all of them.
    held: list[list[list[Int]]] = []
    if rounds * steps <= chunk:
        held = [[fetch(t, Int.of(i)) for i in range(steps)] for t in rows]

    def over(r: int, body: Any, carry: list[Any]) -> list[Any]:
        """`carry = body(i, words, *carry)` for each piece of token r."""
        if held:
            for i, got in enumerate(held[r]):
                carry = body(Int.of(i), got, *carry)
            return carry

        def some(n: Int, *carry: Any) -> list[Any]:
            indices = [n * chunk + i for i in range(chunk)]
            values = list(carry)
            for i, got in [(i, fetch(rows[r], i)) for i in indices]:
                values = body(i, got, *values)
            return values

        return asm.loop(-(-steps // chunk), some, carry, unroll=1)

    def keep(token: Int, part: int, value: Any, kind: str) -> None:
        at = token * c.warps + member + (stats + part * c.m * c.warps)
        asm.store(smem, at, 4, value, f"shared.{kind}")

    inverse = [Float.of(1.0)] * len(rows)
    if c.x_dtype != "int8":

        def look(i: Int, got: list[Int], seen: Int, *squares: Float) -> list[Any]:
            for v in activations(c, got):
                seen = larger(seen, v.as_int() & 0x7FFFFFFF)
            if not squares:
                return [seen]
            (square,) = squares
            inside = (i * team + first).less(items)
            factor = asm.select(inside, Float.of(1.0), Float.of(0.0))
            for v in floats_of(c, got[: len(got) // 2]):
                square = square + v * v * factor
            return [seen, square]

        for r, token in enumerate(rows):
            start: list[Any] = [Int.of(0)]
            if c.prologue == "norm":
                start.append(Float.of(0.0))
            seen, *squares = over(r, look, start)
            keep(token, 1, across("max", seen), "u32")
            for square in squares:
                for distance in (16, 8, 4, 2, 1):
                    square = square + asm.shuffle_xor(square, distance)
                keep(token, 2, square, "f32")
        asm.barrier()
        inverse = [_inverse(c, smem, stats, token, top) for token in rows]

    for r, token in enumerate(rows):

        def body(
            i: Int, got: list[Int], *total: Int, token: Int = token, r: int = r
        ) -> list[Int]:
            at = i * team + first
            new = cut(token, clamp(at, items), got, inverse[r])
            if not total:
                return []
            return [total[0] + asm.select(at.less(items), new, Int.of(0))]

        total = over(r, body, [Int.of(0)] if count else [])
        if count:
            keep(token, 0, across("add", total[0]), "u32")
    asm.barrier()


def activations(c: Tokens, words: list[Int]) -> list[Float]:
    """Float activations of a piece, but for the factor of a norm."""
    if not c.prologue:
        return floats_of(c, words)
    a, b = (
        floats_of(c, w) for w in (words[: len(words) // 2], words[len(words) // 2 :])
    )
    if c.prologue == "silu":
        a = [_silu(v) for v in a]
    return [p * q for p, q in zip(a, b, strict=True)]


def _silu(v: Float) -> Float:
    return asm.ptx(
        "{ .reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.f32 e, e; "
        "add.f32 e, e, 0f3F800000; rcp.approx.f32 e, e; mul.f32 $0, $1, e; }",
        v,
        out=(Float,),
        pure=True,
    )


def floats_of(c: Tokens, words: list[Int]) -> list[Float]:
    """Words as they lie in memory to float32."""
    if c.x_dtype == "float32":
        return [w.as_float() for w in words]
    out: list[Float] = []
    for w in words:
        if c.x_dtype == "bfloat16":
            out += [(w << 16).as_float(), (w & 0xFFFF0000).as_float()]
        else:
            out += _halves(w)
    return out


def _halves(w: Int) -> list[Float]:
    code = "{{ .reg .b16 l, h; mov.b32 {{l, h}}, $1; cvt.f32.f16 $0, {part}; }}"
    return [
        asm.ptx(code.format(part=part), w, out=(Float,), pure=True) for part in "lh"
    ]


def _inverse(c: Tokens, smem: Any, stats: int, token: Int, top: float) -> Float:
    """`top / amax` of a token, from the maxima in shared memory."""
    amax = _amax(c, smem, stats, token)
    safe = asm.select(amax.equals(0), Float.of(1.0), amax.as_float())
    return Float.of(top) / safe


def _amax(c: Tokens, smem: Any, stats: int, token: Int) -> Int:
    """Bits of the largest |x| of a token: non-negative floats order as integers."""
    at = token * c.warps + (stats + c.m * c.warps)
    top = Int.of(0)
    for w in range(c.warps_per_token):
        top = larger(top, asm.load(smem, at + w, 4, words=1, hint="shared")[0])
    return top


def count_of(c: Tokens, smem: Any, stats: int, token: Int) -> Int:
    """Sum of the integers of a token."""
    total = Int.of(0)
    for w in range(c.warps_per_token):
        at = token * c.warps + (stats + w)
        total = total + asm.load(smem, at, 4, words=1, hint="shared")[0]
    return total


def token_scale(
    c: Tokens, smem: Any, stats: int, x_scale: Any, token: Int, top: float
) -> Float:
    """What an integer activation of a token stands for."""
    if c.x_dtype == "int8":
        return asm.load(x_scale, token, 4, words=1, hint="global")[0].as_float()
    scale = _amax(c, smem, stats, token).as_float() * (1 / top)
    if c.prologue != "norm":
        return scale
    at = token * c.warps + (stats + 2 * c.m * c.warps)
    total = Float.of(0.0)
    for w in range(c.warps_per_token):
        (bits,) = asm.load(smem, at + w, 4, words=1, hint="shared")
        total = total + bits.as_float()
    mean = total * (1 / c.valid_k) + c.eps
    root = asm.ptx("rsqrt.approx.f32 $0, $1;", mean, out=(Float,), pure=True)
    return scale * root


def write_output(
    c: Tokens, y: Any, bias: Any, residual: Any, token: Int, column: Int, value: Float
) -> None:
    """One output of a token, with what is added to it."""
    if c.bias:
        (b,) = asm.load(bias, column, 4, words=1, hint="global.nc")
        value = value + b.as_float()
    at = token * c.n + column
    if c.out_dtype == "float32":
        if c.residual:
            (r,) = asm.load(residual, at, 4, words=1, hint="global")
            value = value + r.as_float()
        asm.store(y, at, 4, value, "global.f32")
        return
    kind = {"bfloat16": "bf16", "float16": "f16"}[c.out_dtype]
    if c.residual:
        # The product is rounded before the sum, as it is apart.
        code = (
            f"{{ .reg .b16 h; .reg .f32 p; cvt.rn.{kind}.f32 h, $1; "
            f"cvt.f32.{kind} p, h; ld.global.b16 h, [$2]; cvt.f32.{kind} $0, h; "
            "add.f32 $0, $0, p; }"
        )
        value = asm.ptx(code, value, asm.offset(residual, at, 2), out=(Float,))
    asm.ptx(
        f"{{ .reg .b16 h; cvt.rn.{kind}.f32 h, $1; st.global.b16 [$0], h; }}",
        asm.offset(y, at, 2),
        value,
    )


def permute(a: Int, b: Int, selector: int) -> Int:
    """Four of the eight bytes of two words."""
    return asm.ptx(
        f"prmt.b32 $0, $1, $2, 0x{selector:04x};", a, b, out=(Int,), pure=True
    )


def gather_bytes(four: list[Int], byte: int) -> Int:
    """One byte of each of four words."""
    pick = 0x0040 + 0x0011 * byte
    low, high = permute(four[0], four[1], pick), permute(four[2], four[3], pick)
    return permute(low, high, 0x5410)


def dot4(w: Int, total: Int, signed: bool) -> Int:
    """`total` plus the four bytes of a word."""
    kind = "s32.s32" if signed else "u32.u32"
    return asm.ptx(
        f"dp4a.{kind} $0, $1, 0x01010101, $2;", w, total, out=(Int,), pure=True
    )


def across(op: str, value: Int) -> Int:
    """Maximum or sum over the lanes of a warp."""
    return asm.ptx(
        f"redux.sync.{op}.s32 $0, $1, 0xffffffff;", value, out=(Int,), convergent=True
    )


def larger(a: Int, b: Int) -> Int:
    """The larger of two signed integers."""
    return asm.select(a.less(b), b, a)
