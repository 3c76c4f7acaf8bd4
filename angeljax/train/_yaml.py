"""A training's YAML file: reading with overrides, and plain values to write."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from angeljax._fields import ConfigError

# YAML reads 1e-4, without a point, as text.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def read(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The values of a file, with `key=value` overrides in place.

    Raises:
      ConfigError: one line that names the file, or the override.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(
            f"{path} is not valid YAML: {' '.join(str(e).split())}"
        ) from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a training must be a mapping, not {data!r}")
    for override in overrides:
        _override(data, override)
    return _numbers(data)


def plain(value: Any) -> Any:
    """Mappings as dicts and tuples as lists."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def _override(data: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not all(key.split(".")):
        raise ConfigError(f"--set takes key=value, such as steps=100, not {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: the value is not valid YAML") from None
    *sections, last = key.split(".")
    for section in sections:
        if data.get(section) is None:
            data[section] = {}
        data = data[section]
        if not isinstance(data, dict):
            raise ConfigError(f"--set {override}: {section} has no fields")
    data[last] = value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    return value
