"""Learning the scales of a packed tree, with its codes frozen.

The cheapest recovery there is: a ternary weight of 128 x 4096 has 4096 scales. Each
scale (and shift) s becomes s g with a learned gain g that starts at 1, so that one
learning rate suits all of them; it is rounded to the dtype in which it is stored, and
the gradient passes that rounding.

`angeljax.train.recovery.tune_scales` is a loop that trains this.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from angeljax import _leaves
from angeljax.formats import QTensor
from angeljax.formats._blocks import GRANULE_PLANES, rounded
from angeljax.qat._straight import straight_through

__all__ = ["apply", "finalize", "init"]

# path -> plane -> gains
Gains = dict[str, dict[str, jax.Array]]
_DTYPES = ("bfloat16", "float16", "float32")


def init(params: Any) -> Gains:
    """Gains of 1 for all scales and shifts of a packed tree.

    Args:
      params: as `angeljax.compress` returns it.

    Returns:
      Path -> name of a plane -> float32 gains of its shape. Scales of 8 bits (NVFP4, MX
      formats), zero points and scales of activations are left as they are.

    Raises:
      ValueError: there is nothing to learn.
    """
    gains: Gains = {}
    for leaf in _leaves.flatten(params)[0]:
        if not isinstance(leaf.value, QTensor):
            continue
        names = [
            name
            for name, p in leaf.value.planes.items()
            if name in GRANULE_PLANES - {"input_scale"} and p.dtype.name in _DTYPES
        ]
        if names:
            planes = leaf.value.planes
            gains[leaf.path] = {n: jnp.ones(planes[n].shape) for n in names}
    if not gains:
        raise ValueError(
            "the tree has no packed weight with scales of 16 or 32 bits: compress it "
            "first"
        )
    return gains


def apply(params: Any, gains: Gains) -> Any:
    """The dense tree that the model is to be called with, differentiable in `gains`.

    Args:
      params: the packed tree.
      gains: from `init`, trained.

    Returns:
      The tree with arrays for QTensors: what those of `finalize` dequantize to.
    """
    return _map(params, gains, lambda q: q.dequantize())


def finalize(params: Any, gains: Gains) -> Any:
    """The packed tree with the scales that were learned.

    Args:
      params: the packed tree.
      gains: trained gains.

    Returns:
      The same tree with other scales.

    Raises:
      ValueError: a gain is NaN or infinite (outside of `jit`).

    Example:
      >>> import jax, angeljax as aj
      >>> from angeljax.qat import scales
      >>> params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (64, 8))}}
      >>> packed = aj.compress(params, aj.Recipe(rules=[aj.Rule(format="t2")]))
      >>> gains = jax.tree.map(lambda g: 2 * g, scales.init(packed))
      >>> twice = scales.finalize(packed, gains)["dense"]["kernel"].dequantize()
      >>> bool((twice == 2 * packed["dense"]["kernel"].dequantize()).all())
      True
    """
    for path, planes in gains.items():
        for g in planes.values():
            traced = isinstance(g, jax.core.Tracer)
            if not traced and not bool(jnp.all(jnp.isfinite(g))):
                raise ValueError(
                    f"the learned scales of {path} hold NaN or infinity: use a smaller "
                    "learning rate"
                )
    return _map(params, gains, lambda q: q)


def _map(params: Any, gains: Gains, one: Any) -> Any:
    leaves, treedef = _leaves.flatten(params)
    new = []
    for leaf in leaves:
        value = leaf.value
        if isinstance(value, QTensor):
            planes = dict(value.planes)
            for name, g in gains.get(leaf.path, {}).items():
                x = planes[name].astype(jnp.float32) * g
                kept = rounded(x, planes[name].dtype).astype(jnp.float32)
                kept = straight_through(x, jax.lax.stop_gradient(kept))
                planes[name] = kept.astype(planes[name].dtype)
            value = one(dataclasses.replace(value, planes=planes))
        new.append(value)
    return _leaves.unflatten(treedef, leaves, new)
