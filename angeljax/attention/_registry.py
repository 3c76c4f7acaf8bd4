"""The table of selectors."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from angeljax.attention._selector import Selector

# Name -> module of this package and class; a module is imported when it is asked for.
_SELECTORS = {
    "a_shape": ("static", "AShape"),
    "cosa": ("cosa", "CoSA"),
    "dense": ("static", "Dense"),
    "dilated": ("static", "Dilated"),
    "flashprefill": ("flashprefill", "FlashPrefill"),
    "flexprefill": ("flexprefill", "FlexPrefill"),
    "hybrid": ("hybrid", "Hybrid"),
    "minference": ("minference", "MInference"),
    "stem": ("stem", "Stem"),
    "strided": ("static", "Strided"),
    "tri_shape": ("static", "TriShape"),
    "vecattention": ("vecattention", "VecAttention"),
    "xattention": ("xattention", "XAttention"),
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
      **options: its fields. Lists become tuples, and mappings with a `name` the
        selectors that they describe, as YAML has neither.

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
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.name not in options
    ]
    if missing:
        raise ValueError(f"{name} needs {' and '.join(missing)}")
    return cls(**{key: _resolved(value) for key, value in options.items()})


def _near(name: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}? " if near else ""


def _resolved(value: Any) -> Any:
    if isinstance(value, Mapping):
        if "name" not in value:
            raise ValueError(f"{dict(value)} describes no selector: it needs a name")
        return selector(**value)
    return tuple(map(_resolved, value)) if isinstance(value, list | tuple) else value
