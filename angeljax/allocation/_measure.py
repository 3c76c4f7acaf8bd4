"""Losses of groups of weights, each quantized alone with each candidate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from angeljax import _leaves
from angeljax._jobs import Job, make_jobs
from angeljax.allocation import _candidates
from angeljax.allocation._candidates import Candidate
from angeljax.allocation._divergence import Divergence
from angeljax.allocation._errors import relative_error
from angeljax.allocation._latency import time_of
from angeljax.allocation._plans import Plans, plans, product_shape, weights_of
from angeljax.allocation._table import Allocation, AllocationError, Group, Option
from angeljax.calibration._statistics import Statistics, StatisticsError
from angeljax.formats import QTensor
from angeljax.recipe import Recipe

Times = Mapping[tuple[int, int], Mapping[str, float]]


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """The leaves of a tree, and what each candidate does to each.

    Attributes:
      leaves, treedef: of the tree.
      candidates: in the order of `formats`.
      plans, jobs: of each candidate for each leaf; None for one that keeps all.
      stats: for the errors of outputs.
    """

    leaves: list[_leaves.Leaf]
    treedef: Any
    candidates: list[Candidate]
    plans: Plans
    jobs: list[list[Job | None] | None]
    stats: Statistics | None

    @classmethod
    def of(
        cls,
        params: Any,
        candidates: list[Candidate],
        skip: Sequence[str],
        stats: Statistics | None,
        base: Any,
    ) -> Work:
        """Plans everything; no weight is touched.

        Raises:
          RecipeError, StatisticsError, ValueError: as `compress`.
        """
        leaves, treedef = _leaves.flatten(params)
        by_candidate = plans(leaves, candidates, skip)
        if stats is not None:
            _check_rotations(by_candidate)
        jobs: list[list[Job | None] | None] = []
        for candidate, plan in zip(candidates, by_candidate, strict=True):
            if candidate.rule is None or plan is None:
                jobs.append(None)
                continue
            recipe = Recipe(rules=[candidate.rule], skip=skip)
            jobs.append(make_jobs(leaves, plan, recipe, stats, base))
        return cls(leaves, treedef, candidates, by_candidate, jobs, stats)

    def table(
        self,
        measure: str,
        group: str | Sequence[str],
        *,
        fused: bool,
        latency: Times | None,
    ) -> Allocation:
        """Groups with their options, sizes and times; all losses are 0."""
        taken = weights_of(self.plans)
        sets = _candidates.group_leaves(
            [self.leaves[i] for i in taken], group, fused=fused
        )
        others = set(range(len(self.leaves))) - set(taken)
        return Allocation(
            groups=tuple(self._group([taken[j] for j in one], latency) for one in sets),
            candidates=tuple(self.candidates),
            paths=tuple(leaf.path for leaf in self.leaves),
            other_nbytes=sum(_nbytes(self.leaves[i].value) for i in others),
            measure=measure,
        )

    def _group(self, members: list[int], latency: Times | None) -> Group:
        paths = tuple(self.leaves[i].path for i in members)
        name = _candidates.group_name(paths)
        options = []
        for candidate, jobs in zip(self.candidates, self.jobs, strict=True):
            if jobs is not None and any(jobs[i] is None for i in members):
                continue
            nbytes, times = 0, []
            for i in members:
                value, job = self.leaves[i].value, None if jobs is None else jobs[i]
                if job is not None:
                    w = jax.ShapeDtypeStruct(value.shape, value.dtype)
                    nbytes += jax.eval_shape(job.run, w).nbytes
                else:
                    nbytes += _nbytes(value)
                k, n = shape = product_shape(self.plans, i)
                count = math.prod(value.shape) // (k * n)
                times.append(time_of(latency, shape, candidate.name, count))
            ms = None if None in times else math.fsum(t for t in times if t is not None)
            options.append(Option(candidate.name, nbytes, 0.0, ms))
        if not options:
            raise AllocationError(
                f"no candidate takes all of {name}: leave them apart by `group`, or "
                "offer one that does"
            )
        weights = sum(math.prod(self.leaves[i].value.shape) for i in members)
        return Group(name, paths, weights, tuple(options))

    def quantized(self, group: Group, name: str) -> dict[int, QTensor]:
        """The weights of a group by their index, as a candidate makes them."""
        jobs = next(
            jobs
            for c, jobs in zip(self.candidates, self.jobs, strict=True)
            if c.name == name
        )
        out = {}
        for i, leaf in enumerate(self.leaves):
            job = None if jobs is None else jobs[i]
            if job is not None and leaf.path in group.paths:
                out[i] = job.run(leaf.value)
        return out

    def dense(self, quantized: Mapping[int, QTensor]) -> dict[int, Any]:
        """The same as arrays like those of the tree, which need no new program."""
        out: dict[int, Any] = {}
        for i, q in quantized.items():
            value = self.leaves[i].value
            if q.spec.activation is not None:
                out[i] = q
                continue
            out[i] = q.dequantize(value.dtype)
            if isinstance(value, jax.Array) and out[i].sharding != value.sharding:
                out[i] = jax.device_put(out[i], value.sharding)
        return out

    def changed(self, allocation: Allocation) -> dict[int, Any]:
        """All weights of a choice, for a `Divergence`."""
        out: dict[int, Any] = {}
        for group in allocation.groups:
            out |= self.dense(self.quantized(group, group.choice.name))
        return out

    def error(self, quantized: Mapping[int, QTensor]) -> jax.Array:
        """Sum of `relative_error` over some weights."""
        total = jnp.float32(0)
        for i, q in quantized.items():
            leaf = self.leaves[i]
            found = {} if self.stats is None else self.stats.layers.get(leaf.path, {})
            total += relative_error(leaf.value, q, found.get("hessian"))
        return total


def measured(
    table: Allocation, work: Work, divergence: Divergence | None, progress: bool | None
) -> Allocation:
    """The same table with losses, by its `measure`.

    Raises:
      AllocationError: a loss is not finite.
    """
    from angeljax.evaluation._progress import progress_bar

    found: list[list[tuple[Any, Any]]] = []
    total = sum(len(group.options) for group in table.groups)
    with progress_bar("allocating", total, progress) as advance:
        for group in table.groups:
            one = _losses(table.measure, group, work, divergence)
            found.append(one)
            for loss, _ in one:
                advance(loss)
    values = jax.device_get(found)
    groups = []
    for group, numbers in zip(table.groups, values, strict=True):
        options = []
        for option, (loss, error) in zip(group.options, numbers, strict=True):
            if not math.isfinite(loss):
                raise AllocationError(
                    f"the loss of {group.name} with {option.name} is {float(loss)}: "
                    "look for NaN, infinity or very large values in the weight"
                )
            options.append(
                dataclasses.replace(
                    option,
                    loss=float(loss),
                    error=None if error is None else float(error),
                )
            )
        groups.append(dataclasses.replace(group, options=tuple(options)))
    return dataclasses.replace(table, groups=tuple(groups))


def _losses(
    measure: str, group: Group, work: Work, divergence: Divergence | None
) -> list[tuple[Any, Any]]:
    """Loss and error of each option, on the device."""
    made = (work.quantized(group, option.name) for option in group.options)
    if measure == "kl":
        assert divergence is not None
        # One at a time: the weights of an option are gone before the next are made.
        return [(divergence(work.dense(q)) if q else 0.0, None) for q in made]
    if measure == "error":
        errors = [work.error(q) for q in made]
        return [(error, error) for error in errors]
    assert divergence is not None
    kept = list(made)
    known = [float(e) for e in jax.device_get([work.error(q) for q in kept])]
    coarsest = max(range(len(known)), key=known.__getitem__)
    if not known[coarsest] > 0:
        return [(error, error) for error in known]
    slope = divergence(work.dense(kept[coarsest])) / known[coarsest]
    return [(slope * error, error) for error in known]


def _check_rotations(by_candidate: Plans) -> None:
    """Statistics are of inputs under one rotation.

    Raises:
      StatisticsError: candidates want several for a weight.
    """
    for assignments in zip(*(p for p in by_candidate if p is not None), strict=True):
        rotations = {a.spec.rotation for a in assignments if a.spec is not None}
        if len(rotations) > 1:
            raise StatisticsError(
                f"{assignments[0].path}: candidates with different rotations "
                f"({', '.join(map(str, sorted(rotations)))}) cannot share statistics: "
                "give all the same, or pass no stats"
            )


def _nbytes(value: Any) -> int:
    if isinstance(value, QTensor):
        return value.nbytes
    return math.prod(jnp.shape(value)) * jnp.dtype(jnp.result_type(value)).itemsize
