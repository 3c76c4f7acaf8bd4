"""AWQ: weights of features that matter made larger before they are rounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from angeljax.formats import Spec
from angeljax.transforms._base import register
from angeljax.transforms._graph import Link
from angeljax.transforms._options import PairOptions
from angeljax.transforms._rescale import over_experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQ(PairOptions):
    """Multiplies weights by s and divides the features that they read by s.

    s_j = a_j^r, at least 1e-4, divided by the root of its largest times its smallest;
    a_j is the mean magnitude of a feature over tokens and r one of `grid` exponents
    from 0 on, for each producer the best one (arXiv 2306.00978, section 3.2). The
    function of the model stays as it is. How weights are then rounded is up to the
    rules: the paper takes int4 with a zero point in groups of 128; scales may be
    searched too with the algorithm `awq_clip`.

    The paper compares outputs of a whole block, such as attention. Here the error is
    that of the products of all readers, the sum of tr(dW' H dW) with dW = Q(W s)/s - W:
    exact for these products, computed from statistics without a second pass over data.
    What it leaves out is how a block weighs errors of one reader against another.

    Attributes:
      grid: number of exponents, 0, 1/grid, 2/grid and so on, without 1.
      parts: which pairs of the defaults: "norm" (a norm and the products after it),
        "value" (v_proj and o_proj), "up" (up_proj and down_proj).
      pairs: producers and readers in place of the defaults; `Pair`, or mappings `{from,
        to}`. Every reader of a norm must be named, routers too.
      head_dim: of attention; for "value" where several queries share a head of values:
        they then share its scales.

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
      ...     rules=[aj.Rule(format="int4", group_size=32, symmetric=False)],
      ...     transforms=[{"name": "awq"}])
      >>> tokens = jax.numpy.arange(16).reshape(2, 8)
      >>> stats = aj.calibrate(model, params, [tokens], recipe)
      >>> q = aj.compress(params, recipe, stats)
      >>> model.logits(q, tokens).shape
      (2, 8, 64)
    """

    name: ClassVar[str] = "awq"
    grid: int = 20
    parts: Sequence[str] = ("norm", "up")

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.grid) is not int or self.grid < 2:
            raise ValueError(f"grid={self.grid!r}: use an integer of at least 2")

    def needs(self) -> tuple[str, ...]:
        """See `Transform`."""
        return ("abs_sum", "hessian")

    def scales(
        self,
        link: Link,
        leaves: Mapping[str, Any],
        found: Mapping[str, dict[str, jax.Array]],
        plan: Mapping[str, Spec],
    ) -> jax.Array:
        """See `PairOptions`."""
        total, count = jnp.float32(0), jnp.float32(0)
        for f in found.values():
            total += over_experts(f["abs_sum"], link.lead, "sum")
            count += over_experts(f["count"], link.lead, "sum", trailing=0)
        mean = link.pool(total / jnp.maximum(count, 1)[..., None], "mean")
        return self.best_of(awq_scales(mean, self.grid), link, leaves, found, plan)


def awq_scales(mean: jax.Array, grid: int) -> jax.Array:
    """Candidates `[grid, ..., K]` for mean magnitudes `[..., K]` of features."""
    r = (jnp.arange(grid) / grid).reshape(-1, *(1,) * mean.ndim)
    s = jnp.maximum(mean**r, 1e-4)
    top = jnp.max(s, axis=-1, keepdims=True)
    return s / jnp.sqrt(top * jnp.min(s, axis=-1, keepdims=True))


register(AWQ.name, AWQ)
