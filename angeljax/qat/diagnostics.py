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
from jaxtyping import Array, Float, Int8, Num

from angeljax import _leaves
from angeljax.formats import QTensor, Spec, _blocks, get_format
from angeljax.formats._blocks import Granules
from angeljax.qat._fake import Learned, _snap
from angeljax.qat._transform import QATState

_FLOAT8 = {"float8_e4m3": jnp.float8_e4m3fn, "float8_e5m2": jnp.float8_e5m2}


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Flips:
    """Codes of a while ago, and how many had changed when last compared.

    Attributes:
      codes: path -> int8, of the shape of the weight: one byte a weight.
      step: int32, the optimizer step that they are of.
      rates: path -> float32, share of the codes that differed from those before.
      rate: float32, the same over all leaves together.
    """

    codes: dict[str, jax.Array]
    step: jax.Array
    rates: dict[str, jax.Array]
    rate: jax.Array


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
    for path, w, spec, learned in _trained(params, state):
        _, planes = _snap(_blocks.to_blocks(w, spec), spec, learned)
        ratio = scaled_magnitude(w, _expanded(planes["scale"], w, spec))
        # Not NaN: an infinite float has no int32.
        place = jnp.clip(jnp.nan_to_num(ratio / limit, nan=2.0) * bins, 0, bins)
        counts[path] = jnp.bincount(place.astype(jnp.int32).ravel(), length=bins + 1)
    return Histogram(counts, limit)


def codes(params: Any, state: QATState) -> dict[str, jax.Array]:
    """The code that each weight would be stored with, as a number to compare.

    Args:
      params: latent weights, as `QAT.apply` takes them.
      state: from `QAT.init`, trained.

    Returns:
      path -> int8, of the shape of the weight. Equal for equal levels; ternary formats
      have -2, 0 and 2.

    Raises:
      ValueError: no leaf can be looked at.

    Example:
      >>> import jax.numpy as jnp, angeljax as aj
      >>> from angeljax.qat import diagnostics
      >>> params = {"kernel": jnp.array([[0.9], [-0.8], [0.1], [1.0]])}
      >>> recipe = aj.Recipe(rules=[aj.Rule(match="kernel", format="t2")])
      >>> state = aj.qat.make(recipe, total_steps=1).init(params)
      >>> diagnostics.codes(params, state)["kernel"][:, 0].tolist()
      [2, -2, 0, 2]
    """
    return {
        path: _codes(w, s, learned) for path, w, s, learned in _trained(params, state)
    }


def flip_rates(
    before: dict[str, jax.Array], after: dict[str, jax.Array]
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Shares of the codes that differ.

    Args:
      before: from `codes`.
      after: from `codes`, of the same tree.

    Returns:
      Path -> float32 share, and the share over all leaves together.

    Raises:
      ValueError: the two are of different trees.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.qat.diagnostics import flip_rates
      >>> a, b = jnp.int8([0, 2, -2, 0]), jnp.int8([0, 2, 2, 0])
      >>> rates, rate = flip_rates({"w": a}, {"w": b})
      >>> float(rates["w"]), float(rate)
      (0.25, 0.25)
    """
    odd = sorted(before.keys() ^ after.keys())
    odd += [p for p in before if p in after and before[p].shape != after[p].shape]
    if odd:
        raise ValueError(f"the codes are of different trees: {odd[0]}")
    rates = {p: jnp.mean(before[p] != after[p], dtype=jnp.float32) for p in before}
    size = sum(b.size for b in before.values())
    rate = sum(rates[p] * (before[p].size / size) for p in before)
    return rates, jnp.asarray(rate, jnp.float32)


def start_flips(params: Any, state: QATState, step: Any = 0) -> Flips:
    """Takes the codes to compare later ones with.

    Args:
      params: latent weights, as `QAT.apply` takes them.
      state: from `QAT.init`, trained.
      step: the optimizer step that they are of.

    Returns:
      `Flips` with rates of 0.

    Raises:
      ValueError: no leaf can be looked at.

    Example:
      See `update_flips`.
    """
    now = codes(params, state)
    # One array for each: donating the state must not donate one buffer twice.
    zeros = {path: jnp.zeros(()) for path in now}
    return Flips(now, jnp.asarray(step, jnp.int32), zeros, jnp.zeros(()))


def update_flips(
    flips: Flips, params: Any, state: QATState, step: Any, *, every: int
) -> Flips:
    """Compares codes with those of `every` steps ago, once in so many steps.

    Args:
      flips: from `start_flips` or the last call.
      params: latent weights after `step` optimizer steps.
      state: their state.
      step: optimizer steps taken, a scalar that may be traced.
      every: steps between two comparisons. Between them this costs nothing.

    Returns:
      `flips` itself, or new codes, step and rates.

    Raises:
      ValueError: `every` is not positive, or the trees differ.

    Example:
      >>> import jax, jax.numpy as jnp, angeljax as aj
      >>> from angeljax.qat import diagnostics
      >>> params = {"kernel": jnp.array([[0.9], [-0.8], [0.1], [1.0]])}
      >>> recipe = aj.Recipe(rules=[aj.Rule(match="kernel", format="t2")])
      >>> state = aj.qat.make(recipe, total_steps=1).init(params)
      >>> flips = diagnostics.start_flips(params, state)
      >>> update = jax.jit(diagnostics.update_flips, static_argnames="every")
      >>> moved = {"kernel": params["kernel"] - 0.9}
      >>> float(update(flips, moved, state, 9, every=10).rate)
      0.0
      >>> float(update(flips, moved, state, 10, every=10).rate)
      0.75
    """
    if every < 1:
        raise ValueError(f"every must be positive, not {every}")
    step = jnp.asarray(step, jnp.int32)

    def compare() -> Flips:
        now = codes(params, state)
        return Flips(now, step, *flip_rates(flips.codes, now))

    return jax.lax.cond(step - flips.step >= every, compare, lambda: flips)


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


def _trained(
    params: Any, state: QATState
) -> list[tuple[str, jax.Array, Spec, Learned]]:
    values = {leaf.path: leaf.value for leaf in _leaves.flatten(params)[0]}
    found = []
    for plan in state.plan:
        if plan.path not in values:
            raise ValueError(f"the state is of another tree: {plan.path} is not in it")
        if get_format(plan.spec.format).snap is not None:
            learned = state.learned.get(plan.path, {})
            found.append((plan.path, values[plan.path], plan.spec, learned))
    if not found:
        raise ValueError("no leaf is trained in a format with one scale for its codes")
    return found


def _expanded(scale: jax.Array, w: jax.Array, spec: Spec) -> jax.Array:
    """Granules `[*lead', G, 1]` -> one scale for each weight, of the shape of `w`."""
    blocks = jax.eval_shape(lambda: _blocks.to_blocks(w, spec)).shape
    whole = Granules(spec).expand(scale.astype(jnp.float32))
    return _blocks.from_blocks(jnp.broadcast_to(whole, blocks), spec)


def _codes(w: jax.Array, spec: Spec, learned: Learned) -> Int8[Array, "..."]:
    levels, _ = _snap(_blocks.to_blocks(w, spec), spec, learned)
    levels = _blocks.from_blocks(levels, spec)
    if spec.format in _FLOAT8:
        narrow = levels.astype(_FLOAT8[spec.format])
        return jax.lax.bitcast_convert_type(narrow, jnp.int8)
    clip = get_format(spec.format).clip
    assert clip is not None
    # Levels of few bits may be halves; those of 8 bits are whole and fill the byte.
    factor = 2.0 if max(map(abs, clip(spec))) < 32 else 1.0
    return (levels * factor).astype(jnp.int32).astype(jnp.int8)
