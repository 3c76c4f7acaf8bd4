"""Greedy and beam decoding of Whisper, each one compiled loop without host syncs."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from angeljax.models._whisper_layers import SelfKV
from angeljax.models.generate import Generated
from angeljax.models.whisper import WhisperModel, WhisperState

# Stands for "impossible" in sums of log-probabilities, where -inf would give NaN.
_NEVER = -1e9


def transcribe_tokens(
    model: WhisperModel,
    params: dict[str, Any],
    features: jax.Array,
    *,
    mask: jax.Array | None = None,
    prompt: tuple[int, ...] | None = None,
    max_new_tokens: int | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
) -> Generated:
    """Decodes encoder tokens to the ids of a text, greedily or with beams.

    Beam search keeps `num_beams` texts and, among those that ended, ranks by the sum of
    log-probabilities divided by `length ** length_penalty`, the length being that of
    the new tokens. A clip is done when its best running text, at the length it has, is
    no better than the worst of `num_beams` ended ones; this is how `transformers`
    defines it with `early_stopping=False`.

    Args:
      model: the architecture.
      params: its param tree, compressed or not.
      features: `[B, N, D]`, see `WhisperModel.encode`; all encoder tokens or any rows
        that stand for them.
      mask: bool `[B, N]`, True where the decoder may look; default everywhere.
      prompt: ids that every text starts with; default `config.prompt()`.
      max_new_tokens: upper limit; default what the positions of the model allow.
      num_beams: 1 takes the likeliest token at each step.
      length_penalty: exponent of the length; only for beams.

    Returns:
      `Generated`: the new tokens, int32 `[B, max_new_tokens]` with the padding id after
      the end, and their number in each row, the ending token included.

    Raises:
      ValueError: an option is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.models import WhisperConfig, WhisperModel, transcribe_tokens
      >>> config = WhisperConfig(
      ...     vocab_size=32, hidden_size=16, encoder_layers=1, decoder_layers=1,
      ...     encoder_heads=2, decoder_heads=2, encoder_ffn_size=32,
      ...     decoder_ffn_size=32, start_id=30, eos_id=31, pad_id=31,
      ... )
      >>> model = WhisperModel(config)
      >>> params = model.init(jax.random.key(0))
      >>> audio = model.encode(params, jnp.zeros((1, 80, 100)))
      >>> out = transcribe_tokens(model, params, audio.features, max_new_tokens=4)
      >>> out.tokens.shape
      (1, 4)
    """
    config = model.config
    prompt = config.prompt() if prompt is None else tuple(prompt)
    if not prompt:
        raise ValueError("prompt must hold at least one id, such as config.prompt()")
    room = config.max_target_positions - len(prompt)
    limit = room if max_new_tokens is None else max_new_tokens
    if not 1 <= limit <= room:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} must be from 1 to {room}: this model "
            f"reads {config.max_target_positions} tokens and the prompt has "
            f"{len(prompt)}"
        )
    if num_beams < 1 or 2 * num_beams > config.vocab_size:
        raise ValueError(
            f"num_beams={num_beams} must be from 1 to {config.vocab_size // 2}"
        )
    penalty = jnp.asarray(length_penalty, jnp.float32)
    static = {"model": model, "prompt": prompt, "limit": limit}
    if num_beams == 1:
        return _greedy(params, features, mask, **static)
    return _beams(params, features, mask, penalty, num_beams=num_beams, **static)


class _Rules(NamedTuple):
    """What no text may hold: bool `[V]`, at any place and at its beginning."""

    always: jax.Array
    first: jax.Array

    @classmethod
    def of(cls, model: WhisperModel) -> _Rules:
        c = model.config
        none = jnp.zeros(c.vocab_size, bool)
        always = none.at[jnp.asarray(c.suppress_ids, jnp.int32)].set(True)
        first = always.at[jnp.asarray(c.begin_suppress_ids, jnp.int32)].set(True)
        return cls(always, first)


def _prefill(
    model: WhisperModel,
    params: Any,
    features: jax.Array,
    mask: jax.Array | None,
    prompt: tuple[int, ...],
    limit: int,
    beams: int,
) -> tuple[jax.Array, WhisperState]:
    """Logits `[R, V]` after the prompt, and the state."""
    # The last token is never read.
    slots = len(prompt) + limit - 1
    state = model.start(params, features, mask=mask, slots=slots, beams=beams)
    rows = features.shape[0] * beams
    tokens = jnp.broadcast_to(jnp.asarray(prompt, jnp.int32), (rows, len(prompt)))
    logits, state = model.step(params, state, tokens)
    return logits[:, -1], state


@functools.partial(jax.jit, static_argnames=("model", "prompt", "limit"))
def _greedy(
    params: Any,
    features: jax.Array,
    mask: jax.Array | None,
    *,
    model: WhisperModel,
    prompt: tuple[int, ...],
    limit: int,
) -> Generated:
    c, rules, batch = model.config, _Rules.of(model), features.shape[0]
    logits, state = _prefill(model, params, features, mask, prompt, limit, 1)

    def likeliest(logits: jax.Array, banned: jax.Array) -> jax.Array:
        allowed = jnp.where(banned, -jnp.inf, logits)
        return jnp.argmax(allowed, axis=-1).astype(jnp.int32)

    token = likeliest(logits, rules.first)
    out = jnp.full((batch, limit), c.pad_id, jnp.int32).at[:, 0].set(token)

    def unfinished(carry: Any) -> jax.Array:
        i, _, _, done, _ = carry
        return (i < limit) & ~jnp.all(done)

    def step(carry: Any) -> Any:
        i, state, token, done, out = carry
        logits, state = model.step(params, state, token[:, None])
        new = jnp.where(done, c.pad_id, likeliest(logits[:, -1], rules.always))
        out = jax.lax.dynamic_update_slice(out, new[:, None], (0, i))
        # Padding after the end may be any id, and so no sign of one.
        return i + 1, state, new, done | (new == c.eos_id), out

    carry = (jnp.asarray(1), state, token, token == c.eos_id, out)
    out = jax.lax.while_loop(unfinished, step, carry)[-1]
    return Generated(tokens=out, lengths=_lengths(out, c.eos_id))


class _Beams(NamedTuple):
    """The carry of a beam search; K beams of B clips, T tokens at most.

    Attributes:
      step: tokens that every running text has.
      state: of the decoder, rows `[B * K]`.
      tokens, scores: the running texts `[B, K, T]` and their log-probabilities.
      ended_tokens, ended_scores, ended: the best texts that ended, with the length
        penalty in their scores, best first; `ended` says which of them are real.
      open: bool `[B]`, clips whose result may still change.
    """

    step: jax.Array
    state: WhisperState
    tokens: jax.Array
    scores: jax.Array
    ended_tokens: jax.Array
    ended_scores: jax.Array
    ended: jax.Array
    open: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "prompt", "limit", "num_beams"))
def _beams(
    params: Any,
    features: jax.Array,
    mask: jax.Array | None,
    penalty: jax.Array,
    *,
    model: WhisperModel,
    prompt: tuple[int, ...],
    limit: int,
    num_beams: int,
) -> Generated:
    c, rules = model.config, _Rules.of(model)
    batch, k = features.shape[0], num_beams
    logits, state = _prefill(model, params, features, mask, prompt, limit, k)
    blank = jnp.full((batch, k, limit), c.pad_id, jnp.int32)
    carry = _Beams(
        step=jnp.asarray(0, jnp.int32),
        state=state,
        tokens=blank,
        # All beams are the same at first: only one of them counts.
        scores=jnp.where(jnp.arange(k) == 0, 0.0, jnp.full((batch, k), _NEVER)),
        ended_tokens=blank,
        ended_scores=jnp.full((batch, k), _NEVER),
        ended=jnp.zeros((batch, k), bool),
        open=jnp.ones(batch, bool),
    )

    def choose(carry: _Beams, logits: jax.Array, banned: jax.Array) -> Any:
        """The texts one token longer, and which beam each running one came from."""
        length = carry.step + 1
        logs = jnp.where(banned, -jnp.inf, jax.nn.log_softmax(logits, axis=-1))
        # 2 K suffice for K that go on, as each text has one way to end. The best of
        # every beam are found first: one sort of all K * V would take far longer.
        best, ids = jax.lax.top_k(logs.reshape(batch, k, -1), 2 * k)
        sums = (best + carry.scores[..., None]).reshape(batch, -1)
        scores, at = jax.lax.top_k(sums, 2 * k)
        beam = at // (2 * k)
        new = jnp.take_along_axis(ids.reshape(batch, -1), at, axis=1)
        texts = _rows(carry.tokens, beam)
        texts = jax.lax.dynamic_update_slice_in_dim(
            texts, new[..., None].astype(jnp.int32), carry.step, axis=2
        )
        ends = (new == c.eos_id) | (length == limit)

        # Of those that end only the best K may, and only where something is open.
        rank = jnp.arange(2 * k) < k
        final = scores / length.astype(jnp.float32) ** penalty
        counts = ends & rank & carry.open[:, None]
        final = jnp.where(counts, final, _NEVER)
        all_scores = jnp.concatenate([carry.ended_scores, final], axis=1)
        ended_scores, kept = jax.lax.top_k(all_scores, k)
        ended_tokens = _rows(jnp.concatenate([carry.ended_tokens, texts], 1), kept)
        ended = _rows(jnp.concatenate([carry.ended, counts], axis=1), kept)

        running, at = jax.lax.top_k(jnp.where(ends, scores + _NEVER, scores), k)
        # A text that goes on gets no better at this length than it is now.
        bound = running[:, 0] / length.astype(jnp.float32) ** penalty
        worst = jnp.where(ended, jnp.min(ended_scores, axis=1, keepdims=True), _NEVER)
        carry = carry._replace(
            step=length,
            tokens=_rows(texts, at),
            scores=running,
            ended_tokens=ended_tokens,
            ended_scores=ended_scores,
            ended=ended,
            open=carry.open & jnp.any(bound[:, None] > worst, axis=1),
        )
        return carry, _rows(beam, at)

    def unfinished(carry: tuple[_Beams, jax.Array]) -> jax.Array:
        return jnp.any(carry[0].open) & (carry[0].step < limit)

    def step(carry: tuple[_Beams, jax.Array]) -> tuple[_Beams, jax.Array]:
        beams, origin = carry
        state = _reorder(beams.state, origin)
        last = jnp.take(beams.tokens, beams.step - 1, axis=2).reshape(-1, 1)
        logits, state = model.step(params, state, last)
        return choose(beams._replace(state=state), logits[:, -1], rules.always)

    carry = choose(carry, logits, rules.first)
    done, _ = jax.lax.while_loop(unfinished, step, carry)
    tokens = done.ended_tokens[:, 0]
    lengths = _lengths(tokens, c.eos_id)
    after = jnp.arange(limit) >= lengths[:, None]
    return Generated(tokens=jnp.where(after, c.pad_id, tokens), lengths=lengths)


def _rows(x: jax.Array, at: jax.Array) -> jax.Array:
    """Rows `at [B, K]` of `x [B, M, ...]`."""
    return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)


def _reorder(state: WhisperState, origin: jax.Array) -> WhisperState:
    """The cache of each running text is that of the beam it came from, `[B, K]`."""
    batch, beams = origin.shape
    at = (jnp.arange(batch)[:, None] * beams + origin).reshape(-1)
    kv = tuple(SelfKV(jnp.take(s.k, at, 0), jnp.take(s.v, at, 0)) for s in state.kv)
    return WhisperState(kv=kv, cross=state.cross, mask=state.mask, length=state.length)


def _lengths(tokens: jax.Array, eos_id: int) -> jax.Array:
    """Tokens up to the first end, all of them where there is none."""
    ends = tokens == eos_id
    some = jnp.any(ends, axis=-1)
    return jnp.where(some, jnp.argmax(ends, -1) + 1, tokens.shape[1]).astype(jnp.int32)
