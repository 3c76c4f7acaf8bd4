"""angeljax: compression of JAX and Flax models as pure functions on param trees."""

from angeljax import ops
from angeljax.formats import QTensor, quantize

__version__ = "0.1.0"

__all__ = ["QTensor", "ops", "quantize"]
