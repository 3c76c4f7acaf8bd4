"""Prompts as decoding reads them: tokens, or embeddings of a model that sees."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.models.language_model import LanguageModel
from angeljax.models.prompts import decoder_inputs
from angeljax.models.rows import RowInputs
from angeljax.speculative import _check
from angeljax.speculative.drafter import TargetModel
from angeljax.tokens import Prompt, Pruned


def read_prompts(
    model: TargetModel, given: Any, lengths: Any
) -> tuple[np.ndarray, np.ndarray, RowInputs | None]:
    """int32 `[B, T]` padded on the right, `[B]`, and what is read instead, if anything.

    Raises:
      ValueError: as `_check.prompts`; or embeddings that the model cannot read.
    """
    if not isinstance(given, Prompt | Pruned):
        return *_check.prompts(model, given, lengths), None
    if lengths is not None:
        raise ValueError("lengths belong to prompts that are one array of tokens")
    if not isinstance(model, LanguageModel):
        raise ValueError(
            f"a prompt of embeddings is for a LanguageModel, and {type(model).__name__}"
            " is none"
        )
    fields = decoder_inputs(given)
    plain = given.prompt if isinstance(given, Pruned) else given
    embeds = fields["embeds"]
    config = model.config
    if embeds.ndim != 3 or embeds.shape[2] != config.hidden_size:
        raise ValueError(
            f"embeds must be [batch, length, {config.hidden_size}], not "
            f"{list(embeds.shape)}"
        )
    batch, length, _ = embeds.shape
    mask = fields["mask"]
    real = np.ones((batch, length), bool) if mask is None else np.asarray(mask, bool)
    sizes = real.sum(axis=1)
    if not sizes.size or not sizes.min():
        raise ValueError("a prompt of embeddings has no real token")
    # Rows begin at their first token: what is padding goes behind.
    order = np.argsort(~real, axis=1, kind="stable")[:, : int(sizes.max())]
    tokens = np.zeros((batch, order.shape[1]), np.int32)
    if plain.tokens is not None:
        tokens = np.take_along_axis(np.asarray(plain.tokens, np.int32), order, axis=1)
    tokens, sizes = _check.prompts(model, tokens, sizes)

    def taken(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, jnp.asarray(order)[..., None], axis=1)

    rotary, delta = fields["positions"], None
    after = fields["next_position"]
    if rotary is not None:
        lead = rotary.shape[:-2]
        at = jnp.broadcast_to(jnp.asarray(order), (*lead, *order.shape))
        rotary = jnp.take_along_axis(jnp.asarray(rotary), at, axis=-1)
        if after is None:
            count = jnp.arange(order.shape[1]) < jnp.asarray(sizes)[:, None]
            last = jnp.max(jnp.where(count, rotary, -1), axis=-1)
            after = 1 + (jnp.max(last, axis=0) if lead else last)
    if after is not None:
        delta = jnp.asarray(after, jnp.int32) - jnp.asarray(sizes)
    planes = tuple(map(taken, fields["deepstack"] or ()))
    inputs = RowInputs(
        embeds=taken(embeds), rotary=rotary, deepstack=planes, rope_delta=delta
    )
    return tokens, sizes, inputs


def padded_inputs(inputs: RowInputs, length: int) -> RowInputs:
    """The same with zeros on the right, up to a length."""
    more = (0, length - inputs.embeds.shape[1])

    def rows(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), more, (0, 0)])

    rotary = inputs.rotary
    if rotary is not None:
        rotary = jnp.pad(rotary, [(0, 0)] * (rotary.ndim - 1) + [more])
    return RowInputs(
        embeds=rows(inputs.embeds),
        rotary=rotary,
        deepstack=tuple(map(rows, inputs.deepstack)),
        rope_delta=inputs.rope_delta,
    )
