"""What a transform is: a tree and its statistics in, an equivalent tree out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from angeljax.calibration._statistics import Statistics


@runtime_checkable
class Transform(Protocol):
    """A change of weights that leaves the function of the model as it is.

    Implementations are frozen, hashable dataclasses that check themselves, registered
    under the `name` that recipes call them by. They work on leaves by path, on params
    with or without layer axes in front.
    """

    name: ClassVar[str]

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


def apply_transforms(
    params: Any, recipe: Any, stats: Statistics | None = None
) -> tuple[Any, Statistics | None]:
    """Only the transforms of a recipe: the tree before it is quantized.

    `angeljax.compress` does this by itself. It is of use where statistics are to be
    measured on the transformed model.

    Args:
      params: a param tree.
      recipe: its rules say which weights will be quantized, and how.
      stats: of `params`, where a transform needs them.

    Returns:
      The tree, and its statistics as far as they follow from `stats`.

    Raises:
      RecipeError: the recipe does not fit the tree.
      StatisticsError: statistics are missing, or of another model.

    Example:
      >>> import jax, angeljax as aj
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> from angeljax.transforms import apply_transforms
      >>> model = LanguageModel(DecoderConfig(
      ...     model_type="llama", vocab_size=64, hidden_size=32, num_layers=2,
      ...     intermediate_size=64, num_heads=2, num_kv_heads=1, head_dim=16))
      >>> params, tokens = model.init(jax.random.key(0)), jax.numpy.ones((1, 4), int)
      >>> rules = [aj.Rule(format="int8")]
      >>> recipe = aj.Recipe(rules=rules, transforms=[{"name": "smoothquant"}])
      >>> stats = aj.calibrate(model, params, [tokens], recipe)
      >>> smooth, after = apply_transforms(params, recipe, stats)
      >>> bool(jax.numpy.allclose(model.logits(smooth, tokens),
      ...                         model.logits(params, tokens), atol=1e-5))
      True
    """
    # They stand on recipes, which stand on this module.
    from angeljax import _jobs, _leaves
    from angeljax._plan import make_plan

    leaves, treedef = _leaves.flatten(params)
    new, stats = _jobs.apply_transforms(
        leaves, make_plan(leaves, recipe), recipe, stats
    )
    return _leaves.unflatten(treedef, leaves, [x.value for x in new]), stats


def changed_fields(transform: Transform) -> dict[str, Any]:
    """Name and fields that differ from their defaults, as plain YAML values."""
    out: dict[str, Any] = {"name": transform.name}
    for field in dataclasses.fields(transform):  # type: ignore[arg-type]
        value = getattr(transform, field.name)
        if value == field.default:
            continue
        if field.name == "pairs":
            value = [pair.to_dict() for pair in value]
        out[field.name] = list(value) if isinstance(value, tuple) else value
    return out


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
