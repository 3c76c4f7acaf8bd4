"""Param trees as JSON, so that a checkpoint rebuilds one without being told its shape.

A structure is nested JSON: a string is a leaf (its path), null is None, and
`{"dict": [[key, node], ...]}`, `{"list": [node, ...]}` and `{"tuple": [node, ...]}` are
containers. Keys are JSON values, so an integer comes back as an integer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from angeljax._transposed import TransposedTensor
from angeljax.export._errors import CheckpointError
from angeljax.formats import QTensor
from angeljax.prepare import PreparedTensor

Key = str | int


def describe(tree: Any) -> tuple[Any, dict[str, Any]]:
    """Splits a tree into its structure and its leaves by path.

    Args:
      tree: nested dicts, lists and tuples of arrays, `QTensor`s and None. What
        `prepare` made is restored.

    Returns:
      The structure, and path -> leaf in the order of the tree.

    Raises:
      CheckpointError: another container, a key that is neither str nor int, or two
        keys that give the same path.

    Example:
      >>> import numpy as np
      >>> structure, leaves = describe({"layers": [np.ones(2), None]})
      >>> structure
      {'dict': [['layers', {'list': ['layers/0', None]}]]}
      >>> leaves
      {'layers/0': array([1., 1.])}
    """
    if type(tree) not in (dict, list, tuple):
        raise CheckpointError(
            f"params must be a dict, list or tuple, not {_kind(tree)}{_advice(tree)}"
        )
    leaves: dict[str, Any] = {}
    return _describe(tree, "", leaves), leaves


def _describe(node: Any, path: str, leaves: dict[str, Any]) -> Any:
    if node is None:
        return None
    # Exact types: a subclass would come back as something else.
    if type(node) is dict:
        for key in node:
            if type(key) not in (str, int):
                raise CheckpointError(
                    f"key {key!r} under {path or 'params'!r} must be a str or an int"
                )
        items = [
            [key, _describe(child, _join(path, key), leaves)]
            for key, child in node.items()
        ]
        return {"dict": items}
    if type(node) in (list, tuple):
        children = [_describe(c, _join(path, i), leaves) for i, c in enumerate(node)]
        return {type(node).__name__: children}
    # Checkpoints are canonical, whatever device the tree was prepared for.
    if isinstance(node, PreparedTensor | TransposedTensor):
        node = node.restored()
    if not isinstance(node, QTensor) and not _is_array(node):
        raise CheckpointError(
            f"{path!r} is {_kind(node)}, neither array nor QTensor{_advice(node)}"
        )
    if path in leaves:
        raise CheckpointError(f"two leaves have the path {path!r}: rename one")
    leaves[path] = node
    return path


def rebuild(structure: Any, leaves: Mapping[str, Any]) -> Any:
    """Inverse of `describe`.

    Raises:
      CheckpointError: the structure is malformed or names a leaf that is not there.
    """
    if structure is None:
        return None
    if isinstance(structure, str):
        if structure not in leaves:
            raise CheckpointError(f"the tree names {structure!r}, which is not stored")
        return leaves[structure]
    kind, children = _container(structure)
    if kind == "dict":
        return {key: rebuild(child, leaves) for key, child in children}
    built = [rebuild(child, leaves) for child in children]
    return tuple(built) if kind == "tuple" else built


def walk(structure: Any, keys: tuple[Key, ...] = ()) -> Iterator[tuple[Any, str]]:
    """Yields (keys, path) for each leaf of a structure, in order.

    Raises:
      CheckpointError: the structure is malformed.
    """
    if structure is None:
        return
    if isinstance(structure, str):
        yield keys, structure
        return
    kind, children = _container(structure)
    items = children if kind == "dict" else enumerate(children)
    for key, child in items:
        yield from walk(child, (*keys, key))


def _container(node: Any) -> tuple[str, list[Any]]:
    if type(node) is dict and len(node) == 1:
        ((kind, children),) = node.items()
        if kind in ("list", "tuple") and type(children) is list:
            return kind, children
        if (
            kind == "dict"
            and type(children) is list
            and all(type(c) is list and len(c) == 2 for c in children)
            and all(type(c[0]) in (str, int) for c in children)
        ):
            return kind, children
    raise CheckpointError(f"malformed tree node {str(node)[:60]!r}")


def _join(path: str, key: Key) -> str:
    # A '/' in a key must not look like two keys; the structure keeps the key itself.
    name = str(key).replace("%", "%25").replace("/", "%2F") or "%"
    return f"{path}/{name}" if path else name


def _is_array(x: Any) -> bool:
    return all(hasattr(x, name) for name in ("shape", "dtype", "__array__"))


def _kind(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")


def _advice(x: Any) -> str:
    module = type(x).__module__
    if module.startswith("flax.nnx"):
        return ": pass flax.nnx.to_pure_dict(state)"
    if module.startswith("flax"):
        return ": pass flax.core.unfreeze(...), and unbox the params before compressing"
    return ""
