"""Training of an EAGLE-3 head: what drafting does, at all places of a text at once.

Source: EAGLE-3 (arXiv 2503.01840, section 3, "training-time test"). Step k reads the
true token k + 1 places ahead and what the head gave itself in step k - 1; a column sees
the keys of step 0 up to its own place and those of its own later steps. That is the
recurrence of a chain that starts there.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from angeljax import ops
from angeljax._fields import choice, count, number
from angeljax.models import LanguageModel
from angeljax.speculative import _context_attention
from angeljax.speculative._eagle_config import EagleConfig
from angeljax.speculative._eagle_head import (
    Params,
    draft_logits,
    eagle_ids,
    read_step,
    target_head,
)
from angeljax.train._acceptance import DISTANCES, distance
from angeljax.train.language_model import cast

__all__ = ["EagleLoss", "EagleTask"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EagleLoss:
    """The objective.

    Attributes:
      steps: K, drafts in a row that are trained for.
      decay: weight of each step, relative to the one before.
      kind: "kl", "lk_hybrid", "lk_alpha" or "tv"; see
        `angeljax.train._acceptance.distance`.
      kl_steps: optimizer steps that begin with "kl", whatever the kind.
      eta: of "lk_hybrid".

    Raises:
      ConfigError: a field is out of range.
    """

    steps: int = 5
    decay: float = 0.8
    kind: str = "kl"
    kl_steps: int = 0
    eta: float = 3.0

    def __post_init__(self) -> None:
        count("loss.steps", self.steps)
        number("loss.decay", self.decay, 0)
        choice("loss.kind", self.kind, DISTANCES)
        count("loss.kl_steps", self.kl_steps, 0)
        number("loss.eta", self.eta, 0)


@dataclasses.dataclass(frozen=True)
class EagleTask:
    """An EAGLE-3 head in the loop; the target is frozen and runs in the step.

    Attributes:
      model: the target.
      config: of the head.
      options: the objective.
      dtype: of compute.
      exit_weight: of what the outputs for `SpecExit` learn, if the head has them.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> from angeljax.speculative import EagleConfig, init_eagle
      >>> from angeljax.train.eagle import EagleLoss, EagleTask
      >>> model = LanguageModel(DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=2,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... ))
      >>> params = model.init(jax.random.key(0))
      >>> config = EagleConfig.of(model.config)
      >>> task = EagleTask(model, config, EagleLoss(steps=2), "float32")
      >>> head = init_eagle(config, jax.random.key(1), target=params)
      >>> batch = {"tokens": jnp.ones((2, 9), int), "mask": jnp.ones((2, 9), bool)}
      >>> loss, metrics = task.loss(*task.init(params, head), batch, 0, None)
      >>> sorted(metrics)
      ['tau', 'top1/0', 'top1/1', 'weight']
    """

    model: LanguageModel
    config: EagleConfig
    options: EagleLoss = EagleLoss()
    dtype: str = "bfloat16"
    exit_weight: float = 0.1

    def init(
        self, params: Any, head: Params, scales: Any = None
    ) -> tuple[Params, dict[str, Any]]:
        """`(trainable, frozen)` at the start.

        Args:
          params: of the target.
          head: see `init_eagle`; features already multiplied by `scales` go into its
            `fc`.
          scales: float `[3 * target_hidden_size]`; see `feature_scales`.
        """
        ids = eagle_ids(head)
        wide = len(self.config.target_layers) * self.config.target_hidden_size
        scales = jnp.ones(wide) if scales is None else jnp.asarray(scales)
        frozen: dict[str, Any] = {
            "target": cast(params, self.dtype),
            "scales": scales.astype(jnp.float32),
            "ids": ids,
            # The rows of the target's head that the draft head has too.
            "rows": None
            if ids is None
            else target_head(params, ids).astype(self.dtype),
        }
        trainable = {k: v for k, v in head.items() if k not in ("d2t", "embed_tokens")}
        return trainable, frozen

    def head(self, trainable: Params, frozen: Any) -> Params:
        """Parameters for an `EagleDrafter`: the scales in `fc`, and `d2t`."""
        out = dict(trainable)
        for name in {"fc", "exit"} & set(trainable):
            out[name] = {
                "kernel": frozen["scales"][:, None] * trainable[name]["kernel"]
            }
        if (ids := frozen["ids"]) is not None:
            out["d2t"] = (ids - jnp.arange(len(ids))).astype(jnp.int32)
        return out

    def loss(
        self, trainable: Params, frozen: Any, batch: Any, step: Any, key: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Weighted sum over the steps of the mean loss of the tokens that count.

        Args:
          trainable, frozen: see `init`.
          batch: `tokens` int32 `[B, T + 1]`, and `mask` bool `[B, T + 1]`, which of
            them are predicted; for a head with `exit` also `progress` and `remaining`,
            see `thinking_targets`.
          step: number of optimizer steps taken.
          key: is not used.

        Returns:
          The loss, and `top1/k`, how often step k has the target's likeliest token;
          `tau`, tokens for each forward of the target that a greedy chain of K drafts
          would give from a place of this text; `weight`, the tokens of step 0;
          `exit/*`, mean errors of the signals: of confidence and progress, and of the
          logarithm of what remains.
        """
        o, tokens, mask = self.options, batch["tokens"], batch["mask"]
        final, features = self.target(frozen, tokens[:, :-1])
        best, sure = self._best(frozen, final, "exit" in trainable)
        hidden = self.hidden(trainable, frozen, features, tokens)
        losses, drafted, known = self._row_losses(
            trainable, frozen, hidden, final, best, step
        )
        size = final.shape[1]
        total, metrics = jnp.zeros(()), {}
        run = jnp.ones(best.shape, bool)
        ahead, weight, start = jnp.zeros(best.shape), jnp.zeros(()), run
        for k in range(o.steps):
            # Column i drafts the token i + 2 + k, after i + 1 + k.
            inside = jnp.arange(size) + 1 + k < size
            counts = inside & _ahead(mask, 2 + k, size)
            valid = counts & _ahead(known, 1 + k, size)
            mean = jnp.sum(jnp.where(valid, _ahead(losses[:, k], 1 + k, size), 0.0))
            mean = mean / jnp.maximum(jnp.sum(valid), 1)
            total = total + o.decay**k * mean
            right = _ahead(drafted[:, k] == best, 1 + k, size)
            share = jnp.sum(right & counts) / jnp.maximum(jnp.sum(counts), 1)
            metrics[f"top1/{k}"] = share
            start = counts if k == 0 else start
            weight = jnp.sum(valid) if k == 0 else weight
            run = run & right
            ahead = ahead + run
        # Places from which all K drafts can be judged.
        whole = start & (jnp.arange(size) + o.steps < size)
        tau = 1 + jnp.sum(jnp.where(whole, ahead, 0)) / jnp.maximum(jnp.sum(whole), 1)
        if "exit" in trainable:
            error, found = self._exit_loss(trainable, frozen, features, batch, sure)
            total, metrics = total + self.exit_weight * error, {**metrics, **found}
        return total, {**metrics, "tau": tau, "weight": weight}

    def _exit_loss(
        self, trainable: Params, frozen: Any, features: Any, batch: Any, sure: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean square errors of the three signals where there is thinking.

        Confidence is learnt from the target's own: the probability of its likeliest
        token. (SpecExit annotates answers, which text alone does not have.)
        """
        wide = jnp.concatenate(features, axis=-1) * frozen["scales"]
        raw = jnp.matmul(wide, trainable["exit"]["kernel"], precision="highest")
        remaining, progress = (batch[k][:, :-1] for k in ("remaining", "progress"))
        given = remaining > 0
        count = jnp.maximum(jnp.sum(given), 1)
        errors = {
            "confidence": jax.nn.sigmoid(raw[..., 0]) - sure,
            "progress": jax.nn.sigmoid(raw[..., 1]) - progress,
            "remaining": raw[..., 2] - jnp.log(jnp.maximum(remaining, 1.0)),
        }
        errors = {k: jnp.where(given, e, 0.0) for k, e in errors.items()}
        squares = [jnp.sum(e**2) / count for e in errors.values()]
        found = {f"exit/{k}": jnp.sum(jnp.abs(e)) / count for k, e in errors.items()}
        return sum(squares, jnp.zeros(())), found

    def target(
        self, frozen: Any, tokens: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """The target's normalised output `[B, T, D]`, and its features."""
        layers = self.config.target_layers
        found = self.model.features(frozen["target"], tokens, hidden=layers)
        return jax.lax.stop_gradient((found.final, found.hidden))

    def hidden(
        self, trainable: Params, frozen: Any, features: Any, tokens: jax.Array
    ) -> list[jax.Array]:
        """h' `[B, T, D]` of each step.

        Args:
          trainable, frozen: see `init`.
          features: `[B, T, D_target]` of each layer.
          tokens: int32 `[B, T + 1]`.
        """
        params, size = cast(trainable, self.dtype), tokens.shape[1] - 1
        embeds = self.model.embed(frozen["target"], tokens)
        wide = jnp.concatenate(features, axis=-1) * frozen["scales"]
        h = ops.dot(wide.astype(self.dtype), params["fc"]["kernel"])
        keys: list[jax.Array] = []
        values: list[jax.Array] = []
        out = []

        @functools.partial(jax.checkpoint, static_argnums=(4,))
        def one(params: Any, h: Any, keys: Any, values: Any, k: int) -> Any:
            kept: list[Any] = []

            def attend(q: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
                kept.extend((key, value))
                return _attend(q, [*keys, key], [*values, value], self.model)

            at = jnp.broadcast_to(jnp.arange(size) + k, h.shape[:2])
            e = _ahead(embeds, 1 + k, size)
            h = read_step(self.config, params, e, h, at, attend)
            return h, kept

        for k in range(self.options.steps):
            h, (key, value) = one(params, h, keys, values, k)
            keys, values = [*keys, key], [*values, value]
            out.append(h)
        return out

    def _best(
        self, frozen: Any, final: jax.Array, with_sure: bool
    ) -> tuple[jax.Array, Any]:
        """int32 `[B, T]`, the target's likeliest tokens, and their probabilities."""
        module = self.model.bind(frozen["target"])

        def one(row: jax.Array) -> tuple[jax.Array, Any]:
            logits = module.head(row)
            best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            if not with_sure:
                return best, None
            top = jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)
            return best, jnp.exp(top)

        return jax.lax.map(one, final)

    def _row_losses(
        self,
        trainable: Params,
        frozen: Any,
        hidden: list[jax.Array],
        final: jax.Array,
        best: jax.Array,
        step: Any,
    ) -> Any:
        """Loss and draft of each step `[B, K, T]`, whether it could be right `[B, T]`.

        All at the place of the target's prediction that they are compared with, which
        is computed once for all steps. One row at a time, each computed again for the
        gradient: the logits of a batch would not fit.
        """
        o, ids, rows = self.options, frozen["ids"], frozen["rows"]
        module = self.model.bind(frozen["target"])
        last = {k: trainable[k] for k in ("norm", "lm_head")}
        # Step k of column i is compared with place i + 1 + k.
        moved = [_behind(h, 1 + k) for k, h in enumerate(hidden)]

        @jax.checkpoint
        def one(last: Params, row: Any) -> Any:
            h, x, best = row
            q = draft_logits(self.config, cast(last, self.dtype), h)
            if rows is None:
                p = module.head(x)
            else:
                p = ops.dot(x, rows, preferred_element_type=jnp.float32)
            log_p = jax.nn.log_softmax(jax.lax.stop_gradient(p), axis=-1)
            log_q = jax.nn.log_softmax(q, axis=-1)
            loss = distance(log_p, log_q, o.kind, eta=o.eta)
            if o.kind != "kl" and o.kl_steps:
                begins = step < o.kl_steps
                loss = jnp.where(begins, distance(log_p, log_q, "kl"), loss)
            drafted, top = jnp.argmax(q, axis=-1), jnp.argmax(p, axis=-1)
            if ids is not None:
                drafted, top = ids[drafted], ids[top]
            return loss, drafted, top == best

        each = jnp.stack(moved, axis=1), final, best
        return jax.lax.map(functools.partial(one, last), each)


def _behind(x: jax.Array, count: int) -> jax.Array:
    """`x` moved `count` places on, zeros where it begins."""
    rest = [(0, 0)] * x.ndim
    rest[1] = (count, 0)
    return jnp.pad(x, rest)[:, : x.shape[1]]


def _ahead(x: jax.Array, count: int, size: int) -> jax.Array:
    """`x[:, count : count + size]`, zeros where it ends."""
    x = x[:, count : count + size]
    rest = [(0, 0)] * x.ndim
    rest[1] = (0, size - x.shape[1])
    return jnp.pad(x, rest)


def _attend(
    q: jax.Array, keys: list[jax.Array], values: list[jax.Array], model: LanguageModel
) -> jax.Array:
    """Queries of the last step on the keys of step 0, and their own column's since.

    Args:
      q: `[B, T, H, D]`.
      keys, values: `[B, T, Hkv, D]` of each step.
      model: its attention serves step 0.
    """
    order = jnp.arange(q.shape[1])
    seen = order[:, None] >= order
    if len(keys) == 1:
        return model.attention_fn(q, keys[0], values[0], seen[None, None])
    first = jnp.swapaxes(keys[0], 1, 2), jnp.swapaxes(values[0], 1, 2)
    own = jnp.stack(keys[1:], axis=2), jnp.stack(values[1:], axis=2)
    y = _context_attention.attend(q[:, :, None], first, seen[None], own)
    return y[:, :, 0]
