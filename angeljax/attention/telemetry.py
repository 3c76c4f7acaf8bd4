"""What a selector does to a model: realised density, and how much attention it keeps.

Both are measured on the queries, keys and values of the dense model, so that layers are
judged one by one and not by what earlier ones did to their inputs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.attention._selector import Place, Selector
from angeljax.attention.prefill import SparseAttention
from pallas_kernels import BlockLists
from pallas_kernels.block_sparse_attention._lists import visible_blocks

_ROWS_AT_ONCE = 8


@dataclasses.dataclass(frozen=True)
class AttentionReport:
    """What `attention_report` measured.

    Attributes:
      layers: numbers of the layers.
      density: float `[layers, heads]`, share of the causal blocks that are read.
      recall: float `[layers, heads]`, share of the dense softmax mass of the sampled
        queries that lies in blocks that are read.
      tokens: length of the prompts.
      selector: what was measured, as text.
    """

    layers: tuple[int, ...]
    density: np.ndarray
    recall: np.ndarray
    tokens: int
    selector: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "selector": self.selector,
            "tokens": self.tokens,
            "density": float(self.density.mean()),
            "recall": float(self.recall.mean()),
            "layers": [
                {"layer": layer, "density": d.tolist(), "recall": r.tolist()}
                for layer, d, r in zip(
                    self.layers, self.density, self.recall, strict=True
                )
            ],
        }

    def __rich__(self) -> Any:
        """A table with a row for each layer: means over heads, and the worst head."""
        from rich.table import Table

        table = Table("layer", title=f"{self.selector}, {self.tokens} tokens")
        table.show_footer = True
        table.columns[0].footer = "mean"
        for name, footer in (
            ("density", f"{self.density.mean():.1%}"),
            ("recall", f"{self.recall.mean():.1%}"),
            ("worst head", f"{self.recall.min():.1%}"),
        ):
            table.add_column(name, footer=footer, justify="right")
        for layer, d, r in zip(self.layers, self.density, self.recall, strict=True):
            worst = f"{r.min():.1%} ({int(r.argmin())})"
            table.add_row(str(layer), f"{d.mean():.1%}", f"{r.mean():.1%}", worst)
        return table


def attention_report(
    model: Any,
    params: Any,
    tokens: jax.Array,
    selector: Selector | SparseAttention,
    *,
    rows: int = 64,
    layers: Sequence[int] | None = None,
) -> AttentionReport:
    """Density and recall of a selector, for each layer and head.

    Args:
      model: a `LanguageModel`; it runs densely whatever its `attention_fn`.
      params: its param tree.
      tokens: int32 `[B, T]`, full rows.
      selector: what chooses blocks, or a `SparseAttention` with layers of its own.
      rows: queries for the recall, evenly spaced over the prompt.
      layers: which ones; default all. Queries, keys and values of all of them are held
        at once.

    Returns:
      The report; means over the batch.

    Raises:
      ValueError: a layer or number of rows that cannot be.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.attention import AShape, attention_report
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> config = DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=2,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... )
      >>> model = LanguageModel(config)
      >>> params = model.init(jax.random.key(0))
      >>> near = AShape(block_size=16, sink_tokens=16, window_tokens=1)
      >>> tokens = jnp.arange(64)[None] % 32
      >>> report = attention_report(model, params, tokens, near, rows=8)
      >>> report.density.round(2).tolist()
      [[0.7, 0.7], [0.7, 0.7]]
    """
    if not 1 <= rows <= tokens.shape[1]:
        raise ValueError(f"rows={rows}: from 1 to the {tokens.shape[1]} tokens")
    wanted, groups = _groups(model, selector, layers)
    density, recall = _measure(params, tokens, model, groups, rows)
    return AttentionReport(
        layers=wanted,
        density=_in_order(density, groups, wanted),
        recall=_in_order(recall, groups, wanted),
        tokens=tokens.shape[1],
        selector=_name(selector),
    )


def selected_blocks(
    model: Any,
    params: Any,
    tokens: jax.Array,
    selector: Selector | SparseAttention,
    *,
    layer: int = 0,
) -> np.ndarray:
    """The blocks that one layer reads.

    Args:
      model, params, tokens, selector: as for `attention_report`.
      layer: its number.

    Returns:
      bool `[B, heads, num_q_blocks, num_k_blocks]`.

    Raises:
      ValueError: the layer does not exist.
    """
    _, groups = _groups(model, selector, (layer,))
    return np.asarray(_masks(params, tokens, model, groups[0][0], layer))


Groups = tuple[tuple[Selector, tuple[int, ...]], ...]


def _groups(
    model: Any, selector: Selector | SparseAttention, layers: Sequence[int] | None
) -> tuple[tuple[int, ...], Groups]:
    """The layers, and which of them go with which selector."""
    count = model.config.num_layers
    wanted = tuple(range(count) if layers is None else layers)
    for layer in wanted:
        if not 0 <= layer < count:
            raise ValueError(f"layer {layer} is none of the model's {count}, 0 first")
    if any(model.config.windows):
        raise ValueError("the model has layers with a sliding window, which stay dense")
    kinds: dict[Selector, list[int]] = {}
    for layer in wanted:
        own = selector
        if isinstance(selector, SparseAttention):
            own = selector.selector_of(layer, count)
        kinds.setdefault(own, []).append(layer)  # type: ignore[arg-type]
    return wanted, tuple((kind, tuple(own)) for kind, own in kinds.items())


def _in_order(found: Any, groups: Groups, wanted: tuple[int, ...]) -> np.ndarray:
    rows: dict[int, np.ndarray] = {}
    for (_, layers), values in zip(groups, found, strict=True):
        rows.update(zip(layers, np.asarray(values, np.float64), strict=True))
    return np.stack([rows[layer] for layer in wanted])


def _name(selector: Selector | SparseAttention) -> str:
    if isinstance(selector, SparseAttention):
        return _name(selector.selector)
    return type(selector).__name__


@functools.partial(jax.jit, static_argnames=("model", "groups", "rows"))
def _measure(params: Any, tokens: Any, model: Any, groups: Groups, rows: int) -> Any:
    """For each group `[layers, heads]`: densities, and recalls."""
    order = [layer for _, layers in groups for layer in layers]
    qkv = dict(zip(order, _inside(model, params, tokens, order), strict=True))
    density, recall = [], []
    for kind, layers in groups:
        stacked = [jnp.stack(x) for x in zip(*(qkv[i] for i in layers), strict=True)]

        def one(args: Any, kind: Selector = kind, layers: Any = layers) -> Any:
            q, k, v, layer = args
            count = model.config.num_layers
            place = Place(layer=layer, num_layers=count, among=layers)
            lists = kind.select(q, k, v, place)
            return density_of(lists, q, k), recall_of(lists, q, k, rows)

        found = jax.lax.map(one, (*stacked, jnp.asarray(layers)))
        density.append(found[0])
        recall.append(found[1])
    return density, recall


@functools.partial(jax.jit, static_argnames=("model", "selector", "layer"))
def _masks(
    params: Any, tokens: Any, model: Any, selector: Selector, layer: int
) -> jax.Array:
    ((q, k, v),) = _inside(model, params, tokens, [layer])
    place = Place(layer=layer, num_layers=model.config.num_layers)
    return _mask(selector.select(q, k, v, place), q, k)


def _inside(model: Any, params: Any, tokens: Any, layers: Sequence[int]) -> Any:
    """Queries, keys and values of layers of the dense model."""
    # Models are built on this package, and only whoever has one comes here.
    from angeljax.models import causal_attention

    model = dataclasses.replace(model, attention_fn=causal_attention)
    return model.features(params, tokens, relations=tuple(layers)).qkv


def density_of(lists: BlockLists, q: jax.Array, k: jax.Array) -> jax.Array:
    """Share of the causal blocks that are read, float32 `[H]`; mean over the batch."""
    mask = _mask(lists, q, k)
    _, last = visible_blocks(q.shape[1], k.shape[1], lists.block_q, lists.block_k, 0)
    return mask.sum((0, 2, 3)) / (mask.shape[0] * jnp.sum(last + 1))


def recall_of(lists: BlockLists, q: jax.Array, k: jax.Array, rows: int) -> jax.Array:
    """Share of the softmax mass of some queries in blocks that are read.

    Args:
      lists: of a prompt from its first token on.
      q: `[B, T, H, D]`.
      k: `[B, T, Hkv, D]`.
      rows: number of queries.

    Returns:
      float32 `[H]`, mean over the queries and the batch; softmax in float32.
    """
    batch, t, heads, dim = q.shape
    mask = _mask(lists, q, k)
    at = ((jnp.arange(rows) + 0.5) * t / rows).astype(jnp.int32)
    groups = q[:, at].astype(jnp.float32).reshape(batch, rows, k.shape[2], -1, dim)

    def one(args: Any) -> jax.Array:
        q, position = args
        s = jnp.einsum("bngd,bsnd->bngs", q, k.astype(jnp.float32), precision="highest")
        seen = jnp.arange(t) <= position
        p = jax.nn.softmax(jnp.where(seen, s * dim**-0.5, -jnp.inf), axis=-1)
        kept = jnp.repeat(mask[:, :, position // lists.block_q], lists.block_k, axis=-1)
        return (p.reshape(batch, heads, t) * kept[..., :t]).sum(-1).mean(0)

    found = jax.lax.map(
        one, (jnp.swapaxes(groups, 0, 1), at), batch_size=min(rows, _ROWS_AT_ONCE)
    )
    return found.mean(0)


def _mask(lists: BlockLists, q: jax.Array, k: jax.Array) -> jax.Array:
    """bool `[B, H, num_q, num_k]`, what lies past the diagonal left out."""
    mask = lists.to_mask(-(-k.shape[1] // lists.block_k))
    _, last = visible_blocks(q.shape[1], k.shape[1], lists.block_q, lists.block_k, 0)
    mask = mask & (jnp.arange(mask.shape[-1]) <= last[:, None])
    mask = jnp.repeat(mask, q.shape[2] // mask.shape[1], axis=1)
    return jnp.broadcast_to(mask, (q.shape[0], *mask.shape[1:]))
