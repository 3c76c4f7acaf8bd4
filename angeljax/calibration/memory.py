"""How much memory `compress_sequential` takes, before anything is allocated."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from angeljax import _leaves
from angeljax.calibration import _layer_run
from angeljax.calibration._layer_jobs import PAIRED, LayerJobs, plan_and_transform
from angeljax.calibration._layerwise import as_layerwise, nest, take, without
from angeljax.formats import quantize_to
from angeljax.recipe import Recipe

__all__ = ["MemoryEstimate", "estimate_memory"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes, of the largest layer.

    Attributes:
      weights: of one layer, in full precision.
      packed: of the same layer, quantized.
      statistics: of all its weights together (Hessians are most of it).
      solving: float32 copies that an algorithm makes while it works on the largest
        weight: three of its Hessian (damped, factor, inverse) and three of the weight,
        if it has a Hessian; else two of the weight.
      step: what enters and leaves a layer for one batch, and the largest arrays inside:
        scores of dense attention, or the features of its widest product.
      waiting: states of all batches between layers, on the device or on the host.
      outside: weights outside of layers, which stay on the device.
      finished: all layers, quantized, on the device or on the host.
    """

    weights: int
    packed: int
    statistics: int
    solving: int
    step: int
    waiting: int
    outside: int
    finished: int

    def device(self, *, host: bool = True) -> int:
        """Peak on the device; with `host` all that waits is in the host's memory.

        Params are numpy arrays; statistics, a step, and solving do not all overlap.
        """
        fixed = self.weights + self.packed + self.statistics + self.outside
        more = 0 if host else self.waiting + self.finished
        return fixed + more + max(self.step, self.solving)


def estimate_memory(
    model: Any,
    params: Any,
    recipe: Recipe,
    *,
    rows: int,
    length: int,
    batch_size: int = 8,
) -> MemoryEstimate:
    """Estimates the memory of `compress_sequential` from shapes alone.

    Args:
      model: see `compress_sequential`; takes batches of tokens.
      params: its params, or `jax.ShapeDtypeStruct`s (`LanguageModel.abstract()`).
      recipe: what is to be done.
      rows, length: of the calibration text.
      batch_size: rows in a step.

    Returns:
      A breakdown in bytes.

    Raises:
      RecipeError: the recipe does not fit the tree.
      TypeError: the model cannot be run layer by layer.

    Example:
      >>> import jax.numpy as jnp, angeljax as aj
      >>> from angeljax.calibration import estimate_memory
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> model = LanguageModel(DecoderConfig(
      ...     model_type="llama", vocab_size=128256, hidden_size=8192, num_layers=80,
      ...     intermediate_size=28672, num_heads=64, num_kv_heads=8, head_dim=128))
      >>> rule = aj.Rule(format="int4", activation="int8", activation_scale="amax")
      >>> found = estimate_memory(model, model.abstract(jnp.bfloat16),
      ...                         aj.Recipe(rules=[rule]), rows=128, length=2048)
      >>> f"{found.weights / 1e9:.2f} GB of weights"
      '1.71 GB of weights'
    """
    walk = as_layerwise(model)
    stacked = walk.layer_path(0) == walk.layer_path(1)
    _, plan = plan_and_transform(params, recipe, None)
    jobs = LayerJobs(recipe, plan, (), False)
    batch = jax.ShapeDtypeStruct((min(batch_size, rows), length), jnp.int32)
    paths = list(dict.fromkeys(walk.layer_path(i) for i in range(walk.num_layers)))
    outer = without(params, paths)
    state, context = jax.eval_shape(lambda p, b: walk.embed(p, b), outer, batch)
    # Equal layers are looked at once.
    known: dict[Any, dict[str, int]] = {}
    layers = []
    for i in range(1 if stacked else walk.num_layers):
        path = walk.layer_path(i)
        inside = [a for p, a in plan.items() if p.startswith(f"{path}/")]
        key = tuple((a.path.removeprefix(path), a.shape, a.dtype, a.rule, a.spec)
                    for a in inside)  # fmt: skip
        if key not in known:
            known[key] = _of_layer(walk, jobs, params, i, state, context, stacked)
        layers.append(known[key])
    streams = 2 if any(PAIRED in jobs.needs(a) for a in plan.values()) else 1
    packed = [layer["packed"] for layer in layers]
    finished = packed[0] * walk.num_layers if stacked else sum(packed)
    steps = -(-rows // batch.shape[0])
    return MemoryEstimate(
        **{
            name: max(layer[name] for layer in layers)
            for name in ("weights", "packed", "statistics", "solving", "step")
        },
        waiting=steps * (streams * _nbytes(state) + _nbytes(context)),
        outside=_nbytes(outer),
        finished=finished,
    )


def _of_layer(
    walk: Any,
    jobs: LayerJobs,
    params: Any,
    i: int,
    state: Any,
    context: Any,
    stacked: bool,
) -> dict[str, int]:
    path = walk.layer_path(i)
    layer = take(params, path)
    if stacked:
        layer = jax.eval_shape(_layer_run.of_stack, layer, i)
    leaves, _ = _leaves.flatten(nest(path, layer))
    plan = jobs.assignments(leaves, stacked=stacked)
    packed = statistics = solving = 0
    for n, (leaf, a) in enumerate(zip(leaves, plan, strict=True)):
        if a.spec is None:
            packed += _nbytes(leaf.value)
            continue
        spec = a.spec
        packed += _nbytes(
            jax.eval_shape(lambda w, s=spec: quantize_to(w, s), leaf.value)
        )
        hessians = 0
        if jobs.measures(a, inside=True):
            tap = jobs.tap(n, a, inside=True)
            if PAIRED in jobs.needs(a):
                tap = tap._replace(kinds=(*tap.kinds, PAIRED))
            found = jax.eval_shape(lambda t=tap: _layer_run.nothing((t,)))[0]
            statistics += _nbytes(found)
            hessians = _nbytes([found[k] for k in ("hessian", PAIRED) if k in found])
        wide = 4 * math.prod(a.shape)
        solving = max(solving, 3 * hessians + (3 if hessians else 2) * wide)
    inside = jax.make_jaxpr(lambda p, x, c: walk.layer(p, x, c, i))(
        layer, state, context
    )
    return {
        "weights": _nbytes(layer),
        "packed": packed,
        "statistics": statistics,
        "solving": solving,
        "step": 2 * _nbytes(state) + _largest(inside.jaxpr, 2),
    }


def _largest(jaxpr: Any, count: int) -> int:
    """Bytes of the largest arrays that a program makes: about what lives at once."""
    sizes: list[int] = []

    def walk(jaxpr: Any) -> None:
        for eqn in jaxpr.eqns:
            inner = list(jaxprs_in_params(eqn.params))
            for sub in inner:
                walk(sub)
            if not inner and eqn.primitive.name not in ("broadcast_in_dim", "iota"):
                sizes.extend(_nbytes(v.aval) for v in eqn.outvars)

    walk(jaxpr)
    return sum(sorted(sizes, reverse=True)[:count])


def _nbytes(tree: Any) -> int:
    return sum(
        math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
        if hasattr(x, "dtype")
    )
