"""FOCUS: learned rounding for NVFP4 and MXFP4, with the weights frozen.

A weight is divided by one scale before it is rounded and multiplied by another when it
is read. The second, S, must be one that the format can hold; the first need not, since
nobody stores it (FOCUS FP4, arXiv 2608.01847):

    code = E2M1(w / (S c)),   w' = code S,   S from m amax

c = sigmoid(p) is one number for 8 weights, which starts close to 1 (p = 6), and m one
for each block, which starts at 1. Both are learned, with straight-through gradients:
rounding hands its gradient on, except that of elements beyond 6; the power of two of MX
counts as proportional to its argument, the E4M3 scale of NVFP4 as its argument. What
is stored is an ordinary weight of the format. Block scales of NVFP4 do not go below the
least normal number of E4M3, 2^-6.

`angeljax.train.recovery.learn_focus` is a loop that trains this.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from angeljax import _leaves
from angeljax._plan import make_plan
from angeljax.formats import QTensor, Spec, _blocks, get_format
from angeljax.formats._registry import Planes
from angeljax.formats.float8 import E4M3, cast
from angeljax.formats.integer import TINY, inverse
from angeljax.formats.microscaling import (
    E2M1_MAX,
    E4M3_MAX,
    block_scale,
    e2m1_round,
    e8m0_encode,
)
from angeljax.qat._straight import straight_through
from angeljax.qat._tensor import FakeTensor
from angeljax.recipe import Recipe, RecipeError

__all__ = ["FocusState", "apply", "finalize", "init"]

FORMATS = ("mxfp4", "nvfp4")
SUB_BLOCK = 8
START = 6.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FocusState:
    """What FOCUS learns; a pytree of float32 arrays by the path of the weight.

    The arrays have the blocked form: outputs in front, blocks along the contraction.

    Attributes:
      rounding: p, `[*batch, *outputs, blocks, sub-blocks of 8]`.
      max_scale: m, `[*batch, *outputs, blocks, 1]`.
      plan: path and spec of each weight; static.
    """

    rounding: dict[str, jax.Array]
    max_scale: dict[str, jax.Array]
    plan: tuple[tuple[str, Spec], ...] = dataclasses.field(metadata={"static": True})


def init(params: Any, recipe: Recipe) -> FocusState:
    """The state at the start, close to rounding to nearest.

    Args:
      params: a param tree of float arrays, dense.
      recipe: its rules take weights to nvfp4 or mxfp4.

    Returns:
      A `FocusState`.

    Raises:
      RecipeError: as `angeljax.compress`; also a rule with another format.
    """
    leaves, _ = _leaves.flatten(params)
    plan, rounding, max_scale = [], {}, {}
    for leaf, assigned in zip(leaves, make_plan(leaves, recipe), strict=True):
        spec = assigned.spec
        if spec is None:
            continue
        if spec.format not in FORMATS:
            raise RecipeError(
                f"{leaf.path}: FOCUS learns {' and '.join(FORMATS)}, not "
                f"{spec.format}: leave it out here and compress it afterwards"
            )
        plan.append((leaf.path, spec))
        # Only its shape is looked at.
        blocks = jax.eval_shape(
            functools.partial(_blocks.to_blocks, spec=spec), leaf.value
        )
        lead = blocks.shape[:-1]
        subs = -(-spec.group_size // SUB_BLOCK)
        rounding[leaf.path] = jnp.full((*lead, subs), START, jnp.float32)
        max_scale[leaf.path] = jnp.ones((*lead, 1), jnp.float32)
    return FocusState(rounding, max_scale, tuple(plan))


def apply(params: Any, state: FocusState, *, dtype: Any = None) -> Any:
    """The tree that the model is to be called with in the loss.

    Args:
      params: the weights, which get no gradient.
      state: from `init`, trained.
      dtype: of the quantized leaves; default that of the weights.

    Returns:
      A tree of the structure of `params`, differentiable in `state`; `FakeTensor`s
      where a rule quantizes activations. Bit for bit what `finalize` packs.

    Example:
      >>> import jax, jax.numpy as jnp, angeljax as aj
      >>> from angeljax.qat import focus
      >>> params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (64, 8))}}
      >>> recipe = aj.Recipe(rules=[aj.Rule(format="nvfp4")])
      >>> state = focus.init(params, recipe)
      >>> w = focus.apply(params, state)["dense"]["kernel"]
      >>> packed = focus.finalize(params, state)["dense"]["kernel"]
      >>> bool((w == packed.dequantize()).all())
      True
    """

    def one(w: jax.Array, p: jax.Array, m: jax.Array, spec: Spec) -> Any:
        w = jax.lax.stop_gradient(w)
        fake = _fake(w, p, m, spec).astype(w.dtype if dtype is None else dtype)
        if spec.activation is not None:
            return FakeTensor(planes={"codes": fake}, spec=spec)
        return fake

    return _map(params, state, one)


def finalize(params: Any, state: FocusState, *, dtype: Any = None) -> Any:
    """Packs what was learned into ordinary weights of the format.

    Args:
      params: the weights.
      state: trained state.
      dtype: logical dtype of the packed leaves; default that of the weights.

    Returns:
      The tree with QTensors.

    Raises:
      ValueError: a learned number is NaN or infinite (outside of `jit`).
    """
    for path, _ in state.plan:
        for name in ("rounding", "max_scale"):
            value = getattr(state, name)[path]
            traced = isinstance(value, jax.core.Tracer)
            if not traced and not bool(jnp.all(jnp.isfinite(value))):
                raise ValueError(
                    f"the learned {name} of {path} holds NaN or infinity: use a "
                    "smaller learning rate"
                )

    def one(w: jax.Array, p: jax.Array, m: jax.Array, spec: Spec) -> QTensor:
        if dtype is not None:
            spec = dataclasses.replace(spec, dtype=jnp.dtype(dtype).name)
        return _packed(w, p, m, spec)

    return _map(params, state, one)


def _map(params: Any, state: FocusState, one: Any) -> Any:
    leaves, treedef = _leaves.flatten(params)
    specs = dict(state.plan)
    missing = set(specs) - {leaf.path for leaf in leaves}
    if missing:
        raise ValueError(
            f"the state is of another tree: it has {sorted(missing)[0]}, which is not "
            "among the params"
        )
    new = []
    for leaf in leaves:
        value = leaf.value
        if leaf.path in specs:
            p, m = state.rounding[leaf.path], state.max_scale[leaf.path]
            value = one(value, p, m, specs[leaf.path])
        new.append(value)
    return _leaves.unflatten(treedef, leaves, new)


def _scales(blocks: jax.Array, m: jax.Array, spec: Spec) -> tuple[Planes, jax.Array]:
    """Planes of scales, and the scale of each block, differentiable in m."""
    amax = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    if spec.format == "nvfp4":
        axes = tuple(range(amax.ndim - 1 - spec.rank, amax.ndim))
        scale2 = jnp.max(amax, axis=axes, keepdims=True) * inverse(E2M1_MAX * E4M3_MAX)
        scale2 = jnp.where(scale2 < TINY, 1.0, scale2)
        x = amax * m * inverse(E2M1_MAX) * (1.0 / scale2)
        least = float(jnp.finfo(E4M3).smallest_normal)
        x = jnp.where(amax == 0, 1.0, jnp.clip(x, least, E4M3_MAX))
        planes = {"scale": cast(jax.lax.stop_gradient(x), E4M3), "scale2": scale2}
        return planes, straight_through(x * scale2, block_scale(planes))
    rounding = spec.option("scale_rounding")
    # "floor" divides by the power of two of the largest element.
    x = amax * m * inverse(E2M1_MAX if rounding == "ceil" else 4.0)
    x = jnp.where(amax < TINY, 1.0, jnp.maximum(x, TINY))
    planes = {"scale": e8m0_encode(jax.lax.stop_gradient(x), rounding)}
    scale = block_scale(planes)
    return planes, straight_through(x * jax.lax.stop_gradient(scale / x), scale)


def _levels(
    blocks: jax.Array, p: jax.Array, m: jax.Array, spec: Spec
) -> tuple[jax.Array, Planes, jax.Array]:
    """Elements, planes of scales, and the scale of each block."""
    planes, scale = _scales(blocks, m, spec)
    # Codes at a tie must not depend on what XLA computes c together with.
    c = jax.lax.optimization_barrier(jax.nn.sigmoid(p))
    c = jnp.repeat(c, SUB_BLOCK, axis=-1)[..., : blocks.shape[-1]]
    x = blocks * (1.0 / (scale * c))
    elements = straight_through(jnp.clip(x, -E2M1_MAX, E2M1_MAX), e2m1_round(x))
    return elements, planes, scale


def _fake(w: jax.Array, p: jax.Array, m: jax.Array, spec: Spec) -> jax.Array:
    elements, _, scale = _levels(_blocks.to_blocks(w, spec), p, m, spec)
    return _blocks.from_blocks(elements * scale, spec)


@functools.partial(jax.jit, static_argnames="spec")
def _packed(w: jax.Array, p: jax.Array, m: jax.Array, spec: Spec) -> QTensor:
    fmt = get_format(spec.format)
    assert fmt.pack is not None
    elements, planes, _ = _levels(_blocks.to_blocks(w, spec), p, m, spec)
    stored = _blocks.store(fmt.pack(elements, planes, spec), spec, fmt.tail_unit(spec))
    return QTensor(planes=stored, spec=spec)
