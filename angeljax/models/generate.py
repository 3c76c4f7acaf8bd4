"""Text generation: prefill and all steps in one compiled call."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.models.language_model import LanguageModel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """What `generate` returns.

    Attributes:
      tokens: int32 `[B, max_new_tokens]`; after the end of a row, `pad_id`.
      lengths: int32 `[B]`, generated tokens of each row, the ending one included.
    """

    tokens: jax.Array
    lengths: jax.Array


@functools.partial(
    jax.jit,
    static_argnames=("model", "max_new_tokens", "greedy", "top_k", "eos_ids", "pad_id"),
)
def _generate(
    params: Any,
    prompt: dict[str, Any],
    key: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array | None,
    *,
    model: LanguageModel,
    max_new_tokens: int,
    greedy: bool,
    top_k: int | None,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Generated:
    given = prompt["tokens"] if prompt["embeds"] is None else prompt["embeds"]
    batch, length = given.shape[:2]
    logits, cache = model.apply(
        params,
        **prompt,
        cache=model.init_cache(batch, length + max_new_tokens, params),
        last_only=True,
        start=0,
        total=length,
    )
    return _continue(
        params,
        logits,
        cache,
        key,
        temperature,
        top_p,
        model=model,
        max_new_tokens=max_new_tokens,
        greedy=greedy,
        top_k=top_k,
        eos_ids=eos_ids,
        pad_id=pad_id,
    )


def _continue(
    params: Any,
    logits: jax.Array,
    cache: Any,
    key: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array | None,
    *,
    model: LanguageModel,
    max_new_tokens: int,
    greedy: bool,
    top_k: int | None,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Generated:
    """All tokens after a prefill, of which `logits` are the last ones."""
    batch = len(logits)

    def choose(logits: jax.Array, key: jax.Array) -> jax.Array:
        if greedy:
            return _likeliest(logits)
        filtered = filter_logits(logits / temperature, top_k=top_k, top_p=top_p)
        return jax.random.categorical(key, filtered).astype(jnp.int32)

    def ends(token: jax.Array) -> jax.Array:
        return jnp.isin(token, jnp.asarray(eos_ids, jnp.int32))

    first = choose(logits[:, -1], jax.random.fold_in(key, 0))
    out = jnp.full((batch, max_new_tokens), pad_id, jnp.int32).at[:, 0].set(first)

    def unfinished(carry: Any) -> jax.Array:
        step, _, _, done, _ = carry
        more = step < max_new_tokens
        # With nothing to stop at, the number of steps is known when compiling, and a
        # GPU need not tell the host after each of them whether to go on.
        return more & ~jnp.all(done) if eos_ids else more

    def step(carry: Any) -> Any:
        i, cache, token, done, out = carry
        if greedy:
            new, cache = decode_step(model, params, cache, token)
        else:
            logits, cache = model.apply(params, token[:, None], cache=cache)
            new = choose(logits[:, -1], jax.random.fold_in(key, i))
        new = jnp.where(done, pad_id, new)
        out = jax.lax.dynamic_update_slice(out, new[:, None], (0, i))
        return i + 1, cache, new, done | ends(new), out

    carry = (jnp.asarray(1), cache, first, ends(first), out)
    _, _, _, _, out = jax.lax.while_loop(unfinished, step, carry)
    # The first ending token counts; rows without one are full.
    stop = ends(out)
    lengths = jnp.where(stop.any(-1), jnp.argmax(stop, -1) + 1, max_new_tokens)
    return Generated(tokens=out, lengths=lengths.astype(jnp.int32))


_compiled_continue = jax.jit(
    _continue,
    static_argnames=("model", "max_new_tokens", "greedy", "top_k", "eos_ids", "pad_id"),
)


def generate_after(
    model: LanguageModel,
    params: Any,
    logits: jax.Array,
    cache: Any,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    eos_ids: tuple[int, ...] | None = None,
) -> Generated:
    """Generates after a prefill of one's own, such as `prefill_pruned`.

    Args:
      model, params: as in `generate`.
      logits: float `[B, T, V]` of the prefill; the last column counts.
      cache: `KVCache` or `StagedCache` of the prefill with `max_new_tokens - 1` free
        slots or more.
      max_new_tokens, temperature, top_k, top_p, key, eos_ids: as in `generate`.

    Returns:
      A `Generated` of device arrays.

    Raises:
      ValueError: an option is out of range.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    if temperature > 0 and key is None:
        raise ValueError("sampling needs a key: pass key=jax.random.key(seed)")
    eos, pad = _ending(model, eos_ids)
    return _compiled_continue(
        params,
        logits,
        cache,
        jax.random.key(0) if key is None else key,
        jnp.asarray(max(temperature, 1e-6), jnp.float32),
        None if top_p is None else jnp.asarray(top_p, jnp.float32),
        model=model,
        max_new_tokens=max_new_tokens,
        greedy=temperature == 0,
        top_k=top_k,
        eos_ids=eos,
        pad_id=pad,
    )


def _ending(
    model: LanguageModel, eos_ids: tuple[int, ...] | None
) -> tuple[tuple[int, ...], int]:
    """Ids that end a row, and the one that fills it up behind."""
    config = model.config
    eos = config.eos_ids if eos_ids is None else tuple(eos_ids)
    return eos, config.pad_id if config.pad_id is not None else (eos[0] if eos else 0)


def decode_step(
    model: LanguageModel, params: Any, cache: Any, token: jax.Array
) -> tuple[jax.Array, Any]:
    """One step of greedy decoding: reads a token of each row, gives the likeliest next.

    Pure and not compiled. `jax.jit(decode_step, static_argnums=0, donate_argnums=2)`
    updates the cache in place.

    Args:
      model: the architecture.
      params: its param tree, compressed or not.
      cache: what was read before, a `KVCache` or `StagedCache`; one slot must be free.
      token: int32 `[B]`.

    Returns:
      The next tokens, int32 `[B]`, and the cache with `token` read.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.models import DecoderConfig, LanguageModel, decode_step
      >>> config = DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=2,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... )
      >>> model = LanguageModel(config)
      >>> params = model.init(jax.random.key(0))
      >>> prompt = jnp.zeros((1, 4), jnp.int32)
      >>> logits, cache = model.apply(params, prompt, cache=model.init_cache(1, 8))
      >>> step = jax.jit(decode_step, static_argnums=0, donate_argnums=2)
      >>> token, cache = step(model, params, cache, jnp.argmax(logits[:, -1], -1))
      >>> token.shape, int(cache.length)
      ((1,), 5)
    """
    logits, after = model.apply(params, token[:, None], cache=cache)
    assert after is not None, "a cache goes in"
    return _likeliest(logits[:, -1]), after


def _likeliest(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def filter_logits(
    logits: jax.Array, *, top_k: int | None = None, top_p: jax.Array | None = None
) -> jax.Array:
    """Sets all but the likeliest logits `[..., V]` to -inf.

    Args:
      logits: float, already divided by the temperature.
      top_k: keep the k largest, and what ties with the k-th.
      top_p: keep the smallest set of largest whose probabilities reach `top_p` (nucleus
        sampling, arXiv 1904.09751).

    Returns:
      The logits, of the same shape and dtype.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        least = jnp.min(
            jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True
        )
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def generate(
    model: LanguageModel,
    params: Any,
    tokens: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    embeds: jax.Array | None = None,
    positions: jax.Array | None = None,
    deepstack: Sequence[jax.Array] | None = None,
    next_position: jax.Array | None = None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    eos_ids: tuple[int, ...] | None = None,
) -> Generated:
    """Generates from a batch of prompts in one `while_loop`.

    Args:
      model: the architecture.
      params: its param tree, compressed or not.
      tokens: int32 `[B, T]`, padded on the left.
      mask: bool `[B, T]`, True for real tokens; default all.
      embeds, positions, deepstack, next_position: a prompt with images among its
        tokens, in place of `tokens`; see `Decoder`. Generation goes on after the
        largest position, or at `next_position`.
      max_new_tokens: upper limit for each row; the loop ends early when all rows have.
      temperature: 0 takes the likeliest token.
      top_k, top_p: restrict sampling; see `filter_logits`.
      key: for sampling; needed with a temperature.
      eos_ids: ids that end a row; default those of the configuration.

    Returns:
      A `Generated` of device arrays.

    Raises:
      ValueError: an option is out of range, `mask` has another shape than `tokens`, or
        one of its rows is empty or ends in padding.
    """
    if tokens is not None:
        tokens = jnp.asarray(tokens, jnp.int32)
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be [batch, length >= 1], not {tokens.shape}")
    if (tokens is None) == (embeds is None):
        raise ValueError("give either tokens or embeds, the other None")
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    if temperature > 0 and key is None:
        raise ValueError("sampling needs a key: pass key=jax.random.key(seed)")
    if mask is not None:
        given: Any = tokens if embeds is None else embeds
        _check_mask(mask := jnp.asarray(mask, bool), given.shape[:2])
    eos, pad = _ending(model, eos_ids)
    prompt = {
        "tokens": tokens,
        "embeds": embeds,
        "positions": positions,
        "deepstack": None if deepstack is None else tuple(deepstack),
        "next_position": next_position,
        "mask": mask,
    }
    return _generate(
        params,
        prompt,
        jax.random.key(0) if key is None else key,
        jnp.asarray(max(temperature, 1e-6), jnp.float32),
        None if top_p is None else jnp.asarray(top_p, jnp.float32),
        model=model,
        max_new_tokens=max_new_tokens,
        greedy=temperature == 0,
        top_k=top_k,
        eos_ids=eos,
        pad_id=pad,
    )


def check_sampling(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """Refuses options of `generate` that are out of range, with a ValueError."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be >= 0, not {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {top_p}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")


def _check_mask(mask: jax.Array, shape: tuple[int, ...]) -> None:
    if mask.shape != shape:
        raise ValueError(f"mask has shape {mask.shape}, tokens have {shape}")
    if not bool(mask[:, -1].all()):
        raise ValueError("prompts are padded on the left: the last token must be real")
