"""`apply_selection`: a shorter prompt, with everything that goes with it.

Masks, positions, M-RoPE, cached keys and DeepStack planes follow the same choice. Kept
positions as AngelSlim has them in its prefill, and DeepStack as TensorRT-Edge-LLM.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from angeljax.tokens._cache import check_cache, prune_cache
from angeljax.tokens._prompt import Prompt, check_prompt
from angeljax.tokens._selection import Selection
from angeljax.tokens._where import Where, token_positions

PositionPolicy = Literal["keep", "compact"]
POSITION_POLICIES = ("keep", "compact")
# What `labels` hold where there is nothing to learn, as in Hugging Face's losses.
IGNORED_LABEL = -100


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruned:
    """A shorter prompt and what decoding needs; a pytree.

    Attributes:
      prompt: every field that went in, of L' tokens; `mask` and `positions` always.
      slots: int32 `[B, L']`, which token of the long sequence each one was; L for
        padding.
      vision: int32 `[B, K]`, where the kept vision tokens stand now; L' for unused
        slots of the selection.
      lengths: int32 `[B]`, real tokens of each row.
      dropped: int32 `[B]`, tokens that pruning took from each row.
      next_position: int32 `[B]`, the position of the first token to be decoded, for
        M-RoPE on all three axes.
      overflow: int32 `[B]`, real tokens for which L' had no slot; must be 0. See
        `length` of `apply_selection`.
    """

    prompt: Prompt
    slots: jax.Array
    vision: jax.Array
    lengths: jax.Array
    dropped: jax.Array
    next_position: jax.Array
    overflow: jax.Array

    def take(self, x: jax.Array, fill: Any = 0) -> jax.Array:
        """Anything else of the long sequence, `[B, L, ...]`, as `[B, L', ...]`."""
        return _take(x, self.slots, fill)

    def spread(self, plane: jax.Array) -> jax.Array:
        """A plane `[B, K, D]` of the vision tokens as `[B, L', D]`, zeros beside text.

        One that is `[B, L', D]` already stays.
        """
        lead = self.slots.shape
        if plane.shape[:-1] == lead:
            return plane
        empty = jnp.zeros((*lead, plane.shape[-1]), plane.dtype)
        return _put(empty, self.vision, plane)


def apply_selection(
    selection: Selection,
    prompt: Prompt,
    where: Where,
    *,
    position_policy: PositionPolicy = "keep",
    length: int | None = None,
    padding_side: Literal["left", "right"] = "right",
) -> Pruned:
    """Takes the tokens that were not selected out of a prompt.

    Text stays, and so does the order. What each field becomes:

    ==================  ==============================================================
    embeds              gathered; rows of `selection.merged` where the method merges
    mask, tokens, ...   gathered; padding is False, 0, and -100 in labels
    positions           gathered ("keep"), or counted anew from 0 ("compact")
    attention_mask      gathered on both axes
    deepstack           gathered with the same choice, whatever axis they have
    cache               slots gathered (only with "keep": keys are rotated already)
    ==================  ==============================================================

    Args:
      selection: of the N vision tokens, `[B, K]`; `[K]` for a prompt without batch.
      prompt: of L tokens.
      where: where the vision tokens stand: a span, spans of several images in order,
        positions or a mask; see `token_positions`.
      position_policy: "keep", tokens stand where they stood and decoding goes on after
        the unpruned prompt; "compact", as if the others had never been there, for
        models whose positions are those of the array.
      length: L', static. Default L - (N - K), which is enough if all rows have N vision
        tokens, or as much padding as they lack. A row with few vision tokens and much
        text may need more, up to L; `Pruned.overflow` tells.
      padding_side: where rows that keep fewer are padded. "left" as `generate` wants.

    Returns:
      The prompt of L' tokens with what decoding needs.

    Raises:
      ValueError: a field does not go with the others; the message names it.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.tokens import Prompt, Selection, apply_selection
      >>> chosen = Selection.of(jnp.array([[3, 0]]), num_tokens=4)
      >>> prompt = Prompt(embeds=jnp.ones((1, 7, 8)), tokens=jnp.arange(7)[None])
      >>> short = apply_selection(chosen, prompt, (1, 5))  # tokens 1 to 4 are an image
      >>> short.prompt.tokens.tolist(), short.prompt.positions.tolist()
      ([[0, 1, 4, 5, 6]], [[0, 1, 4, 5, 6]])
      >>> short.next_position.tolist(), short.dropped.tolist()
      ([7], [2])
    """
    n, k, long = selection.num_tokens, selection.indices.shape[-1], prompt.length
    check_prompt(prompt, n)
    if position_policy not in POSITION_POLICIES:
        raise ValueError(
            f"position_policy={position_policy!r}: use {' or '.join(POSITION_POLICIES)}"
        )
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side={padding_side!r}: use left or right")
    lead = prompt.embeds.shape[:-1]
    if selection.indices.shape[:-1] != lead[:-1]:
        raise ValueError(
            f"selection of shape {selection.indices.shape} does not fit Prompt.embeds "
            f"{prompt.embeds.shape}: the axes before the tokens must be the same"
        )
    at = token_positions(where, length=long, num_tokens=n)
    if at.ndim > 1 and at.shape[:-1] != lead[:-1]:
        raise ValueError(
            f"where has shape {at.shape} and Prompt.embeds {prompt.embeds.shape}: the "
            "axes before the tokens must be the same"
        )
    at = jnp.broadcast_to(at, (*lead[:-1], n))
    short = long - (n - k) if length is None else length
    if not 1 <= short <= long:
        raise ValueError(f"length={length} must be from 1 to the {long} tokens there")
    if prompt.cache is not None:
        check_cache(prompt.cache, lead, position_policy)
    place = _Places(selection, at, prompt.real(), short, padding_side)
    positions = prompt.where_they_stand()
    if position_policy == "keep":
        after = _after(positions, prompt.real())
        new = _by_row(positions, place.slots, lead)
    else:
        after = place.lengths
        new = jnp.where(place.used, jnp.cumsum(place.used, axis=-1) - 1, 0)
        new = jnp.broadcast_to(new.astype(jnp.int32), (*positions.shape[:-1], short))
    out = _fields(prompt, selection, place, at)
    return Pruned(
        prompt=dataclasses.replace(out, positions=new, mask=place.used),
        slots=place.slots,
        vision=place.vision,
        lengths=jnp.minimum(place.lengths, short),
        dropped=place.dropped,
        next_position=after,
        overflow=jnp.maximum(place.lengths - short, 0),
    )


class _Places:
    """Which token of the long sequence goes where."""

    def __init__(
        self, selection: Selection, at: jax.Array, real: jax.Array, size: int, side: str
    ) -> None:
        long = real.shape[-1]
        # Positions behind the end belong to no token.
        gone = jnp.where(selection.mask, long, at)
        stays = real & ~_mark(gone, long)
        self.lengths = jnp.sum(stays, axis=-1, dtype=jnp.int32)
        self.dropped = jnp.sum(real, axis=-1, dtype=jnp.int32) - self.lengths
        place = jnp.cumsum(stays, axis=-1, dtype=jnp.int32) - 1
        if side == "left":
            place += size - self.lengths[..., None]
        place = jnp.where(stays & (place >= 0) & (place < size), place, size)
        self.slots = _invert(place, size)
        self.used = self.slots < long
        kept = _take(at, selection.indices, long)
        self.vision = _take(place, kept, size)


def _fields(
    prompt: Prompt, selection: Selection, place: _Places, at: jax.Array
) -> Prompt:
    """All but `mask` and `positions`."""
    slots, lead = place.slots, prompt.embeds.shape[:-1]
    embeds = _take(prompt.embeds, slots)
    if selection.merged is not None:
        embeds = _put(embeds, place.vision, selection.merged.astype(embeds.dtype))

    def plane(x: jax.Array) -> jax.Array:
        return _take(x, slots) if x.shape[:-1] == lead else selection.take(x)

    def take(x: jax.Array | None, fill: int = 0) -> jax.Array | None:
        return None if x is None else _take(x, slots, fill)

    both = prompt.attention_mask
    return Prompt(
        embeds=embeds,
        tokens=take(prompt.tokens),
        token_types=take(prompt.token_types),
        labels=take(prompt.labels, IGNORED_LABEL),
        attention_mask=None if both is None else _take_both(both, slots),
        deepstack=tuple(plane(x) for x in prompt.deepstack),
        cache=None
        if prompt.cache is None
        else prune_cache(prompt.cache, slots, prompt.length),
        extra={name: _take(x, slots) for name, x in prompt.extra.items()},
    )


def _take(x: jax.Array, index: jax.Array, fill: Any = 0) -> jax.Array:
    """`[B, L, ...]` at int32 `[B, M]`; `fill` where the index is L."""
    shape = index.shape + (1,) * (x.ndim - index.ndim)
    return jnp.take_along_axis(
        x, index.reshape(shape), axis=index.ndim - 1, mode="fill", fill_value=fill
    )


def _take_both(x: jax.Array, index: jax.Array) -> jax.Array:
    """`[B, H, L, L]` on both axes; unused slots see nothing and nobody sees them."""
    x = jnp.broadcast_to(x, (*index.shape[:-1], *x.shape[index.ndim - 1 :]))
    unseen = jnp.finfo(x.dtype).min if jnp.issubdtype(x.dtype, jnp.floating) else 0
    for axis, at in ((-2, index[..., None, :, None]), (-1, index[..., None, None, :])):
        x = jnp.take_along_axis(x, at, axis=axis, mode="fill", fill_value=unseen)
    return x


def _by_row(x: jax.Array, index: jax.Array, lead: tuple[int, ...]) -> jax.Array:
    """Positions of one axis or three."""
    if x.shape == lead:
        return _take(x, index)
    return jax.vmap(lambda axis: _take(axis, index))(x)


def _after(positions: jax.Array, real: jax.Array) -> jax.Array:
    """One more than the largest position of the real tokens, on any axis."""
    last = jnp.max(jnp.where(real, positions, -1), axis=-1)
    return (last if last.ndim == real.ndim - 1 else jnp.max(last, axis=0)) + 1


def _rows(index: jax.Array) -> tuple[jax.Array, jax.Array]:
    flat = index.reshape(-1, index.shape[-1])
    return jnp.arange(len(flat))[:, None], flat


def _mark(index: jax.Array, size: int) -> jax.Array:
    """bool `[..., size]`: True at the indices; those from `size` on are dropped."""
    rows, flat = _rows(index)
    out = jnp.zeros((len(flat), size), bool).at[rows, flat].set(True, mode="drop")
    return out.reshape(*index.shape[:-1], size)


def _invert(place: jax.Array, size: int) -> jax.Array:
    """int32 `[..., size]`: what goes to each place, `L` where nothing does."""
    rows, flat = _rows(place)
    long = place.shape[-1]
    out = jnp.full((len(flat), size), long, jnp.int32)
    out = out.at[rows, flat].set(jnp.arange(long, dtype=jnp.int32), mode="drop")
    return out.reshape(*place.shape[:-1], size)


def _put(x: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
    """`x[b, index[b, i]] = rows[b, i]`; indices behind the end are dropped."""
    row, flat = _rows(index)
    out = x.reshape(-1, *x.shape[-2:])
    out = out.at[row, flat].set(rows.reshape(-1, *rows.shape[-2:]), mode="drop")
    return out.reshape(x.shape)
