"""LoRA on a packed language model, in the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from angeljax._fields import ConfigError
from angeljax.qat.lora import lora_apply, lora_init, lora_merge
from angeljax.train._sections import LoraConfig
from angeljax.train.language_model import LMTask, cast, training_flops

__all__ = ["LoraTask"]


@dataclasses.dataclass(frozen=True)
class LoraTask(LMTask):
    """An `LMTask` that trains nothing but low-rank additions to packed weights.

    Trained is `{"lora": Lora}`. What is evaluated and written is the tree with the
    additions merged into the weights.

    Attributes:
      lora: rank, targets and how the result is merged.

    Example:
      >>> import jax, angeljax as aj
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> from angeljax.train import LoraTask
      >>> from angeljax.train.losses import DistillOptions
      >>> from angeljax.train.objective import Objective
      >>> model = LanguageModel(DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=32, num_layers=1,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=16,
      ... ))
      >>> params = model.init(jax.random.key(0))
      >>> small = aj.compress(params, aj.Recipe(rules=[aj.Rule(format="nf4")]))
      >>> objective = Objective(model=model, options=DistillOptions(weight=0.0))
      >>> task = LoraTask(objective, dtype="float32")
      >>> trainable, frozen = task.init(small)
      >>> trainable["lora"].factors["layers/0/mlp/up_proj/kernel"]["a"].shape
      (32, 16)
    """

    lora: LoraConfig = LoraConfig()

    def init(
        self,
        params: Any,
        *,
        teacher: Any = None,
        freeze: Sequence[str] = (),
        key: jax.Array | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """`(trainable, frozen)` at the start.

        Args:
          params: of the model, with packed weights.
          teacher: params of the teacher.
          freeze: must be empty: all of `params` are frozen.
          key: for the factors, and for projections of hidden states.

        Raises:
          ConfigError: there are no packed weights, or `lora.targets` matches none.
        """
        if freeze:
            raise ConfigError("freeze means nothing where only factors are trained")
        key = jax.random.key(0) if key is None else key
        o = self.lora
        try:
            factors = lora_init(
                params, key, rank=o.rank, alpha=o.alpha, targets=o.targets
            )
        except ValueError as e:
            raise ConfigError(f"lora: {e}") from None
        trainable: dict[str, Any] = {"lora": factors}
        projections = self.objective.init_projections(key)
        if projections is not None:
            trainable["projections"] = projections
        if teacher is not None:
            teacher = cast(teacher, self.dtype)
        fixed = cast(params, self.dtype)
        return trainable, {"params": fixed, "state": None, "teacher": teacher}

    def forward_params(self, trainable: Any, frozen: Any, step: Any) -> Any:
        """What the model is called with: packed weights beside their factors."""
        dtype = jnp.dtype(self.dtype)
        return lora_apply(frozen["params"], trainable["lora"], dtype=dtype)

    def deployed(self, trainable: Any, frozen: Any) -> Any:
        """As it will be written, merged."""
        return self.packed(trainable, frozen)

    def packed(self, trainable: Any, frozen: Any) -> Any:
        """The tree to write, merged as `lora.merge` says."""
        return lora_merge(
            frozen["params"],
            trainable["lora"],
            requantize=self.lora.merge == "requantize",
            dtype=jnp.dtype(self.dtype),
        )

    def flops(self, length: int) -> float:
        """Floating-point operations of training, for each token of a row."""
        return training_flops(self.objective, length, passes=2)
