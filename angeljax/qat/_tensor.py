"""A fake-quantized weight whose product also quantizes the activations."""

from __future__ import annotations

import dataclasses

import jax

from angeljax.formats._dense import DenseTensor
from angeljax.formats._qtensor import register_type


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FakeTensor(DenseTensor):
    """A dense weight in training that stands where the QTensor will stand.

    `angeljax.ops` treats it as it will treat the QTensor: the other operand of a
    product is quantized as `spec.activation` says. Foreign models need `angeljax.bind`
    for that, as they do for packed weights.

    Its one plane, `codes`, is the fake-quantized weight itself, of the logical shape.
    """


register_type(FakeTensor)
