"""What transforms that scale features have in common: where, and in which order."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from angeljax.calibration._statistics import Statistics
from angeljax.formats import Spec
from angeljax.transforms._base import changed_fields
from angeljax.transforms._graph import (
    DEFAULTS,
    PARTS,
    Link,
    Pair,
    check_readers,
    find_links,
    parse_pairs,
)
from angeljax.transforms._rescale import found_of, output_error, rescale


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairOptions(abc.ABC):
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

    @abc.abstractmethod
    def needs(self) -> tuple[str, ...]:
        """Names of the statistics that `scales` reads."""

    @abc.abstractmethod
    def scales(
        self,
        link: Link,
        leaves: Mapping[str, Any],
        found: Mapping[str, dict[str, jax.Array]],
        plan: Mapping[str, Spec],
    ) -> jax.Array:
        """What the features of one producer are divided by, `[*lead, width]`.

        Args:
          link: the producer.
          leaves: path -> array, as they are by now.
          found: statistics of its readers that are quantized.
          plan: path -> spec.
        """

    def apply(
        self,
        leaves: Mapping[str, Any],
        stats: Statistics | None,
        plan: Mapping[str, Spec],
    ) -> tuple[dict[str, Any], Statistics | None]:
        """See `Transform`. A later producer sees what an earlier one did to weights.

        Raises:
          ValueError: pairs do not fit the tree, or no reader is quantized by a rule.
        """
        assert stats is not None, "compress has checked it"
        links = find_links(self.all_pairs(), leaves, plan, self.head_dim)
        for link in links:
            check_readers(link, stats, plan)
        now, changed = dict(leaves), {}
        after: Statistics | None = stats
        for link in links:
            assert after is not None
            found = found_of(link, now, after, plan, self.needs())
            if not found:
                if self.pairs:
                    raise ValueError(
                        f"no reader of {link.producer} is quantized by a rule: leave "
                        "out its pair"
                    )
                continue
            s = self.scales(link, now, found, plan)
            new, after = rescale(link, s, now, after, plan)
            now.update(new)
            changed.update(new)
        return changed, after

    def best_of(
        self,
        tried: jax.Array,
        link: Link,
        leaves: Mapping[str, Any],
        found: Mapping[str, dict[str, jax.Array]],
        plan: Mapping[str, Spec],
        *,
        activations: bool = False,
    ) -> jax.Array:
        """Of candidates `[R, *lead, width]` that with the smallest error of outputs."""
        inputs = link.expand(tried)
        errors = [
            output_error(
                leaves[path], dict(f), inputs,
                spec=plan[path], lead=link.lead, activations=activations,
            )
            for path, f in found.items()
        ]  # fmt: skip
        best = jnp.argmin(sum(errors[1:], errors[0]), axis=0)
        return jnp.take_along_axis(tried, best[None, ..., None], axis=0)[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML values."""
        return changed_fields(self)
