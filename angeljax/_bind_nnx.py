"""Routing of nnx layers to `angeljax.ops` by a change of class on a copy."""

from __future__ import annotations

import functools
import sys
from typing import Any

from angeljax import ops
from angeljax._bind_linen import promote
from angeljax.formats import QTensor


def is_module(model: Any) -> bool:
    """Whether `model` is an nnx module; does not import nnx by itself."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(model, nnx.Module)


def bind(model: Any, params: Any = None) -> Any:
    """A copy of `model` whose known layers use packed weights."""
    from flax import nnx

    copy = nnx.clone(model)
    if params is not None:
        nnx.update(copy, params)
    routed = _routed_classes()
    for _, node in nnx.iter_modules(copy):
        # Exact types only: a subclass may compute something else.
        if type(node) in routed:
            node.__class__ = routed[type(node)]
    return copy


@functools.cache
def _routed_classes() -> dict[type, type]:
    """The classes are made on first use, so that importing angeljax needs no nnx."""
    import jax
    from flax import nnx

    class RoutedLinear(nnx.Linear):
        """`nnx.Linear` on a packed kernel."""

        def __call__(self, inputs: Any, out_sharding: Any = None) -> Any:
            kernel = self.kernel[...]
            if (
                not isinstance(kernel, QTensor)
                or self.dot_general is not jax.lax.dot_general
            ):
                return super().__call__(inputs, out_sharding)
            bias = None if self.bias is None else self.bias[...]
            x, bias = promote(inputs, kernel, bias, self.dtype)
            y = ops.dot_general(
                x,
                kernel,
                (((x.ndim - 1,), (0,)), ((), ())),
                precision=self.precision,
                preferred_element_type=self.preferred_element_type,
                out_sharding=out_sharding,
            )
            return y if bias is None else y + bias

    class RoutedLinearGeneral(nnx.LinearGeneral):
        """`nnx.LinearGeneral` on a packed kernel."""

        def __call__(self, inputs: Any, out_sharding: Any = None) -> Any:
            kernel = self.kernel[...]
            custom = self.dot_general_cls is not None or self.dot_general is not None
            if not isinstance(kernel, QTensor) or custom or self.batch_axis:
                return super().__call__(inputs, out_sharding)
            bias = None if self.bias is None else self.bias[...]
            x, bias = promote(inputs, kernel, bias, self.dtype)
            axis = (self.axis,) if isinstance(self.axis, int) else tuple(self.axis)
            axis = tuple(a % x.ndim for a in axis)
            y = ops.dot_general(
                x,
                kernel,
                ((axis, tuple(range(len(axis)))), ((), ())),
                precision=self.precision,
                preferred_element_type=self.preferred_element_type,
                out_sharding=out_sharding,
            )
            return y if bias is None else y + bias

    class RoutedEinsum(nnx.Einsum):
        """`nnx.Einsum` on a packed kernel, without bias."""

        def __call__(
            self, inputs: Any, einsum_str: str | None = None, out_sharding: Any = None
        ) -> Any:
            kernel = self.kernel[...]
            if (
                not isinstance(kernel, QTensor)
                or self.bias is not None
                or out_sharding is not None
            ):
                return super().__call__(inputs, einsum_str, out_sharding)
            equation = self.einsum_str if einsum_str is None else einsum_str
            x, _ = promote(inputs, kernel, None, self.dtype)
            return ops.einsum(
                equation,
                x,
                kernel,
                precision=self.precision,
                preferred_element_type=self.preferred_element_type,
            )

    class RoutedEmbed(nnx.Embed):
        """`nnx.Embed` on a packed table."""

        def __call__(self, inputs: Any, out_sharding: Any = None) -> Any:
            table = self.embedding[...]
            if not isinstance(table, QTensor) or out_sharding is not None:
                return super().__call__(inputs, out_sharding)
            return ops.embed(table, inputs, dtype=self.dtype or table.dtype)

        def attend(self, query: Any, out_sharding: Any = None) -> Any:
            table = self.embedding[...]
            if not isinstance(table, QTensor) or out_sharding is not None:
                return super().attend(query, out_sharding)
            x, _ = promote(query, table, None, self.dtype)
            return ops.attend(x, table, preferred_element_type=x.dtype)

    return {
        nnx.Linear: RoutedLinear,
        nnx.LinearGeneral: RoutedLinearGeneral,
        nnx.Einsum: RoutedEinsum,
        nnx.Embed: RoutedEmbed,
    }
