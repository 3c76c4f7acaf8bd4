"""What a student learns from, and how a layer is reconstructed."""

from __future__ import annotations

import dataclasses
from typing import Any

from angeljax._fields import ConfigError, build, choice, count, flag, number

# KL(T||S), KL(S||T), squared error of logits, both weighted by the teacher's
# confidence, and the two KLs on the likeliest entries alone.
LOSSES = ("kl", "rkl", "mse", "cakld", "kl_top", "rkl_top")
HIDDEN_LOSSES = ("mse", "cosine")
# What a layer is to give: see `BlockwiseOptions.targets`.
TARGETS = ("full", "quantized")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """The training objective: `lm_weight * CE + weight * KD` and terms on features.

    Attributes:
      loss: KD on logits, one of `LOSSES`: "kl" KL(T||S); "rkl" KL(S||T); "mse" mean
        squared difference of logits; "cakld" `c KL(S||T) + (1 - c) KL(T||S)` with the
        teacher's probability c of the true token (after arXiv 2402.10631, for each
        token); "kl_top" KL(T||S) over the teacher's `top_k` likeliest entries, both
        renormalised there; "rkl_top" KL(S||T) over the student's.
      weight: of the KD term; 0 needs no teacher.
      lm_weight: of the cross entropy with the true tokens.
      temperature: divides the logits in the KD term, which is multiplied by its square
        (arXiv 1503.02531). "mse" does not depend on it.
      top_k: entries of "kl_top" and "rkl_top"; all that tie with the last one count.
      hidden_weight: of the loss on hidden states; see `hidden_loss`.
      hidden_kind: "mse" or "cosine".
      hidden_layers: pairs `(student layer, teacher layer)`, counted from 0; empty
        spreads the student's layers evenly over the teacher's.
      relation_weight: of the loss on attention relations (arXiv 2012.15828).
      relation_layers: `(student layer, teacher layer)`; None takes the last of each.
      relation_heads: heads of the relations; None takes the student's key heads.

    Raises:
      ConfigError: a field is out of range; names it.

    Example:
      >>> from angeljax.train.losses import DistillOptions
      >>> DistillOptions.from_dict({"loss": "cakld", "lm_weight": 0.5}).weight
      1.0
    """

    loss: str = "kl"
    weight: float = 1.0
    lm_weight: float = 1.0
    temperature: float = 1.0
    top_k: int = 1000
    hidden_weight: float = 0.0
    hidden_kind: str = "mse"
    hidden_layers: tuple[tuple[int, int], ...] = ()
    relation_weight: float = 0.0
    relation_layers: tuple[int, int] | None = None
    relation_heads: int | None = None

    def __post_init__(self) -> None:
        choice("distill.loss", self.loss, LOSSES)
        choice("distill.hidden_kind", self.hidden_kind, HIDDEN_LOSSES)
        for name in ("weight", "lm_weight", "hidden_weight", "relation_weight"):
            number(f"distill.{name}", getattr(self, name), 0)
        number("distill.temperature", self.temperature, 0)
        if self.temperature == 0:
            raise ConfigError("distill.temperature must be > 0, not 0")
        count("distill.top_k", self.top_k)
        if self.relation_heads is not None:
            count("distill.relation_heads", self.relation_heads)
        # Lists (YAML has no tuples) become hashable.
        pairs = tuple(_pair("hidden_layers", p) for p in self.hidden_layers)
        object.__setattr__(self, "hidden_layers", pairs)
        if self.relation_layers is not None:
            pair = _pair("relation_layers", self.relation_layers)
            object.__setattr__(self, "relation_layers", pair)
        total = self.weight + self.lm_weight + self.hidden_weight + self.relation_weight
        if total == 0:
            raise ConfigError("distill: all weights are 0, there is nothing to learn")

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return self.weight > 0 or self.needs_features

    @property
    def needs_features(self) -> bool:
        """Whether a term looks inside the teacher."""
        return self.hidden_weight > 0 or self.relation_weight > 0

    @classmethod
    def from_dict(cls, data: Any) -> DistillOptions:
        """From a mapping such as a section of a YAML file.

        Raises:
          ConfigError: an unknown or invalid field.
        """
        return build(cls, data, "distill")

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` takes: plain numbers, strings and lists."""
        data = dataclasses.asdict(self)
        data["hidden_layers"] = [list(p) for p in self.hidden_layers]
        if self.relation_layers is not None:
            data["relation_layers"] = list(self.relation_layers)
        return data


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockwiseOptions:
    """How each layer is trained.

    Attributes:
      epochs: passes over the rows, for each layer.
      batch_size: rows of a step.
      learning_rate: of the latent weights (Adam); falls along a cosine.
      scale_learning_rate: of learned scales.
      final_ratio: last learning rate, as a part of the first.
      targets: "full" takes what the full-precision model computed; "quantized" what the
        full-precision layer makes of the quantized layers' output.
      host: keep the activations of all rows in host memory instead of on the device.
      seed: of the order of rows.

    Raises:
      ConfigError: a field is out of range; names it.
    """

    epochs: int = 2
    batch_size: int = 4
    learning_rate: float = 1e-4
    scale_learning_rate: float = 1e-4
    final_ratio: float = 0.05
    targets: str = "full"
    host: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            count(f"blockwise.{name}", getattr(self, name))
        for name in ("learning_rate", "scale_learning_rate", "final_ratio"):
            number(f"blockwise.{name}", getattr(self, name), 0)
        choice("blockwise.targets", self.targets, TARGETS)
        flag("blockwise.host", self.host)
        count("blockwise.seed", self.seed, 0)


def _pair(name: str, value: Any) -> tuple[int, int]:
    ok = isinstance(value, list | tuple) and len(value) == 2
    if not ok or not all(type(v) is int and v >= 0 for v in value):
        raise ConfigError(
            f"distill.{name} holds pairs [student layer, teacher layer], not {value!r}"
        )
    return value[0], value[1]
