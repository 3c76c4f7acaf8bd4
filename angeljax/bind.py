"""`bind`: somebody's model, with its products routed to the packed weights.

A compressed tree runs in any Flax model as it is, because a `QTensor` turns into its
array where a layer reads it. `bind` goes one step further: the layers that it knows
hand the packed weight to `angeljax.ops`, which has kernels for it.
"""

from __future__ import annotations

from typing import Any

from angeljax import _bind_linen, _bind_nnx

__all__ = ["bind"]


def bind(model: Any, params: Any = None) -> Any:
    """Returns the model's callable with packed products switched on.

    Args:
      model: a linen module, an nnx module, or any function of a param tree.
      params: for an nnx module, a compressed `nnx.State` or pure dict to put into the
        copy; for the others it must be left out.

    Returns:
      For a linen module a function with the signature of `model.apply`. For an nnx
      module a copy, in which the `Linear`, `LinearGeneral`, `Einsum` and `Embed` layers
      use `angeljax.ops`; subclasses of them are left alone. A function is returned as
      it is: write it with `angeljax.ops`, or use the QTensors as arrays.

    Raises:
      TypeError: `model` is none of these, or `params` came with a linen module.

    Example:
      >>> import jax, angeljax as aj
      >>> from flax import linen as nn
      >>> model, x = nn.Dense(16), jax.numpy.ones((2, 256))
      >>> params = model.init(jax.random.key(0), x)
      >>> recipe = aj.Recipe(rules=[aj.Rule(format="int8")])
      >>> jax.jit(aj.bind(model))(aj.compress(params, recipe), x).shape
      (2, 16)
    """
    if _bind_nnx.is_module(model):
        return _bind_nnx.bind(model, params)
    if params is not None:
        raise TypeError(
            "params go with an nnx module only: pass them to the bound function instead"
        )
    if _bind_linen.is_module(model):
        return _bind_linen.bind(model)
    if callable(model):
        return model
    raise TypeError(
        f"bind takes a linen module, an nnx module or a function, "
        f"not {type(model).__name__}"
    )
