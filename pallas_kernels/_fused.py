"""Products with what stands around them in a decoder.

A norm or a gate before a product and a residual after it are small kernels of their
own, each of which costs more than its arithmetic. Kernels that read the activations
themselves can do them on the way; for all others they are written out here.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from pallas_kernels import _implementation as impl
from pallas_kernels._weights import KernelError, Planes, WeightLayout

GATES = ("silu",)


def check(
    x: Any, layout: WeightLayout, norm: Any, gate: str | None, residual: Any
) -> None:
    """Refuses what does not go together.

    Raises:
      KernelError: shapes, dtypes or options that no product takes.
    """
    if gate not in (None, *GATES):
        raise KernelError(f"gate must be None or 'silu', not {gate!r}")
    if norm is not None and gate is not None:
        raise KernelError("a norm or a gate goes before a product, not both")
    if not jnp.issubdtype(x.dtype, jnp.floating) and (norm is not None or gate):
        raise KernelError(f"a norm or a gate takes float x, not {x.dtype}")
    if norm is not None and norm.shape != (layout.k,):
        raise KernelError(f"norm must have shape [{layout.k}], not {list(norm.shape)}")
    if gate is not None and (not x.ndim or x.shape[-1] != 2 * layout.k):
        raise KernelError(
            f"with a gate x must end in 2 x {layout.k} features, gate before values, "
            f"not {list(x.shape)}"
        )
    if residual is not None and residual.shape != (*x.shape[:-1], layout.n):
        raise KernelError(
            f"residual must have shape {[*x.shape[:-1], layout.n]}, "
            f"not {list(residual.shape)}"
        )


def before(x: jax.Array, norm: Any, eps: float, gate: str | None) -> jax.Array:
    """`x` after a norm (arXiv 1910.07467) or a gate (SwiGLU, arXiv 2002.05202)."""
    if gate is not None:
        a, b = jnp.split(x, 2, axis=-1)
        return jax.nn.silu(a) * b
    if norm is None:
        return x
    h = x.astype(jnp.float32)
    h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps)
    return norm.astype(x.dtype) * h.astype(x.dtype)


def takes(module: ModuleType, m: int, layout: WeightLayout, wide: bool) -> bool:
    """Whether an implementation does these things by itself for `m` float tokens."""
    fuses = getattr(module, "fuses", None)
    return fuses is not None and fuses(m, layout, wide)


def call(
    package: str,
    name: str,
    x: jax.Array,
    planes: Planes,
    layout: WeightLayout,
    *,
    norm: jax.Array | None,
    eps: float,
    gate: str | None,
    bias: jax.Array | None,
    residual: jax.Array | None,
    activation: str | None,
    out_dtype: Any,
) -> jax.Array:
    """The product of an implementation that takes them, `x [..., K or 2 K]`."""
    rows = x.reshape(-1, x.shape[-1])
    if residual is not None:
        residual = residual.reshape(-1, layout.n)
    product = _product(package, name, layout, eps, gate, activation, out_dtype)
    y = product(rows, dict(planes), norm, bias, residual)
    return y.reshape(*x.shape[:-1], layout.n)


@functools.lru_cache(maxsize=4096)
def _product(
    package: str,
    name: str,
    layout: WeightLayout,
    eps: float,
    gate: str | None,
    activation: str | None,
    dtype: Any,
) -> Any:
    module = impl.implementation(package, name)

    def apart(x: Any, planes: Any, norm: Any, bias: Any, residual: Any) -> jax.Array:
        y = impl.call(
            package,
            name,
            before(x, norm, eps, gate),
            planes,
            layout,
            x_scale=None,
            bias=bias,
            activation=activation,
            out_dtype=dtype,
        )
        return y if residual is None else residual + y

    @custom_vmap
    def forward(x: Any, planes: Any, norm: Any, bias: Any, residual: Any) -> jax.Array:
        return module.matmul(
            x,
            planes,
            layout,
            x_scale=None,
            bias=bias,
            activation=activation,
            out_dtype=dtype,
            norm=norm,
            eps=eps,
            gate=gate,
            residual=residual,
        )

    @forward.def_vmap
    def _(size: int, batched: Any, *args: Any) -> Any:
        del size
        axes = jax.tree.map(lambda b: 0 if b else None, batched)
        return jax.vmap(apart, in_axes=axes)(*args), True

    @jax.custom_vjp
    def product(x: Any, planes: Any, norm: Any, bias: Any, residual: Any) -> jax.Array:
        return forward(x, planes, norm, bias, residual)

    def fwd(*args: Any) -> Any:
        return forward(*args), args

    def bwd(saved: Any, g: jax.Array) -> Any:
        return jax.vjp(apart, *saved)[1](g)

    product.defvjp(fwd, bwd)
    return product
