"""What may be done to a weight: candidates, their names, and who shares a choice."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from angeljax._leaves import Leaf
from angeljax.recipe import RecipeError, Rule

# Projections of the same inputs, which one product serves if their formats agree.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
)
KEEP = "none"
# The first number of a path that is a whole name, or the end of one after `_`.
NUMBER = re.compile(r"(?:(?<=/)|(?<=_)|^)(\d+)(?=/|$)")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One entry of `formats`; without a rule the weight stays as it is."""

    name: str
    rule: Rule | None


def parse(formats: Sequence[Any]) -> list[Candidate]:
    """Candidates with names of their own.

    Raises:
      RecipeError: an entry is no format, or two are the same.
    """
    if isinstance(formats, str | Mapping | Rule) or not isinstance(formats, Sequence):
        raise RecipeError(f"formats must be a list of candidates, not {formats!r}")
    found: list[Candidate] = []
    for entry in formats:
        rule = _rule(entry)
        if any(c.rule == rule for c in found):
            raise RecipeError(f"formats names {entry!r} twice")
        name = _name(rule)
        taken = {c.name for c in found}
        unique, count = name, 2
        while unique in taken:
            unique, count = f"{name}#{count}", count + 1
        found.append(Candidate(unique, rule))
    if all(c.rule is None for c in found):
        raise RecipeError("formats needs a candidate that is a format")
    return found


def _rule(entry: Any) -> Rule | None:
    if entry is None or entry == KEEP:
        return None
    if isinstance(entry, Rule):
        rule = entry
    elif isinstance(entry, Mapping):
        rule = Rule.from_dict(entry)
    elif isinstance(entry, str):
        format, *more = entry.strip().split(":")
        group = more.pop(0) if more and more[0].isdigit() else None
        algorithm = more.pop(0) if more else "rtn"
        if more:
            raise RecipeError(
                f"candidate {entry!r}: write format[:group_size][:algorithm], or give "
                "a rule"
            )
        size = None if group is None else int(group)
        rule = Rule(format=format, group_size=size, algorithm=algorithm)
    else:
        raise RecipeError(
            f"a candidate is a format, a mapping, a Rule or None, not {entry!r}"
        )
    return None if rule.format is None else dataclasses.replace(rule, optional=True)


def _name(rule: Rule | None) -> str:
    if rule is None:
        return KEEP
    parts = [str(rule.format)]
    if rule.group_size is not None:
        parts.append(str(rule.group_size))
    if rule.algorithm != "rtn":
        parts.append(rule.algorithm)
    return ":".join(parts)


def group_leaves(
    leaves: Sequence[Leaf], group: str | Sequence[str], *, fused: bool
) -> list[list[int]]:
    """Indices of the leaves that share a choice, in tree order.

    Args:
      leaves: the weights.
      group: "weight", "layer", or regular expressions.
      fused: whether q, k and v, and gate and up, always share one.

    Raises:
      ValueError: `group` is something else, or a pattern matches nothing.
    """
    keys = [_key(leaf.path, patterns=_patterns(group)) for leaf in leaves]
    if not isinstance(group, str):
        for number, pattern in enumerate(group):
            if all(key[0] != number for key in keys):
                raise ValueError(f"group: {pattern!r} matches no weight")
    # Sets of leaves that grow together; the smallest index stands for a set.
    parent = list(range(len(leaves)))

    def find(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    first: dict[Any, int] = {}
    for i, (leaf, key) in enumerate(zip(leaves, keys, strict=True)):
        same: list[Any] = [("key", key), ("array", id(leaf.value))]
        if fused:
            same.append(("siblings", _siblings(leaf.path)))
        for one in same:
            a, b = find(first.setdefault(one, i)), find(i)
            parent[max(a, b)] = min(a, b)
    sets: dict[int, list[int]] = {}
    for i in range(len(leaves)):
        sets.setdefault(find(i), []).append(i)
    return list(sets.values())


def _patterns(group: str | Sequence[str]) -> list[Any]:
    if group == "weight":
        return []
    if group == "layer":
        return [re.compile(rf"((?:.*?[/_])?{NUMBER.pattern})/.*")]
    if isinstance(group, str) or not isinstance(group, Sequence):
        raise ValueError(
            f"group={group!r}: use 'weight', 'layer' or a list of regular expressions"
        )
    try:
        return [re.compile(pattern) for pattern in group]
    except (re.error, TypeError) as e:
        raise ValueError(f"group: {e}") from None


def _key(path: str, patterns: Sequence[Any]) -> tuple[Any, ...]:
    """Number of the first pattern that matches and what it captures; else the path."""
    for number, pattern in enumerate(patterns):
        if match := pattern.fullmatch(path):
            return number, match.groups()
    return None, path


def _siblings(path: str) -> str:
    parts = path.split("/")
    for i, part in enumerate(parts):
        for number, names in enumerate(SIBLINGS):
            if part in names:
                return "/".join([*parts[:i], f"<{number}>", *parts[i + 1 :]])
    return path


def group_name(paths: Sequence[str]) -> str:
    """One name for several paths: `layers/0/mlp/{gate_proj,up_proj}/kernel`."""
    if len(paths) == 1:
        return paths[0]
    head, middles, tail = common(paths)
    return f"{head}{{{','.join(middles)}}}{tail}"


def common(paths: Sequence[str]) -> tuple[str, list[str], str]:
    """What several distinct paths begin with, what differs, and what they end with."""
    split = [path.split("/") for path in paths]
    shortest = min(map(len, split)) - 1
    begin = 0
    while begin < shortest and len({s[begin] for s in split}) == 1:
        begin += 1
    end = 0
    while end < shortest - begin and len({s[-1 - end] for s in split}) == 1:
        end += 1
    head = "".join(f"{part}/" for part in split[0][:begin])
    tail = "".join(f"/{part}" for part in split[0][len(split[0]) - end :])
    return head, ["/".join(s[begin : len(s) - end]) for s in split], tail
