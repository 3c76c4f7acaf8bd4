"""Least-squares scales for codes that are chosen already."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.lax import dynamic_slice_in_dim, dynamic_update_slice_in_dim

from angeljax.algorithms._hessian import HIGHEST
from angeljax.algorithms._sweep import Planes, of_group, with_group
from angeljax.formats import Spec, get_format
from angeljax.formats._blocks import Granules, rounded


def check_refit(spec: Spec) -> None:
    """Checks that each output's scales can be set by themselves, to any value.

    Raises:
      ValueError: they cannot.
    """
    if spec.scale_dtype == "uint8":
        raise ValueError(
            f"scales of {spec.format} are powers of two, which least squares cannot "
            "set: leave refit_scales out"
        )
    if spec.granularity not in ("group", "channel"):
        raise ValueError(
            "least-squares scales need one for each group or output: use granularity "
            f"group or channel, not {spec.granularity}"
        )


def refit_scales(
    w: jax.Array, levels: jax.Array, planes: Planes, h: jax.Array, spec: Spec
) -> Planes:
    """The scale of each group, one after another, that leaves the least output error.

    With codes T of one output's group and what is wrong with all of its weights r, the
    error r H r' is least for a scale that is larger by T H r' / T H T' (exact for each
    group, given the others; PT2-LLM has it for each group by itself). A rounded scale
    is taken if it is better than what was there, so that no error grows.

    Args:
      w: float32 `[N, K]`, the weights that are stood for.
      levels: `[N, K]`.
      planes: granule planes.
      h: `[K, K]`, their Hessian.
      spec: of the matrix, with one scale for each group or output.

    Returns:
      Granule planes with other scales.
    """
    fmt = get_format(spec.format)
    assert fmt.values is not None
    g, values_of = spec.group_size, fmt.values
    blocks = levels.reshape(*levels.shape[:-1], spec.groups, g)
    wrong = w - values_of(blocks, planes, spec).reshape(w.shape)
    # Padding is given levels too; nothing is multiplied with it.
    inside = jnp.asarray(Granules(spec).mask().reshape(-1))
    levels, wrong = levels * inside, wrong * inside

    def one_group(i: jax.Array, carry: tuple) -> tuple:
        wrong, planes = carry
        t = dynamic_slice_in_dim(levels, i * g, g, axis=-1)
        rows = dynamic_slice_in_dim(h, i * g, g)
        square = dynamic_slice_in_dim(rows, i * g, g, axis=-1)
        slope = jnp.matmul(wrong, rows.T, precision=HIGHEST)
        slope = jnp.sum(slope * t, axis=-1)
        curve = jnp.sum(jnp.matmul(t, square, precision=HIGHEST) * t, axis=-1)
        here = of_group(planes, i)
        # What one unit of the stored scale is worth.
        unit = here["scale2"].reshape(-1) if "scale2" in here else 1.0
        old = here["scale"].astype(jnp.float32).reshape(-1)
        step = slope / jnp.maximum(curve, jnp.finfo(jnp.float32).tiny)
        new = rounded(_within(old + step / unit, old, spec), here["scale"].dtype)
        step = (new.astype(jnp.float32) - old) * unit
        better = step * (step * curve - 2.0 * slope) < 0
        step = jnp.where(better, step, 0.0)
        new = jnp.where(better, new, here["scale"].reshape(-1))
        planes = with_group(
            planes, {**here, "scale": new.reshape(here["scale"].shape)}, i
        )
        part = dynamic_slice_in_dim(wrong, i * g, g, axis=-1) - step[:, None] * t
        return dynamic_update_slice_in_dim(wrong, part, i * g, axis=-1), planes

    return jax.lax.fori_loop(0, spec.groups, one_group, (wrong, planes))[1]


def _within(scale: jax.Array, old: jax.Array, spec: Spec) -> jax.Array:
    """A scale that the format can hold: positive, finite, no other sign of codes."""
    info = jnp.finfo(spec.scale_dtype)
    low = float(info.smallest_subnormal)
    return jnp.where(old > 0, jnp.clip(scale, low, float(info.max)), old)
