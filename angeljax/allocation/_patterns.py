"""Regular expressions that match a set of leaves and no other leaf, short to read."""

from __future__ import annotations

import re
from collections.abc import Sequence

from angeljax.allocation._candidates import NUMBER, common


def patterns(chosen: Sequence[str], paths: Sequence[str]) -> list[str]:
    """Patterns for `re.fullmatch`, such as `layers/(0|3|7)/mlp/down_proj/kernel`.

    Args:
      chosen: paths that are to be matched.
      paths: all of the tree.

    Returns:
      Patterns of which each path of `chosen` matches one, and no other path any; in the
      order in which their first leaves stand in `chosen`.
    """
    every = _numbers(paths)
    # Leaves of the same layers, such as o_proj and down_proj of 3 and 7, go together.
    together: dict[tuple[str, frozenset[str], bool], list[str]] = {}
    for (head, tail), numbers in _numbers(chosen).items():
        whole = bool(head) and len(numbers) > 1 and numbers == every[head, tail]
        key = head, frozenset(numbers), whole
        together.setdefault(key, []).append(tail)
    out = []
    for (head, same, whole), tails in together.items():
        layers = r"\d+" if whole else _either(sorted(same, key=int))
        if len(tails) == 1:
            rest = re.escape(tails[0])
        else:
            begin, middles, end = common(tails)
            rest = re.escape(begin) + _either(middles) + re.escape(end)
        out.append(re.escape(head) + layers + rest)
    return out


def _numbers(paths: Sequence[str]) -> dict[tuple[str, str], set[str]]:
    """What stands before and after the first number of a path -> the numbers there."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in paths:
        if match := NUMBER.search(path):
            key = path[: match.start()], path[match.end() :]
            found.setdefault(key, set()).add(match[1])
        else:
            found.setdefault(("", path), set())
    return found


def _either(words: Sequence[str]) -> str:
    if len(words) <= 1:
        return "".join(map(re.escape, words))
    return f"({'|'.join(map(re.escape, words))})"
