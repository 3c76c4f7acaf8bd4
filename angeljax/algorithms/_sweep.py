"""The sweep of GPTQ: column after column, each error put onto the columns to come.

A sweep works on `[K, N]`: weights of one column (an input) lie together, outputs are
independent of each other. Compile time does not depend on the size: both loops, over
blocks of columns and over the columns of a block, are rolled.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import dynamic_slice_in_dim, dynamic_update_slice_in_dim, fori_loop

from angeljax.algorithms._hessian import HIGHEST
from angeljax.formats import Spec, get_format

Planes = dict[str, jax.Array]
# Rows [n, N], planes of their group, factor [n, n] -> levels and values [n, N].
Choose = Callable[[jax.Array, Planes, jax.Array], tuple[jax.Array, jax.Array]]
# Rows [g, N] of one group, its index, all planes -> all planes, those of it replaced.
Refresh = Callable[[jax.Array, jax.Array, Planes], Planes]


def unit_of(spec: Spec) -> int:
    """Columns that are chosen together: 4 for 3:4 sparsity, else 1."""
    return 1 if get_format(spec.format).pointwise else 4


def natural_order(spec: Spec) -> np.ndarray:
    """Columns `[k_padded]` in the order of the sweep: those chosen together adjoin."""
    columns = np.arange(spec.k_padded)
    if unit_of(spec) == 4 and spec.option("group_stride") == 16:
        columns = columns.reshape(-1, 4, 16).swapaxes(1, 2).reshape(-1)
    return columns


def block_columns(size: int, group: int | None) -> int:
    """Columns of a block: about `size`, so that groups and blocks begin together."""
    if group is None:
        return size
    if group <= size:
        return group * (size // group)
    return max(d for d in range(1, size + 1) if group % d == 0)


def sweep(
    x: jax.Array,
    upper: jax.Array,
    planes: Planes,
    group_of: jax.Array,
    spec: Spec,
    *,
    block_size: int,
    refresh: Refresh | None = None,
) -> tuple[jax.Array, Planes]:
    """Chooses the levels of one matrix (GPTQ, arXiv 2210.17323, algorithm 1).

    Args:
      x: float32 `[K, N]`, columns in the order of the sweep.
      upper: `[K, K]` in the same order, see `Factored`.
      planes: granule planes of the format.
      group_of: int32 `[K]`, the group of each column.
      spec: of the matrix (`as_matrix`).
      block_size: columns whose errors are put onto later blocks together.
      refresh: finds the scales of a group when the sweep reaches it; groups must then
        lie in order. None: `planes` are those of all groups already.

    Returns:
      Levels `[K, N]`, in the order of the sweep, and granule planes.
    """
    k, n = x.shape
    unit, g = unit_of(spec), spec.group_size
    choose = nearest(spec) if unit == 1 else nearest_quad(spec)
    block = block_columns(block_size, None if refresh is None else g)
    block = max(unit, block // unit * unit)
    count = -(-k // block)
    more = count * block - k
    # Never reached by the loops; slices must not be moved to fit.
    x = jnp.pad(x, ((0, more), (0, 0)))
    upper = jnp.pad(upper, ((0, more), (0, more)))
    group_of = jnp.pad(group_of, (0, more))

    def one_block(b: jax.Array, carry: tuple) -> tuple:
        x, levels, planes = carry
        start = b * block
        rows = dynamic_slice_in_dim(upper, start, block)
        square = dynamic_slice_in_dim(rows, start, block, axis=1)

        def one_unit(i: jax.Array, carry: tuple) -> tuple:
            here, errors, chosen, planes = carry
            at = i * unit
            group = group_of[start + at]
            if refresh is not None:
                # A group that is longer than a block begins with one.
                source, first = (here, at) if g <= block else (x, start)
                planes = jax.lax.cond(
                    (start + at) % g == 0,
                    lambda: refresh(
                        dynamic_slice_in_dim(source, first, g), group, planes
                    ),
                    lambda: planes,
                )
            w = dynamic_slice_in_dim(here, at, unit)
            u = dynamic_slice_in_dim(square, at, unit)
            u_unit = dynamic_slice_in_dim(u, at, unit, axis=1)
            level, value = choose(w, of_group(planes, group), u_unit)
            error = forward_substitution(w - value, u_unit)
            here = here - jnp.matmul(u.T, error, precision=HIGHEST)
            return (
                here,
                dynamic_update_slice_in_dim(errors, error, at, 0),
                dynamic_update_slice_in_dim(chosen, level, at, 0),
                planes,
            )

        here = dynamic_slice_in_dim(x, start, block)
        units = jnp.minimum(block, k - start) // unit
        empty = jnp.zeros_like(here)
        _, errors, chosen, planes = fori_loop(
            0, units, one_unit, (here, empty, empty, planes)
        )
        # Also onto the columns of the block itself, which nothing reads any more.
        x = x - jnp.matmul(rows.T, errors, precision=HIGHEST)
        return x, dynamic_update_slice_in_dim(levels, chosen, start, 0), planes

    _, levels, planes = fori_loop(0, count, one_block, (x, jnp.zeros_like(x), planes))
    return levels[:k], planes


def of_group(planes: Planes, group: jax.Array) -> Planes:
    """The planes `[N', 1, 1]` of one group."""
    return {
        name: p if p.shape[-2] == 1 else dynamic_slice_in_dim(p, group, 1, axis=-2)
        for name, p in planes.items()
    }


def with_group(planes: Planes, new: Planes, group: jax.Array) -> Planes:
    """`planes` with those `[N', 1, 1]` of one group replaced."""
    return {
        name: p
        if p.shape[-2] == 1 and name == "scale2"
        else dynamic_update_slice_in_dim(p, new[name], group, axis=-2)
        for name, p in planes.items()
    }


def forward_substitution(wrong: jax.Array, u: jax.Array) -> jax.Array:
    """`inv(u') wrong` for `wrong [n, N]` and upper triangular `u [n, n]`, n small."""
    rows: list[jax.Array] = []
    for i in range(u.shape[0]):
        rest = wrong[i] - sum(u[j, i] * rows[j] for j in range(i))
        rows.append(rest / u[i, i])
    return jnp.stack(rows)


def nearest(spec: Spec) -> Choose:
    """The nearest level of each weight by itself."""
    fmt = get_format(spec.format)
    assert fmt.nearest is not None and fmt.values is not None
    find, value_of = fmt.nearest, fmt.values

    def choose(w: jax.Array, planes: Planes, u: jax.Array) -> tuple:
        del u
        levels = find(w.T[:, None, :], planes, spec)
        values = value_of(levels, planes, spec)
        return levels[:, 0].T, values[:, 0].T

    return choose


def quad_levels() -> np.ndarray:
    """float32 `[32, 4]`: one zero and three signs, all that four weights may be."""
    states = []
    for zero in range(4):
        for bits in range(8):
            signs = [1.0 - 2.0 * (bits >> i & 1) for i in range(3)]
            states.append([*signs[:zero], 0.0, *signs[zero:]])
    return np.asarray(states, np.float32)


def nearest_quad(spec: Spec) -> Choose:
    """Of the 32 states of four weights the one with the least error of the output.

    Given that later columns make up for what they can, an error d of these four costs
    d inv(u' u) d' = |d inv(u)|^2.
    """
    table = quad_levels()

    def choose(w: jax.Array, planes: Planes, u: jax.Array) -> tuple:
        n = w.shape[-1]
        scale = planes["scale"].astype(jnp.float32).reshape(-1)
        target = forward_substitution(w, u)  # [4, N]
        states = forward_substitution(jnp.asarray(table.T), u)  # [4, 32]
        # |target - scale * state|^2 without |target|^2.
        cross = jnp.matmul(states.T, target, precision=HIGHEST)
        square = jnp.sum(states * states, axis=0)[:, None]
        cost = scale * (scale * square - 2.0 * cross)
        best = jnp.argmin(jnp.broadcast_to(cost, (len(table), n)), axis=0)
        levels = jnp.asarray(table)[best].T
        return levels, levels * scale

    return choose
