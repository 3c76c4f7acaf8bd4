"""A fake-quantized weight whose product also quantizes the activations."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from angeljax.formats import QTensor
from angeljax.formats._qtensor import register_type


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FakeTensor(QTensor):
    """A dense weight in training that stands where the QTensor will stand.

    `angeljax.ops` treats it as it will treat the QTensor: the other operand of a
    product is quantized as `spec.activation` says. Foreign models need `angeljax.bind`
    for that, as they do for packed weights.

    Its one plane, `codes`, is the fake-quantized weight itself, of the logical shape.
    """

    packed: ClassVar[bool] = False

    @property
    def _code_rank(self) -> int:
        return len(self.spec.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """Of the stored weight."""
        return jnp.dtype(self.planes["codes"].dtype)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The weight, in `dtype` (default: as it is)."""
        w = self.planes["codes"]
        return w if dtype is None else w.astype(dtype)


register_type(FakeTensor)
