"""A language model in the loop: its loss with recipe and teacher."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from angeljax._fields import ConfigError
from angeljax._leaves import path_string
from angeljax._partition import combine
from angeljax.formats import QTensor
from angeljax.models import DecoderConfig, LanguageModel
from angeljax.train.objective import Objective
from angeljax.train.step import Metrics

if TYPE_CHECKING:
    from angeljax.qat import QAT, QATState


@dataclasses.dataclass(frozen=True)
class LMTask:
    """The loss of a language model for `fit`; hashable.

    Trained is `{"params": ..., "learned": ...}`: latent weights and the learned scales
    of the fake quantizers (and `"projections"` where hidden states of other widths are
    compared). Frozen is the rest: leaves that are not trained, the plan of the
    quantizers, the teacher.

    Attributes:
      objective: model, teacher and the terms of the loss.
      qat: the recipe made ready for training, or None.
      dtype: of compute.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> from angeljax.train import LMTask, OptimizerConfig, fit, make_optimizer
      >>> from angeljax.train.losses import DistillOptions
      >>> from angeljax.train.objective import Objective
      >>> model = LanguageModel(DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=1,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... ))
      >>> objective = Objective(model=model, options=DistillOptions(weight=0.0))
      >>> task = LMTask(objective, dtype="float32")
      >>> trainable, frozen = task.init(model.init(jax.random.key(0)))
      >>> batch = {"tokens": np.arange(36, dtype=np.int32).reshape(4, 9) % 32}
      >>> optimizer = make_optimizer(OptimizerConfig(lr=0.01), 5)
      >>> result = fit(task.loss, trainable, lambda step: batch, frozen=frozen,
      ...              optimizer=optimizer, steps=5)
      >>> result.metrics["loss"] < 3.47
      True
    """

    objective: Objective
    qat: QAT | None = None
    dtype: str = "bfloat16"

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
          params: of the model; QTensors among them are frozen.
          teacher: params of the teacher.
          freeze: regular expressions of whole paths that are not trained.
          key: for projections of hidden states, if the objective has any.

        Raises:
          ConfigError: a pattern that matches nothing, or all of the leaves.
          RecipeError: the recipe does not fit the params.
        """
        state = None if self.qat is None else self.qat.init(params)
        kept, fixed = _split(params, freeze)
        if teacher is not None:
            teacher = cast(teacher, self.dtype)
        trainable: dict[str, Any] = {"params": kept}
        if state is not None:
            trainable["learned"] = state.learned
            state = dataclasses.replace(state, learned={})
        key = jax.random.key(0) if key is None else key
        projections = self.objective.init_projections(key)
        if projections is not None:
            trainable["projections"] = projections
        return trainable, {"params": fixed, "state": state, "teacher": teacher}

    def latent(self, trainable: Any, frozen: Any) -> tuple[Any, QATState | None]:
        """All latent weights, and the state of the quantizers: what is finalized."""
        params = combine(trainable["params"], frozen["params"])
        if frozen["state"] is None:
            return params, None
        state = dataclasses.replace(frozen["state"], learned=trainable["learned"])
        return params, state

    def forward_params(self, trainable: Any, frozen: Any, step: Any) -> Any:
        """What the model is called with: fake-quantized, in the dtype of compute."""
        params, state = self.latent(trainable, frozen)
        if self.qat is not None and state is not None:
            params = self.qat.apply(params, state, step, dtype=jnp.dtype(self.dtype))
        return cast(params, self.dtype)

    def deployed(self, trainable: Any, frozen: Any) -> Any:
        """As `forward_params` when training has ended: no Arenas residual."""
        last = 0 if self.qat is None else self.qat.total_steps
        return self.forward_params(trainable, frozen, last)

    def packed(self, trainable: Any, frozen: Any) -> Any:
        """The tree to write, in the dtype of compute where it is not packed."""
        dtype = jnp.dtype(self.dtype)
        params, state = self.latent(trainable, frozen)
        if state is None:
            return cast(params, self.dtype)
        from angeljax import qat

        return qat.finalize(params, state, dtype=dtype)

    def flops(self, length: int) -> float:
        """Floating-point operations of training, for each token of a row."""
        return training_flops(self.objective, length)

    def loss(
        self, trainable: Any, frozen: Any, batch: Any, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Mean loss over the tokens of a batch; see `fit`.

        Args:
          trainable, frozen: from `init`.
          batch: `{"tokens": int32 [B, T + 1]}`, and as "teacher" the `TopK` of a
            teacher that was written to disk, if that is what is learned from.
          step: number of optimizer steps taken.
          key: is not used.
        """
        tokens = batch["tokens"]
        params = self.forward_params(trainable, frozen, step)
        total, sums = self.objective(
            params,
            tokens[:, :-1],
            tokens[:, 1:],
            batch.get("teacher", frozen["teacher"]),
            projections=trainable.get("projections"),
        )
        count = jnp.maximum(sums["count"], 1).astype(jnp.float32)
        terms = {k: v / count for k, v in sums.items() if k not in ("loss", "count")}
        metrics = {**terms, "weight": sums["count"]}
        if self.qat is not None and self.qat.recipe.arenas is not None:
            metrics["lambda"] = self.qat.arenas(step)
        return total / count, metrics


def forward_flops(config: DecoderConfig, length: int) -> float:
    """Floating-point operations of a forward pass, for each token of a row.

    Products with weights and with the head, and those of causal attention, of which
    half is seen; two operations for a multiplication with its addition.

    Args:
      config: of the model.
      length: of a row.
    """
    hidden, width = config.hidden_size, config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    layer = hidden * (width + 2 * kv) + width * hidden
    layer += 3 * hidden * config.intermediate_size
    attention = 2 * width * length / 2
    head = hidden * config.vocab_size
    return 2 * (config.num_layers * (layer + attention) + head)


def training_flops(objective: Objective, length: int, passes: int = 3) -> float:
    """Of a training step, for each token of a row.

    What `remat` and fake quantizers compute on top is no work of the model and does not
    count, as usual for model FLOP utilisation (arXiv 2204.02311, appendix B).

    Args:
      objective: model and teacher.
      length: of a row.
      passes: in units of a forward pass: one, and one each for the gradients of
        activations and of weights, where those are trained.
    """
    flops = passes * forward_flops(objective.model.config, length)
    if objective.teacher is not None and objective.options.needs_teacher:
        flops += forward_flops(objective.teacher.config, length)
    return flops


def ready(model: LanguageModel, dtype: str, *, scan_layers: bool) -> LanguageModel:
    """The architecture as a training runs it."""
    from angeljax.models import causal_attention

    return dataclasses.replace(
        model,
        dtype=jnp.dtype(dtype),
        attention_fn=causal_attention,
        scan_layers=scan_layers,
    )


def cast(tree: Any, dtype: str) -> Any:
    """Floating-point arrays in a dtype; what is packed stays."""

    def one(x: Any) -> Any:
        if isinstance(x, QTensor) or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return x.astype(dtype)

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, QTensor))


def _split(params: Any, freeze: Sequence[str]) -> tuple[Any, Any]:
    """Trained and frozen leaves, each with None where the other has one."""
    items, treedef = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda x: isinstance(x, QTensor)
    )
    paths = [path_string(path) for path, _ in items]
    for pattern in freeze:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise ConfigError(
                f"freeze: {pattern!r} matches no leaf (such as {paths[0]}): it must "
                "match the whole path"
            )
    trained, fixed = [], []
    for path, (_, value) in zip(paths, items, strict=True):
        dense = not isinstance(value, QTensor)
        keep = dense and jnp.issubdtype(value.dtype, jnp.floating)
        keep = keep and not any(re.fullmatch(pattern, path) for pattern in freeze)
        trained.append(value if keep else None)
        fixed.append(None if keep else value)
    if all(x is None for x in trained):
        raise ConfigError("nothing is trainable: every leaf is frozen")
    build = jax.tree_util.tree_unflatten
    return build(treedef, trained), build(treedef, fixed)
