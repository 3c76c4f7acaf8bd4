"""A decoder's layers one by one, with their parts of the training state."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.models.language_model import LanguageModel
from angeljax.qat import QATState


def outside(state: QATState) -> QATState:
    """The part of a state that is not of layers."""
    learned = {k: v for k, v in state.learned.items() if not k.startswith("layers/")}
    plan = tuple(p for p in state.plan if not p.path.startswith("layers/"))
    return dataclasses.replace(state, learned=learned, plan=plan)


def layer_of(
    model: LanguageModel, params: Any, state: QATState, i: int
) -> tuple[Any, QATState]:
    """One layer and its part of the state, under the same names for every layer."""
    if model.scan_layers:
        tree, learned = jax.tree.map(
            lambda p: p[i],
            (
                params["layers"],
                {k: v for k, v in state.learned.items() if k.startswith("layers/")},
            ),
        )
        plan = tuple(p for p in state.plan if p.path.startswith("layers/"))
        return {"layers": tree}, QATState(learned=learned, plan=plan)
    layers = {int(k): v for k, v in params["layers"].items()}
    here, common = f"layers/{i}/", "layers/0/"

    def rename(path: str) -> str:
        return path.replace(here, common, 1)

    plan = tuple(
        dataclasses.replace(p, path=rename(p.path), bias=p.bias and rename(p.bias))
        for p in state.plan
        if p.path.startswith(here)
    )
    learned = {
        k.replace(here, common, 1): v
        for k, v in state.learned.items()
        if k.startswith(here)
    }
    return {"layers": {0: layers[i]}}, QATState(learned=learned, plan=plan)


def put_back(model: LanguageModel, learned: Any, part: QATState, i: int) -> Any:
    """The learned scales of all layers with those of one replaced."""
    if model.scan_layers:
        new = {
            path: jax.tree.map(lambda old, v: old.at[i].set(v), learned[path], values)
            for path, values in part.learned.items()
        }
    else:
        new = {
            path.replace("layers/0/", f"layers/{i}/", 1): values
            for path, values in part.learned.items()
        }
    return {**learned, **new}


def joined(model: LanguageModel, trees: list[Any]) -> Any:
    if model.scan_layers:
        return jax.tree.map(lambda *p: jnp.stack(p), *(t["layers"] for t in trees))
    return {i: tree["layers"][0] for i, tree in enumerate(trees)}
