"""What `compress_sequential` asks of a model, and subtrees of params by path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class LayerwiseModel(Protocol):
    """A model that runs layer by layer; pure functions of parts of its params.

    Hashable (a frozen dataclass, or a plain class, whose objects are), since compiled
    programs are kept by it. `params` are nested dicts or lists. States and contexts are
    pytrees of arrays with the rows of the batch as their leading axis.

    A model whose layers are to be quantized one after another (`subsets`: q, k, v
    first, then what follows them) has an attribute `subsets`, a sequence of regular
    expressions of paths inside a layer, in the order of the forward pass.

    Attributes:
      num_layers: how many there are.
    """

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        ...

    def layer_path(self, i: int) -> str:
        """'/'-joined path of the subtree of layer i.

        The same for all layers if they are one stack, whose leaves have a leading layer
        axis.
        """
        ...

    def embed(self, params: Any, batch: Any) -> tuple[Any, Any]:
        """What enters the first layer, and what all layers are told beside it.

        Args:
          params: all params but those of layers.
          batch: one of the batches.

        Returns:
          The state, and the context (masks, positions; `()` if there is none).
        """
        ...

    def layer(self, params: Any, state: Any, context: Any, i: Any) -> Any:
        """The state after one layer.

        Args:
          params: the subtree of the layer, without a layer axis.
          state, context: see `embed`.
          i: its number, int32 and traced: equal layers share one program. What differs
            from layer to layer beside the params is looked up in an array.
        """
        ...

    def head(self, params: Any, state: Any, context: Any) -> Any:
        """What the model gives for the state after the last layer.

        Args:
          params: all params but those of layers.
          state, context: see `embed`.
        """
        ...


def as_layerwise(model: Any) -> LayerwiseModel:
    """The model, or what it offers as its layer-by-layer form.

    Raises:
      TypeError: it has none, or cannot be hashed.
    """
    if hasattr(model, "layerwise"):
        model = model.layerwise()
    if isinstance(model, type) or not isinstance(model, LayerwiseModel):
        raise TypeError(
            f"model must be a language model of angeljax.models or implement "
            f"angeljax.calibration.LayerwiseModel, which {type(model).__name__} does "
            "not: for other models use angeljax.calibrate and angeljax.compress"
        )
    try:
        hash(model)
    except TypeError:
        raise TypeError(
            f"model must be hashable: make {type(model).__name__} a frozen dataclass"
        ) from None
    return model


def take(tree: Any, path: str) -> Any:
    """The subtree at a '/'-joined path.

    Raises:
      ValueError: there is none.
    """
    for name in path.split("/"):
        key = _key(tree, name)
        if key is None:
            raise ValueError(f"the params have no subtree {path}")
        tree = tree[key]
    return tree


def put(tree: Any, path: str, new: Any) -> Any:
    """A tree with another subtree at a path that exists; the rest is shared."""
    name, _, rest = path.partition("/")
    key = _key(tree, name)
    assert key is not None, path
    value = put(tree[key], rest, new) if rest else new
    if isinstance(tree, Mapping):
        return {**tree, key: value}
    changed = list(tree)
    changed[key] = value
    return type(tree)(changed)


def without(tree: Any, paths: Sequence[str]) -> Any:
    """A tree without the subtrees at some paths; what is then empty goes too."""
    gone = set(paths)

    def rest(node: Any, at: str) -> Any:
        if isinstance(node, Mapping):
            items = list(node.items())
        elif isinstance(node, list | tuple) and any(p.startswith(at) for p in gone):
            items = list(enumerate(node))
        else:
            return node
        out = {}
        for key, value in items:
            if f"{at}{key}" in gone:
                continue
            value = rest(value, f"{at}{key}/")
            if not (isinstance(value, dict) and not value):
                out[key] = value
        return out

    return rest(tree, "")


def nest(path: str, tree: Any) -> Any:
    """A tree in which the given one stands at a path."""
    for name in reversed(path.split("/")):
        tree = {name: tree}
    return tree


def _key(node: Any, name: str) -> Any:
    """The key of a node whose name in paths is `name`; None if there is none."""
    if isinstance(node, Mapping):
        return next((k for k in node if str(k) == name), None)
    if isinstance(node, list | tuple) and name.isdigit() and int(name) < len(node):
        return int(name)
    return None
