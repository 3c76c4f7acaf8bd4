"""Hybrid: a selector for each layer, or for each head of a layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from angeljax.attention import _options
from angeljax.attention._selector import Place, Selector
from pallas_kernels import BlockLists

Entry = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hybrid:
    """Static and dynamic selectors, mixed by layer and by head.

    A layer with several selectors runs each of them for all of its heads and takes for
    every head the lists of its own, padded to the widest; so a static selector beside a
    dynamic one saves attention, not selection. Where the number of the layer is traced
    (scanned layers), `lax.switch` runs what the layer needs and nothing else.

    Source: the mixture of static and dynamic patterns in the AngelSlim report
    (arXiv 2602.21233, section 4.1).

    Attributes:
      selectors: all of the same block size.
      layers: one entry for each layer, or a single one for all: the number of a
        selector, or a tuple of one number for each query head of the model. Where
        devices hold some of the heads, `Place.first_head` says which.

    Raises:
      ValueError: an option that cannot be, in one line.

    Example:
      >>> import jax
      >>> from angeljax.attention import AShape, Dense, Hybrid, Place
      >>> both = Hybrid(
      ...     selectors=(Dense(), AShape(window_tokens=256)),
      ...     layers=(0, (1, 1, 0, 1)),
      ... )
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 1024, 4, 16))
      >>> lists = both.select(q, k, v, Place(layer=1, num_layers=2))
      >>> lists.counts[0, :, -1].tolist()
      [4, 4, 8, 4]
    """

    selectors: tuple[Selector, ...]
    layers: tuple[Entry, ...]

    def __post_init__(self) -> None:
        for name in ("selectors", "layers"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not value:
                raise ValueError(f"{name} must be a tuple with entries, not {value!r}")
        for one in self.selectors:
            if not isinstance(one, Selector):
                raise ValueError(f"selectors holds {one!r}, which is none")
        sizes = sorted({one.block_size for one in self.selectors})
        if len(sizes) > 1:
            raise ValueError(f"selectors must have one block_size, not {sizes}")
        for entry in self.layers:
            for number in entry if isinstance(entry, tuple) else (entry,):
                if type(number) is not int or not 0 <= number < len(self.selectors):
                    raise ValueError(
                        f"layers has {number!r}: selectors are numbered from 0 to "
                        f"{len(self.selectors) - 1}"
                    )

    @property
    def block_size(self) -> int:
        """Rows of a query block and of a key block."""
        return self.selectors[0].block_size

    def density(
        self, total: int, *, layer: int = 0, num_layers: int = 1, **place: Any
    ) -> float | None:
        """Mean over the heads of a layer; None where one of them is; see `Selector`."""
        entry = self._entry(layer, num_layers)
        place |= {"layer": layer, "num_layers": num_layers}
        found = {i: self.selectors[i].density(total, **place) for i in set(entry)}
        known = [density for i in entry if (density := found[i]) is not None]
        return float(np.mean(known)) if len(known) == len(entry) else None

    def select(
        self, q: jax.Array, k: jax.Array, v: jax.Array, place: Place
    ) -> BlockLists:
        """Lists of the blocks that each query block reads; see `Selector`."""
        entries, layer = _options.for_layers(
            place.layer,
            place.num_layers,
            place.among,
            lambda one: self._entry(one, place.num_layers),
        )
        if layer is None:
            return self._select(entries[0], q, k, v, place)
        possible = place.among or tuple(range(place.num_layers))
        distinct = list(dict.fromkeys(entries))
        branches = []
        for entry in distinct:
            among = tuple(one for one in possible if entries[one] == entry)
            there = {"layer": among[0]} if len(among) == 1 else {"among": among}
            at = dataclasses.replace(place, **there)
            branches.append(
                lambda q, k, v, entry=entry, at=at: self._select(entry, q, k, v, at)
            )
        shapes = [jax.eval_shape(branch, q, k, v).indices.shape for branch in branches]
        shape = tuple(map(max, zip(*shapes, strict=True)))
        if len({s[1] for s in shapes}) > 1:
            shape = (shape[0], q.shape[2], *shape[2:])
        number = jnp.asarray([distinct.index(entry) for entry in entries])[layer]

        def alike(run: Any) -> Any:
            return lambda q, k, v: _varying(_spread(run(q, k, v), shape), q)

        return lax.switch(number, list(map(alike, branches)), q, k, v)

    def _entry(self, layer: int, num_layers: int) -> tuple[int, ...]:
        """Numbers of the selectors of all heads, or one for all."""
        if len(self.layers) == 1:
            entry = self.layers[0]
        else:
            entry = _options.per_layer("layers", self.layers, layer, num_layers)
        entry = entry if isinstance(entry, tuple) else (entry,)
        return entry if len(set(entry)) > 1 else entry[:1]

    def _select(
        self,
        entry: tuple[int, ...],
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        place: Place,
    ) -> BlockLists:
        heads, first = q.shape[2], place.first_head
        if len(entry) > 1:
            if len(entry) < heads:
                raise ValueError(f"layers has {len(entry)} heads and q has {heads}")
            if not isinstance(first, jax.Array):
                entry = entry[first : first + heads]
        numbers = sorted(set(entry))
        lists = [self.selectors[i].select(q, k, v, place) for i in numbers]
        if len(lists) == 1:
            return lists[0]
        own = jnp.asarray([numbers.index(i) for i in entry])
        if isinstance(first, jax.Array):
            own = lax.dynamic_slice_in_dim(own, first, heads)
        shapes = [one.indices.shape for one in lists]
        most = tuple(map(max, zip(*shapes, strict=True)))
        lists = [_spread(one, (most[0], heads, *most[2:])) for one in lists]
        own = own[:, None]
        indices, counts = lists[0].indices, lists[0].counts
        for i, one in enumerate(lists[1:], 1):
            indices = jnp.where((own == i)[..., None], one.indices, indices)
            counts = jnp.where(own == i, one.counts, counts)
        return dataclasses.replace(lists[0], indices=indices, counts=counts)


def _varying(lists: BlockLists, q: jax.Array) -> BlockLists:
    """The same lists; under `shard_map` they vary over the mesh as q does."""
    first = q[0, 0, 0, 0]
    zero = ((first != first) & False).astype(jnp.int32)
    indices, counts = lists.indices + zero, lists.counts + zero
    return dataclasses.replace(lists, indices=indices, counts=counts)


def _spread(lists: BlockLists, shape: tuple[int, ...]) -> BlockLists:
    """Lists for more rows of the batch and heads, with room behind them."""
    rows, heads, blocks, width = shape
    more = heads // lists.indices.shape[1]
    indices = jnp.pad(
        lists.indices, [(0, 0)] * 3 + [(0, width - lists.width)], mode="edge"
    )
    # A list of a key head is for a group of query heads that follow each other.
    indices = jnp.repeat(indices, more, axis=1)
    counts = jnp.repeat(lists.counts, more, axis=1)
    return dataclasses.replace(
        lists,
        indices=jnp.broadcast_to(indices, (rows, heads, blocks, width)),
        counts=jnp.broadcast_to(counts, (rows, heads, blocks)),
    )
