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
from jax.sharding import PartitionSpec as P

from angeljax._adapted import AdaptedTensor
from angeljax._inputs import as_seen, changes_inputs
from angeljax._transposed import takes_token, token_dot
from angeljax.formats import QTensor
from angeljax.formats._blocks import GRANULE_PLANES
from angeljax.prepare import PreparedTensor, has_kernel, kernel_view
from pallas_kernels import packed_matmul, ragged_matmul
from pallas_kernels._fused import before

__all__ = [
    "attend",
    "dot",
    "dot_general",
    "einsum",
    "embed",
    "packed_dot",
    "ragged_dot",
]


def dot(
    x: jax.Array,
    w: jax.Array | QTensor,
    *,
    bias: jax.Array | None = None,
    norm: jax.Array | None = None,
    norm_eps: float = 1e-6,
    gate: str | None = None,
    residual: jax.Array | None = None,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`x @ w` over the last axis of `x` and the first of `w`.

    What often stands around a product can be given to it: kernels for a few tokens do
    it on the way, and for all others it is written out.

    Args:
      x: float `[..., K]`.
      w: `[K, *N]`, an array or a QTensor.
      bias: `[*N]`, added to the product.
      norm: weight `[K]` of a root-mean-square norm of `x` (arXiv 1910.07467).
      norm_eps: added to the mean square.
      gate: "silu" takes `x [..., 2 K]` and multiplies silu of its first half by the
        second (SwiGLU, arXiv 2002.05202).
      residual: `[..., *N]`, added last.
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
    features = x.shape[-1] // (2 if gate else 1)
    if features != w.shape[0]:
        raise ValueError(
            f"dot: x has {features} features and the weight takes {w.shape[0]}"
        )
    around = norm is not None or gate is not None or residual is not None
    ready = isinstance(w, PreparedTensor) and w.shards is None and w.ndim == 2
    if around and ready and not changes_inputs(w):
        if _takes(x, w, (((x.ndim - 1,), (0,)), ((), ()))):
            assert isinstance(w, PreparedTensor)
            return packed_matmul(
                _activation(x, w),
                w.kernel_planes,
                w.layout,
                activation=w.activation,
                bias=bias,
                norm=norm,
                norm_eps=norm_eps,
                gate=gate,
                residual=residual,
                out_dtype=preferred_element_type,
            )
    x = x if gate is None else before(x, None, norm_eps, gate)
    if takes_token(w, x):
        y = token_dot(
            x,
            w,
            norm=norm,
            norm_eps=norm_eps,
            out_dtype=preferred_element_type,
        )
    else:
        x = before(x, norm, norm_eps, None)
        y = dot_general(
            x,
            w,
            (((x.ndim - 1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=preferred_element_type,
        )
    if bias is not None:
        y = y + bias.astype(y.dtype)
    return y if residual is None else residual + y


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
    if isinstance(w, AdaptedTensor) and _whole(w, dimension_numbers):
        around = {
            "precision": precision,
            "preferred_element_type": preferred_element_type,
            "out_sharding": out_sharding,
        }
        y = dot_general(x, w.base, dimension_numbers, **around)
        more = w.times(_inputs_last(x, dimension_numbers, w.ndim))
        return y + more.reshape(y.shape).astype(y.dtype)
    (from_x, from_w), _ = dimension_numbers
    x, w = as_seen(x, w, list(zip(from_x, from_w, strict=True)))
    if out_sharding is None and _takes(x, w, dimension_numbers):
        assert isinstance(w, QTensor)
        x = _inputs_last(x, dimension_numbers, w.ndim)
        return packed_dot(x, w, preferred_element_type)
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
    numbers = _as_dot(equation, x, w) if isinstance(w, QTensor) else None
    if numbers is not None:
        return dot_general(
            x,
            w,
            numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )
    if isinstance(w, QTensor) and changes_inputs(w):
        # A batched product: what one token holds is what this equation sums over.
        left, right, out = _letters(equation, x, w)
        summed = [c for c in right if c in left and c not in out]
        experts = right[: w.ndim - len(w.spec.shape)]
        x, w = as_seen(
            x,
            w,
            [(left.index(c), right.index(c)) for c in summed],
            [left.index(c) if c in left else None for c in experts],
        )
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
    if isinstance(table, AdaptedTensor):
        if table.spec.axis != (-1,) or table.ndim != 2:
            return jnp.take(table.dequantize(dtype), ids, axis=0, mode="clip")
        return embed(table.base, ids, dtype=dtype) + table.rows(ids).astype(dtype)
    if isinstance(table, PreparedTensor):
        table = table.restored()
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


def ragged_dot(
    x: jax.Array,
    w: jax.Array | QTensor,
    group_sizes: jax.Array,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`jax.lax.ragged_dot` with weights of experts that may be quantized.

    The first `group_sizes[0]` rows are multiplied by `w[0]`, the next `group_sizes[1]`
    by `w[1]`, and so on; rows past the sum give zeros. Packed weights are expanded one
    expert at a time, if at all; formats without a kernel are dequantized first.

    Args:
      x: float `[T, K]`, rows sorted by expert.
      w: `[E, K, N]`, an array or a QTensor.
      group_sizes: integers `[E]`.
      precision: as in `jax.lax.ragged_dot`.
      preferred_element_type: accumulation and result dtype.

    Returns:
      `[T, N]`.

    Raises:
      ValueError: shapes that do not go together.

    Example:
      >>> import jax.numpy as jnp, angeljax as aj
      >>> experts = aj.quantize(jnp.ones((4, 128, 8)), format="int8")
      >>> sizes = jnp.asarray([2, 0, 1, 3])
      >>> aj.ops.ragged_dot(jnp.ones((6, 128)), experts, sizes).shape
      (6, 8)
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1]:
        raise ValueError(
            f"ragged_dot: x {list(x.shape)} and weights of experts {list(w.shape)} "
            "are not [T, K] and [E, K, N]"
        )
    x = _activation(x, w)
    if isinstance(w, AdaptedTensor):
        around = {
            "precision": precision,
            "preferred_element_type": preferred_element_type,
        }
        y = ragged_dot(x, w.base, group_sizes, **around)
        for name in ("a", "b"):
            x = jax.lax.ragged_dot(x, w.planes[name].astype(x.dtype), group_sizes)
        return y + (w.scaling * x).astype(y.dtype)
    x, w = as_seen(x, w, [(1, 1)], [None], group_sizes)
    if not isinstance(w, QTensor) or not _ragged(x, w):
        return jax.lax.ragged_dot(
            x,
            _dense(w, x.dtype),
            group_sizes,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )
    out_dtype = x.dtype if preferred_element_type is None else preferred_element_type
    if not isinstance(w, PreparedTensor):
        return ragged_matmul(x, *kernel_view(w), group_sizes, out_dtype=out_dtype)
    return ragged_matmul(
        x,
        w.kernel_planes,
        w.layout,
        group_sizes,
        activation=w.activation,
        out_dtype=out_dtype,
    )


def _ragged(x: jax.Array, w: QTensor) -> bool:
    """Whether a stack of weights is one that `ragged_matmul` takes."""
    matrix = len(w.spec.shape) == 2 and w.spec.axis == (-2,)
    return matrix and has_kernel(w) and x.dtype != jnp.float64


def packed_dot(x: jax.Array, w: QTensor, out_dtype: Any = None) -> jax.Array:
    """`x [..., K]` times a packed weight by the kernels; see `pallas_kernels`.

    Args:
      x: float.
      w: a QTensor without batch axes, of a format that has kernels. One that `prepare`
        made runs on the kernel of its device, another on what XLA makes of it.
      out_dtype: default that of `x`.

    Returns:
      `[..., *N]`, the output axes of `w`.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if isinstance(w, PreparedTensor):
        y = _prepared_dot(x, w, out_dtype)
    else:
        y = packed_matmul(x, *kernel_view(w), out_dtype=out_dtype)
    first = w.ndim + w.spec.axis[0]
    outputs = (*w.shape[:first], *w.shape[first + len(w.spec.axis) :])
    return y.reshape(*x.shape[:-1], *outputs)


def _prepared_dot(x: jax.Array, w: PreparedTensor, out_dtype: Any) -> jax.Array:
    shards = w.shards

    def product(x: jax.Array, planes: Any, dtype: Any) -> jax.Array:
        return packed_matmul(
            x, planes, w.layout, activation=w.activation, out_dtype=dtype
        )

    if shards is None:
        return product(x, w.kernel_planes, out_dtype)

    def part(x: jax.Array, planes: Any) -> jax.Array:
        planes = jax.tree.map(lambda p: p[0], planes)
        if shards.side == "outputs":
            return product(x, planes, out_dtype)
        y = product(x, planes, jnp.float32)
        return jax.lax.psum(y, shards.axis).astype(out_dtype)

    lead = (None,) * (x.ndim - 1)
    split = P(*lead, shards.axis)
    inputs = shards.side == "inputs"
    return jax.shard_map(
        part,
        mesh=shards.mesh,
        in_specs=(split if inputs else P(), P(shards.axis)),
        out_specs=P() if inputs else split,
        check_vma=False,
    )(x, w.kernel_planes)


def _takes(x: jax.Array, w: jax.Array | QTensor, numbers: Any) -> bool:
    """Whether a product is one of `packed_dot`: all contracted axes, no batch axes."""
    if not isinstance(w, QTensor) or not has_kernel(w):
        return False
    return _whole(w, numbers) and x.dtype != jnp.float64


def _whole(w: QTensor, numbers: Any) -> bool:
    """Whether a product sums over what was packed as the inputs, and over all of it."""
    (_, from_w), (batch, _) = numbers
    axes = sorted(a % w.ndim - w.ndim for a in from_w)
    flat = w.ndim == len(w.spec.shape) and not batch
    return flat and tuple(axes) == w.spec.axis


def _inputs_last(x: jax.Array, numbers: Any, ndim: int) -> jax.Array:
    """`x [..., K]`, contracted axes merged in the order of a weight of `ndim` axes."""
    (from_x, from_w), _ = numbers
    order = sorted(range(len(from_w)), key=lambda i: from_w[i] % ndim)
    x = jnp.moveaxis(x, [from_x[i] for i in order], list(range(-len(order), 0)))
    return x.reshape(*x.shape[: x.ndim - len(order)], -1)


def _letters(equation: str, x: jax.Array, w: QTensor) -> tuple[str, str, str]:
    """The axes of both operands and of the result, with letters for an ellipsis."""
    left, _, out = equation.replace(" ", "").partition("->")
    a, _, b = left.partition(",")
    if a.startswith("...") and out.startswith("..."):
        # Letters that neither side can hold stand for the axes that are not named.
        extra = "".join(chr(0x3B1 + i) for i in range(x.ndim - len(a) + 3))
        a, out = extra + a[3:], extra + out[3:]
    return a, b, out


def _as_dot(equation: str, x: jax.Array, w: QTensor) -> Any:
    """Dimension numbers of an einsum that is a plain product in that order, or None."""
    if "->" not in equation or equation.count(",") != 1:
        return None
    a, b, out = _letters(equation, x, w)
    if len(a) != x.ndim or len(b) != w.ndim or len(set(a)) + len(set(b)) != len(a + b):
        return None
    both = [c for c in b if c in a]
    free = [c for c in a if c not in both] + [c for c in b if c not in both]
    if list(out) != free:
        return None
    return ((tuple(map(a.index, both)), tuple(map(b.index, both))), ((), ()))


def _activation(x: Any, w: jax.Array | QTensor) -> jax.Array:
    x = jnp.asarray(x)
    # In the dtype of integers a weight would be rounded to 0.
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(w.dtype)


def _dense(w: jax.Array | QTensor, dtype: Any) -> jax.Array:
    return w.dequantize(dtype) if isinstance(w, QTensor) else jnp.asarray(w, dtype)
