"""Lossless speculative decoding, all of it in one compiled loop.

`generate` is the whole of it; `prefill` and `decode` are its compiled pieces, for
whoever fills finished rows with new prompts. `autoregressive` is plain decoding by the
same code: what speculative text must equal, token for token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax._graph import ONE_GRAPH
from angeljax.models.rows import RowInputs
from angeljax.speculative import _check
from angeljax.speculative._prompts import padded_inputs, read_prompts
from angeljax.speculative._round import (
    Book,
    State,
    Stats,
    decode_round,
    depth_of,
    ready,
    settled,
)
from angeljax.speculative._rows import chain_mask, map_slots
from angeljax.speculative.drafter import (
    Drafter,
    NoDrafter,
    Prompt,
    Target,
    TargetModel,
)
from angeljax.speculative.sampling import Sampling

GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class Generated:
    """What `generate` returns.

    Attributes:
      tokens: int32 `[B, max_new_tokens]`; after the end of a row, the padding id.
      lengths: int32 `[B]`, generated tokens of each row, the ending one included.
      stats: counts of rounds and drafts.
    """

    tokens: jax.Array
    lengths: jax.Array
    stats: Stats

    @property
    def tau(self) -> float:
        """Generated tokens for each forward of the target, over all rows."""
        return float(jnp.sum(self.lengths) / jnp.sum(self.stats.rounds))


def prefill(
    target: Target,
    drafter: Drafter,
    tokens: jax.Array,
    lengths: jax.Array,
    limits: jax.Array,
    *,
    slots: int,
    inputs: RowInputs | None = None,
) -> State:
    """Reads the prompts; compiled once for each shape.

    What the target reads is a program that drafters share if they want the same layers.

    Args:
      target, drafter: see `decode`.
      tokens: int32 `[B, T]`, padded on the right.
      lengths: int32 `[B]`, from 1 to T.
      limits: int32 `[B]`, length of prompt and text that a row may reach.
      slots: of the cache: `max(limits) + drafter.reach - 1` or more, and T or more; for
        a tree by its depth and one more.
      inputs: what is read in place of the tokens' embeddings.

    Returns:
      The state before the first round.
    """
    final, hidden, cache = _read_prompt(
        target.model, target.params, tokens, inputs, slots=slots, hidden=drafter.hidden
    )
    prompt = Prompt(tokens, lengths, final, hidden, None)
    return _first_state(target, drafter, prompt, cache, limits, slots=slots)


@functools.partial(jax.jit, static_argnames=("model", "slots", "hidden"))
def _read_prompt(
    model: TargetModel,
    params: Any,
    tokens: jax.Array,
    inputs: RowInputs | None,
    *,
    slots: int,
    hidden: tuple[int, ...],
) -> tuple[jax.Array, tuple[jax.Array, ...], Any]:
    """Outputs of the last layer and of others, and the cache with all its slots."""
    batch, count = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))
    # Targets that know no embeddings need not know the argument.
    given: Any = {} if inputs is None else {"inputs": inputs}
    rows = model.read_rows(
        params,
        model.init_rows(batch, count),
        tokens,
        positions=positions,
        slots=jnp.zeros(batch, jnp.int32),
        mask=chain_mask(positions, count),
        hidden=hidden,
        **given,
    )

    def widened(x: jax.Array) -> jax.Array:
        rest = [(0, 0)] * x.ndim
        rest[-2] = (0, slots - count)
        return jnp.pad(x, rest)

    return rows.final, tuple(rows.hidden), map_slots(widened, rows.cache)


@functools.partial(jax.jit, static_argnames=("slots",), donate_argnames=("cache",))
def _first_state(
    target: Target,
    drafter: Drafter,
    prompt: Prompt,
    cache: Any,
    limits: jax.Array,
    *,
    slots: int,
) -> State:
    batch, count = prompt.tokens.shape
    prompt = prompt._replace(cache=cache)
    memory = drafter.init(target, batch, slots)
    none = jnp.zeros(batch, jnp.int32)
    return State(
        # A last round may write a token beyond the last slot.
        tokens=jnp.pad(prompt.tokens, [(0, 0), (0, slots + 1 - count)]),
        lengths=prompt.lengths,
        cache=prompt.cache,
        active=prompt.lengths < limits,
        limits=limits,
        drafter=drafter.prefill(target, memory, prompt),
        stats=Stats(none, none, none, jnp.zeros(depth_of(drafter), jnp.int32)),
    )


_jit: Any = functools.partial(
    jax.jit, static_argnames=("always_wide",), donate_argnames=("state",)
)


@_jit
def decode(
    target: Target,
    drafter: Drafter,
    state: State,
    stops: jax.Array,
    rounds: jax.Array,
    *,
    always_wide: bool = False,
) -> State:
    """Some rounds, or fewer where all rows end; the state is updated in place.

    Args:
      target: model, parameters and sampling.
      drafter: proposes.
      state: of `prefill` or of `decode`; not to be used afterwards.
      stops: int32 `[n]`, tokens that end a row.
      rounds: int32 scalar, how many at most.
      always_wide: read `drafter.width` tokens even where nothing was drafted.

    Returns:
      The state after these rounds.
    """

    def more(book: Book) -> jax.Array:
        done, state = book.read()
        return (done < rounds) & jnp.any(state.active)

    def step(book: Book) -> Book:
        done, state = book.read()
        state = decode_round(target, drafter, state, stops, always_wide=always_wide)
        return Book.of(done + 1, state)

    first = Book.of(jnp.int32(0), ready(drafter, state))
    return settled(jax.lax.while_loop(more, step, first).read()[1])


# The same as a program of its own; `decode` can be a part of others.
decode_at_once = _jit(decode.__wrapped__, compiler_options=ONE_GRAPH)


def generate(
    model: TargetModel,
    params: Any,
    prompts: Any,
    lengths: Any = None,
    *,
    drafter: Drafter,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    detokenize: Callable[[list[int]], str] | None = None,
    on_tokens: Callable[[int, list[int]], None] | None = None,
    rounds_per_call: int | None = None,
    exact: str = "fast",
    slots: int | None = None,
) -> Generated:
    """Generates the text of the model, faster where the drafter guesses well.

    Greedily, and with the coupled rule, the tokens are those of `autoregressive`, for
    every drafter. In floating point the two programs multiply matrices of other shapes,
    so logits differ in their last bits and a tie may fall the other way; with
    `exact="same_width"` and `autoregressive(..., width=drafter)` even that is
    the same for chains.

    Args:
      model: such as `angeljax.models.LanguageModel`.
      params: its param tree, compressed or not.
      prompts: a sequence of token sequences, or int32 `[B, T]` padded on the right. Or
        what a model that sees or hears makes of one, an `angeljax.tokens.Prompt` or
        `Pruned`, for its language model; padded anywhere.
      lengths: int32 `[B]`, tokens of each prompt where `prompts` is an array; default
        T.
      drafter: what proposes tokens.
      max_new_tokens: upper limit for each row.
      sampling: temperature, filters, rule and seed; default greedy.
      stop_tokens: ids that end a row; default those of the configuration.
      stop_strings: end a row with the token that completes one of them. They are looked
        for after each call of the compiled loop.
      detokenize: text of generated tokens; needed for `stop_strings`.
      on_tokens: called with (row, new tokens) after each call of the compiled loop.
      rounds_per_call: rounds of one call; default all, or 8 where somebody looks.
      exact: "fast", or "same_width" to read `drafter.width` tokens in every round.
      slots: tokens that a row of the cache can hold; default what is needed, rounded up
        so that prompts of similar lengths share a program.

    Returns:
      A `Generated`.

    Raises:
      ValueError: an option or a prompt that cannot be, in one line, before anything is
        compiled.

    Example:
      >>> import jax, numpy as np
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> from angeljax.speculative import PromptLookup, autoregressive, generate
      >>> config = DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=1,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... )
      >>> model = LanguageModel(config)
      >>> params = model.init(jax.random.key(0))
      >>> prompts = [[5, 6, 7, 5, 6], [9, 9]]
      >>> fast = generate(
      ...     model, params, prompts, drafter=PromptLookup(4), max_new_tokens=12
      ... )
      >>> plain = autoregressive(model, params, prompts, max_new_tokens=12)
      >>> bool((fast.tokens == plain.tokens).all()), fast.tau >= plain.tau == 1.0
      (True, True)
    """
    _check.strings(stop_strings, detokenize)
    run, state = begin(
        model,
        params,
        prompts,
        lengths,
        drafter=drafter,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens,
        stop_strings=stop_strings,
        detokenize=detokenize,
        on_tokens=on_tokens,
        rounds_per_call=rounds_per_call,
        exact=exact,
        slots=slots,
    )
    return run.result(run.finish(drafter, state))


@dataclasses.dataclass(frozen=True)
class Run:
    """A generation under way: what the host knows of it."""

    target: Target
    sizes: np.ndarray
    told: np.ndarray
    stops: tuple[int, ...]
    max_new_tokens: int
    rounds_per_call: int
    always_wide: bool
    stop_strings: Sequence[str]
    detokenize: Callable[[list[int]], str] | None
    on_tokens: Callable[[int, list[int]], None] | None

    @property
    def looked_at(self) -> bool:
        """Whether the host looks at the text before it is finished."""
        return self.on_tokens is not None or bool(self.stop_strings)

    def advance(self, drafter: Drafter, state: State, rounds: int) -> State:
        """One call of the compiled loop, and what the host does after it."""
        state = decode_at_once(
            self.target,
            drafter,
            state,
            stops=jnp.asarray(self.stops, jnp.int32),
            rounds=jnp.int32(rounds),
            always_wide=self.always_wide,
        )
        if self.looked_at:
            look = self.stop_strings, self.detokenize, self.on_tokens
            state = _look(state, self.sizes, self.told, *look)
        return state

    def finish(self, drafter: Drafter, state: State) -> State:
        """The state in which all rows have ended."""
        state = self.advance(drafter, state, self.rounds_per_call)
        while self.looked_at or self.rounds_per_call < self.max_new_tokens:
            if not np.any(state.active):
                break
            state = self.advance(drafter, state, self.rounds_per_call)
        return state

    def result(self, state: State) -> Generated:
        """The text of a state."""
        pad = self.target.model.config.pad_id
        pad = (self.stops[0] if self.stops else 0) if pad is None else pad
        new, count = state.lengths - self.sizes, self.max_new_tokens
        tokens = _collect(state.tokens, self.sizes, new, jnp.int32(pad), count=count)
        return Generated(tokens, new, state.stats)


def begin(
    model: TargetModel,
    params: Any,
    prompts: Any,
    lengths: Any,
    *,
    drafter: Drafter,
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: Sequence[int] | None,
    stop_strings: Sequence[str],
    detokenize: Callable[[list[int]], str] | None,
    on_tokens: Callable[[int, list[int]], None] | None,
    rounds_per_call: int | None,
    exact: str,
    slots: int | None,
) -> tuple[Run, State]:
    """Checks all options and reads the prompts; see `generate`."""
    tokens, sizes, inputs = read_prompts(model, prompts, lengths)
    _check.options(model, drafter, sampling, max_new_tokens, exact, rounds_per_call)
    slots = _check.slots(model, drafter, sizes, max_new_tokens, slots)
    stops = model.config.eos_ids if stop_tokens is None else tuple(stop_tokens)
    length = min(_check.bucket(tokens.shape[1]), slots)
    tokens = _check.padded(tokens, length)
    target = Target(model, params, sampling.sampler(len(tokens)))
    state = prefill(
        target,
        drafter,
        jnp.asarray(tokens),
        jnp.asarray(sizes),
        jnp.asarray(sizes + max_new_tokens),
        slots=slots,
        inputs=None if inputs is None else padded_inputs(inputs, length),
    )
    looked_at = on_tokens is not None or bool(stop_strings)
    if rounds_per_call is None:
        rounds_per_call = 8 if looked_at else max_new_tokens
    run = Run(
        target=target,
        sizes=sizes,
        told=sizes.copy(),
        stops=tuple(stops),
        max_new_tokens=max_new_tokens,
        rounds_per_call=rounds_per_call,
        always_wide=exact == "same_width",
        stop_strings=stop_strings,
        detokenize=detokenize,
        on_tokens=on_tokens,
    )
    return run, state


def autoregressive(
    model: TargetModel, params: Any, prompts: Any, lengths: Any = None, **options: Any
) -> Generated:
    """Plain decoding with the same choices: the text that every drafter must leave.

    Args:
      model, params, prompts, lengths: as in `generate`.
      **options: those of `generate` without `drafter` and `exact`, and `width`: tokens
        that the model reads at once, of which one counts; default 1. With a drafter in
        place of a number it is the program that verifies its drafts.

    Returns:
      A `Generated`.

    Raises:
      ValueError: as `generate`.
    """
    width = options.pop("width", 1)
    drafter = NoDrafter.like(width) if isinstance(width, Drafter) else NoDrafter(width)
    return generate(model, params, prompts, lengths, drafter=drafter, **options)


@functools.partial(jax.jit, static_argnames=("count",))
def _collect(
    tokens: jax.Array, starts: jax.Array, new: jax.Array, pad: jax.Array, *, count: int
) -> jax.Array:
    place = jnp.arange(count)
    text = jnp.take_along_axis(tokens, starts[:, None] + place, axis=1)
    return jnp.where(place < new[:, None], text, pad)


def _look(
    state: State,
    starts: np.ndarray,
    told: np.ndarray,
    strings: Sequence[str],
    detokenize: Callable[[list[int]], str] | None,
    on_tokens: Callable[[int, list[int]], None] | None,
) -> State:
    """Ends rows at stop strings and tells what is new, which `told` then counts."""
    tokens, ends = np.asarray(state.tokens), np.array(state.lengths)
    active = np.array(state.active)
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if strings and end > told[row]:
            assert detokenize is not None
            text = tokens[row, start:end].tolist()
            # What was told before has none of them.
            known = told[row] - start
            size = _first(text, known, strings, detokenize)
            if size is not None:
                ends[row], active[row] = start + size, False
        if on_tokens is not None and ends[row] > told[row]:
            on_tokens(row, tokens[row, told[row] : ends[row]].tolist())
        told[row] = ends[row]
    if not strings:
        return state
    return dataclasses.replace(
        state, lengths=jnp.asarray(ends), active=jnp.asarray(active)
    )


def _first(
    text: list[int],
    known: int,
    strings: Sequence[str],
    detokenize: Callable[[list[int]], str],
) -> int | None:
    """Least number of tokens whose text has one of the strings; None if none has."""

    def has(size: int) -> bool:
        return any(s in detokenize(text[:size]) for s in strings)

    if not has(len(text)):
        return None
    return next(size for size in range(known + 1, len(text) + 1) if has(size))
