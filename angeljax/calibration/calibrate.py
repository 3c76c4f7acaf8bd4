"""`calibrate`: statistics of what each weight is multiplied with, in one pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax import _leaves
from angeljax._plan import Assignment, make_plan
from angeljax.calibration import _measure
from angeljax.calibration._statistics import Statistics, StatisticsError
from angeljax.calibration._tap import TappedTensor, token_mask
from angeljax.recipe import Recipe

# Measured for every weight, whatever the recipe needs: they cost next to nothing.
ALWAYS = ("count", "nonfinite", "amax", "amax_channel")
MEASURABLE = tuple(k for k in _measure.SHAPES if k not in ("batches", "mismatch"))


def calibrate(
    model: Any,
    params: Any,
    batches: Iterable[Any],
    recipe: Recipe,
    *,
    statistics: tuple[str, ...] = (),
    progress: bool | None = None,
) -> Statistics:
    """Measures what each weight of a recipe is multiplied with.

    The model runs as it is; its products are observed on the way, one compiled pass for
    each shape of batches, under whatever the model is made of (`scan`, `vmap`,
    `remat`). What a recipe needs (Hessians for GPTQ, magnitudes for AWQ, maxima for
    static activations) follows from its rules. The model must be differentiable, though
    no gradient is computed. A weight that is used several times in one pass has its
    sums over all uses, and for maxima the sum of those of the uses, an upper bound.

    Args:
      model: a language model of `angeljax.models`, a linen module, an nnx module, or a
        function of params and a batch.
      params: its params; for an nnx module an `nnx.State`, or None for its own.
      batches: each an array, a tuple of positional arguments or a dict of keywords. A
        bool entry `mask` `[B, T]` of a dict marks real tokens: others do not count.
        Arrays may be sharded; sums then are over all devices.
      recipe: says which weights are of interest, and what is needed of them.
      statistics: more that is to be measured, names of `Statistics`.
      progress: show a progress bar on stderr; default: if it is a terminal.

    Returns:
      `Statistics`, for `angeljax.compress(params, recipe, stats)`.

    Raises:
      RecipeError: the recipe does not fit the tree.
      StatisticsError: there were no batches, a weight was never multiplied, or its
        inputs held NaN or infinity (named).

    Example:
      >>> import jax, jax.numpy as jnp, angeljax as aj
      >>> from flax import linen as nn
      >>> model, x = nn.Dense(16), jax.random.normal(jax.random.key(0), (8, 64))
      >>> variables = model.init(jax.random.key(1), x)
      >>> recipe = aj.Recipe(rules=[aj.Rule(format="int4", group_size=64)])
      >>> stats = aj.calibrate(model, variables, [x, 2 * x], recipe)
      >>> float(stats["params/kernel"]["count"])
      16.0
    """
    from angeljax.evaluation._progress import progress_bar

    params = own_params(model, params)
    leaves, treedef = _leaves.flatten(params)
    wanted = kinds_by_path(leaves, recipe, statistics)
    forward = as_function(model)

    def tapped(values: list[Any], slots: dict[str, Any]) -> Any:
        out = []
        for leaf, value in zip(leaves, values, strict=True):
            spec = wanted[leaf.path][0].spec if leaf.path in wanted else None
            if spec is not None:
                value = TappedTensor.of(value, spec, slots[leaf.path])
            out.append(value)
        return _leaves.unflatten(treedef, leaves, out)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(found: dict[str, Any], values: list[Any], batch: Any) -> dict[str, Any]:
        def scalar(slots: dict[str, Any]) -> jax.Array:
            with token_mask(mask_of(batch)):
                out = forward(tapped(values, slots), batch)
            floats = [
                jnp.sum(x.astype(jnp.float32))
                for x in jax.tree.leaves(out)
                if jnp.issubdtype(x.dtype, jnp.floating)
            ]
            return sum(floats, jnp.float32(0))

        new = jax.grad(scalar)(_zeros(wanted, only_measured=True))
        return {path: _measure.combine(found[path], new[path]) for path in found}

    values = [leaf.value for leaf in leaves]
    found = _zeros(wanted, only_measured=False)
    batches = list(batches)
    if not batches:
        raise StatisticsError("there are no batches to calibrate with")
    with progress_bar("calibrating", len(batches), progress) as advance:
        for batch in batches:
            found = step(found, values, batch)
            advance(None)
    norms = {p: weight_norm(leaf_of(leaves, p), a) for p, (a, _) in wanted.items()}
    check_seen(found)
    return Statistics(found, norms)


def kinds_by_path(
    leaves: list[_leaves.Leaf], recipe: Recipe, more: tuple[str, ...] = ()
) -> dict[str, tuple[Assignment, tuple[str, ...]]]:
    """What is to be measured of each weight that a recipe takes.

    Raises:
      RecipeError: the recipe does not fit the tree.
      ValueError: `more` has an unknown name.
    """
    for name in more:
        if name not in MEASURABLE:
            raise ValueError(f"unknown statistic {name!r}: use {', '.join(MEASURABLE)}")
    always = (*ALWAYS, *more, *(k for t in recipe.transforms for k in t.needs()))
    out = {}
    for a in make_plan(leaves, recipe):
        if a.spec is None or a.rule is None:
            continue
        needs = (*always, *recipe.rules[a.rule].needs())
        if "ema" in needs:
            needs = (*needs, "batches")
        out[a.path] = a, tuple(k for k in _measure.SHAPES if k in needs)
    return out


def leaf_of(leaves: list[_leaves.Leaf], path: str) -> Any:
    """The value at a path."""
    return next(leaf.value for leaf in leaves if leaf.path == path)


def batch_of(a: Assignment) -> tuple[int, ...]:
    """Batch axes of a weight."""
    assert a.spec is not None
    return a.shape[: len(a.shape) - len(a.spec.shape)]


def weight_norm(w: jax.Array, a: Assignment) -> jax.Array:
    """Frobenius norm of each entry of the batch axes."""
    axes = tuple(range(len(batch_of(a)), w.ndim))
    return jnp.sqrt(jnp.sum(jnp.square(w.astype(jnp.float32)), axis=axes))


def _zeros(wanted: dict[str, Any], *, only_measured: bool) -> dict[str, Any]:
    skip = _measure.DERIVED if only_measured else ("mismatch",)
    return {
        path: {
            kind: jnp.zeros(
                (*batch_of(a), *_measure.shape_of(kind, a.spec.k)), jnp.float32
            )
            for kind in kinds
            if kind not in skip
        }
        for path, (a, kinds) in wanted.items()
    }


def check_seen(found: dict[str, dict[str, jax.Array]]) -> None:
    """Refuses inputs that were not finite, and weights that saw nothing.

    Raises:
      StatisticsError: names the first weight in the order of the tree.
    """
    told = jax.device_get({p: (f["nonfinite"], f["count"]) for p, f in found.items()})
    for path, (bad, _) in told.items():
        if bad.sum() > 0:
            at = f" (entry {np.argwhere(bad > 0)[0].tolist()})" if bad.ndim else ""
            raise StatisticsError(
                f"the inputs of {path}{at} hold NaN or infinity: {int(bad.sum())} "
                "values; look at the model and the batches before this layer"
            )
    for path, (_, count) in told.items():
        if count.sum() == 0:
            raise StatisticsError(
                f"{path} was not multiplied with anything: the model does not use it, "
                "stops gradients after it, or multiplies in a way that "
                "`angeljax.bind` does not see; leave it out with a rule `format: none`"
            )


def own_params(model: Any, params: Any) -> Any:
    """The params, or those that an nnx module holds."""
    if params is not None:
        return params
    from flax import nnx

    if not isinstance(model, nnx.Module):
        raise TypeError("params may be None for an nnx module only")
    return nnx.state(model, nnx.Param)


def as_function(model: Any) -> Callable[[Any, Any], Any]:
    """A function of params and one batch.

    Raises:
      TypeError: `model` is nothing that can be called.
    """
    from angeljax import _bind_linen, _bind_nnx
    from angeljax.bind import bind

    if _bind_nnx.is_module(model):
        return lambda params, batch: _call(bind(model, params), (), batch)
    if _bind_linen.is_module(model):
        apply = bind(model)
        return lambda params, batch: _call(apply, (params,), batch)
    # A language model of `angeljax.models`, which this module does not know.
    if hasattr(model, "logits") and hasattr(model, "apply"):
        return lambda params, batch: _call(model.apply, (params,), batch)
    if callable(model):
        return lambda params, batch: _call(model, (params,), batch)
    raise TypeError(
        f"model must be a language model, a linen or nnx module, or a function, not "
        f"{type(model).__name__}"
    )


def _call(f: Callable[..., Any], first: tuple[Any, ...], batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return f(*first, **batch)
    if isinstance(batch, tuple):
        return f(*first, *batch)
    return f(*first, batch)


def mask_of(batch: Any) -> jax.Array | None:
    """Which tokens of a batch are real; None if all are."""
    mask = batch.get("mask") if isinstance(batch, Mapping) else None
    if mask is None or jnp.asarray(mask).dtype != bool:
        return None
    return jnp.asarray(mask)
