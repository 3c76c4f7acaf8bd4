"""Documents written side by side: a row whose document ends begins the next one.

A batch that waits for its longest row computes rows that have ended. Here rows stand at
places of their own (`RowCache`), and two programs serve all prompts, lengths and
temperatures: one reads prompts into free rows, one writes a few tokens of every row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.models.attention import causal_attention
from angeljax.models.generate import filter_logits
from angeljax.models.language_model import LanguageModel, stack_layers, unstack_layers

__all__ = ["Lanes"]
# Tokens of each row between two looks at which have ended.
_STEPS = 16
# Rows are filled so many at a time: the batch over this.
_PARTS = 16
# Widths of prompts are rounded up to it, and so are the slots of the cache.
_ROUND = 64
# Bytes of parameters up to which prompts are read by a scan over layers that are
# stacked for it: it compiles once for all layers, and a stack is a copy.
_STACKED = 2**31


class _State(NamedTuple):
    """Rows in the middle of their documents.

    Attributes:
      cache: `RowCache` with a store for each layer.
      token: int32 `[R]`, written or given last, not yet read.
      place: int32 `[R]`, its position.
      left: int32 `[R]`, tokens that may still be written; 0 for a free row.
    """

    cache: Any
    token: jax.Array
    place: jax.Array
    left: jax.Array


@dataclasses.dataclass(frozen=True)
class Lanes:
    """What writes documents.

    Attributes:
      model: the writer, layers apart.
      params: its parameters, layers apart.
      rows: documents at a time.
      widths: of prompts, ascending; each prompt is padded to the first that it fits.
      slots: tokens of a row, prompt and document.
      ends: ids that end a document.
      top_k, top_p: see `angeljax.models.generate`.
    """

    model: LanguageModel
    params: Any
    rows: int
    widths: tuple[int, ...]
    slots: int
    ends: tuple[int, ...]
    top_k: int | None = None
    top_p: float | None = None

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        params: Any,
        *,
        rows: int,
        width: int,
        room: int,
        **options: Any,
    ) -> Lanes:
        """For prompts of up to `width` tokens and documents of up to `room`.

        Args:
          model: stacked or not; the layers are taken apart, since a scan copies the
            cache of each layer out of the stack.
          params: of the model.
          rows, width, room: see above.
          options: other attributes.
        """
        if model.scan_layers:
            model = dataclasses.replace(model, scan_layers=False)
            params = jax.jit(unstack_layers)(params)
        few = _rounded(-(-width // 3), _ROUND)
        widths = tuple(sorted({few, _rounded(width, _ROUND)}))
        slots = _rounded(widths[-1] + room, _ROUND)
        return cls(model, params, rows, widths, slots, **options)

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        limit: int,
        temperature: float,
        key: jax.Array,
    ) -> list[np.ndarray]:
        """What follows each prompt, int32 with the token that ends it.

        Args:
          prompts: token ids.
          limit: tokens of a document at most.
          temperature: 0 is greedy.
          key: of the sampling.
        """
        reader, few = self._reader(), max(self.rows // _PARTS, 1)
        done: list[list[np.ndarray]] = [[] for _ in prompts]
        # Like lengths together: prompts of one width are read at once.
        waiting = iter(_by_length(prompts))
        owner = np.full(self.rows, -1)
        free = list(range(self.rows))
        state, chunk, more = _empty(self.model, self.rows, self.slots), 0, True
        while True:
            while more and len(free) >= few:
                taken = _take(waiting, few)
                more = len(taken) == few
                if not taken:
                    break
                lanes, free = free[: len(taken)], free[len(taken) :]
                owner[lanes] = taken
                batch = self._batch([prompts[i] for i in taken], lanes, limit, few)
                state = _fill(self.params, state, *batch, reader=reader)
            if np.all(owner < 0):
                return [np.concatenate(parts) for parts in done]
            state, out, counts = _advance(
                self.params,
                state,
                jax.random.fold_in(key, chunk),
                jnp.asarray(temperature, jnp.float32),
                None if self.top_p is None else jnp.asarray(self.top_p, jnp.float32),
                model=self.model,
                ends=self.ends,
                top_k=self.top_k,
            )
            chunk += 1
            out, counts, left = jax.device_get((out, counts, state.left))
            for lane in np.flatnonzero(owner >= 0):
                done[owner[lane]].append(out[lane, : counts[lane]])
            ended = np.flatnonzero((owner >= 0) & (left == 0))
            owner[ended] = -1
            free += ended.tolist()

    def _batch(
        self,
        prompts: Sequence[Sequence[int]],
        lanes: Sequence[int],
        limit: int,
        few: int,
    ) -> tuple[jax.Array, ...]:
        """Padded on the right; places without a prompt go to rows that do not exist."""
        longest = max(map(len, prompts))
        width = next(w for w in self.widths if longest <= w)
        tokens = np.zeros((few, width), np.int32)
        lengths = np.ones(few, np.int32)
        where = np.arange(self.rows, self.rows + few, dtype=np.int32)
        for i, (prompt, lane) in enumerate(zip(prompts, lanes, strict=True)):
            tokens[i, : len(prompt)] = prompt
            lengths[i], where[i] = len(prompt), lane
        found = tokens, lengths, where, np.full(few, limit, np.int32)
        return tuple(map(jnp.asarray, found))

    def _reader(self) -> LanguageModel:
        layers = self.params["layers"]
        alike = len({jax.tree.structure(layer) for layer in layers.values()}) == 1
        shapes = {str(jax.tree.map(jnp.shape, layer)) for layer in layers.values()}
        small = sum(x.nbytes for x in jax.tree.leaves(layers)) <= _STACKED
        stacked = alike and len(shapes) == 1 and small
        fn: Any = self.model.attention_fn
        if not any(self.model.config.windows):
            fn = _whole_rows
        return dataclasses.replace(
            self.model, scan_layers=stacked, attention_fn=fn, rows=None
        )


def _whole_rows(q: Any, k: Any, v: Any, mask: Any) -> jax.Array:
    """Rows from their first token on, with the kernel of the training where it is."""
    return causal_attention(q, k, v)


def _empty(model: LanguageModel, rows: int, slots: int) -> _State:
    def zero() -> jax.Array:
        return jnp.zeros(rows, jnp.int32)

    return _State(model.init_rows(rows, slots), zero(), zero(), zero())


@functools.partial(jax.jit, static_argnames=("reader",), donate_argnames=("state",))
def _fill(
    params: Any,
    state: _State,
    tokens: jax.Array,
    lengths: jax.Array,
    lanes: jax.Array,
    limits: jax.Array,
    *,
    reader: LanguageModel,
) -> _State:
    """Reads prompts, all but the last token of each, into rows."""
    few, width = tokens.shape
    order = jnp.arange(width, dtype=jnp.int32)
    if reader.scan_layers:
        params = stack_layers(params)
    # From the right of a row nothing flows to the left: padding does not matter.
    found = reader.read_rows(
        params,
        reader.init_rows(few, width),
        tokens,
        positions=jnp.broadcast_to(order, tokens.shape),
        slots=jnp.zeros((), jnp.int32),
        mask=(order[:, None] >= order)[None, None],
    ).cache

    def put(store: tuple[jax.Array, ...], new: Any) -> tuple[jax.Array, ...]:
        return tuple(
            x.at[lanes, :, :width].set(
                new[i].astype(x.dtype), mode="drop", unique_indices=True
            )
            for i, x in enumerate(store)
        )

    cache = dataclasses.replace(
        state.cache,
        k=put(state.cache.k, found.k),
        v=put(state.cache.v, found.v),
    )
    last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
    return _State(
        cache,
        state.token.at[lanes].set(last, mode="drop"),
        state.place.at[lanes].set(lengths - 1, mode="drop"),
        state.left.at[lanes].set(limits, mode="drop"),
    )


@functools.partial(
    jax.jit,
    static_argnames=("model", "ends", "top_k"),
    donate_argnames=("state",),
)
def _advance(
    params: Any,
    state: _State,
    key: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array | None,
    *,
    model: LanguageModel,
    ends: tuple[int, ...],
    top_k: int | None,
) -> tuple[_State, jax.Array, jax.Array]:
    """Some tokens more: the rows then, int32 `[R, steps]`, and how many of each."""
    slots = state.cache.k[0].shape[2]

    def step(i: Any, carry: Any) -> Any:
        (cache, token, place, left), out, counts = carry
        found = model.read_rows(
            params,
            cache,
            token[:, None],
            positions=place[:, None],
            slots=place,
            mask=(jnp.arange(slots) <= place[:, None])[:, None, None],
        )
        logits = model.head_rows(params, found.final)[:, 0]
        new = _choose(
            logits, jax.random.fold_in(key, i), temperature, top_k=top_k, top_p=top_p
        )
        live = left > 0
        new = jnp.where(live, new, token)
        over = jnp.isin(new, jnp.asarray(ends, jnp.int32))
        left = jnp.where(live & ~over, left - 1, 0)
        # A row that has ended writes its slot again and again, until it is filled.
        state = _State(found.cache, new, place + live, left)
        out = jax.lax.dynamic_update_slice(out, new[:, None], (0, i))
        return state, out, counts + live

    rows = len(state.token)
    start = jnp.zeros((rows, _STEPS), jnp.int32), jnp.zeros(rows, jnp.int32)
    return jax.lax.fori_loop(0, _STEPS, step, (state, *start))


def _choose(
    logits: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    *,
    top_k: int | None,
    top_p: jax.Array | None,
) -> jax.Array:
    """The largest of logits + temperature * Gumbel, which serves all temperatures."""
    noise = jax.random.gumbel(key, logits.shape, jnp.float32)
    if top_k is not None or top_p is not None:
        flat = logits / jnp.maximum(temperature, 1e-6)
        kept = filter_logits(flat, top_k=top_k, top_p=top_p)
        logits = jnp.where(jnp.isneginf(kept), -jnp.inf, logits)
    return jnp.argmax(logits + temperature * noise, axis=-1).astype(jnp.int32)


def _rounded(count: int, step: int) -> int:
    return -(-count // step) * step


def _by_length(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Numbers of the prompts, the longest first."""
    lengths = np.asarray([len(prompt) for prompt in prompts])
    return np.argsort(-lengths, kind="stable").tolist()


def _take(items: Iterator[int], count: int) -> list[int]:
    return [i for _, i in zip(range(count), items, strict=False)]
