"""Where parameters and batches lie on a mesh of devices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from angeljax._fields import ConfigError, count

AXES = ("data", "fsdp")


def make_mesh(sizes: Mapping[str, int] | None = None) -> Mesh:
    """A mesh with the axes "data" (copies) and "fsdp" (parts of every parameter).

    Args:
      sizes: devices along each axis; an axis that is not named has 1. None takes all
        devices as copies.

    Returns:
      A mesh of the first so many devices.

    Raises:
      ConfigError: an unknown axis, or another number of devices than there are.

    Example:
      >>> from angeljax.train import make_mesh
      >>> make_mesh({"fsdp": 1}).shape
      OrderedDict({'data': 1, 'fsdp': 1})
    """
    devices = jax.devices()
    sizes = {"data": len(devices)} if sizes is None else dict(sizes)
    for name, size in sizes.items():
        if name not in AXES:
            raise ConfigError(f"mesh has no axis {name!r}: use {' and '.join(AXES)}")
        count(f"mesh.{name}", size)
    shape = tuple(sizes.get(name, 1) for name in AXES)
    if math.prod(shape) > len(devices):
        raise ConfigError(
            f"mesh {dict(zip(AXES, shape, strict=True))} needs {math.prod(shape)} "
            f"devices and there are {len(devices)}"
        )
    used = devices[: math.prod(shape)]
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * 2, devices=used)


def shard_leaf(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Cuts the largest axis that "fsdp" divides; what has none is copied.

    A function of the shape alone, so that the state of an optimizer lies beside the
    parameters that it belongs to.
    """
    parts = mesh.shape["fsdp"]
    axes = sorted(range(len(shape)), key=lambda i: (-shape[i], i))
    for axis in axes:
        if parts > 1 and shape[axis] % parts == 0 and shape[axis] > 0:
            return NamedSharding(mesh, P(*[None] * axis, "fsdp"))
    return NamedSharding(mesh, P())


def shardings_of(mesh: Mesh, tree: Any) -> Any:
    """`shard_leaf` for each array of a tree (abstract ones will do)."""
    return jax.tree.map(lambda x: shard_leaf(mesh, x.shape), tree)


def place(mesh: Mesh, tree: Any) -> Any:
    """The tree with its arrays on the mesh."""
    return jax.device_put(tree, shardings_of(mesh, tree))


def place_batch(mesh: Mesh, batch: Any, accumulate: int = 1) -> Any:
    """A batch on the mesh, its rows over both axes.

    Args:
      mesh: see `make_mesh`.
      batch: pytree of numpy arrays `[rows, ...]`.
      accumulate: micro-batches; with more than 1 the result has a leading axis of them,
        `[accumulate, rows / accumulate, ...]`.

    Raises:
      ValueError: the rows cannot be divided.
    """
    devices = mesh.size

    def put(x: np.ndarray) -> jax.Array:
        rows = x.shape[0]
        if rows % (accumulate * devices):
            raise ValueError(
                f"a batch of {rows} rows cannot be divided into {accumulate} "
                f"micro-batches over {devices} devices"
            )
        spec = P(AXES)
        if accumulate > 1:
            x = x.reshape(accumulate, rows // accumulate, *x.shape[1:])
            spec = P(None, AXES)
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])

    return jax.tree.map(put, batch)
