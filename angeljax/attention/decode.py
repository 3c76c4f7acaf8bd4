"""Sparse decoding of a whole model: the option `Quest`, and what a layer is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from angeljax.attention.quest import PER, KeyPages, quest_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quest:
    """Each new token reads the pages of the cache that may matter to it.

    Source: Quest (arXiv 2406.10774), whose authors leave the first two layers dense.
    The bounds of the pages travel with the cache. A cache of no more slots than
    `keep_pages * page_size` has none, and is read whole.

    Attributes:
      keep_pages: pages that a token reads, its own included.
      page_size: slots of a page.
      dense_layers: layers from the first on that read the whole cache.
      per: pages for each "kv_head", or for each "query_head".

    Raises:
      ValueError: an option that cannot be, in one line.

    Example:
      >>> from angeljax.attention import Quest
      >>> Quest(keep_pages=128).helps(8192), Quest(keep_pages=128).helps(2048)
      (True, False)
    """

    keep_pages: int = 64
    page_size: int = 16
    dense_layers: int = 2
    per: str = "kv_head"

    def __post_init__(self) -> None:
        for name, least in (("keep_pages", 1), ("page_size", 1), ("dense_layers", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(
                    f"quest {name} must be an integer from {least} on, not {value!r}"
                )
        if self.per not in PER:
            raise ValueError(
                f"quest per={self.per!r}: use {' or '.join(map(repr, PER))}"
            )

    def helps(self, slots: int) -> bool:
        """Whether a cache has more slots than a token would read."""
        return slots > self.keep_pages * self.page_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """Where one new token of each row stands; a decoder passes it in place of a mask.

    Attributes:
      quest: how the cache is read.
      mask: bool `[B, 1, 1, slots]`, for layers that read all of it.
      valid: bool `[B, slots]`, slots that hold a key.
      length: int32, slots that are filled, the new token's included.
      layer: number of the layer from 0; traced under a scan.
    """

    quest: Quest
    mask: jax.Array
    valid: jax.Array
    length: jax.Array
    layer: int | jax.Array = 0

    def at(self, layer: int | jax.Array) -> Step:
        """The same for another layer."""
        return dataclasses.replace(self, layer=layer)

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        pages: KeyPages,
        stacked: int | jax.Array | None,
        dense: Callable[[], jax.Array],
    ) -> jax.Array:
        """Attention of one layer.

        Args:
          q: `[B, 1, H, D]`.
          k, v: stores of the cache with the new token written.
          pages: bounds of these keys.
          stacked: index of the layer if the stores hold all of them.
          dense: attention on the whole cache.

        Returns:
          `[B, 1, H, D]`.
        """

        def sparse() -> jax.Array:
            return quest_attention(
                q,
                k,
                v,
                pages,
                keep_pages=self.quest.keep_pages,
                length=self.length,
                valid=self.valid,
                per=self.quest.per,
                layer=stacked,
            )

        some: Any = self.layer >= self.quest.dense_layers
        if isinstance(some, bool):
            return sparse() if some else dense()
        return jax.lax.cond(some, sparse, dense)
