"""What the public products share: validation, choice of implementation, preparation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _fused
from pallas_kernels import _implementation as impl
from pallas_kernels._devices import elsewhere
from pallas_kernels._weights import (
    CANONICAL,
    KernelError,
    Planes,
    WeightLayout,
    check_planes,
)


def matmul(
    package: str,
    formats: Sequence[str],
    x: jax.Array,
    planes: Planes,
    layout: WeightLayout,
    *,
    x_scale: jax.Array | None,
    bias: jax.Array | None,
    activation: str | None,
    out_dtype: Any,
    name: str | None,
    norm: jax.Array | None = None,
    norm_eps: float = 1e-6,
    gate: str | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Validates, chooses and calls; see `ternary_matmul`."""
    check_format(formats, layout)
    around = norm is not None or gate is not None or residual is not None
    if around:
        _fused.check(x, layout, norm, gate, residual)
    features = jax.ShapeDtypeStruct((*x.shape[:-1], layout.k), x.dtype)
    impl.check_call(features if gate else x, layout, x_scale, bias, activation)
    check_planes(planes, layout)
    if out_dtype is None:
        out_dtype = jnp.float32 if x.dtype == jnp.int8 else x.dtype
    rows = jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), layout.k), x.dtype)
    if name is None:
        name = choose(package, rows, layout, activation)
    module = impl.implementation(package, name)
    wanted = module.ORDER or CANONICAL
    if layout.order != wanted:
        if wanted != CANONICAL:
            raise KernelError(
                f"implementation {name!r} reads planes in the order {wanted!r}, these "
                f"are in {layout.order!r}: prepare them with implementation={name!r}"
            )
        planes, layout = impl.canonical(package, planes, layout)
    # TPU kernels also run in Pallas' interpret mode, anywhere.
    why = None if name == "tpu" else elsewhere(name)
    why = why or module.unsupported(rows, layout, activation)
    if why is not None:
        raise KernelError(
            f"implementation {name!r} cannot run this: {why}; use implementation='xla'"
        )
    wide = activation is None
    if around and (
        x.dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
        and jnp.dtype(out_dtype) in (jnp.bfloat16, jnp.float16, jnp.float32)
        and _fused.takes(module, rows.shape[0], layout, wide)
    ):
        return _fused.call(
            package,
            name,
            x,
            planes,
            layout,
            norm=norm,
            eps=norm_eps,
            gate=gate,
            bias=bias,
            residual=residual,
            activation=activation,
            out_dtype=jnp.dtype(out_dtype),
        )
    y = impl.call(
        package,
        name,
        _fused.before(x, norm, norm_eps, gate),
        planes,
        layout,
        x_scale=x_scale,
        bias=bias,
        activation=activation,
        out_dtype=out_dtype,
    )
    return y if residual is None else residual.astype(y.dtype) + y


def choose(package: str, x: Any, layout: WeightLayout, activation: str | None) -> str:
    """The implementation for `x [M, K]`: that of the planes' order, or "xla"."""
    name = impl.reader(package, layout.order)
    why = elsewhere(name)
    if why is not None:
        raise KernelError(
            f"the weight is prepared for implementation {name!r}, but {why}: restore "
            "it and prepare it here, or use implementation='xla'"
        )
    if impl.implementation(package, name).unsupported(x, layout, activation) is None:
        return name
    return "xla"


def prepare(
    package: str,
    formats: Sequence[str],
    planes: Planes,
    layout: WeightLayout,
    name: str,
) -> tuple[Planes, WeightLayout]:
    """Canonical planes into the order of an implementation."""
    check_format(formats, layout)
    check_planes(planes, layout)
    if layout.order != CANONICAL:
        raise KernelError(f"the planes are prepared already, in {layout.order!r}")
    module = impl.implementation(package, name)
    if module.ORDER is None:
        return dict(planes), layout
    why = module.unsupported(None, layout, None)
    if why is not None:
        raise KernelError(f"implementation {name!r} cannot hold this weight: {why}")
    return module.prepare(planes, layout)


def check_format(formats: Sequence[str], layout: WeightLayout) -> None:
    """Refuses a format that belongs to another operation."""
    if layout.format not in formats:
        raise KernelError(
            f"no product here for the format {layout.format!r}: "
            f"this one takes {', '.join(formats)}"
        )
