"""Where restored arrays go: a partition of the logical weight, mapped to its planes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import (
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from angeljax.export import _tree
from angeljax.export._entries import Entry
from angeljax.export._errors import CheckpointError
from angeljax.formats import Spec

Rule = PartitionSpec | Sharding | None


def place(
    structure: Any, leaves: Mapping[str, Entry], mesh: Mesh | None, shardings: Any
) -> dict[str, Sharding]:
    """Storage name -> sharding for every plane; see `angeljax.export.orbax.load`.

    Raises:
      CheckpointError: a partition that names no axis of the mesh, has more entries
        than the weight has axes, or does not divide it; a pattern without a match.
    """
    rules = _rules(list(_tree.walk(structure)), leaves, shardings)
    out = {}
    for path, entry in leaves.items():
        for _, name, stored in entry.stored():
            try:
                out[name] = _sharding(entry, stored.shape, mesh, rules[path])
            except ValueError as e:
                raise CheckpointError(f"sharding of {path!r}: {e}") from None
    return out


def _rules(
    walked: Sequence[tuple[tuple[Any, ...], str]],
    leaves: Mapping[str, Entry],
    shardings: Any,
) -> dict[str, Rule]:
    if shardings is None or _is_rule(shardings):
        return {path: shardings for _, path in walked}
    if callable(shardings):
        rules = {path: shardings(path, leaves[path].shape) for _, path in walked}
        for path, rule in rules.items():
            _check_rule(path, rule)
        return rules
    if _is_patterns(shardings):
        return _match(shardings, [path for _, path in walked])
    return {path: _look_up(shardings, keys, path) for keys, path in walked}


def _is_rule(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec | Sharding)


def _is_patterns(x: Any) -> bool:
    return isinstance(x, Mapping) and all(
        isinstance(k, str) and _is_rule(v) for k, v in x.items()
    )


def _match(patterns: Mapping[str, Rule], paths: Iterable[str]) -> dict[str, Rule]:
    unused, out = dict.fromkeys(patterns), {}
    for path in paths:
        hit = next((p for p in patterns if re.fullmatch(p, path)), None)
        out[path] = None if hit is None else patterns[hit]
        if hit is not None:
            unused.pop(hit, None)
    if unused:
        # A typo here would put a copy of a large model on every device.
        raise CheckpointError(
            f"shardings: {next(iter(unused))!r} decides for no path; paths look like "
            f"{', '.join(map(repr, list(out)[:3]))}"
        )
    return out


def _look_up(tree: Any, keys: tuple[Any, ...], path: str) -> Rule:
    for key in keys:
        if _is_rule(tree):
            return tree
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            raise CheckpointError(f"shardings: nothing for {path!r}") from None
    _check_rule(path, tree)
    return tree


def _check_rule(path: str, x: Any) -> None:
    if not _is_rule(x):
        raise CheckpointError(f"shardings: {x!r} for {path!r} is no PartitionSpec")


def _sharding(entry: Entry, shape: tuple[int, ...], mesh: Any, rule: Rule) -> Sharding:
    if isinstance(rule, NamedSharding):
        mesh, rule = rule.mesh, rule.spec
    if isinstance(rule, Sharding):
        return rule
    if mesh is None:
        if rule is not None:
            raise ValueError(f"{rule} needs a mesh: pass mesh=")
        return SingleDeviceSharding(jax.local_devices()[0])
    entries = _entries(rule, entry.shape, mesh)
    if entry.spec is not None:
        entries = _merge(entries, entry.spec)
        entries = [_fit(e, n, mesh) for e, n in zip(entries, shape, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*entries))


def _entries(rule: Any, shape: tuple[int, ...], mesh: Mesh) -> list[Any]:
    """One entry per axis of the weight, checked against its shape and the mesh."""
    entries = [] if rule is None else list(rule)
    if len(entries) > len(shape):
        raise ValueError(f"{rule} has more entries than shape {list(shape)} has axes")
    entries += [None] * (len(shape) - len(entries))
    for entry, n in zip(entries, shape, strict=True):
        for name in _names(entry):
            if name not in mesh.shape:
                raise ValueError(f"{name!r} is no axis of the mesh {dict(mesh.shape)}")
        if n % _parts(entry, mesh):
            raise ValueError(
                f"{rule} cuts an axis of {n} into {_parts(entry, mesh)} parts"
            )
    return entries


def _merge(entries: list[Any], spec: Spec) -> list[Any]:
    """Entries of the axes of a stored plane, whose contraction axes are merged.

    Blocks of the merged axis are contiguous only where its first part is the one that
    is cut, so the entries of the other parts are dropped.
    """
    first = len(entries) + spec.axis[0]
    return [*entries[: first + 1], *entries[first + len(spec.axis) :]]


def _fit(entry: Any, n: int, mesh: Mesh) -> Any:
    """The entry, or None where the plane (a scale, mostly) is too short for it."""
    return None if n == 1 or n % _parts(entry, mesh) else entry


def _names(entry: Any) -> tuple[Any, ...]:
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple) else (entry,)


def _parts(entry: Any, mesh: Mesh) -> int:
    return math.prod(mesh.shape[name] for name in _names(entry))
