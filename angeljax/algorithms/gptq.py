"""GPTQ and GPTAQ: codes chosen column by column, errors made up for by later columns."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.algorithms._base import Algorithm, Found, register, require
from angeljax.algorithms._blocks import as_matrix, from_matrix, padded, to_matrix
from angeljax.algorithms._hessian import HIGHEST, factor, mean_diagonal
from angeljax.algorithms._sweep import (
    Planes,
    Refresh,
    natural_order,
    sweep,
    unit_of,
    with_group,
)
from angeljax.formats import QTensor, Spec, get_format
from angeljax.formats.microscaling import nv_block_scales
from angeljax.formats.sherry import from_quads

_NOT_DEFINITE = (
    "the Hessian of its inputs is not positive definite even with damping "
    "{damping:g}: calibrate with more tokens, or raise damping"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQOptions:
    """Options of GPTQ.

    Attributes:
      damping: added to the diagonal of the Hessian, as a share of its mean. Inputs that
        were never other than zero do not enter the mean.
      damping_tries: while the damped Hessian is not positive definite, the damping
        grows tenfold, up to this many tries.
      act_order: take columns by falling mean square of their inputs; needs
        `static_groups`. Codes are stored in the order of the weight all the same.
      static_groups: scales of groups from the original weights. Otherwise from the
        weights that the sweep finds when it reaches a group. Scales of other granules
        are from the original weights always.
      block_size: columns whose errors are put onto later blocks together. It changes
        speed, not the result.

    Raises:
      ValueError: a value out of range, or `act_order` without `static_groups`.
    """

    damping: float = 0.01
    damping_tries: int = 5
    act_order: bool = False
    static_groups: bool = False
    block_size: int = 128

    def __post_init__(self) -> None:
        if not _is_number(self.damping) or not self.damping > 0:
            raise ValueError(f"damping={self.damping!r}: use a positive number")
        for name in ("damping_tries", "block_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r}: use a positive integer")
        for name in ("act_order", "static_groups"):
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
        super().__post_init__()
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
    return _quantize(w, spec, stats["hessian"], None, options, 0.0)


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
      QTensor(int4 g32 [64,32] float32, 4.5 bit/weight)
    """
    options = GPTAQOptions() if options is None else options
    mismatch = stats["mismatch"]
    return _quantize(w, spec, stats["hessian"], mismatch, options, options.alpha)


def _quantize(
    w: jax.Array,
    spec: Spec,
    hessian: jax.Array,
    mismatch: jax.Array | None,
    options: GPTQOptions,
    alpha: float,
) -> QTensor:
    matrix = as_matrix(spec)
    blocks = to_matrix(w, spec)
    h = padded(hessian.astype(jnp.float32), spec, (-2, -1))
    d = None
    if mismatch is not None:
        d = alpha * padded(mismatch.astype(jnp.float32), spec, (-2, -1))

    def one(blocks: jax.Array, h: jax.Array, d: jax.Array | None) -> tuple:
        return _matrix(blocks, h, d, matrix, options)

    for _ in range(blocks.ndim - 3):
        one = jax.vmap(one)
    levels, planes, ok = one(blocks, h, d)
    most = options.damping * 10.0 ** (options.damping_tries - 1)
    require(ok, _NOT_DEFINITE.format(damping=most))
    return from_matrix(levels, planes, spec)


def _matrix(
    blocks: jax.Array,
    h: jax.Array,
    d: jax.Array | None,
    spec: Spec,
    options: GPTQOptions,
) -> tuple[jax.Array, Planes, jax.Array]:
    """Levels, planes, and whether the Hessian was definite, of blocks `[N, G, g]`."""
    fmt = get_format(spec.format)
    assert fmt.scales is not None
    x = blocks.reshape(blocks.shape[0], -1).T
    mean = mean_diagonal(h)
    h = h / mean
    order = jnp.asarray(natural_order(spec))
    if options.act_order:
        order = _by_activation(order, jnp.diagonal(h), unit_of(spec))
    planes = fmt.scales(blocks, spec)
    dynamic = spec.granularity == "group" and not options.static_groups
    factored = factor(_permuted(h, order), options.damping, options.damping_tries)
    x = x[order]
    if d is not None:
        p = _mismatch_update(_permuted(d / mean, order), factored.upper)
        x = x + jnp.matmul(p.T, x, precision=HIGHEST)
    levels, planes = sweep(
        x,
        factored.upper,
        planes,
        order // spec.group_size,
        spec,
        block_size=options.block_size,
        refresh=_refresh(spec) if dynamic else None,
    )
    levels = levels[jnp.argsort(order)].T.reshape(blocks.shape)
    planes = {
        name: jnp.where(factored.ok, p, jnp.nan).astype(p.dtype)
        if jnp.issubdtype(p.dtype, jnp.floating)
        else p
        for name, p in planes.items()
    }
    return levels, planes, factored.ok


def _permuted(h: jax.Array, order: jax.Array) -> jax.Array:
    return h[order][:, order]


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


def _refresh(spec: Spec) -> Refresh:
    """Scales of one group from its weights as they are."""
    g = spec.group_size
    last = spec.k - (spec.groups - 1) * g

    def of(k: int, rows: jax.Array, planes: Planes) -> Planes:
        one = dataclasses.replace(spec, shape=(k, spec.shape[-1]))
        blocks = rows.T
        if unit_of(spec) > 1:
            quads = blocks.reshape(blocks.shape[0], -1, unit_of(spec))
            blocks = from_quads(quads, spec.option("group_stride"))
        blocks = blocks[:, None, :]
        if "scale2" in planes:
            amax = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
            return nv_block_scales(amax, planes["scale2"])
        fmt = get_format(spec.format)
        assert fmt.scales is not None
        return fmt.scales(blocks, one)

    def refresh(rows: jax.Array, group: jax.Array, planes: Planes) -> Planes:
        if last == g:
            new = of(g, rows, planes)
        else:
            # Padding in the last group must not enter a mean.
            new = jax.lax.cond(
                group == spec.groups - 1,
                lambda: of(last, rows, planes),
                lambda: of(g, rows, planes),
            )
        return with_group(planes, new, group)

    return refresh


register(
    Algorithm(
        name="gptq",
        quantize=gptq,
        options=GPTQOptions,
        needs=lambda options: ("hessian",),
        summary="rounds column by column, later columns make up for errors",
    )
)
register(
    Algorithm(
        name="gptaq",
        quantize=gptaq,
        options=GPTAQOptions,
        needs=lambda options: ("hessian", "mismatch"),
        summary="GPTQ that also makes up for inputs that quantization has changed",
    )
)
