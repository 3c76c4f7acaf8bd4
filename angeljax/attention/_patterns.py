"""Tables of attention patterns for each head, as MInference publishes them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

# (kind, keys of columns or of the beginning, keys of diagonals or of the window)
Pattern = tuple[str, int, int]
KINDS = ("vertical_and_slash", "stream_llm")
DEFAULT: Pattern = ("vertical_and_slash", 1000, 6096)

# Field of a fingerprint: the names that a configuration may have for it.
_FINGERPRINT = {
    "model_type": ("model_type",),
    "rope_theta": ("rope_theta",),
    "max_position_embeddings": ("max_position_embeddings", "max_positions"),
    "num_attention_heads": ("num_attention_heads", "num_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "hidden_size": ("hidden_size",),
    "num_hidden_layers": ("num_hidden_layers", "num_layers"),
}


def check_pattern(pattern: Any, where: str) -> Pattern:
    """The first three fields of an entry.

    Raises:
      ValueError: one line that says where.
    """
    if (
        isinstance(pattern, str)
        or not isinstance(pattern, Sequence)
        or len(pattern) < 3
    ):
        raise ValueError(f"{where} must be [kind, size, size, ...], not {pattern!r}")
    kind, *sizes = pattern[:3]
    if kind not in KINDS:
        raise ValueError(
            f"{where} has the kind {kind!r}: {' and '.join(KINDS)} can be run"
        )
    if any(type(s) is not int or not 0 <= s < 2**31 for s in sizes):
        raise ValueError(f"{where} must have integers from 0 on, not {sizes}")
    return kind, sizes[0], sizes[1]


def read_patterns(
    source: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Any],
    model: Any = None,
) -> tuple[tuple[Pattern, ...], ...]:
    """Reads a table; see `MInference.from_json`."""
    name = "the table"
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        with open(source, encoding="utf-8") as file:
            try:
                source = json.load(file)
            except ValueError as error:
                raise ValueError(f"{name} is not JSON: {error}") from None
    heads = None
    if isinstance(source, Mapping):
        version = source.get("schema_version")
        if version != 1:
            raise ValueError(f"{name} has schema_version {version!r}: 1 can be read")
        finger = source.get("model_fingerprint")
        if not isinstance(finger, Mapping):
            raise ValueError(f"{name} has no object 'model_fingerprint'")
        if model is not None:
            _same_model(name, finger, model)
        heads = finger.get("num_attention_heads")
        layers = finger.get("num_hidden_layers")
        source = _rows(source.get("best_pattern"), f"{name}, best_pattern", layers)
    if not isinstance(source, Sequence) or isinstance(source, str) or not source:
        raise ValueError(f"{name} must be a list of layers, or an object that has one")
    rows = [_rows(x, f"{name}, layer {i}", None) for i, x in enumerate(source)]
    heads = max(map(len, rows)) if heads is None else heads
    if not heads or any(len(row) > heads for row in rows):
        raise ValueError(f"{name} has a layer with other than {heads} heads")
    if model is not None:
        found = {"num_attention_heads": heads, "num_hidden_layers": len(rows)}
        _same_model(name, found, model)
    return tuple(
        tuple(
            DEFAULT if x is None else check_pattern(x, f"{name}, layer {i}, head {h}")
            for h, x in enumerate([*row, *[None] * (heads - len(row))])
        )
        for i, row in enumerate(rows)
    )


def _rows(x: Any, where: str, count: Any) -> list[Any]:
    """`{"0": a, "2": b}` as `[a, {} or None, b]`; what is left out is the default."""
    if not isinstance(x, Mapping):
        raise ValueError(f"{where} must be an object, not {type(x).__name__}")
    keys = [str(key) for key in x]
    if not all(key.isdecimal() and int(key) < 2**16 for key in keys):
        raise ValueError(f"{where} must have numbers for keys, not {keys[:4]}")
    items = {int(key): value for key, value in x.items()}
    size = max(items, default=-1) + 1
    if count is not None:
        if type(count) is not int or count < size:
            raise ValueError(f"{where} has the key {size - 1}, beyond {count!r} layers")
        return [items.get(i, {}) for i in range(count)]
    return [items.get(i) for i in range(size)]


def _same_model(name: str, finger: Mapping[str, Any], model: Any) -> None:
    for field, expected in finger.items():
        for ours in _FINGERPRINT.get(field, ()):
            if isinstance(model, Mapping):
                found = model.get(ours)
            else:
                found = getattr(model, ours, None)
            if found is not None and found != expected:
                raise ValueError(
                    f"{name} is for a model with {field}={expected!r}, this one has "
                    f"{found!r}: use the table that was searched for it"
                )
