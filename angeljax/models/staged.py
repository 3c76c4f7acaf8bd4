"""Pruning behind a layer: the first layers read all tokens, the later ones fewer.

FastV (arXiv 2403.06764) drops vision tokens behind layer 2 by the attention that the
last token pays them; PyramidDrop (arXiv 2410.17247) does so several times. Each run of
layers that read the same tokens is a stage with a cache of its own: a later stage holds
and reads only what was kept, so that decoding gets cheaper as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.attention.prefill import SparseAttention
from angeljax.models.cache import KVCache
from angeljax.models.rope import cos_sin
from angeljax.tokens import (
    Prompt,
    Pruned,
    apply_selection,
    last_token_attention,
    token_positions,
)
from angeljax.tokens._signals import PruneFn, choose
from angeljax.tokens.apply import PositionPolicy

if TYPE_CHECKING:
    from angeljax.models.language_model import LanguageModel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StagedCache:
    """One `KVCache` for each run of layers that read the same tokens.

    `LanguageModel.apply` and `decode_step` take it as they take a `KVCache`.

    Attributes:
      stages: the caches, of fewer slots from one to the next.
      starts: the first layer of each stage.
    """

    stages: tuple[KVCache, ...]
    starts: tuple[int, ...] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StagedPrefill:
    """What `prefill_pruned` returns.

    Attributes:
      logits: float32 `[B, 1, V]`, after each row's last token.
      cache: for decoding; `generate_after` takes both.
      pruned: of the last pruning. The `embeds` of its prompt are hidden states.
    """

    logits: jax.Array
    cache: StagedCache
    pruned: Pruned


def prefill_pruned(
    model: LanguageModel,
    params: dict[str, Any],
    prompt: Prompt,
    where: Any,
    prune: PruneFn | Sequence[PruneFn],
    *,
    layer: int | Sequence[int],
    room: int,
    position_policy: PositionPolicy = "keep",
    groups: jax.Array | np.ndarray | None = None,
) -> StagedPrefill:
    """Reads a prompt and prunes vision tokens on the way through the layers.

    Args:
      model: the architecture, with dense attention.
      params: its param tree, compressed or not.
      prompt: `[B, L]`, of which `embeds`, `mask`, `positions` and `deepstack` are read.
        The last real token of a row is text; padding may stand on either side.
      where: where the vision tokens stand: spans, or positions in which L is no token;
        `token_positions` makes them of a mask.
      prune: `prune(hidden [B, N, D], ...)` -> `Selection`, such as
        `recipe.tokens.prune_fn()`; one for all layers or one for each. It is given
        those of these that it has parameters for: `mask` bool `[B, N]`; `attn` float32
        `[B, N]`, what the last text token pays to the vision tokens in the last layer
        that read them all, softmax over these alone, mean over heads, as in
        AngelSlim's FastV; `keys` `[B, N, Hkv * head_dim]`, rotated, of that layer;
        `text` `[B, L, D]`, hidden states of text, zeros elsewhere; `groups`.
      layer: how many layers read all tokens, from 1; several in ascending order.
      room: slots for tokens to be decoded.
      position_policy: see `apply_selection`; of the layers behind a pruning.
      groups: which image each vision token belongs to, int32 `[N]` or `[B, N]`.

    Returns:
      A `StagedPrefill`.

    Raises:
      ValueError: a layer that is not there, sparse attention, or fields of the prompt
        that do not go together.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.models import DecoderConfig, LanguageModel, prefill_pruned
      >>> from angeljax.tokens import Prompt, Selection
      >>> model = LanguageModel(DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=3,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... ))
      >>> def most_attended(hidden, *, attn):
      ...     return Selection.of(jax.lax.top_k(attn, 2)[1], attn.shape[-1])
      >>> out = jax.eval_shape(
      ...     lambda params, embeds: prefill_pruned(
      ...         model, params, Prompt(embeds=embeds), (1, 9), most_attended,
      ...         layer=2, room=4,
      ...     ),
      ...     model.abstract(), jax.ShapeDtypeStruct((1, 12, 16), jnp.float32),
      ... )
      >>> [cache.k[0].shape for cache in out.cache.stages]  # 12 + 4 slots, 12 - 6 + 4
      [(1, 1, 16, 8), (1, 1, 10, 8)]
    """
    layers = (layer,) if isinstance(layer, int) else tuple(layer)
    prunes = tuple(prune) if isinstance(prune, Sequence) else (prune,) * len(layers)
    _check(model, layers, prunes, prompt)
    at = token_positions(where, length=prompt.length)
    at = jnp.broadcast_to(at, (len(prompt.embeds), at.shape[-1]))
    if groups is not None:
        # A NumPy array stays one: then the methods can count the groups.
        host = isinstance(groups, np.ndarray)
        groups = (np if host else jnp).broadcast_to(groups, at.shape)
    prompt = Prompt(
        embeds=prompt.embeds,
        mask=prompt.real(),
        positions=prompt.where_they_stand(),
        deepstack=tuple(_beside(x, at, prompt.length) for x in prompt.deepstack),
    )
    caches: list[KVCache] = []
    after: jax.Array | None = None
    for start, end, fn in zip((0, *layers), layers, prunes, strict=False):
        run = _Run(model, params, prompt, after, room)
        before, first = run(prompt.embeds, start, end - 1)
        x, second = run(before, end - 1, end)
        caches.append(_join(first, second))
        chosen = choose(
            fn,
            _take(x, at),
            mask=_take(prompt.real(), at),
            attn=run.attention(before, second, at, end - 1),
            text=jnp.where(_is_text(prompt, at)[..., None], x, 0),
            keys=_keys(second, at),
            groups=groups,
        )
        short = apply_selection(
            chosen,
            dataclasses.replace(prompt, embeds=x),
            at,
            position_policy=position_policy,
        )
        prompt, at, after = short.prompt, short.vision, short.next_position
        if groups is not None:
            groups = _take(jnp.asarray(groups), chosen.indices)
    x, last = _Run(model, params, prompt, after, room)(
        prompt.embeds, layers[-1], model.config.num_layers
    )
    assert last is not None, "there are layers behind the last pruning"
    decoder = model.bind(params)
    end_of_row = jnp.max(_numbers(prompt.real()), axis=-1, keepdims=True)
    return StagedPrefill(
        logits=decoder.head(decoder.norm(_take(x, end_of_row))),
        cache=StagedCache((*caches, last), (0, *layers)),
        pruned=dataclasses.replace(short, prompt=dataclasses.replace(prompt, embeds=x)),
    )


def apply_staged(
    model: LanguageModel,
    params: dict[str, Any],
    cache: StagedCache,
    tokens: jax.Array | None = None,
    *,
    embeds: jax.Array | None = None,
    mask: jax.Array | None = None,
    last_only: bool = False,
) -> tuple[jax.Array, StagedCache]:
    """`LanguageModel.apply` after a prefill in stages: every stage reads the tokens."""
    decoder = model.bind(params)
    if embeds is None:
        assert tokens is not None, "one of the two is given"
        embeds = decoder.embed(tokens)
    x, stages = embeds, []
    ends = (*cache.starts[1:], model.config.num_layers)
    for start, end, stage in zip(cache.starts, ends, cache.stages, strict=True):
        part, own = _part(model, params, start, end)
        x, new = part.bind(own).hidden(embeds=x, mask=mask, cache=stage)
        assert new is not None, "a cache went in"
        stages.append(new)
    x = x[:, -1:] if last_only else x
    logits = decoder.head(decoder.norm(x))
    return logits, StagedCache(tuple(stages), cache.starts)


class _Run:
    """Some layers of a model over a whole prompt."""

    def __init__(
        self,
        model: LanguageModel,
        params: dict[str, Any],
        prompt: Prompt,
        after: jax.Array | None,
        room: int,
    ) -> None:
        self.model, self.params, self.prompt = model, params, prompt
        self.after, self.room = after, room

    def __call__(
        self, x: jax.Array, start: int, end: int
    ) -> tuple[jax.Array, KVCache | None]:
        if start == end:
            return x, None
        model, own = _part(self.model, self.params, start, end)
        prompt = self.prompt
        return model.bind(own).hidden(
            embeds=x,
            mask=prompt.mask,
            positions=prompt.positions,
            deepstack=prompt.deepstack[start:end],
            next_position=self.after,
            cache=model.init_cache(len(x), prompt.length + self.room),
            start=0,
        )

    def attention(
        self, x: jax.Array, cache: KVCache | None, at: jax.Array, layer: int
    ) -> jax.Array:
        """What the last text token pays to vision tokens in a layer, float32 `[B, N]`.

        Args:
          x: `[B, L, D]`, what the layer reads.
          cache: of this layer alone.
          at: int32 `[B, N]`, the vision tokens.
          layer: its number.
        """
        assert cache is not None, "the layer has run"
        prompt, config = self.prompt, self.model.config
        text = _is_text(prompt, at)
        last = jnp.maximum(jnp.max(_numbers(text), axis=-1, keepdims=True), 0)
        positions = prompt.where_they_stand()
        if positions.ndim == 3:
            positions = jax.vmap(lambda axis: _take(axis, last))(positions)
        else:
            positions = _take(positions, last)
        tree = self.params["layers"]
        tree = (
            jax.tree.map(lambda leaf: leaf[layer], tree)
            if self.model.scan_layers
            else _numbered(tree)[layer]
        )
        block = self.model.bind_block(tree)
        rotation = cos_sin(config, positions)
        q, _, _ = block.attn.project(_take(x, last), rotation, block.attn_norm)
        layers: Any = cache.k  # of one layer, whichever form the cache has
        k = jnp.swapaxes(layers[0], 1, 2)
        there = _take(prompt.real(), at)
        return last_token_attention(q[:, 0], _take(k, at), mask=there)


def _part(
    model: LanguageModel, params: dict[str, Any], start: int, end: int
) -> tuple[LanguageModel, dict[str, Any]]:
    """The model of layers `start` to `end` and its params."""
    config = dataclasses.replace(
        model.config,
        num_layers=end - start,
        windows=model.config.windows[start:end],
    )
    layers = params["layers"]
    if model.scan_layers:
        own = jax.tree.map(lambda x: x[start:end], layers)
    else:
        numbered = _numbered(layers)
        own = {i: numbered[start + i] for i in range(end - start)}
    return dataclasses.replace(model, config=config), {**params, "layers": own}


def _numbered(layers: dict[Any, Any]) -> dict[int, Any]:
    """Checkpoints and JSON turn the numbers of layers into strings."""
    return {int(i): layer for i, layer in layers.items()}


def _join(first: KVCache | None, second: KVCache | None) -> KVCache:
    """One cache of two runs over the same tokens; the first may be of no layer."""
    assert second is not None, "a run of layers has a cache"
    if first is None:
        return second

    def both(a: Any, b: Any) -> Any:
        return (*a, *b) if isinstance(a, tuple) else jnp.concatenate([a, b])

    return dataclasses.replace(
        first, k=both(first.k, second.k), v=both(first.v, second.v)
    )


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """`[B, L, ...]` at int32 `[B, M]`, zeros where the index is L."""
    shape = index.shape + (1,) * (x.ndim - 2)
    return jnp.take_along_axis(x, index.reshape(shape), 1, mode="fill", fill_value=0)


def _keys(cache: KVCache | None, at: jax.Array) -> jax.Array:
    """Keys `[B, N, Hkv * head_dim]` of the only layer of a cache."""
    assert cache is not None, "the layer has run"
    layers: Any = cache.k
    k = _take(jnp.swapaxes(layers[0], 1, 2), at)
    return k.reshape(*at.shape, -1)


def _beside(plane: jax.Array, at: jax.Array, length: int) -> jax.Array:
    """A DeepStack plane beside the sequence, `[B, L, D]`."""
    if plane.shape[1] == length:
        return plane
    out = jnp.zeros((plane.shape[0], length, plane.shape[-1]), plane.dtype)
    return out.at[jnp.arange(len(at))[:, None], at].set(plane, mode="drop")


def _is_text(prompt: Prompt, at: jax.Array) -> jax.Array:
    """bool `[B, L]`: real tokens that are not among `at`."""
    rows = jnp.arange(len(at))[:, None]
    return prompt.real().at[rows, at].set(False, mode="drop")


def _numbers(mask: jax.Array) -> jax.Array:
    """int32 `[B, L]`: its place where the mask is True, else -1."""
    return jnp.where(mask, jnp.arange(mask.shape[-1], dtype=jnp.int32), -1)


def _check(
    model: LanguageModel,
    layers: tuple[int, ...],
    prunes: tuple[PruneFn, ...],
    prompt: Prompt,
) -> None:
    count = model.config.num_layers
    ascending = all(a < b for a, b in zip(layers, layers[1:], strict=False))
    if not layers or not ascending or not 1 <= layers[0] <= layers[-1] < count:
        raise ValueError(
            f"layer={layers if len(layers) != 1 else layers[0]}: the first layers that "
            f"read all tokens are 1 to {count - 1} of this model"
            + ("" if ascending else ", in ascending order")
        )
    if len(prunes) != len(layers):
        raise ValueError(f"{len(prunes)} prune functions for {len(layers)} layers")
    if isinstance(model.attention_fn, SparseAttention):
        raise ValueError(
            "pruning behind a layer needs the dense attention_fn: sparse attention "
            "counts layers and tokens of the whole model"
        )
    if model.kv_cache is not None:
        raise ValueError(
            "pruning behind a layer looks at the keys as they are: use a model with "
            "kv_cache=None"
        )
    if prompt.embeds.ndim != 3:
        raise ValueError(f"Prompt.embeds must be [B, L, D], not {prompt.embeds.shape}")
