"""`compress_sequential`: layer by layer, on what the layers done before put out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from angeljax import _leaves
from angeljax._jobs import make_jobs
from angeljax._leaves import Leaf
from angeljax._plan import Assignment
from angeljax.calibration import _layer_run
from angeljax.calibration._kept_layers import KeptLayers
from angeljax.calibration._layer_jobs import (
    PAIRED,
    LayerJobs,
    plan_and_transform,
    split_transforms,
)
from angeljax.calibration._layer_run import Place, chunks
from angeljax.calibration._layerwise import (
    LayerwiseModel,
    as_layerwise,
    nest,
    put,
    take,
    without,
)
from angeljax.calibration._statistics import Statistics, StatisticsError
from angeljax.calibration.calibrate import check_seen, mask_of
from angeljax.compress import run_jobs
from angeljax.formats import QTensor
from angeljax.recipe import Recipe

__all__ = ["compress_sequential"]


def compress_sequential(
    model: Any,
    params: Any,
    recipe: Recipe,
    batches: Iterable[Any] | jax.Array,
    *,
    base: Any = None,
    inputs: Literal["quantized", "full"] = "quantized",
    true_sequential: bool = False,
    batch_size: int | None = None,
    host: bool = False,
    folder: str | Path | None = None,
    donate: bool = False,
    progress: bool | None = None,
) -> Any:
    """Compresses layer by layer, each with statistics of the quantized ones before it.

    So an algorithm makes up for the errors of earlier layers too (GPTQ, arXiv
    2210.17323), and only one layer's statistics exist at a time. Of each layer: what
    its weights are multiplied with is measured, transforms that need statistics are
    applied to it, its weights are quantized, and the quantized layer runs once more to
    give the inputs of the next. Transforms that need none (rotations) are applied to
    the whole tree before. Equal layers share their compiled programs; each layer's
    weights are visited once. A loop on the host: not for use under `jit`.

    Leaves outside of the layers are quantized as the rules say: those that need no
    statistics before the first layer, the others when they were seen in a product, in
    `embed` or, as a head, after the last layer.

    Algorithms that compare with the full-precision model (statistic `mismatch`, GPTAQ,
    arXiv 2504.02692) make it run beside the quantized one, which doubles the
    activations.

    Args:
      model: a language model of `angeljax.models`, layers apart or stacked, or a
        `LayerwiseModel`.
      params: its params: nested dicts (or lists) of arrays. numpy arrays go to the
        device one layer at a time; sharded arrays stay sharded.
      recipe: what is to be done to which weight; paths are those of the whole tree.
      batches: int32 tokens `[rows, T]`, or batches one by one as `calibrate` takes
        them: arrays, or dicts with a bool entry `mask` of the real tokens.
      base: the params before fine-tuning, for algorithms that compare with them.
      inputs: what a layer is calibrated on: what the quantized layers before it give,
        or the full-precision ones, as one pass over the whole model would.
      true_sequential: quantize the weights inside a layer in the order of the forward
        pass too, and measure again in between (q, k, v; o; gate, up; down).
      batch_size: rows in one step. Default: 8 for one array, else batches as they are.
        A last step of fewer rows compiles once more.
      host: keep activations between layers, and finished layers, in the host's memory,
        as numpy arrays.
      folder: keeps each layer that is done; the same call after an interruption goes on
        from there and gives the same result.
      donate: delete the buffers of weights as soon as they are quantized; `params` must
        not be used afterwards.
      progress: show a progress bar on stderr; default: if it is a terminal.

    Returns:
      The tree with QTensors in place of the leaves that a rule took.

    Raises:
      RecipeError: the recipe does not fit the tree, or its transforms this order.
      StatisticsError: there are no batches though statistics are needed, a weight was
        never multiplied, or its inputs held NaN or infinity (named).
      TypeError: the model cannot be run layer by layer.
      ValueError: a weight holds NaN or infinity, `folder` is of another compression
        (says what differs) or damaged (names the file).

    Example:
      >>> import jax, angeljax as aj
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> model = LanguageModel(DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=32, num_layers=2,
      ...     intermediate_size=64, num_heads=2, num_kv_heads=1, head_dim=16))
      >>> params = model.init(jax.random.key(0))
      >>> tokens = jax.random.randint(jax.random.key(1), (4, 8), 0, 32)
      >>> rule = aj.Rule(format="int8", activation="int8", activation_scale="amax")
      >>> done = aj.compress_sequential(model, params, aj.Recipe(rules=[rule]), tokens)
      >>> done["layers"][1]["mlp"]["down_proj"]["kernel"]
      QTensor(int8 channel [64,32] float32, 8.516 bit/weight)
    """
    if inputs not in ("quantized", "full"):
        raise ValueError(f"inputs must be quantized or full, not {inputs!r}")
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(params)):
        raise TypeError(
            "compress_sequential is a loop on the host: call it outside jit"
        )
    walk = as_layerwise(model)
    given = chunks(batches, batch_size)
    whole, within = split_transforms(recipe)
    original = params
    params, plan = plan_and_transform(params, recipe, whole)
    subsets = tuple(getattr(walk, "subsets", ())) if true_sequential else ()
    if true_sequential and not subsets:
        raise ValueError(
            f"true_sequential needs to know the order of weights in a layer: give "
            f"{type(walk).__name__} an attribute `subsets`"
        )
    run = _Sequential(
        walk=walk,
        # A stack is not freed before its last layer is done.
        jobs=LayerJobs(within, plan, subsets, donate and not _tied(params)),
        base=base,
        batches=given,
        masks=[mask_of(batch) for batch in given],
        place=Place(host),
        inputs=inputs,
        progress=progress,
    )
    run.check()
    kept = None
    if folder is not None:
        options = {
            "inputs": inputs,
            "true_sequential": true_sequential,
            "dtype": str(getattr(model, "dtype", "")),
        }
        kept = KeptLayers.begin(folder, original, recipe, given, base, options)
    return run(params, kept)


def _tied(params: Any) -> bool:
    """Whether one array stands in several places, so that none may be freed early."""
    places = [id(leaf) for leaf in jax.tree.leaves(params)]
    return len(set(places)) < len(places)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sequential:
    """One run: the loop over layers, with its one or two streams of states."""

    walk: LayerwiseModel
    jobs: LayerJobs
    base: Any
    batches: list[Any]
    masks: list[Any]
    place: Place
    inputs: str
    progress: bool | None

    @property
    def stacked(self) -> bool:
        """Whether all layers lie at one path."""
        return self.walk.layer_path(0) == self.walk.layer_path(1)

    @property
    def paths(self) -> list[str]:
        """Paths of the layers' subtrees, each once."""
        count = self.walk.num_layers
        return list(dict.fromkeys(self.walk.layer_path(i) for i in range(count)))

    def inside(self, path: str, i: int | None = None) -> bool:
        """Whether a leaf belongs to a layer, or to layer i."""
        paths = self.paths if i is None else [self.walk.layer_path(i)]
        return any(path.startswith(f"{p}/") for p in paths)

    def measured(self, i: int | None = None) -> bool:
        """Whether anything outside of layers is measured, or anything in layer i."""
        return any(
            self.jobs.measures(a, inside=i is not None)
            for path, a in self.jobs.plan.items()
            if (self.inside(path, i) if i is not None else not self.inside(path))
        )

    @property
    def pairs(self) -> bool:
        """Whether the full-precision model runs beside the quantized one."""
        plan = self.jobs.plan.values()
        return any(PAIRED in self.jobs.needs(a) for a in plan)

    def check(self) -> None:
        """Refuses what cannot go together, before any work."""
        something = any(self.measured(i) for i in (None, *range(self.walk.num_layers)))
        if something and not self.batches:
            raise StatisticsError("there are no batches to calibrate with")
        if not self.pairs:
            return
        for path, a in self.jobs.plan.items():
            if PAIRED in self.jobs.needs(a) and not self.inside(path):
                raise ValueError(
                    f"{path}: its algorithm compares with the full-precision layers, "
                    "and it is in none: use another one, such as gptq"
                )
        if self.inputs == "full" or self.jobs.subsets:
            other = "inputs='full'" if self.inputs == "full" else "true_sequential"
            raise ValueError(
                "an algorithm of this recipe compares what the full-precision and the "
                f"quantized layers give: leave {other} out"
            )

    def __call__(self, params: Any, kept: KeptLayers | None) -> Any:
        from angeljax.evaluation._progress import progress_bar

        count = self.walk.num_layers
        outer = without(params, self.paths)
        # No pass is made after the last one that is needed.
        needed = [i for i in range(count) if self.measured(i)]
        last = count if self.measured() else max(needed, default=-1)
        new_outer, states, full = outer, [], []
        if self.inputs == "quantized":
            new_outer = self._outer(outer, "quiet", [])
            if last >= 0:
                new_outer = self._outer(new_outer, "embed", self.batches)
        xs: list[Any] = []
        if last >= 0:
            xs = self._run("embed", new_outer, self.batches)
            states = [state for state, _ in xs]
        contexts = [context for _, context in xs]
        if self.pairs:
            full = [x for x, _ in self._run("embed", outer, self.batches)]
        done: list[Any] = []
        with progress_bar("layers", count, self.progress) as advance:
            for i in range(count):
                try:
                    new, states, full = self._layer(
                        i, params, states, full, contexts, kept, more=i < last
                    )
                except ValueError as e:
                    raise type(e)(f"layer {i}: {e}") from None
                done.append(self.place.settled(new))
                advance(None)
        if self.inputs == "full":
            new_outer = self._outer(outer, "quiet", [])
            if last >= 0:
                new_outer = self._outer(new_outer, "embed", self.batches)
        if self.measured():
            xs = list(zip(states, contexts, strict=True))
            new_outer = self._outer(new_outer, "head", xs)
        return self._joined(params, new_outer, done)

    def _run(self, part: str, tree: Any, xs: list[Any], i: int = 0) -> list[Any]:
        at = np.int32(i)
        return self.place.over(
            lambda x: _layer_run.forward(self.walk, part, tree, x, at), xs
        )

    def _layer(
        self,
        i: int,
        params: Any,
        states: list[Any],
        full: list[Any],
        contexts: list[Any],
        kept: KeptLayers | None,
        *,
        more: bool,
    ) -> tuple[Any, list[Any], list[Any]]:
        """Layer i quantized, and what it gives; `full` stays empty without pairs."""
        path = self.walk.layer_path(i)
        layer = take(params, path)
        if self.stacked:
            layer = _layer_run.of_stack(layer, np.int32(i))
        layer = _layer_run.on_device(layer)
        leaves, treedef = _leaves.flatten(nest(path, layer))
        xs = list(zip(states, contexts, strict=True))
        follows = lambda tree, xs: self._run("layer", tree, xs, i) if more else []  # noqa: E731

        def tree_of(leaves: list[Leaf]) -> Any:
            values = [leaf.value for leaf in leaves]
            return take(_leaves.unflatten(treedef, leaves, values), path)

        def measure(leaves: list[Leaf], look: list[int]) -> Statistics:
            tree = tree_of(leaves)
            found = self._observe("layer", tree, leaves, plan, look, xs, i)
            pairs = [n for n in look if PAIRED in self.jobs.needs(plan[n])]
            if pairs:
                more = self._observe_pairs(tree, leaves, plan, pairs, full, xs, i)
                found = {p: {**f, **more.get(p, {})} for p, f in found.items()}
            return Statistics(found)

        plan = self.jobs.assignments(leaves, stacked=self.stacked)
        before = kept.load(i) if kept is not None else None
        # Weights may be freed when they are quantized: what they give comes first.
        following = (
            follows(layer, list(zip(full, contexts, strict=True))) if full else []
        )
        if self.inputs == "full":
            following = follows(layer, xs)
        if before is None:
            base = self._base(path, i)
            new = self.jobs.quantize(leaves, plan, measure, base)
        else:
            new = [
                dataclasses.replace(x, value=before.get(x.path, x.value))
                for x in leaves
            ]
        if kept is not None and before is None:
            pairs_of = zip(leaves, new, strict=True)
            changed = {b.path: b.value for a, b in pairs_of if a.value is not b.value}
            kept.save(i, changed)
        tree = tree_of(new)
        if self.inputs == "full":
            return tree, following, []
        return tree, follows(tree, xs), following

    def _base(self, path: str, i: int) -> Any:
        """The subtree of the model before fine-tuning, at its place."""
        if self.base is None:
            return None
        layer = take(self.base, path)
        if self.stacked:
            layer = _layer_run.of_stack(layer, np.int32(i))
        return nest(path, _layer_run.on_device(layer))

    def _outer(self, outer: Any, stage: str, xs: list[Any]) -> Any:
        """The leaves outside of layers, with those quantized whose time has come."""
        leaves, treedef = _leaves.flatten(outer)
        plan = self.jobs.assignments(leaves, stacked=False)
        plan = [
            a if not isinstance(x.value, QTensor) else dataclasses.replace(a, spec=None)
            for a, x in zip(plan, leaves, strict=True)
        ]
        look = [n for n, a in enumerate(plan) if self.jobs.needs(a)]
        stats = None
        if stage == "quiet":
            now = [n for n, a in enumerate(plan) if a.spec and n not in look]
        else:
            if not look:
                return outer
            found = self._observe(stage, outer, leaves, plan, look, xs, 0)
            if stage == "embed":
                # What is not multiplied there is, or is also, a head.
                found = {p: f for p, f in found.items() if float(jnp.sum(f["count"]))}
            check_seen(found)
            stats = Statistics(found)
            now = [n for n in look if leaves[n].path in found]
        some = [leaves[n] for n in now]
        jobs = make_jobs(
            some, [plan[n] for n in now], self.jobs.recipe, stats, self.base
        )
        values = [leaf.value for leaf in leaves]
        for n, value in zip(now, run_jobs(some, jobs, False, False), strict=True):
            values[n] = self.place.settled(value)
        return _leaves.unflatten(treedef, leaves, values)

    def _observe(
        self,
        part: str,
        tree: Any,
        leaves: list[Leaf],
        plan: list[Assignment],
        look: list[int],
        xs: list[Any],
        i: int,
    ) -> dict[str, dict[str, jax.Array]]:
        """Statistics by path of some of the leaves of a tree."""
        taps = tuple(self.jobs.tap(n, plan[n], inside=part == "layer") for n in look)
        found = _layer_run.nothing(taps)
        at = np.int32(i)
        for x, mask in zip(xs, self.masks, strict=True):
            found = _layer_run.observe(self.walk, part, taps, found, tree, x, mask, at)
        named = {leaves[n].path: f for n, f in zip(look, found, strict=True)}
        if part == "layer":
            check_seen(named)
        return named

    def _observe_pairs(
        self,
        tree: Any,
        leaves: list[Leaf],
        plan: list[Assignment],
        look: list[int],
        full: list[Any],
        xs: list[Any],
        i: int,
    ) -> dict[str, dict[str, jax.Array]]:
        """`mismatch` by path of some of the leaves of a layer."""
        taps = tuple(
            self.jobs.tap(n, plan[n], inside=True)._replace(kinds=(PAIRED,))
            for n in look
        )
        found = _layer_run.nothing(taps)
        at = np.int32(i)
        for x_full, (own, context), mask in zip(full, xs, self.masks, strict=True):
            found = _layer_run.observe_pairs(
                self.walk, taps, found, tree, x_full, own, context, mask, at
            )
        return {leaves[n].path: f for n, f in zip(look, found, strict=True)}

    def _joined(self, params: Any, outer: Any, layers: list[Any]) -> Any:
        """The whole tree of what was done."""
        if self.stacked:
            stack = np.stack if self.place.host else jnp.stack
            whole = jax.tree.map(lambda *p: stack(p), *layers)
            params = put(params, self.paths[0], whole)
        else:
            for i, layer in enumerate(layers):
                params = put(params, self.walk.layer_path(i), layer)
        for leaf in _leaves.flatten(outer)[0]:
            if isinstance(leaf.value, QTensor):
                params = put(params, leaf.path, leaf.rebox(leaf.value))
        return params
