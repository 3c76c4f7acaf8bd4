"""The choice of blocks by their mass, for the selectors of strided scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from angeljax.attention import _budgets, _options, _words
from angeljax.attention._frame import make_frame
from angeljax.attention._selector import Place
from angeljax.attention._strided import Scores, measured
from pallas_kernels import BlockLists


class Measure(NamedTuple):
    """What the blocks of each row are ordered by, `[B, H, n, blocks]` each.

    Attributes:
      mass: float32, not negative.
      first: bool, blocks that precede all others; None for none.
    """

    mass: jax.Array
    first: jax.Array | None = None


def select(
    selector: Any,
    share: str,
    measure: Callable[[Scores], Measure],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    place: Place,
) -> BlockLists:
    """Lists of the blocks with the most mass.

    Args:
      selector: with `block_size`, `stride`, `keep_ratio`, `max_blocks` and the share.
      share: name of its field for the share of the mass of a row that is enough.
      measure: from scores to what blocks are ordered by.
      q, k, v, place: see `Selector`.
    """
    frame = make_frame(q, k, v, place, selector.block_size)
    enough = _shares_of_heads(share, getattr(selector, share), place, q.shape[2])
    ratio, most = selector.keep_ratio, selector.max_blocks
    budgets = None
    if ratio is not None:
        # They follow the row alone, so no matter how long the prompt is.
        budgets = _shares(frame.num_k, ratio, most)
    chosen = []
    for part, found in measured(frame, q, k, selector.stride, measure):
        rows = jnp.asarray(frame.rows[:, part])[:, None]  # [1 or B, 1, n]
        words = _choose(found, rows, enough, budgets, most)
        chosen.append(_words.widen(words, frame.num_words))
    width = frame.num_k if budgets is None else int(frame.of_prompt(budgets).max())
    return frame.lists(jnp.concatenate(chosen, axis=2), min(width, most or width))


def _choose(
    found: Measure,
    rows: jax.Array,
    enough: jax.Array,
    budgets: np.ndarray | None,
    most: int | None,
) -> jax.Array:
    """Words `[B, H, n, words]` of the chosen blocks.

    The first block and the diagonal are always in. Then come those of `found.first`,
    then the others, either by falling mass, until the mass of the row is enough or the
    budget is spent.
    """
    mass = found.mass
    columns = np.arange(mass.shape[-1])
    forced = (columns == 0) | (columns == rows[..., None])
    free = (columns < rows[..., None]) & ~forced
    # From 1 on, so that a block of no mass is a candidate still.
    key = _words.order32(mass) + 1
    if found.first is not None:
        key = key | jnp.where(found.first, jnp.uint32(1 << 31), jnp.uint32(0))
    key = jnp.where(free, key, 0)
    held = jnp.minimum(rows + 1, 2)
    if budgets is not None:
        words = _words.best(key, jnp.asarray(budgets)[rows] - held)
    else:
        total = jnp.sum(mass, -1)
        before = jnp.sum(jnp.where(forced, mass, 0), -1)
        needed = jnp.where(enough >= 1, jnp.inf, total * enough)
        words = _words.until(key, jnp.where(free, mass, 0), before, needed)
        if most is not None:
            words = words & _words.best(key, most - held)
    return (words & _words.pack(free)) | _words.pack(forced)


def _shares(blocks: int, ratio: float, most: int | None) -> np.ndarray:
    least = _budgets.forced(blocks, 1, 1)
    return np.minimum(_budgets.shares(blocks, ratio, least), most or blocks)


def ratio_density(selector: Any, total: int) -> float | None:
    """Share of the causal blocks that are read; None where it depends on the tokens."""
    if selector.keep_ratio is None:
        return None
    blocks = -(-total // selector.block_size)
    read = _shares(blocks, selector.keep_ratio, selector.max_blocks)
    return float(read.sum() / _budgets.seen(blocks).sum())


def check(selector: Any, share: str) -> None:
    """Checks the options that the selectors of strided scores have in common.

    Raises:
      ValueError: one line that names the field.
    """
    _options.integer(selector, "block_size", 1)
    _options.integer(selector, "stride", 1)
    if selector.block_size % selector.stride:
        raise ValueError(
            f"stride={selector.stride} must divide block_size={selector.block_size}"
        )
    _options.number(selector, share, 0, 1, depth=2)
    if selector.keep_ratio is not None:
        _options.number(selector, "keep_ratio", 0, 1)
    if selector.max_blocks is not None:
        _options.integer(selector, "max_blocks", 2)


def _shares_of_heads(name: str, value: Any, place: Place, heads: int) -> jax.Array:
    """A share for each query head, float32 `[heads or 1, 1]`.

    Args:
      name: of the option.
      value: a number, or one for each layer, or for each layer one for each head.
      place: of the call.
      heads: query heads of the call.

    Raises:
      ValueError: too few or too many entries.
    """

    def entries(layer: int) -> tuple[float, ...]:
        entry = _options.per_layer(name, value, layer, place.num_layers)
        return entry if isinstance(entry, tuple) else (entry,)

    rows, layer = _options.for_layers(
        place.layer, place.num_layers, place.among, entries
    )
    longest = max(map(len, rows))
    if 1 < longest < heads:
        raise ValueError(f"{name} has {longest} heads and q has {heads}")
    table = np.asarray([row * longest if len(row) == 1 else row for row in rows])
    row = jnp.asarray(table, jnp.float32)[0 if layer is None else layer]
    if longest > 1:
        row = lax.dynamic_slice_in_dim(row, jnp.asarray(place.first_head), heads)
    return row[:, None]
