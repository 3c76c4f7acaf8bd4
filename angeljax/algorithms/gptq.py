"""GPTQ and GPTAQ: column by column, what one gets wrong made up for by later ones."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.algorithms._base import Algorithm, Found, register
from angeljax.algorithms._blocks import (
    as_matrix,
    check_matrix,
    from_matrix,
    padded,
    to_matrix,
)
from angeljax.algorithms._hessian import (
    HIGHEST,
    factor,
    marked,
    mean_diagonal,
    require_definite,
)
from angeljax.algorithms._refit import check_refit, refit_scales
from angeljax.algorithms._scales import ScaleOptions, scale_weights, search_scales
from angeljax.algorithms._sweep import (
    Planes,
    Refresh,
    natural_order,
    sweep,
    unit_of,
    with_group,
)
from angeljax.formats import QTensor, Spec
from angeljax.formats.sherry import from_quads


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQOptions(ScaleOptions):
    """Options of GPTQ; how scales are found is as in `ScaleOptions`.

    Attributes:
      damping: added to the diagonal of the Hessian, as a share of its mean. Inputs that
        were never other than zero do not enter the mean.
      damping_tries: while the damped Hessian is not positive definite, the damping
        grows tenfold, up to this many tries.
      act_order: take columns by falling mean square of their inputs; needs
        `static_groups`. Codes are stored in the order of the weight all the same.
      static_groups: scales of groups from the original weights; if False from the
        weights that the sweep finds when it reaches a group. Scales of other granules
        are from the original weights always.
      refit_scales: set the scales anew for the codes that were chosen, by least
        squares of the output's error.
      block_size: columns whose errors are put onto later blocks together. It changes
        speed, not the result.

    Raises:
      ValueError: a value out of range, or `act_order` without `static_groups`.
    """

    damping: float = 0.01
    damping_tries: int = 5
    act_order: bool = False
    static_groups: bool = True
    refit_scales: bool = False
    block_size: int = 128

    def __post_init__(self) -> None:
        ScaleOptions.__post_init__(self)
        if not _is_number(self.damping) or not self.damping > 0:
            raise ValueError(f"damping={self.damping!r}: use a positive number")
        for name in ("damping_tries", "block_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r}: use a positive integer")
        for name in ("act_order", "static_groups", "refit_scales"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false")
        if self.act_order and not self.static_groups:
            raise ValueError(
                "act_order reaches the columns of a group at different times: it needs "
                "static_groups: true"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTAQOptions(GPTQOptions):
    """Options of GPTAQ: those of GPTQ, and its own.

    Attributes:
      alpha: how much of the error of the inputs is made up for; the default is that of
        the authors' code, 1 is the paper.

    Raises:
      ValueError: as `GPTQOptions`, or `alpha` is not between 0 and 1.
    """

    alpha: float = 0.25

    def __post_init__(self) -> None:
        GPTQOptions.__post_init__(self)
        if not _is_number(self.alpha) or not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha!r}: use a number from 0 to 1")


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def gptq(
    w: jax.Array, spec: Spec, stats: Found, options: GPTQOptions | None = None
) -> QTensor:
    """Quantizes a weight so that its product with the inputs changes least.

    Columns (inputs) are rounded one after another; what each gets wrong is made up for
    by the columns that are not rounded yet, as far as the inputs go together (GPTQ,
    arXiv 2210.17323, section 3.3). Outputs do not depend on each other: a weight that
    is sharded over them is quantized where it lies. For `sherry` four columns at a time
    are set to the best of their 32 states.

    Args:
      w: float `[*batch, *spec.shape]`.
      spec: as `angeljax.formats.make_spec` resolves it; any format.
      stats: `hessian` `[*batch, K, K]`, sum (or mean) of x x' over tokens.
      options: see `GPTQOptions`.

    Returns:
      A QTensor. Where the Hessian was not positive definite, however much it was
      damped, floating-point scales are NaN; `angeljax.compress` raises an error.

    Raises:
      ValueError: granules of several outputs for a weight of several output axes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.algorithms import gptq, rtn
      >>> from angeljax.formats import make_spec
      >>> k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
      >>> w = jax.random.normal(k1, (64, 32))
      >>> x = jax.random.normal(k2, (256, 64)) @ jax.random.normal(k3, (64, 64))
      >>> spec = make_spec(w.shape, w.dtype, format="int4", group_size=32)
      >>> error = lambda q: float(jnp.linalg.norm(x @ (w - q.dequantize())))
      >>> error(gptq(w, spec, {"hessian": x.T @ x})) < 0.7 * error(rtn(w, spec))
      True
    """
    options = GPTQOptions() if options is None else options
    return _quantize(w, spec, stats, None, options)


def gptaq(
    w: jax.Array, spec: Spec, stats: Found, options: GPTAQOptions | None = None
) -> QTensor:
    """GPTQ that also makes up for inputs that quantized layers before it have changed.

    The target is the output of the original model, w x_full, from inputs x of the
    quantized one (GPTAQ, arXiv 2504.02692, section 4).

    Args:
      w: float `[*batch, *spec.shape]`.
      spec: as `angeljax.formats.make_spec` resolves it; any format.
      stats: `hessian` `[*batch, K, K]`, sum of x x' over tokens, and `mismatch` of the
        same shape, sum of (x_full - x) x'; `angeljax.compress_sequential` finds both.
      options: see `GPTAQOptions`.

    Returns:
      As `gptq`.

    Raises:
      ValueError: as `gptq`.

    Example:
      >>> import jax
      >>> from angeljax.algorithms import gptaq
      >>> from angeljax.formats import make_spec
      >>> full = jax.random.normal(jax.random.key(0), (256, 64))
      >>> x = full + 0.1 * jax.random.normal(jax.random.key(1), full.shape)
      >>> w = jax.random.normal(jax.random.key(2), (64, 32))
      >>> spec = make_spec(w.shape, w.dtype, format="int4", group_size=32)
      >>> gptaq(w, spec, {"hessian": x.T @ x, "mismatch": (full - x).T @ x})
      QTensor(int4 g32 [64,32] float32, 4.500 bit/weight)
    """
    options = GPTAQOptions() if options is None else options
    return _quantize(w, spec, stats, options.alpha * stats["mismatch"], options)


def _check(options: GPTQOptions, spec: Spec) -> None:
    check_matrix(spec)
    if options.refit_scales:
        check_refit(spec)


def _quantize(
    w: jax.Array,
    spec: Spec,
    stats: Found,
    mismatch: jax.Array | None,
    options: GPTQOptions,
) -> QTensor:
    _check(options, spec)
    blocks = to_matrix(w, spec)
    h = padded(stats["hessian"].astype(jnp.float32), spec, (-2, -1))
    if mismatch is not None:
        mismatch = padded(mismatch.astype(jnp.float32), spec, (-2, -1))
    weights = scale_weights(stats, spec, options)
    one = functools.partial(_matrix, spec=as_matrix(spec), options=options)
    for _ in range(blocks.ndim - 3):
        one = jax.vmap(one)
    levels, planes, ok = one(blocks, h, mismatch, weights)
    require_definite(ok, options.damping, options.damping_tries)
    return from_matrix(levels, planes, spec)


def _matrix(
    blocks: jax.Array,
    h: jax.Array,
    mismatch: jax.Array | None,
    weights: jax.Array | None,
    *,
    spec: Spec,
    options: GPTQOptions,
) -> tuple[jax.Array, Planes, jax.Array]:
    """Levels, planes, and whether the Hessian was definite, of blocks `[N, G, g]`."""
    x = blocks.reshape(blocks.shape[0], -1).T
    mean = mean_diagonal(h)
    h = h / mean
    order: Any = natural_order(spec)
    if options.act_order:
        order = _by_activation(jnp.asarray(order), jnp.diagonal(h), unit_of(spec))
    planes = search_scales(blocks, spec, options, weights)
    dynamic = spec.granularity == "group" and not options.static_groups
    factored = factor(_permuted(h, order), options.damping, options.damping_tries)
    x = _taken(x, order)
    if mismatch is not None:
        p = _mismatch_update(_permuted(mismatch / mean, order), factored.upper)
        x = x + jnp.matmul(p.T, x, precision=HIGHEST)
    levels, planes = sweep(
        x,
        factored.upper,
        planes,
        jnp.asarray(order // spec.group_size),
        spec,
        block_size=options.block_size,
        refresh=_refresh(spec, options, weights) if dynamic else None,
    )
    levels = _taken(levels, _inverse(order)).T
    if options.refit_scales:
        damped = h + options.damping * jnp.eye(len(h), dtype=jnp.float32)
        w = blocks.reshape(levels.shape)
        planes = refit_scales(w, levels, planes, damped, spec)
    levels = levels.reshape(blocks.shape)
    return levels, marked(planes, factored.ok), factored.ok


def _taken(x: jax.Array, order: Any, axis: int = 0) -> jax.Array:
    """Entries in another order; nothing to do for one that is known to be their own."""
    if isinstance(order, np.ndarray) and np.array_equal(order, np.arange(order.size)):
        return x
    return jnp.take(x, order, axis=axis)


def _inverse(order: Any) -> Any:
    return np.argsort(order) if isinstance(order, np.ndarray) else jnp.argsort(order)


def _permuted(h: jax.Array, order: Any) -> jax.Array:
    return _taken(_taken(h, order), order, axis=1)


def _by_activation(order: jax.Array, diagonal: jax.Array, unit: int) -> jax.Array:
    """`order` by falling mean square; columns that are chosen together stay so."""
    units = order.reshape(-1, unit)
    return units[jnp.argsort(-jnp.sum(diagonal[units], axis=-1))].reshape(-1)


def _mismatch_update(d: jax.Array, upper: jax.Array) -> jax.Array:
    """What each column adds to later ones for the error of its own input.

    Row i solves for the columns F after it: d[i, F] inv(H[F, F]), as upper[F, F]' *
    upper[F, F] is that inverse.
    """
    inner = jnp.triu(jnp.matmul(d, upper.T, precision=HIGHEST), 1)
    return jnp.matmul(inner, upper, precision=HIGHEST)


def _refresh(spec: Spec, options: ScaleOptions, weights: jax.Array | None) -> Refresh:
    """Scales of one group from its weights as they are."""
    g = spec.group_size
    last = spec.k - (spec.groups - 1) * g

    def of(k: int, rows: jax.Array, group: jax.Array, planes: Planes) -> Planes:
        one = dataclasses.replace(spec, shape=(k, spec.shape[-1]))
        blocks = rows.T
        if unit_of(spec) > 1:
            quads = blocks.reshape(blocks.shape[0], -1, unit_of(spec))
            blocks = from_quads(quads, spec.option("group_stride"))
        part = None
        if weights is not None:
            part = jax.lax.dynamic_slice_in_dim(weights, group * g, g)
        return search_scales(blocks[:, None, :], one, options, part, planes)

    def refresh(rows: jax.Array, group: jax.Array, planes: Planes) -> Planes:
        if last == g:
            new = of(g, rows, group, planes)
        else:
            # Padding in the last group must not enter a mean.
            new = jax.lax.cond(
                group == spec.groups - 1,
                lambda: of(last, rows, group, planes),
                lambda: of(g, rows, group, planes),
            )
        return with_group(planes, new, group)

    return refresh


register(
    Algorithm(
        name="gptq",
        quantize=gptq,
        options=GPTQOptions,
        needs=lambda options: ("hessian",),
        check=_check,
        summary="rounds column by column, later columns make up for errors",
    )
)
register(
    Algorithm(
        name="gptaq",
        quantize=gptaq,
        options=GPTAQOptions,
        needs=lambda options: ("hessian", "mismatch"),
        check=_check,
        summary="GPTQ that also makes up for inputs that quantization has changed",
    )
)
