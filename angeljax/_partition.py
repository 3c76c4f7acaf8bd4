"""Splitting a compressed tree into what can be trained and what is frozen."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from angeljax.formats import QTensor


def partition(tree: Any) -> tuple[Any, Any]:
    """Splits a tree into floating-point arrays and everything else.

    `jax.grad` refuses the integer planes of a QTensor; differentiate with respect to
    the first part and put the tree together inside the loss.

    Args:
      tree: a param tree, compressed or not.

    Returns:
      `(trainable, frozen)`, both of the structure of `tree` with None where the other
      has the leaf.

    Example:
      >>> import jax, jax.numpy as jnp, angeljax as aj
      >>> q = aj.quantize(jnp.ones((64, 4)), format="int8")
      >>> train, frozen = aj.partition({"w": q, "b": jnp.zeros(4)})
      >>> grads = jax.grad(
      ...     lambda t: jnp.sum(aj.combine(t, frozen)["b"])
      ... )(train)
      >>> grads["b"].shape, grads["w"]
      ((4,), None)
    """

    def trainable(x: Any) -> bool:
        dtype = getattr(x, "dtype", None)
        return (
            not isinstance(x, QTensor)
            and dtype is not None
            and jnp.issubdtype(dtype, jnp.floating)
        )

    train = jax.tree.map(lambda x: x if trainable(x) else None, tree, is_leaf=_packed)
    frozen = jax.tree.map(lambda x: None if trainable(x) else x, tree, is_leaf=_packed)
    return train, frozen


def combine(trainable: Any, frozen: Any) -> Any:
    """Inverse of `partition`.

    Args:
      trainable: the first part, or a tree of its structure with new values.
      frozen: the second part.

    Returns:
      The whole tree.
    """
    return jax.tree.map(
        lambda a, b: b if a is None else a,
        trainable,
        frozen,
        is_leaf=lambda x: x is None or _packed(x),
    )


def _packed(x: Any) -> bool:
    return isinstance(x, QTensor)
