"""Prompts with images and videos: putting their tokens in, and taking some out."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.models._qwen_vl_config import QwenVLConfig
from angeljax.models._qwen_vl_tower import VisionTokens
from angeljax.tokens import Prompt, Pruned, apply_selection, token_positions
from angeljax.tokens._signals import choose
from angeljax.tokens.apply import PositionPolicy

# What the vision tower tells of tokens beside their embeddings.
_SIGNALS = ("attn", "object_attn", "keys")


def merge_prompt(
    config: QwenVLConfig,
    tokens: jax.Array,
    embeds: jax.Array,
    images: VisionTokens | None,
    videos: VisionTokens | None,
    positions: jax.Array | None,
    mask: jax.Array | None,
) -> Prompt:
    """See `QwenVL.merge`; `embeds` are those of `tokens`."""
    like = _checked(config, images, videos)
    into = jax.tree.map(
        lambda x: jnp.zeros((*tokens.shape, *x.shape[1:]), x.dtype), like
    )
    into = dataclasses.replace(into, embeds=embeds)
    for found, token in (
        (images, config.image_token_id),
        (videos, config.video_token_id),
    ):
        if found is not None:
            into = _put(into, found, tokens == token)
    extra = {name: getattr(into, name) for name in _SIGNALS}
    return Prompt(
        embeds=into.embeds,
        mask=mask,
        positions=positions,
        tokens=tokens,
        deepstack=into.deepstack,
        extra={name: x for name, x in extra.items() if x is not None},
    )


def _checked(config: QwenVLConfig, *given: VisionTokens | None) -> VisionTokens:
    """One of them; refuses such as are not the model's, or have not the same."""
    found = [tokens for tokens in given if tokens is not None]
    if not found:
        return VisionTokens(jnp.zeros((0, config.text.hidden_size)))
    count = len(config.vision.deepstack_layers)
    for tokens in found:
        if len(tokens.deepstack) != count:
            raise ValueError(
                f"VisionTokens have {len(tokens.deepstack)} planes of DeepStack, "
                f"the model {count}"
            )
        if (tokens.attn is None) != (found[0].attn is None):
            raise ValueError("attention must be asked for of images and videos")
    return found[0]


def _put(into: VisionTokens, found: VisionTokens, here: jax.Array) -> VisionTokens:
    """Puts one row after the other where `here [B, T]` is True."""
    # A gather: each placeholder takes the next row.
    row = jnp.cumsum(here.reshape(-1), dtype=jnp.int32) - 1
    row = jnp.clip(row.reshape(here.shape), 0, len(found.embeds) - 1)

    def put(into: jax.Array, rows: jax.Array) -> jax.Array:
        new = rows[row].astype(into.dtype)
        return jnp.where(here.reshape(*here.shape, *(1,) * (rows.ndim - 1)), new, into)

    return jax.tree.map(put, into, found)


def prune_prompt(
    prompt: Prompt,
    there: jax.Array,
    fn: Any,
    policy: PositionPolicy,
    num_tokens: int,
) -> Pruned:
    """See `QwenVL.prune`; `there` says which tokens are of images and videos."""
    where, groups = vision_places(there, num_tokens)

    def take(x: jax.Array) -> jax.Array:
        return _take(x, where)

    text = prompt.real() & ~there
    known = {name: x for name, x in prompt.extra.items() if name in _SIGNALS}
    signals: dict[str, Any] = {name: take(x) for name, x in known.items()}
    chosen = choose(
        fn,
        take(prompt.embeds),
        mask=where < prompt.length,
        text=jnp.where(text[..., None], prompt.embeds, 0),
        groups=groups,
        **signals,
    )
    return apply_selection(
        chosen, prompt, where, position_policy=policy, padding_side="left"
    )


def vision_places(there: jax.Array, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """int32 `[B, N]` each: where vision tokens stand, T for none, and in which run.

    A run is an image, or a frame with text around it.
    """
    where = token_positions(there, length=there.shape[-1], num_tokens=num_tokens)
    before = jnp.pad(there, ((0, 0), (1, 0)))[:, :-1]
    run = jnp.cumsum(there & ~before, axis=-1, dtype=jnp.int32) - 1
    return where, _take(run, where)


def _take(x: jax.Array, where: jax.Array) -> jax.Array:
    at = where.reshape(*where.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, at, axis=1, mode="fill", fill_value=0)
