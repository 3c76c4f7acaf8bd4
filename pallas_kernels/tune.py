"""A small autotuner of the packed products: time the candidates, keep the fastest."""

from __future__ import annotations

import datetime
import importlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _timing, _tuning
from pallas_kernels._devices import current_device, implementation_for
from pallas_kernels._weights import TERNARY, KernelError, WeightLayout

ACTIVATIONS = ("int8", "int8-from-bfloat16", "bfloat16")
_DTYPES = {
    "int8": jnp.int8,
    "float8_e4m3": jnp.float8_e4m3fn,
    "mxfp8": jnp.float8_e4m3fn,
    "float8_e5m2": jnp.float8_e5m2,
}
# Bits of a byte that keep random codes valid and finite.
_MASKS = {
    "t2": 0b01010101,
    "float8_e4m3": 0b10110111,
    "mxfp8": 0b10110111,
    "float8_e5m2": 0b10110111,
}


def random_weights(
    layout: WeightLayout, count: int, implementation: str, seed: int = 0
) -> tuple[list[Any], WeightLayout]:
    """Prepared weights of random codes and scales of 1.

    Args:
      layout: canonical.
      count: how many.
      implementation: whose order they get.
      seed: of the codes.

    Returns:
      Planes, and the layout of all of them.
    """
    fmt, groups, n = layout.format, layout.groups, layout.n
    module = module_of(layout, implementation)
    found: list[WeightLayout] = []

    def make(key: jax.Array) -> Any:
        codes = jax.random.bits(key, (layout.stored_k // layout.per_byte, n), jnp.uint8)
        codes = codes & jnp.uint8(_MASKS.get(fmt, 0xFF))
        dtype = _DTYPES.get(fmt, jnp.uint8) if layout.symmetric else jnp.uint8
        planes = {"codes": jax.lax.bitcast_convert_type(codes, dtype)}
        scale: Any = jnp.float32 if groups == 1 else jnp.bfloat16
        if fmt == "nvfp4":
            scale, planes["scale2"] = jnp.float8_e4m3fn, jnp.ones((1, 1))
        planes["scale"] = jnp.ones((groups, n), scale)
        if fmt in ("mxfp4", "mxfp8"):
            planes["scale"] = jnp.full((groups, n), 127, jnp.uint8)
        if fmt == "sherry":
            planes["high"] = jax.random.bits(key, (layout.stored_k // 32, n), jnp.uint8)
        if not layout.symmetric:
            planes["zero"] = jnp.full((groups, n), 8, jnp.uint8)
        if module.ORDER is None:
            found.append(layout)
            return planes
        ready, there = module.prepare(planes, layout)
        found.append(there)
        return ready

    one = jax.jit(make)
    return [one(jax.random.key(seed + i)) for i in range(count)], found[0]


def module_of(layout: WeightLayout, implementation: str) -> ModuleType:
    """The module of an implementation for a format."""
    op = "ternary" if layout.format in TERNARY else "quantized"
    return importlib.import_module(f"pallas_kernels.{op}_matmul.{implementation}")


def compiled(
    jobs: Sequence[Any], compile_one: Callable[[Any], Any], threads: int = 8
) -> Iterator[tuple[Any, Any]]:
    """`(job, compile_one(job) or its exception)` of each job.

    Compiles a few dozen at a time in threads, and nothing while the caller has one:
    compilers try kernels out on the device.
    """
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(jobs), 4 * threads):
            some = jobs[start : start + 4 * threads]
            futures = [pool.submit(compile_one, job) for job in some]
            done = [future.exception() or future.result() for future in futures]
            yield from zip(some, done, strict=True)


def tune(
    layouts: Sequence[WeightLayout],
    tokens: Sequence[int],
    activations: Sequence[str],
    *,
    report: Callable[[str], None] = print,
    seconds: float = 0.01,
) -> dict[str, Any]:
    """Times every candidate plan on this device.

    Args:
      layouts: canonical weights.
      tokens: rows of x; each stands for the range up to it from the power of two below.
      activations: "int8" (quantized before), "int8-from-bfloat16" (quantized in the
        product) or "bfloat16" (A16).
      report: gets one line for each winner.
      seconds: length of one measurement.

    Returns:
      A table for `PALLAS_KERNELS_TUNING`; see `pallas_kernels._tuning`.

    Raises:
      KernelError: there is nothing to tune on this device.
    """
    name = implementation_for()
    if name != "mosaic_gpu":
        raise KernelError(
            f"nothing to tune on a {current_device().device_kind}: the implementation "
            f"{name!r} has no parameters; this is for Hopper GPUs (H100, H200)"
        )
    plans: dict[str, dict[str, _tuning.Plan]] = {}
    for layout in layouts:
        size = layout.k * layout.n // layout.per_byte
        count = _timing.rotation(size)
        weights, ready = random_weights(layout, count, name)
        module = module_of(layout, name)
        for m in tokens:
            for kind in activations:
                best = _fastest(module, weights, ready, m, kind, seconds)
                if best is None:
                    continue
                us, plan, tried = best
                inside = kind == "int8-from-bfloat16"
                case = _tuning.case_of(ready, kind == "bfloat16", inside)
                plans.setdefault(case, {})[str(_tuning.bucket(m))] = plan
                report(f"{case}, {m} tokens: {us:.2f} us by {plan} of {tried}")
    return {
        "device": current_device().device_kind,
        "versions": {"jax": jax.__version__},
        "date": datetime.date.today().isoformat(),
        "plans": plans,
    }


def activations(m: int, k: int, kind: str) -> jax.Array:
    """Random rows of the dtype that a kind of activations has before the product."""
    x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
    if kind != "int8":
        return x
    return jnp.round(jnp.clip(42 * x, -127, 127)).astype(jnp.int8)


def guess(m: int, layout: WeightLayout) -> float:
    """Microseconds of a product on a Hopper GPU, roughly."""
    size = layout.k * layout.n
    return 3 + size / layout.per_byte / 2e6 + 2 * m * size / 8e8


def product(
    module: ModuleType, layout: WeightLayout, kind: str, plan: Any
) -> Callable[[jax.Array, Any], jax.Array]:
    """`(x, planes) -> y` in bfloat16 by one plan."""
    activation = "int8" if kind == "int8-from-bfloat16" else None

    def run(x: jax.Array, planes: Any) -> jax.Array:
        return module.matmul(
            x,
            planes,
            layout,
            x_scale=None,
            bias=None,
            activation=activation,
            out_dtype=jnp.bfloat16,
            **plan,
        )

    return run


def _fastest(
    module: ModuleType,
    weights: Any,
    layout: WeightLayout,
    m: int,
    kind: str,
    seconds: float,
) -> tuple[float, _tuning.Plan, int] | None:
    x = activations(m, layout.k, kind)
    activation = "int8" if kind == "int8-from-bfloat16" else None
    if module.unsupported(x, layout, activation) is not None:
        return None
    candidates = list(module.candidates(m, layout, kind == "bfloat16"))

    def compile_one(plan: _tuning.Plan) -> _timing.Loop:
        run = product(module, layout, kind, plan)
        return _timing.compile_loop(run, x, weights, guess(m, layout))

    times = []
    for plan, loop in compiled(candidates, compile_one):
        if isinstance(loop, BaseException):
            continue  # too much shared memory, or registers: not a candidate after all
        try:
            us = _timing.microseconds(loop, seconds=seconds)
        except RuntimeError:
            continue  # disturbed; one candidate less
        times.append((us, plan))
    if not times:
        return None
    us, plan = min(times, key=lambda t: t[0])
    return us, plan, len(times)
