"""3:4 sparse ternary weights by least squares under the statistics of their inputs."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from angeljax.algorithms._base import Algorithm, Found, register
from angeljax.algorithms._blocks import as_matrix, from_matrix, padded, to_matrix
from angeljax.algorithms._hessian import mean_diagonal
from angeljax.algorithms._refit import check_refit, refit_scales
from angeljax.algorithms._sweep import Planes
from angeljax.formats import QTensor, Spec, get_format
from angeljax.formats._blocks import Granules
from angeljax.formats.sherry import from_quads, to_quads
from angeljax.formats.ternary import mean_scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lstsq34Options:
    """Options of `lstsq34`.

    Attributes:
      rounds: of choosing zeros for a scale and a scale for the zeros.
      damping: added to the diagonal of the Hessian for the last scales, as a share of
        its mean.

    Raises:
      ValueError: a value out of range.
    """

    rounds: int = 3
    damping: float = 0.01

    def __post_init__(self) -> None:
        if type(self.rounds) is not int or self.rounds < 1:
            raise ValueError(f"rounds={self.rounds!r}: use a positive integer")
        number = isinstance(self.damping, int | float) and self.damping is not True
        if not number or not self.damping >= 0:
            raise ValueError(f"damping={self.damping!r}: use a number that is not < 0")


def lstsq34(
    w: jax.Array, spec: Spec, stats: Found, options: Lstsq34Options | None = None
) -> QTensor:
    """Chooses which of four weights become zero, and scales, by weighted least squares.

    Each weight counts as much as the mean square h of its input. In turns, the scale is
    d = sum h |w| / sum h over kept weights, and the zero of each four is where
    h (w^2 - (|w| - d)^2), what a zero costs over +-d, is least. The last scales are
    exact for the codes under the whole Hessian. No weight makes up for another: see
    `gptq` for that.

    Args:
      w: float `[*batch, *spec.shape]`.
      spec: as `angeljax.formats.make_spec` resolves it, of format `sherry`.
      stats: `hessian` `[*batch, K, K]`, sum (or mean) of x x' over tokens.
      options: see `Lstsq34Options`.

    Returns:
      A QTensor.

    Raises:
      ValueError: a scale for the whole tensor.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.algorithms import lstsq34, rtn
      >>> from angeljax.formats import make_spec
      >>> w = jax.random.normal(jax.random.key(0), (128, 32))
      >>> x = jax.random.normal(jax.random.key(1), (512, 128)) * jnp.arange(1.0, 129)
      >>> spec = make_spec(w.shape, w.dtype, format="sherry", group_size=64)
      >>> error = lambda q: float(jnp.linalg.norm(x @ (w - q.dequantize())))
      >>> error(lstsq34(w, spec, {"hessian": x.T @ x})) < error(rtn(w, spec))
      True
    """
    options = Lstsq34Options() if options is None else options
    check_refit(spec)
    blocks = to_matrix(w, spec)
    h = padded(stats["hessian"].astype(jnp.float32), spec, (-2, -1))
    one = functools.partial(_matrix, spec=as_matrix(spec), options=options)
    for _ in range(blocks.ndim - 3):
        one = jax.vmap(one)
    levels, planes = one(blocks, h)
    return from_matrix(levels, planes, spec)


def _matrix(
    blocks: jax.Array, h: jax.Array, *, spec: Spec, options: Lstsq34Options
) -> tuple[jax.Array, Planes]:
    """Levels and planes of blocks `[N, G, g]`."""
    fmt, granules = get_format(spec.format), Granules(spec)
    assert fmt.scales is not None
    h = h / mean_diagonal(h)
    inside = jnp.asarray(granules.mask(), jnp.float32)
    # Inputs that are always zero do not count, but among themselves they are equal.
    weights = (jnp.diagonal(h).reshape(blocks.shape[-2:]) + options.damping) * inside
    a = jnp.abs(blocks)

    def zeros(d: jax.Array) -> jax.Array:
        cost = weights * (2.0 * a - d) * d
        # What is padded becomes the zero of its four.
        cost = jnp.where(inside > 0, cost, -jnp.inf)
        quads = to_quads(cost, spec.option("group_stride"))
        least = jnp.argmin(quads, axis=-1)[..., None] == jnp.arange(4)
        return from_quads(least, spec.option("group_stride"))

    def one_round(_: int, carry: tuple) -> tuple:
        d, _ = carry
        zero = zeros(d)
        kept = jnp.where(zero, 0.0, weights)
        d = granules.sum(kept * a) / jnp.maximum(granules.sum(kept), 1e-30)
        return d, zero

    d = fmt.scales(blocks, spec)["scale"].astype(jnp.float32)
    start = (d, jnp.zeros(blocks.shape, bool))
    d, zero = jax.lax.fori_loop(0, options.rounds, one_round, start)
    levels = jnp.where(zero, 0.0, jnp.where(blocks < 0, -1.0, 1.0))
    planes = {"scale": mean_scale(jnp.maximum(d, 0.0), spec)}
    rows = (blocks.shape[0], -1)
    damped = h + options.damping * jnp.eye(spec.k_padded, dtype=jnp.float32)
    planes = refit_scales(
        blocks.reshape(rows), levels.reshape(rows), planes, damped, spec
    )
    return levels, planes


register(
    Algorithm(
        name="lstsq34",
        quantize=lstsq34,
        options=Lstsq34Options,
        needs=lambda options: ("hessian",),
        formats=("sherry",),
        check=lambda options, spec: check_refit(spec),
        summary="3:4 zeros and scales by least squares under the Hessian",
    )
)
