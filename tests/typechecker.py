"""The type checker that `conftest.py` puts behind the library's array annotations.

Only jaxtyping annotations (shapes and dtypes of arrays) are enforced. Everything else
must be validated by the library itself, which is what the tests of bad input look at.
"""

import inspect
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

# An int is a float, as static checkers (PEP 484) have it.
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def _about_arrays(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(_about_arrays(arg) for arg in typing.get_args(hint))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function whose signature speaks of array shapes; returns others as is."""
    if not inspect.isfunction(function):
        return function
    try:
        hints = typing.get_type_hints(function)
    except NameError:  # a name that is imported for static checkers only
        return function
    arrays = {name: hint for name, hint in hints.items() if _about_arrays(hint)}
    if not arrays:
        return function
    function.__annotations__ = arrays
    return _beartype(function)
