"""The whole training objective of a `LanguageModel`, with or without a teacher."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.models.language_model import LanguageModel
from angeljax.train._options import DistillOptions
from angeljax.train._token_losses import TopK
from angeljax.train.chunked import Sums, chunked_loss
from angeljax.train.feature_losses import (
    hidden_loss,
    init_projections,
    layer_pairs,
    relation_layers,
    relation_loss,
)
from angeljax.train.losses import check_vocabularies

__all__ = ["Objective"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised: hashable, so that `jit` can close over it.

    Attributes:
      model: the student.
      options: the terms and their weights.
      teacher: its architecture, for a teacher in the same step; its parameters are an
        argument. None for no teacher, or one that was written to disk.
      remat: see `LanguageModel.features`.
      chunk_tokens: see `chunked_loss`.

    Raises:
      ValueError: the vocabularies differ, a layer does not exist, or terms on features
        have no teacher to look into.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> from angeljax.train.losses import DistillOptions, next_tokens
      >>> from angeljax.train.objective import Objective
      >>> model = LanguageModel(DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=1,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... ))
      >>> params, tokens = model.init(jax.random.key(0)), jnp.zeros((2, 4), jnp.int32)
      >>> objective = Objective(model=model, teacher=model, options=DistillOptions())
      >>> loss, sums = objective(params, tokens, next_tokens(tokens), params)
      >>> int(sums["count"]), round(float(sums["kd"]), 4)
      (6, 0.0)
    """

    model: LanguageModel
    options: DistillOptions
    teacher: LanguageModel | None = None
    remat: Any = False
    chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.teacher is None:
            if self.options.needs_features:
                raise ValueError(
                    "distill: losses on hidden states and relations need the teacher "
                    "itself, in the same step"
                )
            return
        student, teacher = self.model.config, self.teacher.config
        if self.options.weight > 0:
            check_vocabularies(student.vocab_size, teacher.vocab_size)
        self._layers()

    def init_projections(self, key: jax.Array) -> list[jax.Array] | None:
        """Trainable maps for hidden states of other widths, or None if none needed."""
        if self.teacher is None or self.options.hidden_weight == 0:
            return None
        widths = self.model.config.hidden_size, self.teacher.config.hidden_size
        return init_projections(key, len(self._layers()[0]), *widths)

    def __call__(
        self,
        params: Any,
        tokens: jax.Array,
        labels: jax.Array,
        teacher: Any = None,
        *,
        mask: jax.Array | None = None,
        projections: list[jax.Array] | None = None,
    ) -> tuple[jax.Array, Sums]:
        """The loss summed over valid tokens, and what it consists of.

        Args:
          params: the student's, as its forward takes them (fake-quantized, ...).
          tokens: int32 `[B, T]`.
          labels: int32 `[B, T]`, see `next_tokens`.
          teacher: params of the teacher, or a `TopK` of it.
          mask: bool `[B, T]`, True for real tokens.
          projections: see `init_projections`.

        Returns:
          The weighted sum and the sums "loss", "ce", "kd", "count" and, where asked
          for, "hidden" and "relation"; divide by "count" for means.
        """
        o = self.options
        if mask is not None:
            labels = jnp.where(mask, labels, -100)  # padding predicts nothing
        pairs, relation = self._layers() if self.teacher is not None else ((), None)
        student = self.model.features(
            params,
            tokens,
            mask=mask,
            hidden=[s for s, _ in pairs],
            relations=[relation[0]] if relation else [],
            remat=self.remat,
        )
        given: Any = teacher if isinstance(teacher, TopK) else None
        if self.teacher is not None and o.needs_teacher:
            if teacher is None or given is not None:
                raise ValueError("the objective's teacher needs its params")
            teacher = jax.lax.stop_gradient(teacher)
            features = self.teacher.features(
                teacher,
                tokens,
                mask=mask,
                hidden=[t for _, t in pairs],
                relations=[relation[1]] if relation else [],
            )
            features = jax.lax.stop_gradient(features)
            given = features.final, self.teacher.head_params(teacher)
        loss, sums = chunked_loss(
            student.final,
            self.model.head_params(params),
            labels,
            o,
            teacher=given if o.weight > 0 else None,
            chunk_tokens=self.chunk_tokens,
        )
        valid = labels >= 0
        more = {}
        if pairs:
            more["hidden"] = hidden_loss(
                student.hidden,
                features.hidden,
                valid,
                kind=o.hidden_kind,
                projections=projections,
            )
            loss += o.hidden_weight * more["hidden"]
        if relation:
            more["relation"] = relation_loss(
                student.qkv[0],
                features.qkv[0],
                valid,
                heads=o.relation_heads,
                mask=mask,
            )
            loss += o.relation_weight * more["relation"]
        more = jax.lax.stop_gradient(more)
        return loss, {**sums, **more, "loss": jax.lax.stop_gradient(loss)}

    def _layers(self) -> tuple[tuple[tuple[int, int], ...], tuple[int, int] | None]:
        assert self.teacher is not None
        counts = self.model.config.num_layers, self.teacher.config.num_layers
        o = self.options
        pairs = layer_pairs(o, *counts) if o.hidden_weight > 0 else ()
        relation = relation_layers(o, *counts) if o.relation_weight > 0 else None
        return pairs, relation
