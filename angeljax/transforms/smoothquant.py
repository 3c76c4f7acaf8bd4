"""SmoothQuant: outliers of activations moved into weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.formats import Spec
from angeljax.transforms._base import register
from angeljax.transforms._graph import Link
from angeljax.transforms._options import PairOptions
from angeljax.transforms._rescale import (
    check_number,
    geometry,
    over_experts,
    weight_amax,
)

_GRID = np.linspace(0.3, 1.0, 8)
# Scales beyond these would only be noise of dead features.
_LEAST, _MOST = 1e-5, 1e5


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothQuant(PairOptions):
    """Divides features by s and multiplies the weights that read them by s.

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), the maxima over all tokens and over all
    readers (arXiv 2211.10438, equation 4). The function of the model stays as it is.

    `alpha="search"` tries .3, .4, ... 1 for every producer and keeps what makes the
    error of the products of its readers smallest, computed from the Hessian: weights
    rounded as their own rules say, activations by a model of their rounding to what the
    rule's `activation` says. Readers that no rule takes are compensated, and have no
    say.

    Attributes:
      alpha: how much of the difficulty moves into the weights, 0 to 1, or "search".
      parts: which pairs of the defaults: "norm" (a norm and the products after it),
        "value" (v_proj and o_proj), "up" (up_proj and down_proj).
      pairs: producers and readers in place of the defaults; `Pair`, or mappings `{from,
        to}`. Every reader of a norm must be named, routers too.
      head_dim: of attention; for "value" where several queries share a head of values.

    Raises:
      ValueError: a field has a value that it cannot have.

    Example:
      >>> import jax, angeljax as aj
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> model = LanguageModel(DecoderConfig(
      ...     model_type="llama", vocab_size=64, hidden_size=32, num_layers=2,
      ...     intermediate_size=64, num_heads=2, num_kv_heads=1, head_dim=16))
      >>> params = model.init(jax.random.key(0))
      >>> recipe = aj.Recipe(
      ...     rules=[
      ...         aj.Rule(format="int8", activation="int8", activation_scale="amax")],
      ...     transforms=[{"name": "smoothquant", "alpha": 0.5}])
      >>> tokens = jax.numpy.arange(16).reshape(2, 8)
      >>> stats = aj.calibrate(model, params, [tokens], recipe)
      >>> q = aj.compress(params, recipe, stats)
      >>> model.logits(q, tokens).shape
      (2, 8, 64)
    """

    name: ClassVar[str] = "smoothquant"
    alpha: float | str = 0.5
    parts: Sequence[str] = ("norm",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha != "search":
            if isinstance(self.alpha, str):
                raise ValueError(f"alpha={self.alpha!r}: use a number or 'search'")
            check_number("alpha", self.alpha, 0.0, 1.0)

    def needs(self) -> tuple[str, ...]:
        """See `Transform`."""
        more = ("hessian",) if self.alpha == "search" else ()
        return ("amax_channel", *more)

    def scales(
        self,
        link: Link,
        leaves: Mapping[str, Any],
        found: Mapping[str, dict[str, jax.Array]],
        plan: Mapping[str, Spec],
    ) -> jax.Array:
        """See `PairOptions`."""
        tops = [
            over_experts(f["amax_channel"], link.lead, "max") for f in found.values()
        ]
        x = link.pool(jnp.max(jnp.stack(tops), axis=0), "max")
        weights = []
        for path in link.consumers:
            _, axes = geometry(path, leaves[path], plan)
            weights.append(weight_amax(leaves[path], link.lead, axes))
        w = link.pool(jnp.max(jnp.stack(weights), axis=0), "max")
        if self.alpha != "search":
            return smoothing_scales(x, w, float(self.alpha))
        tried = jnp.stack([smoothing_scales(x, w, float(a)) for a in _GRID])
        return self.best_of(tried, link, leaves, found, plan, activations=True)


def smoothing_scales(x: jax.Array, w: jax.Array, alpha: float) -> jax.Array:
    """x^alpha / w^(1 - alpha) for maxima of inputs and weights; 1 where one is 0."""
    s = x**alpha / jnp.maximum(w, 1e-30) ** (1 - alpha)
    return jnp.where((x > 0) & (w > 0), jnp.clip(s, _LEAST, _MOST), 1.0)


register(SmoothQuant.name, SmoothQuant)
