"""Stem: budgets that decay along the prompt, scores that look at the values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from angeljax.attention import _budgets, _options, _words
from angeljax.attention._frame import Frame, make_frame, strided
from angeljax.attention._selector import Place
from angeljax.attention._strided import mass, measured
from angeljax.attention._values import value_bonus
from pallas_kernels import BlockLists

_LEAST = 1e-30  # of a mass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stem:
    """The best key blocks of each query block, fewer the later it stands.

    A pair of blocks has the mean anti-diagonal product of its queries and keys plus a
    bonus for keys with large values as its score,

        L[i, j] = mean(q k) / sqrt(D) + value_weight * mean(relu(z(log |v|))),

    the mean over every `stride`-th pair on anti-diagonals, z the standard score over
    the keys. A mean of products is a product of sums, so one small matrix product
    `[n, stride D] x [stride D, n]` for each head gives exactly this. Each row keeps the
    blocks with the highest scores, as many as its budget, and besides them the first
    and the last few.

    A mean over so many pairs hardly notices one key that matters. With `cells` a block
    is that many by that many cells, each scored as above; their softmax over the keys,
    summed over a block, is its mass, and the score is the logarithm of that plus the
    bonus. It costs `cells` squared times the product; `cells = block_size // stride`
    gives the score of XAttention (arXiv 2503.16428).

    Budgets fall from a first one to `alpha` times it at the end of the prompt. They
    follow `Place.total`, so chunks of a prompt select what the prompt would in one
    piece, up to the rounding of scores that are nearly equal; with `value_stats`
    "prompt" that holds for the last chunk only. Rows of a batch with fewer tokens have
    the same budgets.

    Source: Stem (arXiv 2603.06274) in the form that AngelSlim gives it. AngelSlim's own
    selection is `budget_mode="angelslim", value_stats="prompt", valid_mean=False`.
    Without decay: `alpha=1`; without the bonus: `value_weight=0`.

    Attributes:
      block_size: rows of a query block and of a key block.
      stride: rows between the pairs of an anti-diagonal; divides `block_size`.
      alpha: what is left of the first budget in the last row; a tuple has one for each
        layer.
      keep_ratio: the first budget as a share of the blocks of the prompt; with
        `budget_mode` "density" or "rows" the share of the causal blocks that is read. A
        tuple has one for each layer. None: the length rule.
      budget_mode: "ratio" uses `keep_ratio`, or the length rule where that is None.
        "density" finds the first budget with which the share `keep_ratio` of the causal
        blocks is read, forced blocks included. "rows" reads that share of the causal
        blocks of each row instead, without decay (`alpha` is not looked at): the last
        queries of a prompt, which write the answer, then read the most. "angelslim"
        takes the length rule unless `keep_ratio` is 1, whatever else it is.
      dense_layers: layers from the first on that read all blocks.
      sink_blocks, window_blocks: the first and the last blocks of each row that are
        always read, the latter with the diagonal. With "density" and "rows" they are
        part of the budget, else they come on top of it where the scores do not name
        them.
      min_blocks: least first budget in "ratio" mode; the paper's is 46.
      length_limits, length_rates, length_biases: of the length rule. Prompts of less
        than the first limit of blocks are dense; the first budget is `rates[0] * n +
        biases[0]` up to the second limit and `rates[1] * n + biases[1]` from there on.
      cells: of a block along each side, for scores that see single keys; divides
        `block_size // stride`. None scores the block as one: Stem as published.
      value_weight: lambda, weight of the bonus.
      value_form: "zscore" (AngelSlim), or "paper": the largest max(0, log |v|) of the
        block, without standardization.
      value_stats: mean and deviation of log |v| for a row of blocks are over the keys
        up to it ("causal") or over all keys of the call ("prompt", AngelSlim: later
        values then decide what earlier queries read).
      valid_mean: the means of a short last block are over its real rows. False divides
        by all rows (AngelSlim), and the last queries of a prompt that ends in a short
        block are then chosen for nearly by the bonus alone.
      select_per: a list for each "q_head", or for each "kv_head", from the mean of its
        queries.

    Raises:
      ValueError: an option that cannot be, in one line.

    Example:
      >>> import jax
      >>> from angeljax.attention import Place, Stem
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 1024, 2, 16))
      >>> stem = Stem(
      ...     block_size=64, keep_ratio=0.5, budget_mode="density",
      ...     dense_layers=0, sink_blocks=1, window_blocks=2,
      ... )
      >>> lists = jax.jit(stem.select, static_argnums=3)(q, k, v, Place())
      >>> lists.indices.shape, stem.density(1024), int(lists.counts[0, 0].sum())
      ((1, 2, 16, 6), 0.5, 68)
    """

    block_size: int = 128
    stride: int = 8
    alpha: float | tuple[float, ...] = 0.7
    keep_ratio: float | tuple[float, ...] | None = None
    budget_mode: str = "ratio"
    dense_layers: int = 2
    sink_blocks: int = 4
    window_blocks: int = 4
    min_blocks: int = 1
    length_limits: tuple[int, int] = (56, 160)
    length_rates: tuple[float, float] = (0.2, 0.1)
    length_biases: tuple[int, int] = (30, 30)
    cells: int | None = None
    value_weight: float = 0.2
    value_form: str = "zscore"
    value_stats: str = "causal"
    valid_mean: bool = True
    select_per: str = "q_head"

    def __post_init__(self) -> None:
        for name, least in (
            ("block_size", 1),
            ("stride", 1),
            ("dense_layers", 0),
            ("sink_blocks", 0),
            ("window_blocks", 1),
            ("min_blocks", 1),
        ):
            _options.integer(self, name, least)
        if self.block_size % self.stride:
            raise ValueError(
                f"stride={self.stride} must divide block_size={self.block_size}"
            )
        inside = self.block_size // self.stride
        if self.cells is not None and (
            type(self.cells) is not int or self.cells < 1 or inside % self.cells
        ):
            raise ValueError(
                f"cells={self.cells!r} must be an integer that divides the {inside} "
                f"groups of {self.stride} rows in a block of {self.block_size}"
            )
        _options.number(self, "alpha", 0, 1, depth=1)
        if self.keep_ratio is not None:
            _options.number(self, "keep_ratio", 0, 1, depth=1)
        elif self._counts_forced:
            raise ValueError(f"budget_mode={self.budget_mode!r} needs a keep_ratio")
        modes = ("ratio", "density", "rows", "angelslim")
        _options.choice(self, "budget_mode", modes)
        _options.choice(self, "value_form", ("zscore", "paper"))
        _options.choice(self, "value_stats", ("causal", "prompt"))
        _options.choice(self, "select_per", ("q_head", "kv_head"))
        if not 0 <= self.value_weight < math.inf:
            raise ValueError(f"value_weight must be 0 or more, not {self.value_weight}")
        for name in ("length_limits", "length_rates", "length_biases"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != 2 or min(value) < 0:
                raise ValueError(
                    f"{name} must be two numbers, one for prompts up to the second "
                    f"limit and one for longer ones, not {value!r}"
                )

    def budgets(self, total: int, *, layer: int = 0, num_layers: int = 1) -> np.ndarray:
        """How many blocks each row of a prompt keeps by score.

        Args:
          total: tokens of the prompt.
          layer: number of the layer.
          num_layers: of the model.

        Returns:
          int32 `[num_blocks]`; forced blocks are included with "density" and "rows",
          and come on top otherwise. A row that sees fewer keeps all.
        """
        blocks = -(-total // self.block_size)
        return np.asarray(self._budgets(blocks, layer, num_layers), np.int32)

    def density(
        self, total: int, *, layer: int = 0, num_layers: int = 1, **place: Any
    ) -> float | None:
        """Share of the causal blocks that are read; see `Selector`.

        None where scores decide how many of the forced blocks the budget holds.
        """
        low, high = self.density_bounds(total, layer=layer, num_layers=num_layers)
        return low if low == high else None

    def density_bounds(
        self, total: int, *, layer: int = 0, num_layers: int = 1
    ) -> tuple[float, float]:
        """Least and largest share of the causal blocks that can be read.

        Args:
          total: tokens of the prompt.
          layer: number of the layer.
          num_layers: of the model.

        Returns:
          Two shares: all forced blocks among the best, and none of them.
        """
        rows = _budgets.seen(-(-total // self.block_size))
        low, high = self._read(self.budgets(total, layer=layer, num_layers=num_layers))
        return float(low.sum() / rows.sum()), float(high.sum() / rows.sum())

    def select(
        self, q: jax.Array, k: jax.Array, v: jax.Array, place: Place
    ) -> BlockLists:
        """Lists of the blocks that each query block reads; see `Selector`."""
        frame = make_frame(q, k, v, place, self.block_size)
        plans, layer = _options.for_layers(
            place.layer,
            place.num_layers,
            place.among,
            lambda one: self._budgets(frame.total, one, place.num_layers),
        )
        table = np.asarray(plans, np.int32)
        least, most = self._read(table)
        least, most = frame.of_prompt(least.min(0)), frame.of_prompt(most.max(0))
        if frame.start is not None and (least > frame.rows).all():
            return frame.every_block()
        budget = frame.at_rows(table if layer is not None else table[0], layer)
        words = self._words(frame, q, k, v, jnp.asarray(budget))
        words = words & frame.causal()
        return frame.lists(words | self._forced(frame), int(most.max()))

    @property
    def _counts_forced(self) -> bool:
        """Whether budgets hold the forced blocks."""
        return self.budget_mode in ("density", "rows")

    def _budgets(self, blocks: int, layer: int, num_layers: int) -> tuple[int, ...]:
        alpha = _options.per_layer("alpha", self.alpha, layer, num_layers)
        ratio = _options.per_layer("keep_ratio", self.keep_ratio, layer, num_layers)
        if layer < self.dense_layers:
            return (blocks,) * blocks
        if self._counts_forced:
            forced = self.sink_blocks, self.window_blocks
            if self.budget_mode == "density":
                return _budgets.at_density(blocks, ratio, alpha, *forced)
            least = _budgets.forced(blocks, *forced)
            return tuple(_budgets.shares(blocks, ratio, least).tolist())
        if self.budget_mode == "ratio" and ratio is not None:
            first = max(self.min_blocks, int(math.floor(ratio * blocks + 0.5)))
        elif ratio == 1:
            first = blocks
        else:
            rule = self.length_limits, self.length_rates, self.length_biases
            first = _budgets.length_rule(blocks, *rule)
        return tuple(_budgets.decayed(blocks, min(first, blocks), alpha).tolist())

    def _read(self, budgets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Least and largest number of blocks that rows read."""
        blocks = budgets.shape[-1]
        rows = _budgets.seen(blocks)
        forced = _budgets.forced(blocks, self.sink_blocks, self.window_blocks)
        low = np.minimum(np.maximum(budgets, forced), rows)
        if self._counts_forced:
            return low, low
        return low, np.minimum(budgets + forced, rows)

    def _forced(self, frame: Frame) -> jax.Array:
        return frame.forced(self.sink_blocks, self.window_blocks)

    def _words(
        self, frame: Frame, q: jax.Array, k: jax.Array, v: jax.Array, budget: jax.Array
    ) -> jax.Array:
        """The best blocks of each row, uint32 `[B, heads, num_q, words]`."""
        chosen = []
        for rows, scores in self._scores(frame, q, k, v):
            columns = np.arange(scores.shape[-1])
            own = jnp.asarray(frame.rows[:, rows])[:, None, None, :, None]
            key = jnp.where(columns <= own, _words.order16(scores), 0)
            if self._counts_forced:
                near = columns > own - self.window_blocks
                near = (near | (columns < self.sink_blocks)) & (key > 0)
                key = jnp.where(near, jnp.uint16(_words.FIRST), key)
            # Made once: each pass of the search reads 16 bits of a pair, not its score.
            key = lax.optimization_barrier(key)
            best = _words.best(key, budget[:, :, None, rows])
            chosen.append(_words.widen(best, frame.num_words))
        words = jnp.concatenate(chosen, axis=3)
        return words.reshape(words.shape[0], -1, *words.shape[3:])

    def _scores(
        self, frame: Frame, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> Iterator[tuple[slice, jax.Array]]:
        """Query blocks, and their scores of m key blocks, `[B, Hkv, G, n, m]`."""
        v = frame.real_keys(v)
        bonus = None
        if self.value_weight:
            bonus = value_bonus(
                frame,
                v,
                stride=self.stride,
                weight=self.value_weight,
                form=self.value_form,
                stats=self.value_stats,
                valid_mean=self.valid_mean,
            )
        products = self._products if self.cells is None else self._masses
        for rows, scores in products(frame, q, k):
            if bonus is not None:
                scores = scores + bonus(rows, scores.shape[-1])[:, :, None]
            yield rows, scores

    def _masses(
        self, frame: Frame, q: jax.Array, k: jax.Array
    ) -> Iterator[tuple[slice, jax.Array]]:
        """Logarithms of softmax masses over cells, shaped as `_scores` says."""
        pool = self.block_size // self.stride // (self.cells or 1)
        for rows, x in measured(frame, q, k, self.stride, mass, pool):
            x = x.reshape(x.shape[0], frame.kv_heads, frame.group, *x.shape[2:])
            if self.select_per == "kv_head":
                x = x.mean(2, keepdims=True)
            # Past the diagonal there is none; what is chosen there is cut off later.
            yield rows, jnp.log(jnp.maximum(x, _LEAST))

    def _products(
        self, frame: Frame, q: jax.Array, k: jax.Array
    ) -> Iterator[tuple[slice, jax.Array]]:
        """Mean anti-diagonal products, shaped as `_scores` says."""
        queries, keys = self._queries(frame, q), self._keys(frame, frame.real_keys(k))
        for rows, size in frame.parts():
            scores = jnp.einsum(
                "bhgnc,bhmc->bhgnm",
                queries[:, :, :, rows],
                keys[:, :, :size],
                precision="highest" if q.dtype == jnp.float32 else None,
                preferred_element_type=jnp.float32,
            )
            yield rows, scores * (1 / (math.sqrt(q.shape[-1]) * self.stride))

    def _queries(self, frame: Frame, q: jax.Array) -> jax.Array:
        """`[B, Hkv, G or 1, num_q, stride * D]`."""
        x = self._sums(frame.real_queries(q), frame.rows_of(frame.num_q, True))
        x = x.reshape(*x.shape[:3], frame.kv_heads, frame.group, -1)
        if self.select_per == "kv_head":
            x = x.mean(4, keepdims=True)
        x = x.transpose(0, 3, 4, 1, 2, 5)
        return x.reshape(*x.shape[:4], -1).astype(q.dtype)

    def _keys(self, frame: Frame, k: jax.Array) -> jax.Array:
        """`[B, Hkv, num_k, stride * D]`, with the rows of a stride backwards."""
        x = self._sums(k, frame.rows_of(frame.num_k, False))[:, :, ::-1]
        x = x.transpose(0, 3, 1, 2, 4)
        return x.reshape(*x.shape[:3], -1).astype(k.dtype)

    def _sums(self, x: jax.Array, rows: jax.Array | None) -> jax.Array:
        """Means over a block of every stride-th row: `[B, n, stride, heads, D]`."""
        x = strided(x, self.block_size, self.stride)
        # Written out: a GPU then reads several elements of a row at once.
        parts = [x[:, :, cell].astype(jnp.float32) for cell in range(x.shape[2])]
        x = sum(parts[1:], parts[0]) * (self.stride / self.block_size)
        if rows is None or not self.valid_mean:
            return x
        return x * (self.block_size / jnp.maximum(rows, 1))[..., None, None, None]
