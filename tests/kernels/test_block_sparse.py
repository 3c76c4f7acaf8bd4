"""Block-sparse attention: lists, checks, the portable implementations, gradients."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P

from pallas_kernels import BlockLists, KernelError, block_sparse_attention
from pallas_kernels.block_sparse_attention import _backward, _walk, reference, xla
from pallas_kernels.block_sparse_attention._lists import causal_lists, visible_blocks
from tests.kernels._attention import oracle, random_lists, random_qkv

LIMIT = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes of one call; `lists` are (rows, heads)."""

    batch: int = 1
    q: int = 48
    k: int = 48
    heads: tuple[int, int] = (2, 2)
    dim: int = 16
    block: tuple[int, int] = (16, 16)
    lists: tuple[int, int] = (1, 2)
    density: float = 0.5
    offset: Any = 0
    soft_cap: float | None = None
    dtype: str = "float32"

    def make(self, seed: int = 0) -> tuple[tuple[jax.Array, ...], BlockLists, dict]:
        """q, k and v, lists, options of the call."""
        rng = np.random.default_rng(seed)
        sizes = self.batch, self.q, self.k, *self.heads, self.dim
        qkv = random_qkv(rng, *sizes, jnp.dtype(self.dtype))
        # Lists of one row must suit the row of the batch that is furthest on.
        where = self.offset if self.lists[0] > 1 else int(np.max(self.offset))
        lists = random_lists(
            rng, *self.lists, self.q, self.k, *self.block, self.density, where
        )
        options = {"q_offset": jnp.asarray(self.offset), "soft_cap": self.soft_cap}
        return qkv, lists, options


CASES = {
    "uneven": Case(batch=2, q=39, k=53, offset=[14, 3], lists=(2, 1), block=(16, 8)),
    "groups": Case(heads=(4, 2), lists=(1, 4), block=(8, 16), soft_cap=2.0),
    "key heads": Case(batch=2, heads=(4, 2), lists=(2, 2), k=64, offset=[16, 5]),
    "seven": Case(batch=2, heads=(7, 1), lists=(1, 1), dim=80, dtype="bfloat16"),
    "half": Case(dim=96, dtype="float16", density=0.0),
    "wide": Case(dim=256, q=16, k=64, offset=48, block=(16, 32), dtype="bfloat16"),
}


def _set(x: jax.Array, where: Any, value: Any) -> jax.Array:
    changed = np.array(x)
    changed[where] = value
    return jnp.asarray(changed)


def _without(lists: BlockLists, *where: int) -> BlockLists:
    """Lists of which one is empty."""
    return dataclasses.replace(lists, counts=_set(lists.counts, where, 0))


def _close(got: Any, want: Any, limit: float) -> None:
    got, want = (np.asarray(x).astype(np.float64) for x in (got, want))
    assert got.shape == want.shape
    assert np.array_equal(np.isfinite(got), np.isfinite(want))
    got, want = (np.where(np.isfinite(x), x, 0) for x in (got, want))
    assert np.abs(got - want).max() <= limit * max(np.abs(want).max(), 1)


def _loss(run: Callable[..., Any], shape: tuple[int, ...]) -> Callable[..., jax.Array]:
    """Of both outputs, -inf left out, so that both have a cotangent."""
    rng = np.random.default_rng(9)
    c, c_lse = (rng.standard_normal(shape[:3]).astype(np.float32) for _ in range(2))

    def loss(*args: Any) -> jax.Array:
        y, lse = run(*args)
        lse = jnp.where(lse > -jnp.inf, lse, 0.0).transpose(0, 2, 1)
        return jnp.sum(c[..., None] * y**2) + jnp.sum(c_lse * lse)

    return loss


def _gradients(run: Callable[..., Any], q: jax.Array, *args: Any) -> Any:
    return jax.jit(jax.grad(_loss(run, q.shape), argnums=(0, 1, 2)))(q, *args)


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name: str) -> None:
    """Results are the oracle's, gradients those of the reference in float32."""
    case = CASES[name]
    (q, k, v), lists, options = case.make()
    lists = _without(lists, 0, lists.counts.shape[1] - 1, 0)

    def run(q: Any, k: Any, v: Any) -> Any:
        return block_sparse_attention(q, k, v, lists, return_lse=True, **options)

    def plain(q: Any, k: Any, v: Any) -> Any:
        offset = jnp.broadcast_to(options["q_offset"], (case.batch,))
        return reference.attention(
            q, k, v, lists,
            scale=case.dim**-0.5, q_offset=offset, soft_cap=case.soft_cap,
        )  # fmt: skip

    @jax.jit
    def both(*qkv: jax.Array) -> Any:
        results = [run(*qkv), plain(*qkv)]
        if name in ("half", "wide"):
            return results, []
        wide = [x.astype(jnp.float32) for x in qkv]
        losses = (_loss(run, q.shape), qkv), (_loss(plain, q.shape), wide)
        return results, [jax.grad(f, argnums=(0, 1, 2))(*x) for f, x in losses]

    results, gradients = both(q, k, v)
    want, want_lse = oracle(q, k, v, lists, **options)
    for y, lse in results:
        assert y.dtype == q.dtype and lse.dtype == jnp.float32
        _close(y, want, LIMIT[case.dtype])
        _close(lse, want_lse, LIMIT["float32"])
    for a, b in zip(*gradients, strict=True) if gradients else ():
        assert a.dtype == q.dtype
        _close(a, b, 5 * LIMIT[case.dtype])
    if gradients:  # the list that was emptied
        assert not np.asarray(gradients[0][0])[0, : case.block[0], -1].any()


def test_many_steps_and_visits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences: what fits in one step of the other tests, in many."""
    case = Case(batch=2, q=117, k=128, heads=(4, 2), lists=(2, 4), block=(8, 8),
                offset=[0, 11])  # fmt: skip
    (q, k, v), lists, options = case.make()
    lists = _without(lists, 1, 2, 3)
    shapes = []
    sizes = _walk._sizes

    def small(*args: Any) -> tuple[int, int]:
        shapes.append(sizes(*args))
        return 7, 3

    want = oracle(q, k, v, lists, **options)
    rng = np.random.default_rng(1)
    dy = jnp.asarray(rng.standard_normal(q.shape), jnp.float32)
    dlse = jnp.asarray(rng.standard_normal(want[1].shape), jnp.float32)
    options = {**options, "scale": case.dim**-0.5}

    def both(q: Any, k: Any, v: Any, lists: BlockLists) -> Any:
        y, lse = xla.attention(q, k, v, lists, **options)
        dlse_ = jnp.where(lse > -jnp.inf, dlse, jnp.nan)  # must not be read
        return (y, lse), _backward.gradients(
            q, k, v, lists, y, lse, dy, dlse_, **options
        )

    whole = jax.jit(both)(q, k, v, lists)
    monkeypatch.setattr(_walk, "_sizes", small)
    results, gradients = jax.jit(lambda *args: both(*args))(q, k, v, lists)
    assert len(shapes) == 2 and shapes[0][0] > 50 and shapes[0][1] > 10
    for a, b in zip(results, want, strict=True):
        _close(a, b, LIMIT["float32"])
    for a, b in zip(gradients, whole[1], strict=True):
        assert np.isfinite(a).all()
        _close(a, b, 5e-6)


def test_memory_does_not_grow_with_the_square() -> None:
    block, width, q_shape = 64, 8, (1, 16384, 2, 32)
    n = q_shape[1] // block
    x = jax.ShapeDtypeStruct(q_shape, jnp.bfloat16)
    lists = BlockLists(
        jax.ShapeDtypeStruct((1, 2, n, width), jnp.int32),
        jax.ShapeDtypeStruct((1, 2, n), jnp.int32),
        block,
        block,
    )

    def run(q: Any, k: Any, v: Any, lists: BlockLists) -> Any:
        return block_sparse_attention(q, k, v, lists, return_lse=True)

    bound = _walk._FAST * (_walk.os.cpu_count() or 1) + 16 * 2**20
    gradient = jax.grad(_loss(run, q_shape), argnums=(0, 1, 2))
    for f in (run, gradient):
        compiled = jax.jit(f).lower(x, x, x, lists).compile()
        used = compiled.memory_analysis().temp_size_in_bytes
        assert used < 2 * bound, used  # one head of logits would be 1 GiB


def test_all_blocks_are_dense_attention() -> None:
    (q, k, v), _, _ = Case(batch=2, q=50, k=50, heads=(4, 2)).make()

    @jax.jit
    def both(q: Any, k: Any, v: Any) -> Any:
        lists = causal_lists(50, 50, block_q=16, block_k=8)
        dense = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        blocks = visible_blocks(50, 50, 16, 8, 0)
        return block_sparse_attention(q, k, v, lists), dense, blocks

    y, dense, (first, last) = both(q, k, v)
    _close(y, dense, 2e-6)
    assert first.tolist() == [0, 2, 4, 6] and last.tolist() == [1, 3, 5, 6]


def test_chunks_of_a_prompt_are_the_whole() -> None:
    case = Case(q=70, k=70, heads=(4, 2), lists=(1, 2), block=(1, 8), density=0.6)
    (q, k, v), lists, _ = case.make()
    run = jax.jit(
        lambda q, lists, at: block_sparse_attention(
            q, k, v, lists, q_offset=at, return_lse=True
        )
    )
    whole = run(q, lists, 0)
    # Lists of single queries can be cut anywhere.
    for start, end in ((0, 13), (13, 26), (57, 70)):
        part = BlockLists(
            lists.indices[:, :, start:end], lists.counts[:, :, start:end], 1, 8
        )
        y, lse = run(q[:, start:end], part, start)
        _close(y, whole[0][:, start:end], 2e-6)
        _close(lse, whole[1][..., start:end], 2e-6)


def test_lengths() -> None:
    case = Case(batch=3, q=40, k=56, heads=(4, 2), lists=(1, 2), offset=[16, 3, 0])
    (q, k, v), lists, options = case.make()
    lengths = jnp.asarray([50, 9, 0])
    v = v.at[2].set(jnp.nan)  # nobody reads it

    def run(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        return block_sparse_attention(
            q, k, v, lists, lengths=lengths, return_lse=True, **options
        )

    loss = _loss(run, q.shape)
    both = jax.jit(lambda *x: (run(*x), jax.grad(loss, argnums=(0, 1, 2))(*x)))
    results, gradients = both(q, k, v, lengths)
    want = oracle(q, k, v, lists, lengths=lengths, **options)
    for a, b in zip(results, want, strict=True):
        _close(a, b, 2e-6)
    for x, seen in zip(gradients, (slice(0, 6), slice(0, 9), slice(0, 9)), strict=True):
        row = np.asarray(x)[1]
        assert np.isfinite(x).all() and row[seen].any()
        assert not np.delete(row, seen, axis=0).any() and not np.asarray(x)[2].any()
    v = v.at[2].set(1.0)
    (y, _), _ = both(q, k, v, jnp.full(3, 56))
    _close(y, oracle(q, k, v, lists, **options)[0], 2e-6)


def test_vmap_joins_the_batch() -> None:
    case = Case(batch=2, q=20, k=24, heads=(4, 2), block=(8, 8), lists=(1, 2))
    case = dataclasses.replace(case, density=1.0)
    rng = np.random.default_rng(3)
    single = []
    for seed, offset in enumerate((4, 0, 2)):
        (q, k, v), lists, _ = case.make(seed)
        counts = jnp.asarray(rng.integers(1, lists.counts + 1), jnp.int32)
        lists = dataclasses.replace(lists, counts=counts)
        single.append((q, k, v, lists, jnp.asarray(offset)))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *single)

    def run(q: Any, k: Any, v: Any, lists: BlockLists, offset: Any) -> Any:
        return block_sparse_attention(q, k, v, lists, q_offset=offset, return_lse=True)

    gradient = jax.grad(_loss(run, single[0][0].shape), argnums=(0, 1, 2))

    def both(*args: Any) -> Any:
        return run(*args), gradient(*args)

    for f, axes in (
        (run, (0, None, None, None, None)),
        (both, (None, 0, 0, 0, 0)),
    ):
        given = [stacked[n] if x == 0 else single[0][n] for n, x in enumerate(axes)]
        mapped = jax.jit(jax.vmap(f, axes)).trace(*given)
        # Three loops in one would go on as long as the longest.
        conditions = r"(\w+):bool\[(\d*)\] = lt \w+ \w+\s+in \(\1,\)"
        found = re.findall(conditions, str(mapped.jaxpr))
        assert found and all(size == "" for _, size in found)
        got = mapped.lower().compile()(*given)
        results, gradients = got if f is both else (got, None)
        for i in range(3):
            *args, offset = [single[i if x == 0 else 0][n] for n, x in enumerate(axes)]
            for a, b in zip(results, oracle(*args, q_offset=offset), strict=True):
                _close(a[i], b, 2e-6)
    want = jax.jit(gradient)(single[0][0], *single[2][1:])
    for a, b in zip(gradients, want, strict=True):
        _close(a[2], b, 2e-6)


def test_transformations() -> None:
    (q, k, v), lists, _ = CASES["key heads"].make()

    def run(q: Any) -> Any:
        return block_sparse_attention(
            q, k, v, lists, q_offset=jnp.asarray([16, 5]), return_lse=True
        )

    shapes = jax.eval_shape(run, q)
    assert [x.shape for x in shapes] == [q.shape, (2, 4, 48)]

    def layers(q: jax.Array) -> Any:
        step = jax.checkpoint(lambda x, _: (run(x)[0], None))
        return run(jax.lax.scan(step, q, None, 1)[0])

    got = jax.jit(jax.grad(_loss(layers, q.shape)))(q)
    want = jax.jit(jax.grad(_loss(lambda q: run(run(q)[0]), q.shape)))(q)
    _close(got, want, 1e-6)
    none = block_sparse_attention(
        q[:, :0], k, v, dataclasses.replace(lists, indices=lists.indices[:, :, :0],
                                            counts=lists.counts[:, :, :0])
    )  # fmt: skip
    assert none.shape == (2, 0, 4, 16)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_shards_are_the_whole(kv_heads: int) -> None:
    """Also where every device holds the only key head: its gradient is summed."""
    case = Case(batch=2, heads=(4, kv_heads), lists=(2, 4))
    (q, k, v), lists, _ = case.make()

    def run(q: Any, k: Any, v: Any, lists: BlockLists) -> Any:
        return block_sparse_attention(q, k, v, lists, return_lse=True)

    mesh = jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[:4],
    )  # fmt: skip
    split = P("data", None, "model")
    keys = split if kv_heads > 1 else P("data")
    shards = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(split, keys, keys, P("data", "model")),
        out_specs=(split, P("data", "model")),
    )
    if kv_heads > 1:
        got, want = (jax.jit(f)(q, k, v, lists) for f in (shards, run))
    else:
        got, want = (_gradients(f, q, k, v, lists) for f in (shards, run))
    for a, b in zip(got, want, strict=True):
        _close(a, b, 2e-6)


def test_values_are_checked_outside_of_jit_and_by_checkify() -> None:
    case = Case(batch=2, q=32, k=48, lists=(2, 2), density=1.0, offset=16)
    (q, k, v), lists, _ = case.make()
    offset, lengths = jnp.full(2, 16), jnp.full(2, 48)

    def run(k: Any, lists: BlockLists, offset: Any, lengths: Any) -> Any:
        return block_sparse_attention(q, k, v, lists, q_offset=offset, lengths=lengths)

    def listed(**changes: jax.Array) -> BlockLists:
        return dataclasses.replace(lists, **changes)

    at = (1, 0, 1)
    wrong = {
        r"lists.counts of .* \[1 0 1\] is not in 0..3":
            (k, listed(counts=_set(lists.counts, at, 4)), offset, lengths),
        r"lists.counts of .* \[0 1 0\] is not in 0..3":
            (k, listed(counts=_set(lists.counts, (0, 1, 0), -1)), offset, lengths),
        r"lists.indices of .* \[1 0 1\] names a block that is not in 0..2":
            (k, listed(indices=_set(lists.indices, (*at, 2), 3)), offset, lengths),
        r"lists.indices of .* \[1 0 1\] does not ascend strictly":
            (k, listed(indices=_set(lists.indices, (*at, 1), 0)), offset, lengths),
        r"lists.counts of .* \[1 0 1\] is 0: give each query block":
            (k, listed(counts=_set(lists.counts, at, 0)), offset, lengths),
        r"q_offset of row \[1\] is not in 0..16":
            (k, lists, _set(offset, 1, 17), lengths),
        r"lengths of row \[0\] is not in 0..48":
            (k, lists, offset, _set(lengths, 0, 49)),
        r"k is NaN at row, position and head \[1 7 1\]":
            (_set(k, (1, 7, 1, 3), jnp.nan), lists, offset, lengths),
    }  # fmt: skip

    @jax.jit
    @jax.value_and_grad
    def loss(k: Any, *args: Any) -> jax.Array:
        return jnp.sum(jax.vmap(run, (0, None, None, None))(k[None], *args))

    checked = jax.jit(checkify.checkify(loss))
    for match, args in wrong.items():
        with pytest.raises(KernelError, match=match) as e:
            run(*args)
        assert "\n" not in str(e.value)
        error, _ = checked(*args)
        with pytest.raises(checkify.JaxRuntimeError, match=match):
            error.throw()
    # A block of padding needs no list, a row no token.
    padded = listed(counts=_set(lists.counts, at, 0))
    for good in (
        (k, lists, offset, lengths),
        (k, padded, offset, jnp.asarray([0, 32])),
    ):
        error, (y, _) = checked(*good)
        error.throw()
        _close(y, jnp.sum(run(*good)), 1e-6)


def test_what_does_not_go_together() -> None:
    (q, k, v), lists, _ = Case(batch=2, heads=(4, 2), lists=(1, 2)).make()

    def refused(match: str, *args: Any, **options: Any) -> None:
        args = args + (q, k, v, lists)[len(args) :]
        with pytest.raises(KernelError, match=match) as e:
            block_sparse_attention(*args, **options)
        assert "\n" not in str(e.value)

    refused(r"q must be \[B, T, heads, D\]", q[0])
    refused("k is bfloat16: q, k and v must all be one of", q, k.astype(jnp.bfloat16))
    refused("must be alike", q, k, v[:, :-1])
    refused("must have the batch 2 and the head size 16", q, k[:1], v[:1])
    refused("4 query heads cannot share 3 key heads", q, *[k[:, :, [0, 0, 0]]] * 2)
    refused("q has 48 rows and k 32", q, k[:, :32], v[:, :32])
    refused("q_offset=1: 48 queries in 48 keys", q_offset=1)
    refused("q_offset is float32: use integers", q_offset=jnp.ones(2))
    refused(
        r"lengths has shape \[3\]: use one integer or \[2\]", lengths=jnp.ones(3, int)
    )
    refused("soft_cap must be positive", soft_cap=0.0)
    refused("lists must be BlockLists, not tuple", q, k, v, (1, 2))
    refused("lists.block_q must be a positive integer, not 0", q, k, v,
            dataclasses.replace(lists, block_q=0))  # fmt: skip
    refused("48 rows of 32 make 2", q, k, v, dataclasses.replace(lists, block_q=32))
    refused("lists are for 3 heads: use 4", q, k, v,
            jax.tree.map(lambda x: x[:, [0, 0, 0]], lists))  # fmt: skip
    refused("lists must have indices", q, k, v,
            dataclasses.replace(lists, counts=lists.counts[0]))  # fmt: skip
    refused("lists.indices must be int32", q, k, v,
            dataclasses.replace(lists, indices=lists.indices * 1.0))  # fmt: skip
    refused("unknown implementation 'cuda'", implementation="cuda")
    for name in ("mosaic_gpu", "triton"):
        refused(f"{name}.* use implementation='xla'", implementation=name)


def test_lists_and_masks() -> None:
    rng = np.random.default_rng(0)

    @partial(jax.jit, static_argnames="width")
    def make(mask: jax.Array, width: int | None) -> Any:
        lists = BlockLists.from_mask(mask, block_q=8, block_k=4, width=width)
        return lists, lists.to_mask(mask.shape[-1])

    for blocks, width in ((1, None), (31, 4), (33, None), (70, 40)):
        mask = rng.random((2, 1, 5, blocks)) < rng.random((2, 1, 5, 1))
        mask[0, 0, :2] = [[False], [True]]
        lists, back = make(jnp.asarray(mask), width)
        assert lists.width == (width or blocks)
        kept = np.zeros_like(mask)
        for line in np.ndindex(mask.shape[:3]):
            want = np.flatnonzero(mask[line])[:width]
            kept[line][want] = True
            assert lists.counts[line] == len(want)
            got = np.asarray(lists.indices[line])
            assert np.array_equal(got[: len(want)], want)
            assert (got[len(want) :] == (want[-1] if len(want) else 0)).all()
        assert np.array_equal(back, kept)
