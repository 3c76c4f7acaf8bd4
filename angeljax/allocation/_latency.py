"""Times of products on the present device, for budgets in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from angeljax import ops
from angeljax._leaves import flatten
from angeljax.algorithms._blocks import as_matrix
from angeljax.allocation._candidates import parse
from angeljax.allocation._plans import plans, product_shape, weights_of
from angeljax.formats import Spec, quantize_to
from angeljax.prepare import prepare
from angeljax.recipe import DEFAULT_SKIP

# (inputs, outputs) of a product -> name of a candidate -> milliseconds.
Times = dict[tuple[int, int], dict[str, float]]


def measure_latency(
    params: Any,
    formats: Sequence[Any],
    *,
    tokens: int = 1,
    dtype: Any = None,
    skip: Sequence[str] = DEFAULT_SKIP,
    progress: bool | None = None,
) -> Times:
    """Times the product of each shape in each format on the default device.

    Weights are prepared for the kernels of the device, and each product runs many times
    inside one compiled program, over copies that do not fit in the cache.

    Args:
      params: the param tree; only its shapes are looked at.
      formats: candidates as in `allocate`.
      tokens: rows of activations: 1 for decoding alone, more for prompts or batches.
      dtype: of the activations. Default: bfloat16, on a CPU float32.
      skip: as in `allocate`.
      progress: show a progress bar on stderr; default: if it is a terminal.

    Returns:
      `(inputs, outputs) -> name of a candidate -> milliseconds`, for
      `allocate(latency=)`. Names are as in `Option`; "none" is the weight as it is.

    Raises:
      ValueError: a candidate or `tokens` is wrong.
      RuntimeError: other work on the machine disturbs the measurements.
    """
    from angeljax.evaluation._progress import progress_bar

    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"tokens must be a positive integer, not {tokens!r}")
    if dtype is None:
        on_cpu = jax.default_backend() == "cpu"
        dtype = jnp.float32 if on_cpu else jnp.bfloat16
    candidates = parse(formats)
    leaves, _ = flatten(params)
    by_candidate = plans(leaves, candidates, skip)
    cases: dict[tuple[tuple[int, int], str], Any] = {}
    for i in weights_of(by_candidate):
        for candidate, plan in zip(candidates, by_candidate, strict=True):
            shape = product_shape(by_candidate, i)
            spec = None if plan is None else plan[i].spec
            if plan is None or spec is not None:
                what = jnp.dtype(leaves[i].value.dtype) if plan is None else spec
                cases.setdefault((shape, candidate.name), what)
    times: Times = {}
    with progress_bar("timing", len(cases), progress) as advance:
        for (shape, name), what in cases.items():
            ms = _milliseconds(shape, what, tokens, dtype)
            times.setdefault(shape, {})[name] = ms
            advance(None)
    return times


def time_of(
    times: Mapping[tuple[int, int], Mapping[str, float]] | None,
    shape: tuple[int, int],
    name: str,
    count: int,
) -> float | None:
    """Milliseconds of all products of a weight; None without a table.

    Raises:
      ValueError: the table lacks it.
    """
    if times is None:
        return None
    if name not in times.get(shape, {}):
        raise ValueError(
            f"latency has no time for {shape[0]} inputs, {shape[1]} outputs and "
            f"{name!r}: it needs latency[{shape}][{name!r}]"
        )
    ms = float(times[shape][name])
    if not (ms >= 0 and math.isfinite(ms)):
        raise ValueError(
            f"latency[{shape}][{name!r}] must be milliseconds >= 0, not {ms}"
        )
    return count * ms


def _milliseconds(shape: tuple[int, int], what: Any, tokens: int, dtype: Any) -> float:
    from pallas_kernels._timing import compile_loop, microseconds, rotation

    k, n = shape
    w = jax.random.normal(jax.random.key(0), (k, n), jnp.float32)
    if isinstance(what, Spec):
        matrix = as_matrix(what)
        weight = prepare(jax.jit(quantize_to, static_argnums=1)(w, matrix))
    else:
        weight = w.astype(what)
    nbytes = sum(x.nbytes for x in jax.tree.leaves(weight))
    copies = [jax.tree.map(jnp.copy, weight) for _ in range(rotation(nbytes))]
    x = jax.random.normal(jax.random.key(1), (tokens, k), dtype)
    # 1 TB/s, to choose the length of the loop.
    guess = max(5.0, nbytes / 1e6)
    return microseconds(compile_loop(_product, x, copies, guess)) / 1e3


def _product(x: jax.Array, w: Any) -> jax.Array:
    # A weight of another dtype is converted on the way, as layers do.
    w = w.astype(x.dtype) if isinstance(w, jax.Array) else w
    return ops.dot(x, w)
