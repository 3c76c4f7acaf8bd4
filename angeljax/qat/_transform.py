"""Quantization-aware training as a pair of pure functions on a param tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from angeljax import _leaves
from angeljax._plan import make_plan
from angeljax._train_options import Arenas, QATOptions
from angeljax.formats import QTensor, Spec
from angeljax.qat._fake import (
    Learned,
    fake_quantize,
    initial_scale,
    quantize_learned,
)
from angeljax.qat._state import LeafPlan, QATState, local_plan
from angeljax.qat._tensor import FakeTensor
from angeljax.qat._tequila import bias_path, dead_zone_bias
from angeljax.recipe import Recipe

__all__ = ["QAT", "QATState", "finalize", "make"]


@dataclasses.dataclass(frozen=True)
class QAT:
    """A recipe made ready for training; see `make`.

    Attributes:
      recipe: which leaf takes which format.
      total_steps: optimizer steps of the training.
    """

    recipe: Recipe
    total_steps: int

    def init(self, params: Any) -> QATState:
        """The state at the start of training; scales come from the weights.

        Args:
          params: a param tree of float arrays, dense.

        Returns:
          A `QATState`.

        Raises:
          RecipeError: as `angeljax.compress`; also a leaf whose scales cannot be
            learned, or a dead-zone bias without a bias to go to.
        """
        leaves, _ = _leaves.flatten(params)
        by_path = {leaf.path: leaf.value for leaf in leaves}
        plan, learned = [], {}
        for leaf, assigned in zip(leaves, make_plan(leaves, self.recipe), strict=True):
            if assigned.spec is None or assigned.rule is None:
                continue
            options = self.recipe.rules[assigned.rule].qat or QATOptions()
            bias = None
            if options.tequila is not None:
                bias = bias_path(leaf.path, assigned.spec, by_path)
            plan.append(LeafPlan(leaf.path, assigned.spec, options, bias))
            if options.scale == "learned":
                learned[leaf.path] = _initial(leaf.value, assigned.spec)
        return QATState(learned=learned, plan=tuple(plan))

    def apply(
        self, params: Any, state: QATState, step: jax.Array | int, *, dtype: Any = None
    ) -> Any:
        """The tree that the model is to be called with in the loss.

        Quantized leaves become `Q(W) + lambda(step) W` (or the blend), computed in
        float32 from the latent weights; all others stay. Differentiable in `params` and
        `state`.

        Args:
          params: latent weights, ideally float32.
          state: from `init`, trained.
          step: number of optimizer steps taken, a scalar that may be traced. Count
            optimizer steps, not forward passes or micro-batches. At
            `self.total_steps` and later lambda is 0: that is what will be deployed.
          dtype: of the quantized leaves in the result; default that of the latent
            weights.

        Returns:
          A tree of the structure of `params` with arrays, or `FakeTensor`s where a rule
          quantizes activations.
        """
        residual = self.arenas(step)
        blend = self.recipe.arenas is not None and self.recipe.arenas.form == "blend"
        return _transform(params, state, _trained(residual, blend, dtype))

    def arenas(self, step: jax.Array | int) -> jax.Array:
        """lambda of the Arenas residual at an optimizer step; 0 without a schedule.

        Args:
          step: as in `apply`.

        Returns:
          A float32 scalar.
        """
        if self.recipe.arenas is None:
            return jnp.zeros((), jnp.float32)
        return self.recipe.arenas.at(step, self.total_steps)


def make(recipe: Recipe, *, total_steps: int, arenas: Arenas | None = None) -> QAT:
    """Quantization-aware training by a recipe.

    ```python
    qat = aj.qat.make(recipe, total_steps=1000)
    state = qat.init(params)

    def loss_fn(params, state, step, batch):
        return loss(model.apply(qat.apply(params, state, step), batch))

    packed = aj.qat.finalize(params, state)
    ```

    Pure functions for linen, nnx and plain trees, under `jit`, `grad`, `remat`, `scan`
    and sharding. Keep the latent weights in float32: the spacing of bfloat16 at 0.02 is
    larger than a step of Adam at a learning rate of 1e-4.

    Args:
      recipe: as for `angeljax.compress`; a rule's `qat` says how its weights are
        trained.
      total_steps: optimizer steps of the whole training, for the Arenas schedule.
      arenas: replaces the schedule of the recipe.

    Returns:
      A `QAT` with `init`, `apply` and `arenas`.

    Raises:
      ValueError: `total_steps` is no positive integer.

    Example:
      >>> import jax, jax.numpy as jnp, angeljax as aj
      >>> params = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (64, 8))}}
      >>> recipe = aj.Recipe(rules=[aj.Rule(format="sherry")], arenas=aj.qat.Arenas())
      >>> qat = aj.qat.make(recipe, total_steps=100)
      >>> state = qat.init(params)
      >>> trained = qat.apply(params, state, 100)["dense"]["kernel"]
      >>> packed = aj.qat.finalize(params, state)["dense"]["kernel"]
      >>> bool((trained == packed.dequantize()).all())
      True
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(
            f"recipe must be a Recipe, not {type(recipe).__name__}: "
            "use Recipe.load(path) or Recipe(rules=[...])"
        )
    if isinstance(total_steps, bool) or not isinstance(total_steps, int):
        raise ValueError(f"total_steps must be an integer, not {total_steps!r}")
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, not {total_steps}")
    if arenas is not None:
        recipe = dataclasses.replace(recipe, arenas=arenas)
    return QAT(recipe, total_steps)


def finalize(params: Any, state: QATState, *, dtype: Any = None) -> Any:
    """Packs what was trained: the same weights that `apply` gives at the end.

    Args:
      params: trained latent weights.
      state: trained state.
      dtype: logical dtype of the packed leaves, and of all other floating-point ones;
        default those of `params`.

    Returns:
      The tree with QTensors, as `angeljax.compress` returns.

    Raises:
      ValueError: a leaf holds NaN or infinity (outside of `jit`).
    """
    return _transform(params, state, _packed(dtype), dtype)


@jax.jit
def _finite(w: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(w))


def _transform(
    params: Any,
    state: QATState,
    one: Callable[[LeafPlan, Any, Learned], tuple[Any, jax.Array | None]],
    other_dtype: Any = None,
) -> Any:
    leaves, treedef = _leaves.flatten(params)
    plans = {p.path: p for p in state.plan}
    missing = set(plans) - {leaf.path for leaf in leaves}
    if missing:
        raise ValueError(
            f"the state is of another tree: it has {sorted(missing)[0]}, which is not "
            "among the params"
        )
    values: dict[str, Any] = {}
    biases: dict[str | None, jax.Array] = {}
    for leaf in leaves:
        value = leaf.value
        if leaf.path in plans:
            plan = local_plan(plans[leaf.path], value)
            value, bias = one(plan, value, state.learned.get(leaf.path, {}))
            if bias is not None:
                # Several weights may feed one bias: x A + h B + bias.
                biases[plan.bias] = bias + biases.get(plan.bias, 0.0)
        elif other_dtype is not None and jnp.issubdtype(value.dtype, jnp.floating):
            value = value.astype(other_dtype)
        values[leaf.path] = value
    for path, bias in biases.items():
        assert path is not None
        values[path] = values[path] + bias.astype(values[path].dtype)
    return _leaves.unflatten(treedef, leaves, [values[leaf.path] for leaf in leaves])


def _trained(residual: jax.Array, blend: bool, dtype: Any) -> Callable[..., Any]:
    def one(plan: LeafPlan, w: jax.Array, learned: Learned) -> Any:
        fake = fake_quantize(w, plan.spec, learned, plan.options.gradient)
        bias = dead_zone_bias(w, fake, plan.spec, plan.options)
        if plan.options.arenas:
            rest = w.astype(jnp.float32)
            fake = fake + residual * (rest - fake if blend else rest)
        fake = fake.astype(w.dtype if dtype is None else dtype)
        if plan.spec.activation is not None:
            return FakeTensor(planes={"codes": fake}, spec=plan.spec), bias
        return fake, bias

    return one


def _packed(dtype: Any) -> Callable[..., Any]:
    def one(plan: LeafPlan, w: jax.Array, learned: Learned) -> Any:
        if not isinstance(w, jax.core.Tracer):
            for name, value in {"": w, **learned}.items():
                if not bool(_finite(value)):
                    what = f"the learned {name} of {plan.path}" if name else plan.path
                    raise ValueError(
                        f"{what} holds NaN or infinity: take an earlier checkpoint"
                    )
        spec = plan.spec
        if dtype is not None:
            spec = dataclasses.replace(spec, dtype=jnp.dtype(dtype).name)
        q, bias = _pack_one(w, learned, spec, plan.options)
        return q, bias

    return one


def _pack_one(
    w: jax.Array, learned: Learned, spec: Spec, options: QATOptions
) -> tuple[QTensor, jax.Array | None]:
    q = quantize_learned(w, spec, learned)
    if options.tequila is None:
        return q, None
    return q, dead_zone_bias(w, q.dequantize(jnp.float32), spec, options)


_initial = jax.jit(initial_scale, static_argnames="spec")
_pack_one = jax.jit(_pack_one, static_argnames=("spec", "options"))
