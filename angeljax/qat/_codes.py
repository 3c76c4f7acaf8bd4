"""Codes of the trained leaves, and how many of them training still changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int8

from angeljax import _leaves
from angeljax.formats import Spec, _blocks, get_format
from angeljax.qat._fake import Learned, _snap
from angeljax.qat._state import QATState

_FLOAT8 = {"float8_e4m3": jnp.float8_e4m3fn, "float8_e5m2": jnp.float8_e5m2}


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
        path: _codes(w, s, learned)
        for path, w, s, learned in trained_leaves(params, state)
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


def trained_leaves(
    params: Any, state: QATState
) -> list[tuple[str, jax.Array, Spec, Learned]]:
    """Path, latent weight, format and learned planes of what can be looked at.

    Raises:
      ValueError: no leaf can, or the state is of another tree.
    """
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
