"""`angeljax spec generate`: answers to prompts, one after another."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from angeljax._draft_options import DraftOptions
from angeljax._spec_workflow.setup import Ready
from angeljax.speculative import (
    Drafter,
    Generated,
    autoregressive,
    divergences,
    generate_as,
    sampling_of,
)
from angeljax.speculative._check import bucket
from angeljax.speculative._round import reach_of

ROUNDS = 8  # of a call, after which the text so far is shown


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer, and how it came about.

    Attributes:
      text: decoded.
      tokens: how many.
      rounds: forwards of the target.
      tau: tokens of a round.
      tokens_per_second: without the calls that compile; None if it was too short.
      drafted: whether anything was drafted to the end, where that was to be decided.
      plain_tokens_per_second: of plain decoding, if it was compared.
      same: whether the text equals that of plain decoding; None if not compared.
      index, gap: where the two part, and how close the choice was there.
    """

    text: str
    tokens: int
    rounds: int
    tau: float
    tokens_per_second: float | None
    drafted: bool | None = None
    plain_tokens_per_second: float | None = None
    same: bool | None = None
    index: int | None = None
    gap: float | None = None

    def summary(self) -> str:
        """One line."""
        parts = [f"{self.tokens} tokens in {self.rounds} rounds, tau {self.tau:.2f}"]
        if self.drafted is False:
            parts.append("drafts were switched off: they would not pay")
        rate, plain = self.tokens_per_second, self.plain_tokens_per_second
        if rate is not None:
            parts.append(f"{rate:.1f} tokens/s")
        if plain is not None:
            times = "" if rate is None else f" ({rate / plain:.2f}x)"
            parts.append(f"plain decoding {plain:.1f}{times}")
        if self.same:
            parts.append("same text as plain decoding")
        elif self.same is not None:
            parts.append(
                f"NOT the text of plain decoding: they part at token {self.index}, "
                f"where one is better by {self.gap:.2g}"
            )
        return "; ".join(parts)


class _Clock:
    """Watches a generation: the text as it grows, and when its tokens came."""

    def __init__(self, decode: Callable[[list[int]], str], show: Any) -> None:
        self._decode, self._show = decode, show
        self._tokens: list[int] = []
        self._shown = ""
        self._times: list[tuple[float, int]] = []

    def __call__(self, row: int, new: list[int]) -> None:
        self._tokens += new
        self._times.append((time.perf_counter(), len(self._tokens)))
        if self._show is None:
            return
        text = self._decode(self._tokens)
        # Half a character is not shown before its other half is there.
        if not text.endswith("\ufffd") and text.startswith(self._shown):
            self._show(text[len(self._shown) :])
            self._shown = text

    def rest(self, text: str) -> None:
        """Shows what has not been."""
        if self._show is not None and text.startswith(self._shown):
            self._show(text[len(self._shown) :])

    def rate(self, skip: int) -> float | None:
        """Tokens of a second after the first calls; None if too few are left."""
        if len(self._times) <= skip:
            return None
        (start, few), (end, many) = self._times[skip - 1], self._times[-1]
        return (many - few) / (end - start) if many - few >= ROUNDS else None


def answer(
    ready: Ready,
    ids: Sequence[int],
    options: DraftOptions,
    drafter: Drafter,
    *,
    max_new_tokens: int,
    stop_strings: Sequence[str] = (),
    compare: bool = False,
    slots: int | None = None,
    show: Callable[[str], None] | None = None,
) -> Answer:
    """Answers one prompt.

    Args:
      ready: the target.
      ids: of the prompt.
      options: the section `draft`, with its sampling.
      drafter: of these options.
      max_new_tokens: upper limit.
      stop_strings: end the text.
      compare: decode plainly as well.
      slots: of the cache, so that prompts share a program.
      show: is given the text piece by piece.

    Returns:
      An `Answer`.

    Raises:
      ValueError: as `generate`.
    """
    tokenizer = ready.opened.need_tokenizer()
    sampling = sampling_of(options.sampling)
    run = ready.model, ready.params, [list(ids)]
    common: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "sampling": sampling,
        "stop_strings": tuple(stop_strings),
        "detokenize": tokenizer.decode if stop_strings else None,
        "rounds_per_call": ROUNDS,
        "slots": slots,
    }
    clock = _Clock(tokenizer.decode, show)
    out, plan = generate_as(options, *run, drafter=drafter, on_tokens=clock, **common)
    text = _text(ready, out)
    clock.rest(text)
    # After the choice the loop is compiled once more, for what was chosen.
    rate = clock.rate(1 if plan is None else 2)
    found = Answer(
        text=text,
        tokens=int(out.lengths[0]),
        rounds=int(out.stats.rounds[0]),
        tau=out.tau,
        tokens_per_second=rate,
        drafted=None if plan is None else plan.on,
    )
    if not compare:
        return found
    same_width = options.exact == "same_width" and drafter.tree is None
    clock = _Clock(tokenizer.decode, None)
    plain = autoregressive(
        *run, width=drafter if same_width else 1, on_tokens=clock, **common
    )
    apart = divergences(*run, plain, out, sampling=sampling)
    return dataclasses.replace(
        found,
        plain_tokens_per_second=clock.rate(1),
        same=not apart,
        index=apart[0].index if apart else None,
        gap=apart[0].gap if apart else None,
    )


def _text(ready: Ready, out: Generated) -> str:
    ids = jax.device_get(out.tokens)[0, : int(out.lengths[0])]
    return ready.opened.need_tokenizer().decode(ids.tolist())


def shared_slots(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, drafters: Sequence[Drafter]
) -> int:
    """Slots of a cache that suits all prompts and drafters."""
    reach = max(map(reach_of, drafters))
    return bucket(max(map(len, prompts))) + bucket(max_new_tokens + reach)
