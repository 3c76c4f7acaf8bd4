"""Checks of the options of selectors, and options that differ between layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def integer(selector: Any, name: str, least: int) -> None:
    """Raises ValueError unless the field is an integer from `least` on."""
    value = getattr(selector, name)
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be an integer from {least} on, not {value!r}")


def choice(selector: Any, name: str, allowed: tuple[Any, ...]) -> None:
    """Raises ValueError unless the field is one of the allowed values."""
    value = getattr(selector, name)
    if value not in allowed:
        known = ", ".join(map(repr, allowed))
        raise ValueError(f"{name} must be one of {known}, not {value!r}")


def number(selector: Any, name: str, low: float, high: float, depth: int = 0) -> None:
    """Raises ValueError unless the field is a number in `(low, high]`.

    Args:
      selector: whose field.
      name: of the field.
      low, high: bounds, the first not included.
      depth: how deep tuples of such numbers may be nested instead.
    """
    value = getattr(selector, name)
    if not _inside(value, low, high, depth):
        layers = ", or a tuple with one for each layer"
        tuples = ["", layers, f"{layers}, or there a tuple with one for each head"]
        raise ValueError(
            f"{name} must be a number above {low:g} and at most {high:g}"
            f"{tuples[depth]}, not {value!r}"
        )


def _inside(value: Any, low: float, high: float, depth: int) -> bool:
    if isinstance(value, tuple):
        return (
            depth > 0
            and bool(value)
            and all(_inside(x, low, high, depth - 1) for x in value)
        )
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and low < value <= high


def per_layer(name: str, value: Any, layer: int, num_layers: int) -> Any:
    """The entry of a layer where the option is a tuple, else the option."""
    if not isinstance(value, tuple):
        return value
    if len(value) != num_layers:
        raise ValueError(
            f"{name} has {len(value)} entries and the model {num_layers} layers"
        )
    return value[layer]


def for_layers(
    layer: int | jax.Array,
    num_layers: int,
    among: tuple[int, ...] | None,
    make: Callable[[int], Any],
) -> tuple[list[Any], int | jax.Array | None]:
    """What differs between layers, for all that a call may be for.

    Args:
      layer: its number; may be traced.
      num_layers: of the model.
      among: layers that a traced number may be.
      make: number of a layer -> what is wanted.

    Returns:
      The one thing and None; or, if the layer is traced and they are not all alike, one
      for each layer of the model and the layer. Those that it cannot be hold what the
      first possible one does.

    Raises:
      ValueError: a layer that the model does not have.
    """
    layers = tuple(range(num_layers)) if among is None else among
    known = not isinstance(layer, jax.Array)
    for one in (layer,) if known else layers:
        if not 0 <= one < num_layers:
            raise ValueError(f"layer {one} of a model with num_layers={num_layers}")
    if known:
        return [make(int(layer))], None
    made = {one: make(one) for one in layers}
    distinct = list(dict.fromkeys(made.values()))
    if len(distinct) == 1:
        return distinct, None
    return [made.get(one, made[layers[0]]) for one in range(num_layers)], layer
