"""A frozen weight with a trained low-rank addition, standing where the weight stood."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from angeljax.formats import QTensor
from angeljax.formats._qtensor import register_type


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AdaptedTensor(QTensor):
    """`W + scaling A B` (LoRA, arXiv 2106.09685) of a packed W; see `lora_apply`.

    `angeljax.ops` multiplies by W from its packed planes and by A and B after one
    another; no gradient of the size of W is ever formed. Everything else gets the sum
    as an array.

    Its planes are `base` (a QTensor), `a [*batch, K, r]` and `b [*batch, r, N]`, with
    the contracted axes of W merged into K and all others into N.

    Attributes:
      scaling: `alpha / r`.
    """

    packed: ClassVar[bool] = False

    scaling: float = dataclasses.field(metadata={"static": True})

    @property
    def base(self) -> QTensor:
        """The frozen weight; no gradient flows into it."""
        return jax.lax.stop_gradient(self.planes["base"])

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, batch axes included."""
        return self.planes["base"].shape

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight and of both factors."""
        factors = self.planes["a"].nbytes + self.planes["b"].nbytes
        return self.planes["base"].nbytes + factors

    @property
    def sharding(self) -> Any:
        """That of the packed weight."""
        return self.planes["base"].sharding

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The sum, in `dtype` (default: the logical dtype)."""
        dtype = self.dtype if dtype is None else dtype
        w = self.base.dequantize(jnp.float32)
        return (w + self.addition()).astype(dtype)

    def addition(self) -> jax.Array:
        """`scaling A B` in float32, of the shape of the weight."""
        a, b = (self.planes[n].astype(jnp.float32) for n in ("a", "b"))
        core, axis = self.spec.shape, self.spec.axis
        first, count = len(core) + axis[0], len(axis)
        outputs = (*core[:first], *core[first + count :])
        inputs = core[first : first + count]
        lead = a.shape[:-2]
        delta = (self.scaling * (a @ b)).reshape(*lead, *inputs, *outputs)
        start = [len(lead) + i for i in range(count)]
        return jnp.moveaxis(delta, start, [i + first for i in start])

    def times(self, x: jax.Array) -> jax.Array:
        """`x [..., K]` times the addition, `[..., N]`, in the dtype of `x`."""
        a, b = (self.planes[n].astype(x.dtype) for n in ("a", "b"))
        return (x @ a) @ b * jnp.asarray(self.scaling, x.dtype)

    def __getitem__(self, index: Any) -> Any:
        """`q[...]` is `q`; an integer or slice into batch axes stays packed."""
        if index is Ellipsis:
            return self
        base = self.planes["base"][index]
        if not isinstance(base, QTensor):
            return self.dequantize()[index]
        factors = {n: self.planes[n][index] for n in ("a", "b")}
        return dataclasses.replace(self, planes={"base": base, **factors})

    def rows(self, ids: jax.Array) -> jax.Array:
        """Rows of the addition to a table `[V, D]` that is packed along D, float32."""
        a, b = (self.planes[n].astype(jnp.float32) for n in ("a", "b"))
        return self.scaling * (jnp.take(b.T, ids, axis=0, mode="clip") @ a.T)


register_type(AdaptedTensor)


def factor_shapes(q: QTensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B for a packed weight."""
    lead = q.shape[: q.ndim - len(q.spec.shape)]
    k = q.spec.k
    n = math.prod(q.spec.shape) // k
    return (*lead, k, rank), (*lead, rank, n)
