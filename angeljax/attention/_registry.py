"""The table of selectors."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from typing import Any

from angeljax.attention._selector import Selector

# Name -> module of this package and class; a module is imported when it is asked for.
_SELECTORS = {
    "a_shape": ("static", "AShape"),
    "dense": ("static", "Dense"),
    "dilated": ("static", "Dilated"),
    "flashprefill": ("flashprefill", "FlashPrefill"),
    "flexprefill": ("flexprefill", "FlexPrefill"),
    "minference": ("minference", "MInference"),
    "stem": ("stem", "Stem"),
    "strided": ("static", "Strided"),
    "tri_shape": ("static", "TriShape"),
    "vecattention": ("vecattention", "VecAttention"),
}


def selector_names() -> tuple[str, ...]:
    """All selectors.

    Returns:
      The names that `selector` takes, sorted.
    """
    return tuple(sorted(_SELECTORS))


def selector(name: str, **options: Any) -> Selector:
    """A selector by its name.

    Args:
      name: one of `selector_names()`.
      **options: its fields; lists become tuples, as YAML has no tuples.

    Returns:
      The selector.

    Raises:
      ValueError: no such selector or option, with the closest names; or a value that
        an option cannot have.

    Example:
      >>> from angeljax.attention import selector
      >>> selector("a_shape", window_tokens=1024).window_tokens
      1024
    """
    if name not in _SELECTORS:
        raise ValueError(
            f"unknown selector {name!r}: {_near(name, selector_names())}known "
            f"selectors: {', '.join(selector_names())}"
        )
    module, attribute = _SELECTORS[name]
    cls = getattr(importlib.import_module(f"angeljax.attention.{module}"), attribute)
    fields = [field.name for field in dataclasses.fields(cls)]
    for option in options:
        if option not in fields:
            raise ValueError(
                f"{name} has no option {option!r}: {_near(option, fields)}it has "
                f"{', '.join(fields)}"
            )
    return cls(**{key: _tuples(value) for key, value in options.items()})


def _near(name: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}? " if near else ""


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
