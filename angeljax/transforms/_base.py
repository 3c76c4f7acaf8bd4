"""What a transform is: a tree and its statistics in, an equivalent tree out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from angeljax.calibration._statistics import Statistics


@runtime_checkable
class Transform(Protocol):
    """A change of weights that leaves the function of the model as it is.

    Implementations are frozen, hashable dataclasses that check themselves, registered
    under the `name` that recipes call them by. They work on leaves by path, on params
    with or without layer axes in front.
    """

    def needs(self) -> tuple[str, ...]:
        """Names of the statistics that it reads."""
        ...

    def apply(
        self,
        leaves: Mapping[str, Any],
        stats: Statistics | None,
        plan: Mapping[str, Any],
    ) -> tuple[dict[str, Any], Statistics | None]:
        """New values of some leaves, and the statistics that go with them.

        Args:
          leaves: path -> array.
          stats: of the tree as it is, or None.
          plan: path -> `Spec` of the leaves that the recipe quantizes.

        Returns:
          The leaves that changed, and statistics of the new tree.

        Raises:
          ValueError: the tree does not have what it needs.
        """
        ...

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML values, `name` among them."""
        ...


_TRANSFORMS: dict[str, Callable[..., Transform]] = {}


def register(name: str, make: Callable[..., Transform]) -> None:
    """Adds a transform; its name must be new."""
    if name in _TRANSFORMS:
        raise ValueError(f"transform {name!r} is registered already")
    _TRANSFORMS[name] = make


def parse(data: Any) -> Transform:
    """A transform from an entry of a recipe.

    Raises:
      ValueError: no such transform, or options that it does not take.
    """
    if isinstance(data, Transform):
        return data
    if not isinstance(data, Mapping) or "name" not in data:
        raise ValueError(f"a transform must be a mapping with a name, not {data!r}")
    name = data["name"]
    if name not in _TRANSFORMS:
        raise ValueError(
            f"unknown transform {name!r}: use {', '.join(sorted(_TRANSFORMS))}"
        )
    options = {k: v for k, v in data.items() if k != "name"}
    try:
        return _TRANSFORMS[name](**options)
    except TypeError as e:
        raise ValueError(f"transform {name}: {e}") from None
