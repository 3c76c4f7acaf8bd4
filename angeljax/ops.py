"""Products with weights that may be quantized.

Each takes a plain array or a `QTensor` in the place of the weight. With a plain array
it is the `jax.numpy` function of that name; with a QTensor it works from the packed
planes. A model written with these needs nothing else to run compressed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.formats import QTensor
from angeljax.formats._blocks import GRANULE_PLANES

__all__ = ["attend", "dot", "dot_general", "einsum", "embed"]


def dot(
    x: jax.Array,
    w: jax.Array | QTensor,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`x @ w` over the last axis of `x` and the first of `w`.

    Args:
      x: float `[..., K]`.
      w: `[K, *N]`, an array or a QTensor.
      precision: as in `jax.lax.dot_general`.
      preferred_element_type: accumulation and result dtype.

    Returns:
      `[..., *N]`.

    Raises:
      ValueError: the lengths of the contracted axes differ.

    Example:
      >>> import jax.numpy as jnp, angeljax as aj
      >>> q = aj.quantize(jnp.ones((128, 8)), format="int8")
      >>> aj.ops.dot(jnp.ones((2, 128)), q).shape
      (2, 8)
    """
    if x.shape[-1] != w.shape[0]:
        raise ValueError(
            f"dot: x has {x.shape[-1]} features and the weight takes {w.shape[0]}"
        )
    return dot_general(
        x,
        w,
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )


def dot_general(
    x: jax.Array,
    w: jax.Array | QTensor,
    dimension_numbers: Any,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`jax.lax.dot_general` with a right operand that may be quantized.

    Args:
      x: the left operand; the weight is brought to its dtype, or an integer `x` to
        that of the weight.
      w: the right operand, an array or a QTensor.
      dimension_numbers: of the logical shapes.
      precision, preferred_element_type, out_sharding: as in `jax.lax.dot_general`.

    Returns:
      Batch axes, free axes of `x`, free axes of `w`.
    """
    x = _activation(x, w)
    return jax.lax.dot_general(
        x,
        _dense(w, x.dtype),
        dimension_numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )


def einsum(
    equation: str,
    x: jax.Array,
    w: jax.Array | QTensor,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`jnp.einsum(equation, x, w)` with a weight that may be quantized."""
    x = _activation(x, w)
    return jnp.einsum(
        equation,
        x,
        _dense(w, x.dtype),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )


def embed(table: jax.Array | QTensor, ids: jax.Array, *, dtype: Any = None) -> Any:
    """Rows of an embedding table; only the rows asked for are dequantized.

    Args:
      table: `[V, D]`.
      ids: int `[...]`, in range (out of range clips, as `jnp.take(mode="clip")`).
      dtype: of the result; default that of the table.

    Returns:
      `[..., D]`.
    """
    dtype = table.dtype if dtype is None else dtype
    if not isinstance(table, QTensor) or table.spec.axis != (-1,) or table.ndim != 2:
        return jnp.take(_dense(table, dtype), ids, axis=0, mode="clip").astype(dtype)
    rows = {}
    for name, plane in table.planes.items():
        if name in GRANULE_PLANES and plane.shape[0] == 1:
            rows[name] = plane[0]  # one granule for all rows
        elif name in GRANULE_PLANES and table.spec.out_block > 1:
            rows[name] = jnp.take(plane, ids // table.spec.out_block, 0, mode="clip")
        else:
            rows[name] = jnp.take(plane, ids, axis=0, mode="clip")
    spec = dataclasses.replace(table.spec, shape=table.shape[-1:], out_block=1)
    return QTensor(planes=rows, spec=spec).dequantize(dtype)


def attend(
    x: jax.Array,
    table: jax.Array | QTensor,
    *,
    precision: Any = None,
    preferred_element_type: Any = jnp.float32,
) -> jax.Array:
    """Logits of a tied head: `x [..., D]` on `table [V, D]` -> `[..., V]`, float32."""
    return dot_general(
        x,
        table,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )


def _activation(x: Any, w: jax.Array | QTensor) -> jax.Array:
    x = jnp.asarray(x)
    # In the dtype of integers a weight would be rounded to 0.
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(w.dtype)


def _dense(w: jax.Array | QTensor, dtype: Any) -> jax.Array:
    return w.dequantize(dtype) if isinstance(w, QTensor) else jnp.asarray(w, dtype)
