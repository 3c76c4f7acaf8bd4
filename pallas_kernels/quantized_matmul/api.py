"""`quantized_matmul`: activations times weights of 8 or 4 bits."""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels import _api, _implementation
from pallas_kernels._weights import QUANTIZED, Planes, WeightLayout

_PACKAGE = "pallas_kernels.quantized_matmul"


def quantized_matmul(
    x: jax.Array,
    planes: Planes,
    layout: WeightLayout,
    *,
    x_scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: str | None = None,
    out_dtype: Any = None,
    implementation: str | None = None,
    norm: jax.Array | None = None,
    norm_eps: float = 1e-6,
    gate: str | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """`x @ W (+ bias)` with `W` of 8 or 4 bits, from its packed planes.

    Formats: int8 and int4 with or without zero points, FP8 (e4m3, e5m2), NVFP4, MXFP4
    and MXFP8 (OCP Microscaling Formats v1.0), NF4 (arXiv 2305.14314).

    Args:
      x: `[..., K]`, bfloat16, float16, float32, float8, or int8 with `x_scale`.
      planes: arrays of the packed weight; see `WeightLayout`. `jax.vmap` adds batches
        of weights (experts).
      layout: what the planes mean.
      x_scale: float32, one entry for each row of int8 `x`; default 1.
      bias: `[N]`.
      activation: "int8" quantizes float `x` for each token (amax / 127) first, which
        is what the fast products of GPUs and TPUs take. None keeps its precision.
      out_dtype: default that of a float `x`, float32 for int8.
      implementation: "mosaic_gpu", "triton", "tpu", "xla" or "reference"; None takes
        the one whose order the planes are in.
      norm: weight `[K]` of a root-mean-square norm (arXiv 1910.07467) of float `x`.
      norm_eps: added to the mean square.
      gate: "silu" takes `x [..., 2 K]` and multiplies silu of its first half by the
        second (SwiGLU, arXiv 2002.05202).
      residual: `[..., N]`, added to the product. Kernels for a few tokens do these
        three by themselves; they are written out before and after any other.

    Returns:
      `[..., N]`. Integer products are exact; scales are applied in float32.
      Differentiable in `x` and `bias`; the planes are constants.

    Raises:
      KernelError: shapes, dtypes or planes that do not go together, or an
        implementation that cannot run here.

    Example:
      >>> import jax.numpy as jnp
      >>> from pallas_kernels import WeightLayout, quantized_matmul
      >>> layout = WeightLayout(format="int4", k=128, n=8, group_size=128)
      >>> planes = {
      ...     "codes": jnp.full((64, 8), 0x11, jnp.uint8),
      ...     "scale": jnp.full((1, 8), 0.5),
      ... }
      >>> quantized_matmul(jnp.ones((1, 128)), planes, layout)[0, 0].item()
      64.0
    """
    return _api.matmul(
        _PACKAGE,
        QUANTIZED,
        x,
        planes,
        layout,
        x_scale=x_scale,
        bias=bias,
        activation=activation,
        out_dtype=out_dtype,
        name=implementation,
        norm=norm,
        norm_eps=norm_eps,
        gate=gate,
        residual=residual,
    )


def prepare(
    planes: Planes, layout: WeightLayout, *, implementation: str
) -> tuple[Planes, WeightLayout]:
    """Permutes canonical planes once into the order that an implementation reads.

    Args:
      planes: canonical, without leading axes (`jax.vmap` adds them).
      layout: of the order "canonical".
      implementation: as in `quantized_matmul`; "xla" and "reference" read canonical
        planes and give them back.

    Returns:
      Planes and layout in that order; `restore` is the exact inverse.

    Raises:
      KernelError: the implementation has no place for this format, size or group.
    """
    return _api.prepare(_PACKAGE, QUANTIZED, planes, layout, implementation)


def restore(planes: Planes, layout: WeightLayout) -> tuple[Planes, WeightLayout]:
    """Prepared planes back in the canonical order.

    Args:
      planes: in the order that `layout` names.
      layout: of any order.

    Returns:
      The planes and layout that `prepare` was given.
    """
    _api.check_format(QUANTIZED, layout)
    return _implementation.canonical(_PACKAGE, planes, layout)
