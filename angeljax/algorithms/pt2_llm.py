"""PT2-LLM: ternary weights without training, group after group (arXiv 2510.03267)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.lax import dynamic_slice_in_dim, dynamic_update_slice_in_dim, fori_loop
from jax.scipy.linalg import solve_triangular

from angeljax.algorithms import _fit
from angeljax.algorithms._base import Algorithm, Found, register
from angeljax.algorithms._blocks import as_matrix, from_matrix, padded, to_matrix
from angeljax.algorithms._hessian import (
    HIGHEST,
    factor,
    marked,
    mean_diagonal,
    require_definite,
)
from angeljax.algorithms._sweep import natural_order, sweep, with_group
from angeljax.formats import QTensor, Spec, get_format
from angeljax.formats._blocks import rounded
from angeljax.formats.ternary import mean_scale

Planes = dict[str, jax.Array]
Levels = Literal["group", "column"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PT2LLMOptions:
    """Options of PT2-LLM.

    Attributes:
      iterations: how often levels and scales of a group are fitted to each other.
      levels: "group" keeps the levels of that fit and puts the error of the whole group
        onto the groups to come, as the paper; "column" keeps only its scales and
        chooses levels column by column as GPTQ does.
      damping, damping_tries: of the Hessian, as in `GPTQOptions`.

    Raises:
      ValueError: a value out of range.
    """

    iterations: int = 10
    levels: Levels = "column"
    damping: float = 0.01
    damping_tries: int = 5

    def __post_init__(self) -> None:
        if self.levels not in get_args(Levels):
            known = " or ".join(get_args(Levels))
            raise ValueError(f"levels={self.levels!r}: use {known}")
        number = isinstance(self.damping, int | float)
        if not number or isinstance(self.damping, bool) or not self.damping > 0:
            raise ValueError(f"damping={self.damping!r}: use a positive number")
        for name, least in (("iterations", 0), ("damping_tries", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}={value!r}: use an integer from {least}")


def pt2_llm(
    w: jax.Array, spec: Spec, stats: Found, options: PT2LLMOptions | None = None
) -> QTensor:
    """Quantizes a weight to ternary levels, each group to what the ones before left.

    For each output and group, w = a T + b (b with the option `shift` of the format):

    1. Iterative ternary fitting: the least squares (a, b) for T and the nearest T for
       (a, b) by turns, ten times, from the start of Ternary Weight Networks.
    2. Activation-aware grid alignment: once more (a, b) for this T, with the least
       error of the product with the calibrated inputs.
    3. As in GPTQ, the groups to come make up for the error of this one.

    The paper keeps T from there on (`levels="group"`). Here T is chosen column by
    column in step 3, with the (a, b) of step 2, which loses about a third less. Its
    reordering of columns is left out: groups would no longer be runs of K, and the
    product would have to gather its inputs.

    The same is done for the other formats of few levels: `seq2` (2 bits), `sherry` and
    the two planes of `ptqtp`.

    Args:
      w: float `[*batch, *spec.shape]`.
      spec: granularity "group", of t2, t1_6, seq2, sherry or ptqtp.
      stats: `hessian` `[*batch, K, K]`, sum of x x' over tokens.
      options: see `PT2LLMOptions`.

    Returns:
      A QTensor; its scales are NaN where the Hessian was not positive definite, for
      which `angeljax.compress` raises an error.

    Raises:
      ValueError: another format or granularity.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.algorithms import pt2_llm, rtn
      >>> from angeljax.formats import make_spec
      >>> k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
      >>> w = jax.random.normal(k1, (64, 32))
      >>> x = jax.random.normal(k2, (256, 64)) @ jax.random.normal(k3, (64, 64))
      >>> spec = make_spec(w.shape, w.dtype, format="t2", group_size=32, shift=True)
      >>> error = lambda q: float(jnp.linalg.norm(x @ (w - q.dequantize())))
      >>> error(pt2_llm(w, spec, {"hessian": x.T @ x})) < 0.7 * error(rtn(w, spec))
      True
    """
    options = PT2LLMOptions() if options is None else options
    _check(options, spec)
    matrix = as_matrix(spec)
    blocks = to_matrix(w, spec)
    h = padded(stats["hessian"].astype(jnp.float32), spec, (-2, -1))

    def one(blocks: jax.Array, h: jax.Array) -> tuple[jax.Array, Planes, jax.Array]:
        return _matrix(blocks, h, matrix, options)

    for _ in range(blocks.ndim - 3):
        one = jax.vmap(one)
    levels, planes, ok = one(blocks, h)
    require_definite(ok, options.damping, options.damping_tries)
    return from_matrix(levels, planes, spec)


def _check(options: Any, spec: Spec) -> None:
    del options
    if spec.format not in _fit.FORMATS:
        raise ValueError(
            f"algorithm pt2_llm makes {', '.join(_fit.FORMATS)}, not {spec.format}"
        )
    if spec.granularity != "group":
        raise ValueError(
            "algorithm pt2_llm fits scales group by group: use granularity 'group', "
            f"not {spec.granularity!r}"
        )


def _matrix(
    blocks: jax.Array, h: jax.Array, spec: Spec, options: PT2LLMOptions
) -> tuple[jax.Array, Planes, jax.Array]:
    """Levels, planes, and whether the Hessian was definite, of blocks `[N, G, g]`."""
    fmt, g = get_format(spec.format), spec.group_size
    assert fmt.scales is not None
    # Columns of a group in the order of the sweep, and back.
    inner = natural_order(spec)[:g]
    back = inner.argsort()
    order = jnp.asarray(natural_order(spec))
    h = (h / mean_diagonal(h))[order][:, order]
    factored = factor(h, options.damping, options.damping_tries)
    x = blocks.reshape(blocks.shape[0], -1).T[order]

    def fit(rows: jax.Array, group: jax.Array) -> tuple[jax.Array, Planes]:
        """Levels and planes of rows `[g, N]`, in the order of the sweep."""
        start = group * g
        metric = _square(h, start, g)[back][:, back]
        inside = jnp.arange(g) + start < spec.k
        levels, planes = fit_group(
            rows[back].T, inside, spec, options.iterations, metric
        )
        return levels[:, inner].T, planes

    planes = fmt.scales(blocks, spec)
    if options.levels == "column":
        levels, planes = sweep(
            x,
            factored.upper,
            planes,
            order // g,
            spec,
            block_size=128,
            refresh=lambda rows, i, all_: with_group(all_, fit(rows, i)[1], i),
        )
    else:

        def step(i: jax.Array, carry: tuple) -> tuple:
            x, levels, planes = carry
            rows = dynamic_slice_in_dim(x, i * g, g)
            found, own = fit(rows, i)
            wrong = rows - _values(found[back].T, own, spec).T[inner]
            after = dynamic_slice_in_dim(factored.upper, i * g, g)
            square = dynamic_slice_in_dim(after, i * g, g, axis=1)
            errors = solve_triangular(square, wrong, lower=False, trans=1)
            # Also onto the group itself, which nothing reads any more.
            x = x - jnp.matmul(after.T, errors, precision=HIGHEST)
            levels = dynamic_update_slice_in_dim(levels, found, i * g, 0)
            return x, levels, with_group(planes, own, i)

        start = (x, jnp.zeros_like(x), planes)
        _, levels, planes = fori_loop(0, spec.groups, step, start)
    levels = levels[jnp.argsort(order)].T.reshape(blocks.shape)
    return levels, marked(planes, factored.ok), factored.ok


def fit_group(
    w: jax.Array,
    inside: jax.Array,
    spec: Spec,
    iterations: int,
    metric: jax.Array,
) -> tuple[jax.Array, Planes]:
    """Levels `[N, g]` and planes `[N, 1, 1]` of one group, fitted to each other.

    Args:
      w: float32 `[N, g]`.
      inside: bool `[g]`, False where K is padded.
      spec: of the weight (`as_matrix`).
      iterations: of scales for levels and levels for scales.
      metric: `[g, g]`, in which the scales are fitted once more at the end.
    """
    planes = _start(w, inside, spec)

    def step(_: int, planes: Planes) -> Planes:
        return _fit.refit(w, _nearest(w, planes, spec), planes, inside, spec)

    planes = fori_loop(0, iterations, step, planes)
    levels = _nearest(w, planes, spec)
    return levels, _fit.refit(w, levels, planes, inside, spec, metric)


def _start(w: jax.Array, inside: jax.Array, spec: Spec) -> Planes:
    """Scales of the format; those of Ternary Weight Networks for ternary levels."""
    if spec.format not in ("t2", "t1_6"):
        scales = get_format(spec.format).scales
        assert scales is not None
        one = dataclasses.replace(spec, shape=(spec.group_size, spec.shape[-1]))
        return scales(w[:, None, :], one)
    count = jnp.sum(inside)
    mean = jnp.zeros((w.shape[0], 1), jnp.float32)
    if spec.option("shift"):
        mean = jnp.sum(w, axis=-1, keepdims=True) / count
    size = jnp.where(inside, jnp.abs(w - mean), 0.0)
    threshold = 0.75 * jnp.sum(size, axis=-1, keepdims=True) / count
    kept = inside & (size >= threshold)
    scale = jnp.sum(jnp.where(kept, size, 0.0), axis=-1, keepdims=True)
    scale = scale / jnp.sum(kept, axis=-1, keepdims=True)
    planes = {"scale": mean_scale(scale[..., None], spec)}
    if spec.option("shift"):
        planes["shift"] = rounded(mean[..., None], spec.scale_dtype)
    return planes


def _nearest(w: jax.Array, planes: Planes, spec: Spec) -> jax.Array:
    nearest = get_format(spec.format).nearest
    assert nearest is not None
    return nearest(w[:, None, :], planes, spec)[:, 0]


def _values(levels: jax.Array, planes: Planes, spec: Spec) -> jax.Array:
    values = get_format(spec.format).values
    assert values is not None
    return values(levels[:, None, :], planes, spec)[:, 0]


def _square(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    rows = dynamic_slice_in_dim(x, start, size)
    return dynamic_slice_in_dim(rows, start, size, axis=1)


register(
    Algorithm(
        name="pt2_llm",
        quantize=pt2_llm,
        options=PT2LLMOptions,
        needs=lambda options: ("hessian",),
        formats=_fit.FORMATS,
        check=_check,
        summary="ternary and other few levels, fitted group by group",
    )
)
