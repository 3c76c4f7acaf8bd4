"""A module that is filled with the leaves of a param tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from angeljax.models.language_model import _leaves_by_path


def skeleton(make: Callable[[], nnx.Module]) -> tuple[Any, Any]:
    """The module without its parameters, and their places."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    return graphdef, nnx.filter_state(state, nnx.Param)


def fill(bare: tuple[Any, Any], params: dict[str, Any]) -> Any:
    """The module of a skeleton with these parameters.

    Raises:
      ValueError: a parameter is missing.
    """
    graphdef, state = bare
    values = _leaves_by_path(params)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        if path not in values:
            raise ValueError(f"no {'/'.join(map(str, path))} in the params")
        flat.append((path, variable.replace(values[path])))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def abstract(make: Callable[[], nnx.Module]) -> dict[str, Any]:
    """The param tree of a module with `jax.ShapeDtypeStruct` leaves."""
    return jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(make(), nnx.Param)))
