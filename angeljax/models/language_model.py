"""`LanguageModel`: a decoder as a pure function of its param tree."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from angeljax._kv_cache_options import KVCacheOptions
from angeljax.attention.prefill import SparseAttention
from angeljax.kv_cache._scales import kv_scales
from angeljax.models._fused_rows import FusedRows, head_fused, read_fused
from angeljax.models._layerwise import DecoderLayers
from angeljax.models.attention import dense_attention
from angeljax.models.cache import KVCache, init_cache
from angeljax.models.config import DecoderConfig
from angeljax.models.decoder import Decoder
from angeljax.models.features import Features
from angeljax.models.layers import AttentionFn, Block
from angeljax.models.rows import RowCache, RowInputs, Rows, init_rows, read_rows
from angeljax.models.staged import StagedCache, apply_staged


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """The architecture without parameters: hashable, so that `jit` can close over it.

    `params` is everywhere a nested dict of arrays or QTensors, such as `init` gives:
    `{"embed_tokens": {"embedding": ...}, "layers": {0: {"attn": ...}}, ...}`.

    Attributes:
      config: sizes and switches.
      dtype: of activations.
      scan_layers: whether the layers are one stack; see `Decoder`.
      attention_fn: see `Decoder`.
      fused: whether the params have one kernel for q, k and v and one for gate and up;
        see `fuse_projections`.
      kv_cache: how `init_cache` stores keys and values; None for `dtype`. `logits` then
        are those of tokens read through such a cache.
      rows: how `read_rows` and `head_rows` read few tokens; None as all others.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> config = DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=2,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... )
      >>> model = LanguageModel(config)
      >>> params = model.init(jax.random.key(0))
      >>> model.logits(params, jnp.zeros((1, 4), jnp.int32)).shape
      (1, 4, 32)
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    scan_layers: bool = False
    attention_fn: AttentionFn = dense_attention
    fused: bool = False
    kv_cache: KVCacheOptions | None = None
    rows: FusedRows | None = None

    def module(self, rngs: nnx.Rngs, param_dtype: Any = jnp.float32) -> Decoder:
        """A `Decoder` with fresh parameters."""
        return Decoder(
            self.config,
            rngs=rngs,
            dtype=self.dtype,
            param_dtype=param_dtype,
            scan_layers=self.scan_layers,
            attention_fn=self.attention_fn,
            fused=self.fused,
        )

    def init(self, key: jax.Array, param_dtype: Any = jnp.float32) -> dict[str, Any]:
        """Random parameters as a nested dict."""
        module = self.module(nnx.Rngs(params=key), param_dtype)
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    def abstract(self, param_dtype: Any = jnp.float32) -> dict[str, Any]:
        """The tree of `init` with `jax.ShapeDtypeStruct` leaves; takes no memory."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0), param_dtype))

    def bind(self, params: dict[str, Any]) -> Decoder:
        """The nnx module with these parameters.

        Raises:
          ValueError: a parameter is missing; says so if the tree is fused and the model
            is not, or the other way round.
        """
        return bind_params(_skeleton(self), params, self._missing)

    def bind_block(self, layer: dict[str, Any]) -> Block:
        """One layer as an nnx module: `layer` is a numbered subtree, or one of a stack.

        Raises:
          ValueError: as `bind`.
        """
        return bind_params(_block_skeleton(self), layer, self._missing)

    def _missing(self, path: tuple[Any, ...], values: dict[Any, Any]) -> str:
        name = "/".join(map(str, path))
        parts = {part for other in values for part in other}
        if self.fused and {"q_proj", "gate_proj"} & parts and path[-2] in _FUSED:
            return (
                f"no {name} in the params: the model is fused and they are not; use "
                "fuse_projections(params), or a model with fused=False"
            )
        if not self.fused and set(_FUSED) & parts and path[-2] not in parts:
            return (
                f"no {name} in the params: they are fused and the model is not; use "
                "a model with fused=True, or split_projections(params, config)"
            )
        return f"no {name} in the params"

    def init_cache(
        self, batch: int, slots: int, params: dict[str, Any] | None = None
    ) -> KVCache:
        """An empty cache in the form that suits the layers, in `dtype` or `kv_cache`.

        With sparse decoding it has pages, and slots that fill them.

        Args:
          batch: rows.
          slots: tokens that a row can hold, prompt and padding included.
          params: the param tree, which holds the static scales of `kv_cache`, if it has
            any; see `angeljax.kv_cache.calibrate_kv`.

        Raises:
          ValueError: scales that are needed are missing, or `kv_cache` does not go with
            the model or with sparse decoding.
        """
        config, fn, size = self.config, self.attention_fn, None
        decode = fn.decode if isinstance(fn, SparseAttention) else None
        if decode is not None and decode.helps(slots):
            size = decode.page_size
            slots += -slots % size
        scales = None
        if (options := self.kv_cache) is not None:
            layers, heads = config.num_layers, config.num_kv_heads
            scales = kv_scales(params, options, layers, heads)
        return init_cache(
            config,
            batch,
            slots,
            self.dtype,
            stacked=self.scan_layers,
            page_size=size,
            kv_cache=options,
            scales=scales,
        )

    def apply(
        self,
        params: dict[str, Any],
        tokens: jax.Array | None = None,
        *,
        embeds: jax.Array | None = None,
        positions: jax.Array | None = None,
        deepstack: Sequence[jax.Array] | None = None,
        next_position: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: KVCache | StagedCache | None = None,
        last_only: bool = False,
        start: int | None = None,
        total: int | None = None,
    ) -> tuple[jax.Array, Any]:
        """`Decoder.__call__` as a pure function.

        Also goes on after `prefill_pruned`, with its cache: only `tokens` or `embeds`,
        `mask` and `last_only` are then looked at.
        """
        if isinstance(cache, StagedCache):
            return apply_staged(
                self,
                params,
                cache,
                tokens,
                embeds=embeds,
                mask=mask,
                last_only=last_only,
            )
        return self.bind(params)(
            tokens,
            embeds=embeds,
            positions=positions,
            deepstack=deepstack,
            next_position=next_position,
            mask=mask,
            cache=cache,
            last_only=last_only,
            start=start,
            total=total,
        )

    def init_rows(self, batch: int, slots: int) -> RowCache:
        """An empty cache for rows that advance at different speeds, in `dtype`."""
        return init_rows(
            self.config, batch, slots, self.dtype, stacked=self.scan_layers
        )

    def read_rows(
        self,
        params: dict[str, Any],
        cache: RowCache,
        tokens: jax.Array,
        *,
        positions: jax.Array,
        slots: jax.Array,
        mask: jax.Array,
        key_positions: jax.Array | None = None,
        layers: Sequence[int] | None = None,
        hidden: Sequence[int] = (),
        inputs: RowInputs | None = None,
    ) -> Rows:
        """Reads T tokens of each row where that row stands.

        Args:
          params: the param tree.
          cache: of `init_rows`. Its keys and values are written before they are read.
          tokens: int32 `[B, T]`.
          positions: int32 `[B, T]`, rotary positions.
          slots: int32 `[B]`, where each row's T entries go; `slots + T` must not
            exceed the slots of the cache.
          mask: bool `[B, 1, T, slots]`, what each token sees, itself included.
          key_positions: int32 `[B, slots]`, positions of the slots for layers with a
            sliding window; default the number of the slot.
          layers: numbers of the layers that run; default all.
          hidden: numbers of the layers whose outputs are wanted, from 0.
          inputs: what is read in place of the embeddings of `tokens`; all layers run.

        Returns:
          `Rows`: the last layer's output, what was asked for, and the cache.

        Raises:
          ValueError: a layer does not exist, or is wanted and does not run; or `rows`
            cannot serve the model.
        """
        read: Any = read_rows
        if self.rows is not None:
            self.rows.check(self, params)
            if FusedRows.reads(mask):
                how = self.rows.implementation
                read = functools.partial(read_fused, implementation=how)
        return read(
            self.bind(params),
            cache,
            tokens,
            positions=positions,
            slots=slots,
            mask=mask,
            key_positions=key_positions,
            layers=layers,
            hidden=hidden,
            inputs=inputs,
        )

    def head_rows(self, params: dict[str, Any], final: jax.Array) -> jax.Array:
        """float32 logits `[B, T, V]` of what `read_rows` calls `final`."""
        module = self.bind(params)
        if self.rows is not None and final.shape[1] <= FusedRows.MOST:
            self.rows.check(self, params)
            how = self.rows.implementation
            return head_fused(module, final, implementation=how)
        return module.head(module.norm(final))

    def embed(self, params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        """Embeddings `[B, T, hidden_size]` of int32 tokens `[B, T]`."""
        return self.bind(params).embed(tokens)

    def logits(self, params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        """float32 next-token logits `[B, T, V]` of int32 tokens `[B, T]`.

        With `kv_cache` the tokens go through a cache, so that they attend to the keys
        and values that it would hold: what decoding gives, in one parallel pass.
        """
        if self.kv_cache is None:
            return self.apply(params, tokens)[0]
        batch, length = tokens.shape
        cache = self.init_cache(batch, length, params)
        return self.apply(params, tokens, cache=cache, start=0, total=length)[0]

    def features(
        self,
        params: dict[str, Any],
        tokens: jax.Array,
        *,
        mask: jax.Array | None = None,
        hidden: Sequence[int] = (),
        relations: Sequence[int] = (),
        remat: Any = False,
    ) -> Features:
        """Hidden states instead of logits, for training losses.

        Args:
          params: the param tree.
          tokens: int32 `[B, T]`.
          mask: bool `[B, T]`, True for real tokens.
          hidden: numbers of the layers whose outputs are wanted, from 0.
          relations: numbers of the layers whose queries, keys and values are wanted.
          remat: True computes the inside of each layer again in the gradient; a policy
            of `jax.checkpoint_policies` keeps some of it.

        Returns:
          `Features`; `final` times `head_params(params)` are the logits.

        Raises:
          ValueError: a layer does not exist.
        """
        module = self.bind(params)
        return module.features(
            tokens, mask=mask, hidden=hidden, relations=relations, remat=remat
        )

    def layerwise(self) -> DecoderLayers:
        """The model layer by layer, for `angeljax.compress_sequential`."""
        return DecoderLayers(self)

    def head_params(self, params: dict[str, Any]) -> dict[str, Any]:
        """`{"embedding": [V, D]}` of a tied head, else `{"kernel": [D, V]}`."""
        return params["embed_tokens" if self.config.tied else "lm_head"]


_FUSED = ("qkv_proj", "gate_up_proj")


@functools.lru_cache(maxsize=16)
def _skeleton(model: LanguageModel) -> tuple[Any, Any]:
    abstract = nnx.eval_shape(lambda: model.module(nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    return graphdef, nnx.filter_state(state, nnx.Param)


@functools.lru_cache(maxsize=16)
def _block_skeleton(model: LanguageModel) -> tuple[Any, Any]:
    def block() -> Block:
        return Block(
            model.config, fused=model.fused, dtype=jnp.float32, rngs=nnx.Rngs(0)
        )

    graphdef, state = nnx.split(nnx.eval_shape(block))
    return graphdef, nnx.filter_state(state, nnx.Param)


def bind_params(
    skeleton: tuple[Any, Any],
    params: dict[str, Any],
    missing: Callable[[Any, Any], str] | None = None,
) -> Any:
    """An nnx module with the given parameters.

    Args:
      skeleton: its graph and its abstract parameters.
      params: nested dict of arrays or QTensors.
      missing: `(path, those that are there) -> message`, where one is missing.

    Raises:
      ValueError: a parameter is missing.
    """
    graphdef, state = skeleton
    values = _leaves_by_path(params)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        if path not in values:
            name = "/".join(map(str, path))
            what = f"no {name} in the params"
            raise ValueError(what if missing is None else missing(path, values))
        flat.append((path, variable.replace(values.pop(path))))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _leaves_by_path(params: Any, path: tuple[Any, ...] = ()) -> dict[Any, Any]:
    if not isinstance(params, dict):
        return {path: params}
    out = {}
    for key, value in params.items():
        # Checkpoints and JSON turn the numbers of layers into strings.
        key = int(key) if isinstance(key, str) and key.isdigit() else key
        out.update(_leaves_by_path(value, (*path, key)))
    return out


def stack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """From one subtree for each layer to one stack, for `scan_layers`.

    Args:
      params: a tree whose `layers` are numbered subtrees.

    Returns:
      The tree with one subtree `layers`; each of its leaves has a leading layer axis.

    Raises:
      ValueError: layers differ in structure or format.
    """
    layers = [params["layers"][i] for i in sorted(params["layers"], key=int)]
    structures: list[Any] = [jax.tree.structure(layer) for layer in layers]
    for i, structure in enumerate(structures):
        if structure != structures[0]:
            raise ValueError(f"layer {i} has other formats than layer 0: cannot stack")
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
    return {**params, "layers": stacked}


def unstack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `stack_layers`.

    Args:
      params: a tree with stacked `layers`.

    Returns:
      The tree with one subtree for each layer, under its number.
    """
    n = jax.tree.leaves(params["layers"])[0].shape[0]
    layers = {i: jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(n)}
    return {**params, "layers": layers}
