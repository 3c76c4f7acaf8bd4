"""Putting tensors that arrive one by one into a param tree, onto their devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.models.config import ModelError

# path, name in the file, and a function that reads it as `[out, in]` (or a vector)
Tensor = tuple[tuple[Any, ...], str, Callable[[], np.ndarray]]
# '/'-joined path and shape -> sharding of that leaf, None for the default device
Shardings = Callable[[str, tuple[int, ...]], Any]


@runtime_checkable
class Architecture(Protocol):
    """A model that knows its param tree; `LanguageModel` is one."""

    def abstract(self, param_dtype: Any) -> dict[str, Any]:
        """The tree with abstract leaves."""


def assemble(
    model: Architecture,
    tensors: Iterable[Tensor],
    *,
    dtype: Any,
    shardings: Shardings | None,
    file: Any,
) -> dict[str, Any]:
    """Reads every tensor once and places it; holds one tensor beside the tree.

    With `scan_layers` a stack is filled on the host layer by layer and placed when its
    last layer has come.

    Raises:
      ModelError: a tensor is missing, is there twice, or has another shape than the
        configuration says.
    """
    abstract = model.abstract(dtype)
    want = _flatten(abstract)
    scan_layers = getattr(model, "scan_layers", False)
    stacks: dict[tuple[Any, ...], tuple[np.ndarray, set[int]]] = {}
    values: dict[tuple[Any, ...], Any] = {}

    def place(path: tuple[Any, ...], value: np.ndarray) -> None:
        name = "/".join(map(str, path))
        target = shardings(name, value.shape) if shardings else None
        values[path] = (
            jnp.asarray(value)
            if target is None
            else jax.make_array_from_callback(value.shape, target, lambda i: value[i])
        )

    for path, name, read in tensors:
        layer = path[1] if path[0] == "layers" and scan_layers else None
        key = path if layer is None else ("layers", *path[2:])
        if key not in want or (layer is not None and layer >= want[key].shape[0]):
            raise ModelError(f"{file}: the configuration has no place for {name}")
        value = _to_kernel(read(), path).astype(dtype)
        shape = want[key].shape if layer is None else want[key].shape[1:]
        if value.shape != shape:
            raise ModelError(
                f"{file}: {name} has shape {value.shape[::-1]}, the configuration says "
                f"{tuple(shape)[::-1]}"
            )
        if layer is None:
            if key in values:
                raise ModelError(f"{file}: {name} is there twice")
            place(key, value)
            continue
        if key in values:
            raise ModelError(f"{file}: {name} is there twice")
        stack, seen = stacks.setdefault(
            key, (np.empty(want[key].shape, value.dtype), set())
        )
        if layer in seen:
            raise ModelError(f"{file}: {name} is there twice")
        stack[layer] = value
        seen.add(layer)
        if len(seen) == len(stack):
            place(key, stack)
            del stacks[key]
    missing = [path for path in want if path not in values]
    if missing:
        raise ModelError(
            f"{file}: no tensor for {'/'.join(map(str, missing[0]))}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + ": the checkpoint is incomplete or of another architecture"
        )
    return _unflatten(abstract, values)


def _to_kernel(value: np.ndarray, path: tuple[Any, ...]) -> np.ndarray:
    return value.T if path[-1] == "kernel" else value


def _flatten(tree: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    out: dict[tuple[Any, ...], Any] = {}
    for key, value in tree.items():
        out.update(_flatten(value, (*path, key)))
    return out


def _unflatten(tree: Any, values: dict[Any, Any], path: tuple[Any, ...] = ()) -> Any:
    if not isinstance(tree, dict):
        return values[path]
    return {k: _unflatten(v, values, (*path, k)) for k, v in tree.items()}
