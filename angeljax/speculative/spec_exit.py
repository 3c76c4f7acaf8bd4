"""SpecExit: an EAGLE-3 head that also says when a model has thought enough.

Not lossless: it ends the thinking of a reasoning model early, on purpose. The head has
one more output for each signal, on the features that it reads anyway, and a rule looks
at the smoothed signals wherever a paragraph of the thinking ends.

Source: SpecExit (arXiv 2509.24248) and its implementation in AngelSlim.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from angeljax.speculative._eagle_head import EXIT_SIGNALS
from angeljax.speculative.drafter import (
    Context,
    Draft,
    Drafter,
    Prompt,
    Target,
    TargetModel,
    Verified,
)
from angeljax.speculative.eagle import EagleDrafter
from angeljax.speculative.sampling import Sampling
from angeljax.speculative.tree import DynamicTree, Tree

__all__ = ["SIGNALS", "ExitRule", "SpecExit", "exit_signals"]

SIGNALS = EXIT_SIGNALS
SMOOTHINGS = ("ewma", "momentum", "mean", "paragraph_mean")
_static: Any = {"static": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitRule:
    """When thinking ends, and with which tokens.

    All conditions that are named must hold, after a token of `breaks`. Signals are of
    the rounds before: at least one, and `window` of them for "momentum".

    Attributes:
      end: tokens that end the thinking, such as that of `</think>`; they are put into
        the text, the first after the paragraph's end, one in a round.
      breaks: tokens at which a paragraph ends.
      begin: token that begins the thinking; None: the text begins with it.
      confidence, progress: what these signals, from 0 to 1, must exceed; None does not
        look at the signal.
      remaining: what the estimate of tokens that are left to think must be below; None
        does not look at it.
      smoothing: "ewma", exponential average with `alpha`; "mean" of the last `window`
        rounds; "momentum", the last round's value and the mean of the last
        `window - 1` differences; "paragraph_mean", a mean that starts again at each
        end of a paragraph.
      alpha: weight of the newest round in "ewma".
      window: rounds.

    Raises:
      ValueError: a field is out of range, or no signal is looked at; one line.

    Example:
      >>> from angeljax.speculative import ExitRule
      >>> ExitRule(end=(7,), breaks=(3,), remaining=None).limits
      ((0, 0.8, 1), (1, 0.3, 1))
    """

    end: tuple[int, ...]
    breaks: tuple[int, ...]
    begin: int | None = None
    confidence: float | None = 0.8
    progress: float | None = 0.3
    remaining: float | None = 200.0
    smoothing: str = "ewma"
    alpha: float = 0.1
    window: int = 10

    def __post_init__(self) -> None:
        for name in ("end", "breaks"):
            value = tuple(getattr(self, name))
            object.__setattr__(self, name, value)
            if not value or min(value) < 0:
                raise ValueError(f"{name} must name tokens, at least one, not {value}")
        if self.smoothing not in SMOOTHINGS:
            raise ValueError(
                f"smoothing must be one of {', '.join(SMOOTHINGS)}, not "
                f"{self.smoothing!r}"
            )
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must be above 0 and up to 1, not {self.alpha}")
        if self.window < 2:
            raise ValueError(f"window must be at least 2, not {self.window}")
        if not self.limits:
            raise ValueError(f"name a limit for one of {', '.join(SIGNALS)}")

    @property
    def limits(self) -> tuple[tuple[int, float, int], ...]:
        """(number of the signal, limit, 1 to exceed it or -1 to be below)."""
        given = self.confidence, self.progress, self.remaining
        signs = 1, 1, -1
        return tuple(
            (i, value, sign)
            for i, (value, sign) in enumerate(zip(given, signs, strict=True))
            if value is not None
        )


def exit_signals(kernel: jax.Array, features: Any) -> jax.Array:
    """Confidence, progress and remaining tokens, float32 `[..., 3]`.

    Args:
      kernel: `[3 * target_hidden_size, 3]`, the head's `exit` kernel.
      features: outputs of the target's layers `[..., D_target]`, in order.

    Returns:
      The first two from 0 to 1, the third in tokens.
    """
    wide = jnp.concatenate(features, axis=-1).astype(jnp.float32)
    raw = jnp.matmul(wide, kernel.astype(jnp.float32), precision="highest")
    return jnp.concatenate(
        [jax.nn.sigmoid(raw[..., :2]), jnp.exp(raw[..., 2:])], axis=-1
    )


class _State(NamedTuple):
    """Of a row: the drafter's state, and where its thinking stands.

    `scores` `[B, window, 3]` are the signals of the last rounds, newest last, `told`
    of them; `average` `[B, 3]` is their exponential average. `forced` counts the tokens
    of the end that were put into the text; 0 is before, -1 where the text ended its
    thinking itself.
    """

    drafter: Any
    thinking: jax.Array
    scores: jax.Array
    told: jax.Array
    average: jax.Array
    forced: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpecExit(Drafter):
    """An EAGLE-3 drafter with a rule that ends thinking early. Not lossless.

    Up to the end of the paragraph where the rule holds the text is the target's, and
    so is what follows the tokens that end the thinking.

    Attributes:
      drafter: its parameters have `exit`, `{"kernel": [3 * target_hidden_size, 3]}`,
        for `SIGNALS` in order.
      rule: an `ExitRule`.

    Example:
      >>> import jax
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> from angeljax.speculative import (
      ...     EagleConfig, EagleDrafter, ExitRule, SpecExit, generate, init_eagle)
      >>> model = LanguageModel(DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=2,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... ))
      >>> params = model.init(jax.random.key(0))
      >>> config = EagleConfig.of(model.config)
      >>> head = init_eagle(config, jax.random.key(1), target=params, exit=True)
      >>> rule = ExitRule(end=(7,), breaks=tuple(range(32)), confidence=0.4,
      ...                 progress=None, remaining=None)
      >>> out = generate(model, params, [[1, 2]], max_new_tokens=6,
      ...                drafter=SpecExit(EagleDrafter(config, head), rule))
      >>> int(out.tokens[0].tolist().count(7)) >= 1
      True
    """

    drafter: EagleDrafter
    rule: ExitRule = dataclasses.field(metadata=_static)

    @property
    def width(self) -> int:
        return self.drafter.width

    @property
    def tree(self) -> Tree | DynamicTree | None:
        return self.drafter.tree

    @property
    def hidden(self) -> tuple[int, ...]:
        return self.drafter.hidden

    @property
    def reach(self) -> int:
        return self.drafter.reach

    def check(self, model: TargetModel, sampling: Sampling) -> None:
        self.drafter.check(model, sampling)
        if "exit" not in self.drafter.params:
            raise ValueError(
                "SpecExit needs a head with the outputs 'exit': train one with a "
                "section exit, or use the drafter alone"
            )
        named = (*self.rule.end, *self.rule.breaks, self.rule.begin or 0)
        if max(named) >= model.config.vocab_size:
            raise ValueError(
                f"the rule names token {max(named)} and the target has "
                f"{model.config.vocab_size}"
            )

    def init(self, target: Target, batch: int, slots: int) -> _State:
        none = jnp.zeros(batch, jnp.int32)
        shape = batch, self.rule.window, len(SIGNALS)
        return _State(
            drafter=self.drafter.init(target, batch, slots),
            thinking=jnp.full(batch, self.rule.begin is None),
            scores=jnp.zeros(shape),
            told=none,
            average=jnp.zeros((batch, len(SIGNALS))),
            forced=none,
        )

    def prefill(self, target: Target, state: _State, prompt: Prompt) -> _State:
        thinking = state.thinking
        if self.rule.begin is not None:
            place = jnp.arange(prompt.tokens.shape[1])
            known = place < prompt.lengths[:, None]

            def latest(token: int) -> jax.Array:
                here = known & (prompt.tokens == token)
                return jnp.max(jnp.where(here, place, -1), axis=1)

            thinking = latest(self.rule.begin) > latest(self.rule.end[0])
        inner = self.drafter.prefill(target, state.drafter, prompt)
        return state._replace(drafter=inner, thinking=thinking)

    def draft(
        self, target: Target, state: _State, context: Context
    ) -> tuple[Draft, _State]:
        draft, inner = self.drafter.draft(target, state.drafter, context)
        return draft, state._replace(drafter=inner)

    def steer(
        self, state: _State, read: jax.Array, text: jax.Array, accepted: jax.Array
    ) -> tuple[jax.Array, jax.Array, _State]:
        rule, place = self.rule, jnp.arange(read.shape[1])
        kept = place <= accepted[:, None]

        def has(tokens: tuple[int, ...]) -> jax.Array:
            return kept & jnp.isin(read, jnp.asarray(tokens))

        thinking, forced = state.thinking, state.forced
        over = has(rule.end[:1]).any(axis=1)
        if rule.begin is not None:
            thinking |= (forced == 0) & has((rule.begin,)).any(axis=1)
        forced = jnp.where(thinking & over & (forced == 0), -1, forced)
        thinking &= ~over
        stops = has(rule.breaks)
        at_break = thinking & stops.any(axis=1)
        first = jnp.argmax(stops, axis=1)
        exits = at_break & self._holds(state)
        # One more token of a longer end, if it has begun.
        goes_on = (forced > 0) & (forced < len(rule.end))
        cut = jnp.where(exits, first, jnp.where(goes_on, 0, accepted))
        end = jnp.asarray(rule.end, jnp.int32)
        token = end[jnp.clip(forced, 0, len(rule.end) - 1)]
        put = (exits | goes_on)[:, None] & (place == cut[:, None])
        told = state.told
        if rule.smoothing == "paragraph_mean":
            told = jnp.where(at_break, jnp.minimum(told, 1), told)
        state = state._replace(
            thinking=thinking & ~exits,
            forced=jnp.where(exits, 1, forced + goes_on),
            told=told,
        )
        return jnp.where(put, token[:, None], text), cut.astype(accepted.dtype), state

    def _holds(self, state: _State) -> jax.Array:
        """bool `[B]`: all conditions, on the signals of the rounds before."""
        rule, count = self.rule, state.told
        if rule.smoothing == "ewma":
            value, known = state.average, count > 0
        elif rule.smoothing == "momentum":
            last, first = state.scores[:, -1], state.scores[:, 0]
            value = last + (last - first) / (rule.window - 1)
            known = count >= rule.window
        else:
            some = jnp.minimum(count, rule.window)
            newest = jnp.arange(rule.window) >= rule.window - some[:, None]
            total = jnp.sum(jnp.where(newest[..., None], state.scores, 0), axis=1)
            value, known = total / jnp.maximum(some, 1)[:, None], count > 0
        for signal, limit, sign in rule.limits:
            known &= sign * value[:, signal] > sign * limit
        return known

    def update(self, target: Target, state: _State, verified: Verified) -> _State:
        inner = self.drafter.update(target, state.drafter, verified)
        kernel = self.drafter.params["exit"]["kernel"]
        signals = exit_signals(kernel, verified.hidden)
        rows = jnp.arange(signals.shape[1]) < verified.emitted[:, None]
        total = jnp.sum(jnp.where(rows[..., None], signals, 0.0), axis=1)
        mean = total / jnp.maximum(verified.emitted, 1)[:, None]
        new = (state.thinking & (verified.emitted > 0))[:, None]
        first = (state.told == 0)[:, None]
        alpha = self.rule.alpha
        average = jnp.where(first, mean, alpha * mean + (1 - alpha) * state.average)
        moved = jnp.concatenate([state.scores[:, 1:], mean[:, None]], axis=1)
        return state._replace(
            drafter=inner,
            scores=jnp.where(new[..., None], moved, state.scores),
            average=jnp.where(new, average, state.average),
            told=state.told + new[:, 0],
        )
