"""Sections of a configuration file: unknown fields, types, ranges; one line each."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any


class ConfigError(ValueError):
    """A training configuration that cannot be read or does not make sense; one line."""


def known_fields(
    data: Mapping[Any, Any],
    known: Iterable[str],
    where: str,
    error: type[ValueError] = ConfigError,
) -> None:
    """Refuses keys that are no fields; the message names the nearest one."""
    names = list(known)
    for name in data:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise error(
                f"{where} has no field {name!r}{hint}; known: {', '.join(names)}"
            )


def build[T](cls: type[T], data: Any, where: str) -> T:
    """A dataclass from a mapping.

    Raises:
      ConfigError: `data` is no mapping or has unknown fields.
    """
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"{where} must be a mapping of {', '.join(names)}, not {data!r}"
        )
    known_fields(data, names, where)
    return cls(**data)


def count(where: str, value: Any, least: int = 1) -> None:
    """Refuses what is not an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{where} must be an integer >= {least}, not {value!r}")


def number(where: str, value: Any, low: float, high: float = math.inf) -> None:
    """Refuses what is not a finite number in `[low, high]`."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if real and math.isfinite(value) and low <= value <= high:
        return
    top = "" if high == math.inf else f" and <= {high:g}"
    raise ConfigError(f"{where} must be a number >= {low:g}{top}, not {value!r}")


def choice(where: str, value: Any, known: tuple[str, ...]) -> None:
    """Refuses what is not one of `known`; the message names the nearest one."""
    if value not in known:
        near = difflib.get_close_matches(str(value), known, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(
            f"{where} must be one of {', '.join(known)}, not {value!r}{hint}"
        )


def flag(where: str, value: Any) -> None:
    """Refuses what is not a boolean."""
    if not isinstance(value, bool):
        raise ConfigError(f"{where} must be true or false, not {value!r}")


def pattern(where: str, value: Any) -> None:
    """Refuses what is no regular expression."""
    try:
        re.compile(value)
    except (re.error, TypeError) as e:
        raise ConfigError(f"{where}: {value!r} is no regular expression: {e}") from None
