"""The emulator of thread blocks, and the words of `_ptx` for an H100."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import _ptx
from tests.kernels._h100 import check_no_spills, has_plugin
from tests.kernels._simt import Float, Int, Machine, run
from tests.kernels._simt_memory import GARBAGE, Memory

BF16 = ml_dtypes.bfloat16


def call(f: Any, *arrays: Any, threads: int = 64, grid: Any = 1, words: int = 64):
    run(
        lambda asm, case, *pointers: f(asm, *pointers),
        None,
        grid=grid,
        threads=threads,
        smem_words=words,
        arrays=arrays,
    )


def test_it_has_the_words_of_the_device() -> None:
    raw = {"as_bytes", "as_float8", "floats_of", "pair", "ptx", "unvector", "vector"}
    raw |= {"vector_of_float", "word"}  # MLIR, not registers
    assert [n for n in _ptx.__all__ if n not in raw and not hasattr(Machine, n)] == []


def test_integers_wrap_like_registers() -> None:
    a, b = Int([7, 0xFFFFFFFF, 0x80000000]), Int([3, 2, 5])
    u = [int(x) for x in a.value]
    assert (a + b).value.tolist() == [10, 1, 0x80000005]
    assert (a - b).value.tolist() == [4, 0xFFFFFFFD, 0x7FFFFFFB]
    assert (a * b).value.tolist() == [21, 0xFFFFFFFE, 0x80000000]
    assert (a >> 4).value.tolist() == [x >> 4 for x in u]
    assert (a << 1).value.tolist() == [x << 1 & 0xFFFFFFFF for x in u]
    assert a.divided(4).signed.tolist() == [0, -1, -(2**27)]
    assert (a // 3).value.tolist() == [x // 3 for x in u]
    assert (a % 3).value.tolist() == [x % 3 for x in u]
    assert (~a).value.tolist() == [x ^ 0xFFFFFFFF for x in u]
    assert ((a & b) | (a ^ b)).value.tolist() == (a | b).value.tolist()
    assert a.less(0).tolist() == [False, True, True]
    assert a.equals(-1).tolist() == [False, True, False]
    assert a.to_float().value.tolist() == [7.0, -1.0, -(2.0**31)]
    assert Float(1.0).as_int().value == 0x3F800000
    assert Int(0x3F800000).as_float().value == 1.0


def test_floats() -> None:
    asm = Machine(32, 0)
    low, high = Float([1 + 2**-8, -0.1, np.nan]), Float([1 + 3 * 2**-8, 3e38, 1e-40])
    packed = asm.pack_bf16(low, high)
    # Halves go to even, and the first argument is the low half.
    assert packed.value[0] == 0x3F82_3F80
    assert packed.value[2] & 0xFFFF == 0x7FFF
    got = asm.unpack_bf16(packed)
    np.testing.assert_array_equal(got[0].value, low.value.astype(BF16).astype("f4"))
    np.testing.assert_array_equal(got[1].value, high.value.astype(BF16).astype("f4"))
    assert asm.exp2(Float([3.0, -126.0, -127.0])).value.tolist() == [8, 2**-126, 0]
    assert asm.rsqrt(Float([4.0, 0.0])).value.tolist() == [0.5, np.inf]
    assert asm.maximum(Float([1.0, np.nan]), Float(2.0)).value.tolist() == [2, 2]


def test_a_product_by_two_warps() -> None:
    """`a [32, 32] @ b [32, 8]`: a warp has 16 rows; `b` lies as `[8, 32]`."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s).astype(BF16) for s in ((32, 32), (8, 32)))
    start = rng.standard_normal((32, 8)).astype(np.float32)
    out = start.copy()

    def product(asm: Any, a: Any, b: Any, y: Any, smem: Any) -> None:
        thread = asm.special("tid.x")
        lane, warp = thread & 31, thread >> 5
        row, t = (lane >> 2) + warp * 16, lane & 3

        def words(base: Any, row: Int, k: Int) -> Int:
            at = row * 16 + k.divided(1)
            return asm.load(base, at, 4, words=1, hint="global.nc")[0]

        def step(i: Int, *acc: Float) -> list[Float]:
            k = i * 16 + t * 2
            left = [words(a, row + r, k + c) for c in (0, 8) for r in (0, 8)]
            right = [words(b, lane >> 2, k + c) for c in (0, 8)]
            return asm.mma_bf16(acc, left, right)

        places = [(row + r) * 8 + t * 2 + c for r in (0, 8) for c in (0, 1)]
        acc = [asm.load(y, at, 4, words=1, hint="global")[0] for at in places]
        acc = asm.loop(2, step, [x.as_float() for x in acc], unroll=1)
        for at, value in zip(places, acc, strict=True):
            asm.store(y, at, 4, value, "global.f32")

    call(product, a, b, out)
    want = start + a.astype("f8") @ b.astype("f8").T
    np.testing.assert_allclose(out, want, rtol=1e-6, atol=1e-6)


def test_a_sum_over_blocks_of_a_grid() -> None:
    x = np.arange(2 * 3 * 64, dtype=np.int32)
    out = np.zeros(6, np.int32)

    def total(asm: Any, x: Any, y: Any, smem: Any) -> None:
        thread = asm.special("tid.x")
        block = asm.special("ctaid.y") * 3 + asm.special("ctaid.x")
        (value,) = asm.load(x, block * 64 + thread, 4, words=1, hint="global")
        for distance in (16, 8, 4, 2, 1):
            value = value + asm.shuffle_xor(value, distance)
        asm.store(smem, thread >> 5, 4, value, "shared.u32")
        asm.barrier()
        a, b, c, _ = asm.load(smem, Int.of(0), 4, words=4, hint="shared")
        assert np.all(c.value == GARBAGE) and np.isnan(c.as_float().value).all()
        with asm.when(thread.equals(5)):
            asm.store(y, block, 4, a + b, "global.u32")

    call(total, x, out, grid=(3, 2))
    assert out.tolist() == x.reshape(6, 64).sum(1).tolist()


def test_masks_nest() -> None:
    out = np.zeros(64, np.uint8)
    wide = np.zeros((16, 4), np.int32)

    def write(asm: Any, y: Any, z: Any, smem: Any) -> None:
        thread = asm.special("tid.x")
        inside = asm.both(thread.less(10), Int.of(3).less(thread))
        with asm.when(thread.less(10)), asm.when(Int.of(3).less(thread)):
            asm.store(y, thread, 1, thread + 0x100, "global.u8")
        with asm.when(inside):
            asm.store(
                y, thread + 32, 1, asm.load_byte(y, thread, "global"), "global.u8"
            )
        with asm.when((thread & 3).equals(0)):
            words = [thread + i for i in range(4)]
            asm.store_words_global(z, thread >> 2, 16, words)

    call(write, out, wide)
    want = [i if 3 < i < 10 else 0 for i in range(32)]
    assert out.tolist() == want * 2
    assert wide.reshape(-1).tolist() == list(range(64))


def test_branches_and_pointers_of_threads() -> None:
    a, b = np.arange(32, dtype=np.int32), np.arange(100, 200, dtype=np.int16)
    out, half = np.zeros(64, np.int32), np.zeros(64, BF16)

    def pick(asm: Any, a: Any, b: Any, y: Any, h: Any, smem: Any) -> None:
        thread = asm.special("tid.x")
        odd = (thread & 1).equals(1)
        index = thread >> 1
        other = asm.offset(b, index, 4)
        both = asm.select_pointer(odd, asm.offset(a, index, 4), other)
        (word,) = asm.load(both, Int.of(0), 1, words=1, hint="global")

        # 32 words only: the branch must not read elsewhere.
        def beyond() -> list[Any]:
            (got,) = asm.load(a, thread - 32, 4, words=1, hint="global")
            return [got, got.to_float()]

        def near() -> list[Any]:
            return [word, Float.of(-1.0)]

        value, number = asm.choose(Int.of(31).less(thread), beyond, near)
        asm.store(y, thread, 4, value, "global.u32")
        asm.store(h, thread, 2, asm.pack_bf16(number, number), "global.b16")

    call(pick, a, b, out, half)
    pairs = b.view(np.int32)
    want = [int(a[i // 2] if i & 1 else pairs[i // 2]) for i in range(32)]
    assert out.tolist() == want + list(range(32))
    assert half.tolist() == [-1.0] * 32 + list(range(32))


def _load(index: Any) -> Any:
    def f(asm: Any, x: Any, smem: Any) -> None:
        asm.load(x, index(asm.special("tid.x")), 4, words=1, hint="global")

    return f


def _store(asm: Any, x: Any, smem: Any, index: Any, kind: str = "global.u32") -> None:
    asm.store(x, index, 4, asm.special("tid.x"), kind)


def _race(asm: Any, x: Any, smem: Any) -> None:
    thread = asm.special("tid.x")
    asm.store(smem, thread, 4, thread, "shared.u32")
    asm.load(smem, thread, 4, words=1, hint="shared")  # its own
    asm.load(smem, thread ^ 1, 4, words=1, hint="shared")


def _early(asm: Any, x: Any, smem: Any) -> None:
    thread = asm.special("tid.x")
    asm.load(smem, thread & 0, 4, words=1, hint="shared")
    with asm.when(thread.equals(63)):
        asm.store(smem, thread & 0, 4, thread, "shared.u32")


def _blocks(asm: Any, x: Any, smem: Any) -> None:
    asm.load(x, Int.of(0), 4, words=1, hint="global")
    with asm.when(asm.special("tid.x").equals(0)):
        asm.store(x, Int.of(0), 4, Int.of(1), "global.u32")


def _part(what: str) -> Any:
    def f(asm: Any, x: Any, smem: Any) -> None:
        with asm.when(asm.special("tid.x").less(40)):
            asm.barrier() if what == "barrier" else asm.shuffle_xor(Int.of(1), 1)

    return f


FORBIDDEN = [
    (_load(lambda t: t + 1), IndexError, "byte 256 is outside of array 0 of 256"),
    (_load(lambda t: t - 1), IndexError, "outside of array 0"),
    (lambda asm, x, s: _store(asm, x, s, Int.of(64)), IndexError, "outside"),
    (
        lambda asm, x, s: asm.load(x, Int.of(1), 4, words=4, hint="global"),
        IndexError,
        "not aligned to 16",
    ),
    (lambda asm, x, s: asm.store_words(x, Int.of(0), [Int(0)] * 4), ValueError, "of"),
    (lambda asm, x, s: _store(asm, x, s, Int.of(0)), RuntimeError, "two threads"),
    (_race, RuntimeError, "a race in shared memory"),
    (_early, RuntimeError, "a race in shared memory"),
    (_blocks, RuntimeError, "a race in array 0"),
    (_part("barrier"), RuntimeError, "do not arrive"),
    (_part("shuffle"), RuntimeError, "part of a warp"),
]


@pytest.mark.parametrize("emit, error, text", FORBIDDEN)
def test_what_a_device_forbids_raises(emit: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        call(emit, np.zeros(64, np.int32), grid=2)


def test_shared_memory_by_fours_and_steps_back() -> None:
    out = np.zeros(256, np.int32)

    def copy(asm: Any, y: Any, smem: Any) -> None:
        thread = asm.special("tid.x")
        asm.store_words(smem, thread * 4, [thread * 4 + i for i in range(4)])
        asm.barrier()
        back = asm.offset(smem, Int.of(255), 4)
        for i in range(4):
            (word,) = asm.load(
                back, Int.of(0) - thread * 4 - i, 4, words=1, hint="shared"
            )
            asm.store(y, thread * 4 + i, 4, word, "global.u32")

    call(copy, out, words=256)
    assert out.tolist() == list(range(255, -1, -1))


def test_an_array_is_changed_in_place_or_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        Memory(np.zeros((4, 4))[:, :2])


_SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from pallas_kernels import _ptx as asm
from pallas_kernels._ptx import Float, Int
from tests.kernels._h100 import compile_for_h100

def emit(context, x, w, y, smem):
    x, w, y, smem = map(asm.pointer, (x, w, y, smem))
    thread = asm.special("tid.x")
    a = asm.load(x, thread, 16, words=4, hint="global.nc")
    b = asm.load(w, thread, 8, words=2, hint="global.nc")
    acc = asm.mma_bf16([Float.of(0.0)] * 4, a, b)
    near = thread.less(64)

    def then():
        low, high = asm.unpack_bf16(asm.load_byte(w, thread, "global.nc"))
        return [asm.exp2(acc[0]), asm.pack_bf16(low, high)]

    def otherwise():
        return [asm.rsqrt(acc[1]), a[0]]

    number, word = asm.choose(near, then, otherwise)
    where = asm.select_pointer(near, asm.offset(x, thread, 4), asm.offset(w, thread, 4))
    (more,) = asm.load(where, Int.of(0), 1, words=1, hint="global")
    number = asm.maximum(number, acc[2])
    words = [number.as_int(), word, more, acc[3].as_int()]
    asm.store_words_global(y, thread, 16, words)
    with asm.when(thread.less(1)):
        asm.store(y, thread, 2, word, "global.b16")

def body(*refs):
    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 4)(emit)(*refs)

kernel = plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((512,), jnp.int32),
    grid=(1,),
    grid_names=("rows",),
    num_threads=1,
    thread_name="group",
    scratch_types=(plgpu.SMEM((64,), jnp.int32),),
    compiler_params=plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
)
compile_for_h100(
    kernel,
    jax.ShapeDtypeStruct((1024,), jnp.bfloat16),
    jax.ShapeDtypeStruct((512,), jnp.bfloat16),
)
"""


@pytest.mark.gpu_compile
@pytest.mark.skipif(not has_plugin(), reason="needs jax[cuda13]")
def test_an_h100_takes_the_words(tmp_path: Path) -> None:
    check_no_spills(_SCRIPT, None, tmp_path)
    (code,) = (p.read_text() for p in tmp_path.glob("*.ptx"))
    for word in (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "cvt.rn.bf16x2.f32",
        "ex2.approx.ftz.f32",
        "rsqrt.approx.f32",
        "max.f32",
        "ld.global.nc.u8",
        "st.global.v4.u32",
    ):
        assert word in code
