"""Walking a param tree: leaves with their paths, and the boxes around them.

The same code serves linen dicts, `nnx.State`, plain nested containers and boxed leaves
(`nn.Partitioned`, `nnx.Variable`). Flax is recognised by the shape of its objects, so
that nothing here imports it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from angeljax._transposed import TransposedTensor
from angeljax.formats import QTensor


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf: its '/'-joined path, its bare value, and its box put back."""

    path: str
    value: Any
    rebox: Callable[[Any], Any]


def flatten(tree: Any) -> tuple[list[Leaf], Any]:
    """Leaves in order and the treedef; boxes and QTensors are leaves."""
    items, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)
    return [Leaf(path_string(path), *_open(value)) for path, value in items], treedef


def unflatten(treedef: Any, leaves: list[Leaf], values: list[Any]) -> Any:
    """The tree with new values in the old boxes."""
    boxed = [leaf.rebox(v) for leaf, v in zip(leaves, values, strict=True)]
    return jax.tree_util.tree_unflatten(treedef, boxed)


def path_string(path: tuple[Any, ...]) -> str:
    """'/'-joined names of a key path: `layers/0/attn/q_proj/kernel`."""
    names = []
    for entry in path:
        for field in ("key", "name", "idx"):
            if hasattr(entry, field):
                names.append(str(getattr(entry, field)))
                break
    return "/".join(names)


def _is_partition_box(x: Any) -> bool:
    return hasattr(x, "replace_boxed") and hasattr(x, "unbox")


def _is_variable(x: Any) -> bool:
    return hasattr(x, "get_value") and hasattr(x, "replace")


def _is_leaf(x: Any) -> bool:
    if isinstance(x, QTensor | TransposedTensor):
        return True
    return _is_partition_box(x) or _is_variable(x)


def _open(x: Any) -> tuple[Any, Callable[[Any], Any]]:
    if isinstance(x, QTensor):
        return x, lambda new: new
    if _is_partition_box(x):
        # `unbox` may apply a sharding constraint; the field is the bare value.
        return x.value, x.replace_boxed
    if _is_variable(x):
        return x.get_value(), x.replace
    return x, lambda new: new


def default_axis(path: str, ndim: int) -> int | tuple[int, ...]:
    """Contraction axes of a Flax leaf by its name.

    Flax kernels are `[in, out]` and embeddings `[vocab, features]`. Its attention
    projects `[features, heads, head_dim]` into heads and `[heads, head_dim, features]`
    out of them.
    """
    names = path.split("/")
    if names[-1] == "embedding":
        return -1
    if names[-1] == "kernel" and len(names) > 1 and ndim >= 3:
        if names[-2] in ("query", "key", "value"):
            return -3
        if names[-2] == "out":
            return (-3, -2)
    return -2
