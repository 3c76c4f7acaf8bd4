"""What training holds beside the latent weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from angeljax._train_options import QATOptions
from angeljax.formats import QTensor, Spec
from angeljax.qat._fake import Learned
from angeljax.recipe import RecipeError


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """What happens to one leaf; hashable, so that a state carries it under `jit`."""

    path: str
    spec: Spec
    options: QATOptions
    bias: str | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QATState:
    """What training holds beside the latent weights.

    A pytree of float32 arrays: train it together with the params, as in
    `jax.grad(loss, argnums=(0, 1))`. It is empty unless a rule learns its scales.

    Attributes:
      learned: path of a leaf -> trained planes ("scale", "shift") in the layout that
        the QTensor will store.
      plan: which leaves, and how; static.
    """

    learned: dict[str, Learned]
    plan: tuple[LeafPlan, ...] = dataclasses.field(metadata={"static": True})


def local_plan(plan: LeafPlan, w: Any) -> LeafPlan:
    """The plan of the part of a weight that one device sees under `shard_map`."""
    spec = plan.spec
    shape = tuple(w.shape[w.ndim - len(spec.shape) :])
    if isinstance(w, QTensor) or len(shape) != len(spec.shape):
        raise RecipeError(f"{plan.path} is not the dense weight that the state is of")
    if shape == spec.shape:
        return plan
    part = dataclasses.replace(spec, shape=shape)
    whole_groups = spec.granularity == "group" and part.k % spec.group_size == 0
    # Two levels of scales: the outer one is for the whole weight.
    outer = spec.format == "nvfp4"
    if part.k != spec.k and not whole_groups or spec.out_block != 1 or outer:
        raise ValueError(
            f"{plan.path} has shape {shape} here and {spec.shape} in the state: a part "
            "of a weight must hold whole granules of its scales"
        )
    return dataclasses.replace(plan, spec=part)
