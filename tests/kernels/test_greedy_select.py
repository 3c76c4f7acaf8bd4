"""Greedy selection: every implementation against a literal one in numpy."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from benchmarks.tpu_bundles import GENERATIONS, count
from pallas_kernels import KernelError, greedy_select
from pallas_kernels.greedy_select import _gram, _terms, api, mosaic_gpu, tpu, xla
from tests.kernels import _greedy
from tests.kernels._simt import Machine, Memory

ROOT = Path(__file__).parents[2]
PORTABLE = ("reference", "xla")
_cosine = functools.partial(jax.jit, static_argnums=1)(_gram.cosine)


def _want(gram: Any, importance: Any, k: int, **options: Any) -> list[list[int]]:
    """The oracle on a batch; `mask` and `counts` are of the batch."""
    mask, counts = options.pop("mask", None), options.pop("counts", None)
    return [
        _greedy.choices(
            gram[b],
            None if importance is None else importance[b],
            k,
            mask=None if mask is None else mask[b],
            count=None if counts is None else int(counts[b]),
            **options,
        )
        for b in range(len(gram))
    ]


@pytest.fixture(scope="module")
def case() -> tuple[Any, Any, Any]:
    """Embeddings, importance and cosines of two rows of 40 tokens."""
    rng = np.random.default_rng(0)
    x = _greedy.embeddings(rng, 2, 40, 12)
    return x, rng.random((2, 40)).astype(np.float32), np.asarray(_cosine(x, "highest"))


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that sets how many bytes matrices may take."""

    def limit(size: int) -> None:
        api._run.clear_cache()
        monkeypatch.setattr(api, "_MOST_BYTES", size)

    yield limit
    api._run.clear_cache()


# Choices


@pytest.mark.parametrize("name", PORTABLE)
@pytest.mark.parametrize(
    ("objective", "weight", "parallel"),
    [
        ("mmr", 0.5, 1),
        ("mmr", 0.3, 1),
        ("mmr", 0.0, 1),
        ("mmr", 1.0, 1),
        ("mmr", 0.5, 4),
        ("dpp", 0.5, 1),
        ("facility", 1.0, 1),
        ("facility", 0.5, 3),
    ],
)
def test_choices_are_those_of_the_oracle(
    case: Any, name: str, objective: str, weight: float, parallel: int
) -> None:
    x, v, gram = case
    k = 11 if objective == "dpp" else 23  # the rank is 12
    options: dict[str, Any] = {
        "objective": objective, "weight": weight, "parallel": parallel,
    }  # fmt: skip
    rng = np.random.default_rng(1)
    mask, counts = rng.random((2, 40)) < 0.8, np.asarray([k, 6])
    for more in ({}, {"mask": mask, "counts": counts}):
        got = greedy_select(
            x, v, k, implementation=name, **options,
            **{key: jnp.asarray(value) for key, value in more.items()},
        )  # fmt: skip
        assert got.dtype == jnp.int32
        assert got.tolist() == _want(gram, v, k, **options, **more)


@pytest.mark.parametrize("name", PORTABLE)
@pytest.mark.parametrize("objective", ["mmr", "facility"])
def test_ties_go_to_the_lowest_index(name: str, objective: str) -> None:
    gram, v = _greedy.ties(np.random.default_rng(2), 2, 30)
    got = greedy_select(
        None, v, 30, gram=gram, objective=objective, implementation=name
    )
    # Halves and quarters: every score is exact.
    assert got.tolist() == _want(gram, v, 30, objective=objective)


@pytest.mark.parametrize(
    ("objective", "weight", "parallel"),
    [("mmr", 0.25, 1), ("mmr", 0.5, 3), ("dpp", 0.5, 1)],
)
def test_choices_without_a_matrix(
    monkeypatch: pytest.MonkeyPatch,
    little_memory: Any,
    objective: str,
    weight: float,
    parallel: int,
) -> None:
    # A whole number of quarters and halves: products are exact, and many scores equal.
    rng = np.random.default_rng(8)
    x = np.eye(8, dtype=np.float32)[rng.integers(0, 8, (2, 90))]
    x = x + 2 * np.eye(8, dtype=np.float32)[rng.integers(0, 8, (2, 90))]
    if objective == "dpp":
        x = rng.standard_normal((2, 90, 40)).astype(np.float32)
    v = np.round(rng.random((2, 90)) * 4).astype(np.float32) / 4 + 0.25
    k, mask, counts = 30, rng.random((2, 90)) < 0.8, np.asarray([30, 9])
    options: dict[str, Any] = {
        "objective": objective, "weight": weight, "parallel": parallel,
        "mask": jnp.asarray(mask), "counts": jnp.asarray(counts),
    }  # fmt: skip
    want = greedy_select(x, v, k, **options)
    seen = []
    without = xla.select_without

    def spy(*args: Any) -> Any:
        seen.append(args)
        return without(*args)

    little_memory(1000)
    monkeypatch.setattr(xla, "select_without", spy)
    monkeypatch.setattr(xla, "_CANDIDATES", 16)
    assert np.array_equal(greedy_select(x, v, k, **options), want)
    assert seen
    with pytest.raises(KernelError, match="all 90 tokens.*select among parts of them"):
        greedy_select(x, v, k, objective="facility")


def test_large_batches_are_worked_through_in_parts(
    little_memory: Any, case: Any
) -> None:
    x, v, _ = case
    x, v = np.concatenate([x, x[:1]]), np.concatenate([v, v[1:]])
    want = np.asarray(greedy_select(x, v, 8))
    little_memory(2 * 40 * 40 * 4)
    assert np.array_equal(greedy_select(x, v, 8), want)
    assert not np.array_equal(want[0], want[2])


def test_no_importance_is_farthest_point_sampling(case: Any) -> None:
    x, _, gram = case
    want = _want(gram, None, 9, weight=0.0)
    assert greedy_select(x, None, 9).tolist() == want
    assert greedy_select(x, None, 9, weight=0.0).tolist() == want


def test_every_prefix_is_the_choice_for_fewer(case: Any) -> None:
    x, v, _ = case
    for objective in ("mmr", "facility"):
        whole = greedy_select(x, v, 20, objective=objective)
        part = greedy_select(x, v, 7, objective=objective)
        assert np.array_equal(whole[:, :7], part)


def test_scales_and_order_of_tokens_do_not_matter(case: Any) -> None:
    x, v, _ = case
    rng = np.random.default_rng(3)
    want = np.asarray(greedy_select(x, v, 9))
    scale = 2.0 ** rng.integers(-3, 4, (2, 40, 1)).astype(np.float32)
    assert np.array_equal(greedy_select(x * scale, v, 9), want)
    mixed = rng.permutation(40)
    again = greedy_select(x[:, mixed], v[:, mixed], 9)
    assert np.array_equal(mixed[np.asarray(again)], want)


# Degenerate inputs


@pytest.mark.parametrize("name", PORTABLE)
@pytest.mark.parametrize("objective", ["mmr", "dpp", "facility"])
def test_degenerate_rows_have_an_answer(name: str, objective: str) -> None:
    """No valid token, fewer than K, all equal, all zero, NaN, beyond the rank."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((6, 12, 5)).astype(np.float32)
    v = rng.random((6, 12)).astype(np.float32)
    x[2], x[3] = x[2, :1], 0.0
    v[4, 5] = np.nan
    x[5, :6], x[5, 7] = x[5, 6], np.nan
    mask = np.ones((6, 12), bool)
    mask[0], mask[1, 3:] = False, False
    mask[4] = False
    mask[4, 3:7] = True
    got = np.asarray(
        greedy_select(
            x, v, 12, mask=jnp.asarray(mask), objective=objective, implementation=name
        )
    )
    for row, ok in zip(got, mask, strict=True):
        some = int(ok.sum())
        assert sorted(row[:some]) == np.flatnonzero(ok).tolist()
        assert (row[some:] == 12).all()
    by_importance = np.argsort(-v, axis=1, kind="stable")
    # Equal or zero embeddings: nothing but importance tells tokens apart.
    assert got[2].tolist() == by_importance[2].tolist()
    assert got[3].tolist() == by_importance[3].tolist()
    assert got[4, 3] == 5  # NaN is last
    gram = np.asarray(_cosine(x, "highest"))
    if objective != "dpp":  # whose last digits are those of each algorithm
        assert got.tolist() == _want(gram, v, 12, mask=mask, objective=objective)


def test_a_dpp_maximizes_the_determinant_step_by_step() -> None:
    rng = np.random.default_rng(5)
    x, v = rng.standard_normal((1, 20, 30)), rng.random((1, 20)) + 0.1
    kernel = _greedy.cosine(x[0]) * np.outer(v[0], v[0])
    order = [int(np.argmax(v))]
    while len(order) < 8:
        rest = [i for i in range(20) if i not in order]
        sizes = [
            np.linalg.slogdet(kernel[np.ix_([*order, i], [*order, i])]) for i in rest
        ]
        order.append(rest[int(np.argmax([s.logabsdet for s in sizes]))])
    got = greedy_select(
        jnp.asarray(x, jnp.float32), jnp.asarray(v, jnp.float32), 8, objective="dpp"
    )
    assert got[0].tolist() == order


def test_cosines_are_signed_and_exact_for_16_bits() -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal((2, 30, 200)).astype(np.float32)
    for dtype in ("float32", "bfloat16", "float16"):
        y = jnp.asarray(x, dtype)
        want = np.stack([_greedy.cosine(row) for row in np.asarray(y, np.float64)])
        assert want.min() < -0.1
        assert np.abs(np.asarray(_cosine(y, "highest")) - want).max() < 1e-6
        assert np.abs(np.asarray(_cosine(y, "fast")) - want).max() < 0.01


def test_cosines_on_a_gpu_come_from_products_of_16_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_gram, "is_gpu", lambda: True)
    x = np.random.default_rng(7).standard_normal((1, 30, 200)).astype(np.float32)
    got = np.asarray(_gram.cosine(jnp.asarray(x), "highest"))
    assert np.abs(got[0] - _greedy.cosine(x[0])).max() < 5e-7
    assert np.array_equal(got, got.transpose(0, 2, 1))
    text = str(jax.make_jaxpr(lambda x: _gram.cosine(x, "highest"))(x))
    assert "precision=HIGHEST" not in text and text.count("dot_general") == 2


# Transformations


def test_it_is_one_program_without_the_host(case: Any) -> None:
    x, v, _ = case
    want = np.asarray(greedy_select(x, v, 5))
    text = jax.jit(lambda x, v: greedy_select(x, v, 5)).lower(x, v).as_text()
    assert "callback" not in text
    shape = jax.eval_shape(lambda x, v: greedy_select(x, v, 5), x, v)
    assert shape.shape == (2, 5) and shape.dtype == jnp.int32
    # Mapped over rows with and without a batch of its own, and over importance alone.
    one = jax.vmap(lambda x, v: greedy_select(x[None], v[None], 5)[0])(x, v)
    assert np.array_equal(one, want)
    two = jax.vmap(lambda v: greedy_select(x, v, 5))(jnp.stack([v, v]))
    assert np.array_equal(two, np.stack([want, want]))

    def kept(x: Any) -> Any:
        order = greedy_select(x, v, 5)
        return jnp.take_along_axis(x, order[..., None], axis=1).sum()

    gradient = np.asarray(jax.grad(kept)(jnp.asarray(x)))
    assert gradient.sum() == 2 * 5 * 12 and set(np.unique(gradient)) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_select": 0}, "num_select=0 must be from 1 to the 6 tokens"),
        ({"num_select": 7}, "num_select=7 must be from 1 to the 6 tokens"),
        ({"num_select": True}, "num_select=True must be a static integer"),
        ({"num_select": 2.0}, "num_select=2.0 must be a static integer"),
        ({"parallel": 0}, "parallel=0 must be from 1"),
        ({"embeds": None}, r"give embeds \[B, N, D\] or their gram"),
        (
            {"embeds": jnp.ones((6, 3))},
            r"embeds must be \[B, N, D\], not \[6, 3\]",
        ),
        ({"embeds": jnp.ones((2, 6, 3), int)}, "embeds must be a float array, not int"),
        ({"embeds": jnp.ones((2, 0, 3))}, "there are no tokens"),
        ({"gram": jnp.ones((2, 5, 5))}, r"gram \[2, 5, 5\] must be \[2, 6, 6\] like"),
        ({"embeds": None, "gram": jnp.ones((2, 5, 6))}, "must be square"),
        (
            {"importance": jnp.ones((2, 5))},
            r"importance must be \[2, 6\], not",
        ),
        ({"importance": jnp.ones((2, 6), int)}, "importance must be a float array"),
        ({"mask": jnp.ones((2, 6))}, "mask must be boolean, not float32"),
        ({"mask": jnp.ones((6,), bool)}, r"mask must be \[2, 6\], not \[6\]"),
        ({"counts": jnp.ones(2)}, "counts must be integers, not float32"),
        ({"counts": jnp.ones(3, int)}, r"counts must be \[2\], not \[3\]"),
        ({"objective": "max"}, "objective='max' must be 'mmr', 'dpp' or 'facility'"),
        ({"objective": "dpp", "importance": None}, "'dpp' needs importance"),
        ({"objective": "facility", "importance": None}, "'facility' needs importance"),
        ({"weight": 1.5}, "weight=1.5 of 'mmr' must be from 0 to 1"),
        ({"weight": float("nan")}, "weight=nan of 'mmr'"),
        ({"weight": -1, "objective": "facility"}, "'facility' must be 0 or more"),
        ({"precision": "low"}, "precision='low' must be 'highest' or 'fast'"),
        ({"implementation": "cuda"}, "unknown implementation 'cuda'"),
        ({"implementation": "mosaic_gpu"}, "it is for Hopper GPUs"),
    ],
)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="messages of a CPU")
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    args = {"embeds": jnp.ones((2, 6, 3)), "importance": jnp.ones((2, 6)), **changes}
    args.setdefault("num_select", 2)
    with pytest.raises(KernelError, match=message):
        greedy_select(**args)


# The kernels of one launch, without their devices


def _given(seed: int, n: int, k: int) -> tuple[Any, ...]:
    """Inputs with ties, a mask and counts, settings, and the oracle's answer."""
    rng = np.random.default_rng(seed)
    gram, v = _greedy.ties(rng, 3, n)
    mask = rng.random((3, n)) < 0.8
    counts = np.asarray([k, min(k, 5), 0])
    limit = _terms.limits(jnp.asarray(mask), jnp.asarray(counts), k)
    want = _want(gram, v, k, weight=0.25, mask=mask, counts=counts)
    args = tuple(map(jnp.asarray, (gram, v, mask, limit)))
    return args, _terms.Settings(k, "mmr", 0.25, 1), want


@pytest.mark.parametrize(
    ("n", "k", "warps", "early"),
    [
        (300, 30, 4, "copy"),
        (1100, 9, 8, "prefetch"),
        (8, 8, 4, "copy"),
        (132, 20, 16, ""),
    ],
)
def test_the_hopper_kernel_thread_by_thread(
    n: int, k: int, warps: int, early: str
) -> None:
    (gram, v, mask, limit), settings, want = _given(n, n, k)
    first, base = _terms.mmr_start(v, mask, settings)
    factor = _terms.mmr_factor(settings)
    shape = mosaic_gpu.Shape(3, n, k, factor, warps, early)
    order = Memory(np.full((3, k), -1, np.int32))
    for row in range(3):
        machine = Machine(32 * warps, row)
        shared = [
            Memory(np.full(size, -1, np.int32), shared=True)
            for size in mosaic_gpu.scratch(shape)
        ]
        inputs = [Memory(np.asarray(x)) for x in (gram, first, base, limit)]
        mosaic_gpu.emit(shape, machine, *inputs, order, *shared)
        assert machine.copies == 0, "copies outlive the block"
    assert order.words.reshape(3, k).tolist() == want


@pytest.mark.parametrize("resident", [True, False])
def test_the_tpu_kernel_interpreted(resident: bool) -> None:
    args, settings, want = _given(9, 150, 20)
    order = tpu.select(*args, settings, resident=resident)
    assert order.tolist() == want


@pytest.mark.parametrize("n", [512, 4096])
def test_a_tpu_gets_its_kernel(n: int) -> None:
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device
    )
    shapes = (jax.ShapeDtypeStruct((2, n, d), jnp.float32) for d in (32, 1))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(lambda x, v: greedy_select(x, v[..., 0], 40)).trace(*shapes)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1


@pytest.mark.tpu_compile
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_tpu_takes_the_kernel(generation: str) -> None:
    cases = [
        {"format": "greedy_select", "batch": 2, "n": n, "k": k}
        for n, k in ((576, 64), (1024, 1024), (2691, 672), (100, 7))
    ]
    assert min(count(generation, cases)) > 0


def test_a_gpu_gets_its_kernel() -> None:
    device = AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda"
    )
    mesh = AbstractMesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device
    )
    shapes = (jax.ShapeDtypeStruct((2, 100, d), jnp.bfloat16) for d in (32, 1))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(lambda x, v: greedy_select(x, v[..., 0], 40)).trace(*shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton (pip install triton)",
)
def test_the_triton_kernel_in_the_interpreter(tmp_path: Path) -> None:
    # A process of its own: triton decides at import whether it interprets.
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels._greedy_interpreter"],
        cwd=ROOT,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": path,
            "TRITON_CACHE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["300", "130", "7"]
