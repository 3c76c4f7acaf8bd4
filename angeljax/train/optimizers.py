"""Optimizers and learning-rate schedules by name; the work is optax's."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from angeljax._fields import ConfigError, choice, count, number, pattern
from angeljax._leaves import path_string

OPTIMIZERS = ("adamw", "schedule_free", "muon")
SCHEDULES = ("constant", "linear", "cosine", "wsd")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How parameters are updated.

    Attributes:
      name: "adamw" (arXiv 1711.05101); "schedule_free", AdamW that needs to know no
        last step (arXiv 2405.15682); "muon", orthogonalised momentum for matrices, with
        updates as large as AdamW's (arXiv 2502.16982), and AdamW for the rest.
      lr: peak learning rate.
      schedule: after the warm-up: "constant"; "linear" or "cosine" down to `final_lr`;
        "wsd", constant and then linear down over the last `decay_fraction` of all steps
        (arXiv 2404.06395). Schedule-free takes "constant" only.
      warmup: steps in which the rate rises linearly.
      final_lr: rate at the end, as a share of `lr`.
      decay_fraction: see "wsd".
      b1, b2, eps: of Adam; `b1` is also the momentum of Muon's and schedule-free's
        averages.
      weight_decay: decoupled, for matrices and embeddings; never for norms, biases and
        learned scales.
      clip: largest global norm of a gradient; 0 does not clip.
      scale_lr: factor on the rate of learned quantizer scales (paths `learned/...`).
      lr_factors: regular expression for the whole path of a leaf (`params/...`) ->
        factor on its rate; the first that matches counts.

    Raises:
      ConfigError: a field is out of range; one line.
    """

    name: str = "adamw"
    lr: float = 1e-4
    schedule: str = "cosine"
    warmup: int = 0
    final_lr: float = 0.0
    decay_fraction: float = 0.2
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    scale_lr: float = 1.0
    lr_factors: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        choice("optimizer.name", self.name, OPTIMIZERS)
        if self.name == "schedule_free" and self.schedule == "cosine":
            # The default of the others means nothing here.
            object.__setattr__(self, "schedule", "constant")
        choice("optimizer.schedule", self.schedule, SCHEDULES)
        if self.name == "schedule_free" and self.schedule != "constant":
            raise ConfigError(
                "optimizer.schedule must be constant for schedule_free, which replaces "
                f"a schedule, not {self.schedule!r}"
            )
        number("optimizer.lr", self.lr, 0)
        if self.lr == 0:
            raise ConfigError("optimizer.lr is 0: nothing would be trained")
        count("optimizer.warmup", self.warmup, 0)
        number("optimizer.final_lr", self.final_lr, 0, 1)
        number("optimizer.decay_fraction", self.decay_fraction, 0, 1)
        number("optimizer.b1", self.b1, 0, 0.99999)
        number("optimizer.b2", self.b2, 0, 0.99999)
        number("optimizer.eps", self.eps, 0)
        number("optimizer.weight_decay", self.weight_decay, 0)
        number("optimizer.clip", self.clip, 0)
        number("optimizer.scale_lr", self.scale_lr, 0)
        if self.name == "schedule_free" and self.b1 == 0:
            raise ConfigError("optimizer.b1 must be above 0 for schedule_free")
        if not isinstance(self.lr_factors, Mapping):
            raise ConfigError(
                f"optimizer.lr_factors maps patterns to numbers: {self.lr_factors!r}"
            )
        for path, factor in self.lr_factors.items():
            pattern("optimizer.lr_factors", path)
            number(f"optimizer.lr_factors[{path!r}]", factor, 0)


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the optimizer step, counted from 0.

    Args:
      config: see `OptimizerConfig`.
      steps: of the whole training.

    Returns:
      Step -> rate; the step may be traced.

    Raises:
      ConfigError: the warm-up takes all steps.

    Example:
      >>> from angeljax.train import OptimizerConfig, make_schedule
      >>> schedule = make_schedule(OptimizerConfig(lr=1.0, warmup=2), steps=6)
      >>> [round(float(schedule(i)), 3) for i in range(6)]
      [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    lr, warmup = config.lr, config.warmup
    if warmup >= steps:
        raise ConfigError(
            f"optimizer.warmup of {warmup} steps leaves none of the {steps} to train in"
        )
    rest = steps - warmup
    main: optax.Schedule
    if config.schedule == "constant":
        main = optax.constant_schedule(lr)
    elif config.schedule == "linear":
        main = optax.linear_schedule(lr, lr * config.final_lr, rest)
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(lr, rest, alpha=config.final_lr)
    else:
        decay = min(max(round(config.decay_fraction * steps), 1), rest)
        down = optax.linear_schedule(lr, lr * config.final_lr, decay)
        main = optax.join_schedules([optax.constant_schedule(lr), down], [rest - decay])
    if not warmup:
        return main
    # Step 0 already moves: a rate of 0 would waste it.
    up = optax.linear_schedule(lr / warmup, lr, max(warmup - 1, 1))
    return optax.join_schedules([up, main], [warmup])


def decay_at(config: OptimizerConfig, share: float) -> float:
    """Factor on the rate after a share of the training, where time is what ends it.

    Args:
      config: see `OptimizerConfig`.
      share: from 0 to 1.

    Returns:
      From 1 down to `final_lr`, by the shape of `schedule`.

    Example:
      >>> from angeljax.train.optimizers import OptimizerConfig, decay_at
      >>> decay_at(OptimizerConfig(schedule="linear", final_lr=0.2), 0.5)
      0.6
    """
    kind, least = config.schedule, config.final_lr
    if kind == "constant":
        return 1.0
    if kind == "wsd":
        width = max(config.decay_fraction, 1e-9)
        share = max(0.0, 1 - (1 - share) / width)
    fall = (1 - math.cos(math.pi * share)) / 2 if kind == "cosine" else share
    return 1 - (1 - least) * fall


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer without clipping, which `fit` does itself.

    Args:
      config: see `OptimizerConfig`.
      steps: of the whole training.

    Returns:
      An optax transformation for any tree of float32 arrays.

    Raises:
      ConfigError: the schedule does not fit the steps.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.train import OptimizerConfig, make_optimizer
      >>> optimizer = make_optimizer(OptimizerConfig(lr=0.1), steps=10)
      >>> params = {"params": {"kernel": jnp.ones((2, 2))}}
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> float(updates["params"]["kernel"][0, 0]).__round__(3)
      -0.1
    """
    schedule = make_schedule(config, steps)
    factors = _factors(config)
    decay: dict[str, Any] = {"weight_decay": config.weight_decay}
    adam: dict[str, Any] = {"b2": config.b2, "eps": config.eps}
    if config.name == "adamw":
        rule = optax.adamw(schedule, b1=config.b1, **adam, **decay, mask=_decayed)
        return optax.chain(rule, *factors)
    if config.name == "muon":
        rule = optax.contrib.muon(
            schedule,
            beta=config.b1,
            eps=config.eps,
            weight_decay_mask=_decayed,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_muon_matrices,
            consistent_rms=0.2,
            **decay,
        )
        return optax.chain(rule, *factors)
    base = optax.chain(
        optax.scale_by_adam(b1=0.0, **adam),
        optax.add_decayed_weights(config.weight_decay, mask=_decayed),
        optax.scale_by_learning_rate(schedule),
        *factors,
    )
    return optax.contrib.schedule_free(base, schedule, b1=config.b1)


def evaluation_params(opt_state: Any, params: Any) -> Any:
    """The parameters to evaluate and keep: schedule-free's average, or `params`.

    Args:
      opt_state: of an optimizer of `make_optimizer`.
      params: the tree that is trained.

    Returns:
      A tree of the structure of `params`.
    """
    kind = optax.contrib.ScheduleFreeState
    found = [
        x
        for x in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
        if isinstance(x, kind)
    ]
    if not found:
        return params
    return optax.contrib.schedule_free_eval_params(found[0], params)


def _by_path(fn: Callable[[str, Any], Any], tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda p, x: fn(path_string(p), x), tree)


def _is_matrix(path: str, x: Any) -> bool:
    return (
        x.ndim >= 2
        and not path.startswith("learned/")
        and path.split("/")[-1] not in ("scale", "bias")
    )


def _decayed(tree: Any) -> Any:
    return _by_path(_is_matrix, tree)


def _muon_matrices(tree: Any) -> Any:
    """Kernels `[..., in, out]` of hidden layers; the rest is for Adam."""
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    # Embedding and head map from and to a one-hot vector, where Adam is the better one.
    outside = re.compile(r"(.*/)?([^/]*embed[^/]*|lm_head|head)(/.*)?")

    def kind(path: str, x: Any) -> Any:
        inside = _is_matrix(path, x) and not outside.fullmatch(path)
        return numbers if inside else None

    return _by_path(kind, tree)


def _factors(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    table = dict(config.lr_factors)
    if config.scale_lr != 1:
        table[r"learned/.*"] = config.scale_lr
    if not table:
        return []

    def factor(path: str) -> float:
        hits = (f for named, f in table.items() if re.fullmatch(named, path))
        return next(hits, 1.0)

    scaled = optax.stateless(
        lambda updates, _: _by_path(lambda path, x: x * factor(path), updates)
    )
    return [scaled]
