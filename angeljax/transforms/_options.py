"""What the transforms that scale features have in common: where they do so."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from angeljax.transforms._graph import DEFAULTS, PARTS, Link, Pair, parse_pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairOptions:
    """Producers and readers; see the transforms."""

    name: ClassVar[str]
    parts: Sequence[str] = ("norm",)
    pairs: Sequence[Pair] = ()
    head_dim: int | None = None

    def __post_init__(self) -> None:
        parts = self.parts
        if isinstance(parts, str) or any(p not in PARTS for p in parts):
            raise ValueError(f"parts={parts!r}: use a list of {', '.join(PARTS)}")
        object.__setattr__(self, "parts", tuple(parts))
        object.__setattr__(self, "pairs", parse_pairs(self.pairs))
        if not self.parts and not self.pairs:
            raise ValueError("parts and pairs are empty: there is nothing to scale")
        size = self.head_dim
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"head_dim={size!r}: use a positive integer")

    def all_pairs(self) -> tuple[Pair, ...]:
        """Those of the user, or the defaults of the parts."""
        return tuple(self.pairs) or tuple(p for x in self.parts for p in DEFAULTS[x])

    def check_unused(self, link: Link) -> None:
        """A pair of the user must have a reader that is quantized.

        Raises:
          ValueError: it has none.
        """
        if self.pairs:
            raise ValueError(
                f"no reader of {link.producer} is quantized by a rule: leave out its "
                "pair"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML values."""
        out: dict[str, Any] = {"name": self.name}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if field.name == "pairs":
                value = [pair.to_dict() for pair in value]
            out[field.name] = list(value) if isinstance(value, tuple) else value
        return out
