"""Whether training still moves the codes, or the latent weights are trapped.

Under a coarse quantizer latent weights may drift to the scale and stay, with all signs
and zeros settled and gradients of low rank (Sherry, arXiv 2601.07892, section 3.1:
"weight trapping"). Three things show it: the histogram of |w| / alpha, the share of
weights whose code changed of late, and the effective rank of the gradients.

All functions are pure, return small arrays and may stand in a jitted training step.
Leaves are those that the `QATState` trains, by path. The block formats with two scales
or none that training sees (NVFP4, MXFP4, MXFP8, NF4) are left out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from angeljax import _leaves
from angeljax.formats import QTensor, Spec, _blocks, get_format
from angeljax.formats._blocks import Granules
from angeljax.qat._codes import (
    Flips,
    codes,
    flip_rates,
    start_flips,
    trained_leaves,
    update_flips,
)
from angeljax.qat._fake import _snap
from angeljax.qat._state import QATState

__all__ = [
    "Flips",
    "Histogram",
    "codes",
    "effective_rank",
    "flip_rates",
    "gradient_ranks",
    "histogram",
    "scaled_magnitude",
    "start_flips",
    "update_flips",
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Histogram:
    """How many weights lie at which multiple of their scale.

    Attributes:
      counts: path -> int32 `[bins + 1]`; the last one counts what lies beyond `limit`.
      limit: where the bins end; they start at 0 and are equally wide.
    """

    counts: dict[str, jax.Array]
    limit: float = dataclasses.field(metadata={"static": True})

    @property
    def edges(self) -> jax.Array:
        """float32 `[bins + 1]`, the borders of the bins within `limit`."""
        bins = next(iter(self.counts.values())).shape[0] - 1
        return jnp.linspace(0.0, self.limit, bins + 1)

    @property
    def shares(self) -> jax.Array:
        """float32 `[bins + 1]`: the leaves taken together, with the sum 1."""
        total = sum(c.astype(jnp.float32) for c in self.counts.values())
        return total / jnp.sum(jnp.asarray(total))


def scaled_magnitude(w: Num[Array, "..."], scale: Any) -> Float[Array, "..."]:
    """|w| / alpha, where alpha is the scale that a weight shares.

    Args:
      w: latent weights.
      scale: a QTensor of the same shape, or an array that broadcasts against `w`.

    Returns:
      float32, of the shape of `w`; infinite where the scale is 0 and the weight is not.

    Raises:
      ValueError: the QTensor's format has no one scale.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.qat.diagnostics import scaled_magnitude
      >>> scaled_magnitude(jnp.array([-1.0, 0.5]), 0.5).tolist()
      [2.0, 1.0]
    """
    if isinstance(scale, QTensor):
        spec = scale.spec
        if get_format(spec.format).snap is None:
            raise ValueError(f"{spec.label()} weights have no scale of their own")
        planes = _blocks.unstore({"scale": scale.planes["scale"]}, spec, 1)
        scale = _expanded(planes["scale"], w, spec)
    size = jnp.abs(w.astype(jnp.float32))
    alpha = jnp.abs(jnp.asarray(scale, jnp.float32))
    unscaled = jnp.where(size > 0, jnp.inf, 0.0)
    return jnp.where(alpha > 0, size / jnp.where(alpha > 0, alpha, 1.0), unscaled)


def histogram(
    params: Any, state: QATState, *, bins: int = 60, limit: float = 3.0
) -> Histogram:
    """Counts |w| / alpha of every trained leaf.

    A share that grows around 1 (and around 0 for ternary formats) is trapped.

    Args:
      params: latent weights, as `QAT.apply` takes them.
      state: from `QAT.init`, trained.
      bins: between 0 and `limit`.
      limit: multiples of the scale beyond which weights are only counted.

    Returns:
      A `Histogram`.

    Raises:
      ValueError: `bins` or `limit` is not positive, or no leaf can be looked at.

    Example:
      >>> import jax, jax.numpy as jnp, angeljax as aj
      >>> from angeljax.qat import diagnostics
      >>> params = {"a": {"kernel": jax.random.normal(jax.random.key(0), (64, 8))}}
      >>> recipe = aj.Recipe(rules=[aj.Rule(format="sherry")])
      >>> state = aj.qat.make(recipe, total_steps=1).init(params)
      >>> diagnostics.histogram(params, state, bins=4).counts["a/kernel"].shape
      (5,)
    """
    if bins < 1 or not limit > 0:
        raise ValueError(f"bins={bins} and limit={limit} must be positive")
    counts = {}
    for path, w, spec, learned in trained_leaves(params, state):
        _, planes = _snap(_blocks.to_blocks(w, spec), spec, learned)
        ratio = scaled_magnitude(w, _expanded(planes["scale"], w, spec))
        # Not NaN: an infinite float has no int32.
        place = jnp.clip(jnp.nan_to_num(ratio / limit, nan=2.0) * bins, 0, bins)
        counts[path] = jnp.bincount(place.astype(jnp.int32).ravel(), length=bins + 1)
    return Histogram(counts, limit)


def effective_rank(matrix: Num[Array, "*batch rows columns"]) -> Float[Array, "*batch"]:
    """exp of the entropy of the normalised singular values (arXiv 2601.07892, sec. 3).

    ER = exp(-sum p ln p) with p = sigma / sum sigma: n for n equal singular values, 1
    for a matrix of rank one, and in between a rank that no threshold decides.

    Args:
      matrix: any real dtype, `[*batch, rows, columns]`.

    Returns:
      float32 `[*batch]`; 0 for a matrix of zeros.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.qat.diagnostics import effective_rank
      >>> ranks = effective_rank(jnp.stack([jnp.eye(4), jnp.ones((4, 4))]))
      >>> print(f"{ranks[0]:.3f} {ranks[1]:.3f}")
      4.000 1.000
    """
    sigma = jnp.linalg.svd(matrix.astype(jnp.float32), compute_uv=False)
    total = sigma.sum(axis=-1, keepdims=True)
    p = sigma / jnp.where(total > 0, total, 1.0)
    entropy = -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0).sum(axis=-1)
    return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0.0)


def gradient_ranks(
    gradients: Any, state: QATState, *, paths: tuple[str, ...] | None = None
) -> dict[str, jax.Array]:
    """Effective rank of the gradient of each trained leaf, as a matrix [out, in].

    A singular value decomposition of each: call it now and then, not at every step.

    Args:
      gradients: of the params, a tree of the same structure.
      state: from `QAT.init`.
      paths: the leaves to look at; None for all.

    Returns:
      Path -> float32, one number, or one for each layer of a stack.

    Raises:
      ValueError: a path is no trained leaf.

    Example:
      >>> import jax, jax.numpy as jnp, angeljax as aj
      >>> from angeljax.qat import diagnostics
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 8))}
      >>> recipe = aj.Recipe(rules=[aj.Rule(format="sherry")])
      >>> state = aj.qat.make(recipe, total_steps=1).init(params)
      >>> gradients = {"kernel": jnp.ones((64, 8))}
      >>> print(f'{diagnostics.gradient_ranks(gradients, state)["kernel"]:.3f}')
      1.000
    """
    plans = {plan.path: plan for plan in state.plan}
    for path in paths or ():
        if path not in plans:
            raise ValueError(f"{path} is not trained; there are {', '.join(plans)}")
    chosen = plans if paths is None else paths
    ranks = {}
    for leaf in _leaves.flatten(gradients)[0]:
        if leaf.path in chosen:
            spec = plans[leaf.path].spec
            blocks = _blocks.to_blocks(leaf.value, spec)
            batch = leaf.value.shape[: leaf.value.ndim - len(spec.shape)]
            # The padding of K is zeros, and adds singular values of 0 only.
            matrix = blocks.reshape(*batch, -1, spec.k_padded)
            ranks[leaf.path] = effective_rank(matrix)
    return ranks


def _expanded(scale: jax.Array, w: jax.Array, spec: Spec) -> jax.Array:
    """Granules `[*lead', G, 1]` -> one scale for each weight, of the shape of `w`."""
    blocks = jax.eval_shape(lambda: _blocks.to_blocks(w, spec)).shape
    whole = Granules(spec).expand(scale.astype(jnp.float32))
    return _blocks.from_blocks(jnp.broadcast_to(whole, blocks), spec)
