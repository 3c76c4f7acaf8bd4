"""Routing of linen layers to `angeljax.ops` by method interception.

The interceptor is entered inside the bound function, so that it is part of what `jit`
traces: a compiled function keeps the routing that it was traced with.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from angeljax import ops
from angeljax.formats import QTensor


def is_module(model: Any) -> bool:
    """Whether `model` is a linen module; does not import linen by itself."""
    linen = sys.modules.get("flax.linen")
    return linen is not None and isinstance(model, linen.Module)


def bind(model: Any) -> Callable[..., Any]:
    """`model.apply` under the interceptor."""
    from flax import linen as nn

    handlers = {
        (nn.Dense, "__call__"): _dense,
        (nn.DenseGeneral, "__call__"): _dense_general,
        (nn.Einsum, "__call__"): _einsum,
        (nn.Embed, "__call__"): _embed,
        (nn.Embed, "attend"): _attend,
    }

    def interceptor(
        call: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> Any:
        # Exact types only: a subclass may compute something else.
        key = (type(context.module), context.method_name)
        handler = handlers.get(key)
        if handler is not None:
            out = handler(context.module, *args, **kwargs)
            if out is not NotImplemented:
                return out
        return call(*args, **kwargs)

    @functools.wraps(model.apply)
    def apply(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(interceptor):
            return model.apply(*args, **kwargs)

    return apply


def _packed(module: Any, name: str) -> QTensor | None:
    """The parameter if it is packed, taken out of a partitioning box if need be."""
    value = module.get_variable("params", name)
    if not isinstance(value, QTensor) and hasattr(value, "replace_boxed"):
        value = value.value
    return value if isinstance(value, QTensor) else None


def _bias(module: Any) -> Any:
    from flax.core import meta

    if not module.use_bias:
        return None
    return meta.unbox(module.get_variable("params", "bias"))


def promote(
    x: jax.Array, kernel: QTensor, bias: Any, dtype: Any
) -> tuple[jax.Array, Any]:
    """Flax's dtype promotion, with the packed kernel counted by its logical dtype."""
    if dtype is None:
        dtypes = [kernel.dtype] if bias is None else [kernel.dtype, bias.dtype]
        dtype = jnp.result_type(x, *dtypes)
    return x.astype(dtype), None if bias is None else bias.astype(dtype)


def _customised(module: Any) -> bool:
    return module.dot_general is not None or module.dot_general_cls is not None


def _dense(module: Any, inputs: Any) -> Any:
    kernel = _packed(module, "kernel")
    if kernel is None or _customised(module):
        return NotImplemented
    x, bias = promote(jnp.asarray(inputs), kernel, _bias(module), module.dtype)
    y = ops.dot(x, kernel, precision=module.precision)
    return y if bias is None else y + bias


def _dense_general(module: Any, inputs: Any) -> Any:
    kernel = _packed(module, "kernel")
    if kernel is None or _customised(module) or module.batch_dims:
        return NotImplemented
    x, bias = promote(jnp.asarray(inputs), kernel, _bias(module), module.dtype)
    axis = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
    axis = tuple(a % x.ndim for a in axis)
    numbers = ((axis, tuple(range(len(axis)))), ((), ()))
    y = ops.dot_general(x, kernel, numbers, precision=module.precision)
    return y if bias is None else y + bias


def _einsum(module: Any, inputs: Any, einsum_str: str | None = None) -> Any:
    kernel = _packed(module, "kernel")
    # The broadcast of the bias follows the equation; the layer itself knows how.
    if kernel is None or module.use_bias:
        return NotImplemented
    equation = einsum_str if einsum_str is not None else module.einsum_str
    x, _ = promote(jnp.asarray(inputs), kernel, None, module.dtype)
    return ops.einsum(equation, x, kernel, precision=module.precision)


def _embed(module: Any, inputs: Any) -> Any:
    table = _packed(module, "embedding")
    if table is None or not jnp.issubdtype(jnp.asarray(inputs).dtype, jnp.integer):
        return NotImplemented
    dtype = table.dtype if module.dtype is None else module.dtype
    return ops.embed(table, inputs, dtype=dtype)


def _attend(module: Any, query: Any) -> Any:
    table = _packed(module, "embedding")
    if table is None:
        return NotImplemented
    x, _ = promote(jnp.asarray(query), table, None, module.dtype)
    return ops.attend(x, table, preferred_element_type=x.dtype)
