"""`DenseTensor`: a weight as it is, in a box where the QTensor will stand."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from angeljax.formats._qtensor import QTensor


class DenseTensor(QTensor):
    """What boxes around dense weights have in common; see its subclasses.

    The plane `codes` is the weight itself, of the logical shape.
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
