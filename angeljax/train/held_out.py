"""Evaluation in a training: of what would be deployed, on text that is held out."""

from __future__ import annotations

from typing import Any

import jax

from angeljax.evaluation import Windows, evaluate
from angeljax.models import LanguageModel
from angeljax.train.language_model import LMTask

__all__ = ["HeldOut", "measure"]


class HeldOut:
    """Perplexity of what would be deployed, and KL and agreement with the teacher.

    Args:
      task: see `LMTask`.
      frozen: of the task.
      windows: held-out text.
      batch_size: windows in a step; None picks by memory.
    """

    def __init__(
        self,
        task: LMTask,
        frozen: Any,
        windows: Windows,
        batch_size: int | None = None,
    ) -> None:
        self._task, self._frozen = task, frozen
        self._windows, self._batch_size = windows, batch_size
        self._deployed = jax.jit(task.deployed)

    def __call__(self, trainable: Any) -> dict[str, float]:
        """Numbers by name, `eval/perplexity` and so on."""
        objective, params = self._task.objective, self._frozen["teacher"]
        against = None
        if objective.teacher is not None and params is not None:
            against = objective.teacher, params
        deployed = self._deployed(trainable, self._frozen)
        return measure(
            objective.model, deployed, self._windows, self._batch_size, against
        )


def measure(
    model: LanguageModel,
    params: Any,
    windows: Windows,
    batch_size: int | None = None,
    reference: tuple[LanguageModel, Any] | None = None,
) -> dict[str, float]:
    """`angeljax.evaluation.evaluate` as numbers for a log.

    Args:
      model: the architecture.
      params: its params, packed or not.
      windows: held-out text.
      batch_size: windows in a step; None picks by memory.
      reference: architecture and params of the model to compare with.

    Returns:
      `eval/nll`, `eval/perplexity`, and with a reference `eval/kl` and
      `eval/top1_agreement`.
    """
    against: dict[str, Any] = {}
    if reference is not None:
        against = {"reference_fn": reference[0].logits, "reference": reference[1]}
    found = evaluate(
        model.logits,
        params,
        windows,
        batch_size=batch_size,
        progress=False,
        **against,
    )
    names = ("nll", "perplexity", "kl", "top1_agreement")
    values = {f"eval/{name}": getattr(found, name) for name in names}
    return {k: float(v) for k, v in values.items() if v is not None}
