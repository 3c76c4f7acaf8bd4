"""The type checker that `conftest.py` puts behind the library's annotations."""

import inspect
import typing
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

# An int is a float, as static checkers (PEP 484) have it.
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the arguments and results that carry a jaxtyping shape, and no others.

    Plain types are mypy's business. Checked here as well, they would keep a test from
    seeing what the library itself says about an argument of the wrong type, and a
    pytree's dataclass from holding the placeholders that JAX puts into it.
    """
    kept = {
        name: annotation
        for name, annotation in inspect.get_annotations(function).items()
        if _has_shape(annotation)
    }
    if not kept:
        return function
    function.__annotations__ = kept
    return _beartype(function)


def _has_shape(annotation: Any) -> bool:
    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        return True
    return any(_has_shape(part) for part in typing.get_args(annotation))
