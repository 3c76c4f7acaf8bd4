"""`ragged_matmul`: activations times the packed weights of a mixture of experts."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _api
from pallas_kernels import _implementation as impl
from pallas_kernels._devices import elsewhere
from pallas_kernels._weights import (
    KernelError,
    Planes,
    WeightLayout,
    check_planes,
    package_of,
)
from pallas_kernels.ragged_matmul._product import PACKAGE, product


def ragged_matmul(
    x: jax.Array,
    planes: Planes,
    layout: WeightLayout,
    group_sizes: jax.Array,
    *,
    x_scale: jax.Array | None = None,
    activation: str | None = None,
    out_dtype: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    """Rows of `x`, sorted by expert, times the packed weight of their expert.

    `jax.lax.ragged_dot` for packed weights: the first `group_sizes[0]` rows are
    multiplied by the first weight, the next `group_sizes[1]` by the second, and so on.
    Rows past the sum give zeros. At no time are the weights of more than one expert
    expanded, and experts without rows cost nothing.

    Args:
      x: `[T, K]`, bfloat16, float16, float32, float8, or int8 with `x_scale`.
      planes: as `packed_matmul` takes them, each with a leading axis of E experts;
        `jax.vmap(prepare)` brings them into the order of a device.
      layout: what the planes of one expert mean.
      group_sizes: integers `[E]`, not negative; may be traced.
      x_scale: float32, one entry for each row of int8 `x`; default 1.
      activation: "int8" quantizes float `x` for each token (amax / 127) first. None
        keeps its precision.
      out_dtype: default that of a float `x`, float32 for int8.
      implementation: "mosaic_gpu", "xla" or "reference"; None takes the one whose
        order the planes are in, or "xla".

    Returns:
      `[T, N]`. Integer products are exact; scales are applied in float32.
      Differentiable in `x`; the planes are constants.

    Raises:
      KernelError: shapes, dtypes or planes that do not go together, or an
        implementation that cannot run here.

    Example:
      >>> import jax.numpy as jnp
      >>> from pallas_kernels import WeightLayout, ragged_matmul
      >>> layout = WeightLayout(format="int8", k=64, n=8, group_size=64)
      >>> planes = {
      ...     "codes": jnp.ones((2, 64, 8), jnp.int8),
      ...     "scale": jnp.asarray([1.0, 2.0]).reshape(2, 1, 1) * jnp.ones((2, 1, 8)),
      ... }
      >>> sizes = jnp.asarray([1, 2])
      >>> ragged_matmul(jnp.ones((4, 64)), planes, layout, sizes)[:, 0].tolist()
      [64.0, 128.0, 128.0, 0.0]
    """
    package = package_of(layout)
    if x.ndim != 2:
        raise KernelError(f"x must be [T, {layout.k}], not {list(x.shape)}")
    impl.check_call(x, layout, x_scale, None, activation)
    group_sizes = _group_sizes(group_sizes)
    _check_experts(planes, layout, group_sizes.shape[0])
    if out_dtype is None:
        out_dtype = jnp.float32 if x.dtype == jnp.int8 else x.dtype
    if implementation is None:
        # What is prepared for a kernel that has no ragged form is read by XLA.
        best = _api.choose(package, x, layout, activation)
        name = best if best == "mosaic_gpu" else "xla"
    else:
        name = implementation
        _check_named(name, x, layout, activation)
    if not x.shape[0]:
        return jnp.zeros((0, layout.n), out_dtype)
    if x_scale is not None:
        x_scale = x_scale.astype(jnp.float32).reshape(-1, 1)
        x_scale = jnp.broadcast_to(x_scale, (x.shape[0], 1))
    ragged = product(name, layout, activation, jnp.dtype(out_dtype))
    return ragged(x, dict(planes), group_sizes, x_scale)


def _group_sizes(group_sizes: Any) -> jax.Array:
    sizes = jnp.asarray(group_sizes)
    if (
        sizes.ndim != 1
        or not sizes.size
        or not jnp.issubdtype(sizes.dtype, jnp.integer)
    ):
        raise KernelError(
            "group_sizes must be an int32 array [E] with one entry for each expert, "
            f"not {sizes.dtype} {list(sizes.shape)}"
        )
    return sizes.astype(jnp.int32)


def _check_experts(planes: Planes, layout: WeightLayout, experts: int) -> None:
    """Refuses planes that are not those of one weight for each expert."""
    check_planes(planes, layout.replace(order="any"))  # the names
    for name, plane in planes.items():
        if not plane.ndim or plane.shape[0] != experts:
            raise KernelError(
                f"group_sizes [{experts}] has one entry for each expert, and plane "
                f"{name} {list(plane.shape)} has not that many: its first axis must be "
                "that of the experts"
            )
    shapes = tuple((n, p.shape[1:], jnp.dtype(p.dtype)) for n, p in planes.items())
    why = _misfit(shapes, layout)
    if why is not None:
        raise KernelError(f"the planes of an expert do not fit their layout: {why}")


@functools.lru_cache(maxsize=1024)
def _misfit(shapes: Any, layout: WeightLayout) -> str | None:
    """What is wrong with the planes of one expert, or None."""
    one = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in shapes}
    found: list[WeightLayout] = []

    def restore(planes: Any) -> Any:
        plain, there = impl.canonical(package_of(layout), planes, layout)
        found.append(there)
        return dict(plain)

    try:
        plain = jax.eval_shape(restore, one)
        check_planes(plain, found[0])
        ranks = {plane.ndim for plane in plain.values()}
        return None if ranks == {2} else "there are axes besides that of the experts"
    except (TypeError, ValueError) as e:
        return str(e).partition("\n")[0]


def _check_named(
    name: str, x: jax.Array, layout: WeightLayout, activation: str | None
) -> None:
    module = impl.implementation(PACKAGE, name)
    if module.ORDER not in (None, layout.order):
        raise KernelError(
            f"implementation {name!r} reads planes in the order {module.ORDER!r}, "
            f"these are in {layout.order!r}: prepare them with implementation={name!r}"
        )
    why = elsewhere(name) or module.unsupported(x, layout, activation)
    if why is not None:
        raise KernelError(
            f"implementation {name!r} cannot run this: {why}; use implementation='xla'"
        )
