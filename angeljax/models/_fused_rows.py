"""Rounds of decoding in six kernels a layer; see `FusedRows`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from angeljax._transposed import TransposedTensor
from angeljax.attention.prefill import SparseAttention
from angeljax.models.attention import causal_attention, dense_attention
from angeljax.models.rope import cos_sin
from angeljax.models.rows import (
    RowCache,
    RowInputs,
    Rows,
    entry_of,
    masks_of,
    which_layers,
)
from pallas_kernels import rows_attention, skinny_matmul
from pallas_kernels._devices import implementation_for
from pallas_kernels.rows_attention import Held
from pallas_kernels.skinny_matmul.mosaic_gpu import refused as skinny_refused


@dataclasses.dataclass(frozen=True)
class FusedRows:
    """How a `LanguageModel` reads few tokens of each row: six kernels a layer.

    Where up to 16 tokens of a row are read, as in rounds of plain and of speculative
    decoding, most of the time goes into starting kernels. Here they are: norm and
    queries, keys and values; rotation, cache and attention by parts of the cache, and
    their sum; output and residual; norm and gated MLP; its output and residual. Longer
    pieces of text go the usual way, and so does all with a cache of more than 8192
    slots. Only Hopper GPUs have the kernels: elsewhere XLA computes the same, and would
    compute the layers sooner.

    What a token gets does not depend on how many are read with it, so that the text of
    speculative decoding by chains equals that of plain decoding in bfloat16 as well.
    (Tokens of a tree lie in other slots, and sums over slots are in their order.) It is
    not bit for bit what a model without `FusedRows` gives, as that rounds elsewhere.

    It serves dense weights of the model's dtype with fused projections and unrolled
    layers, RMS norms, SiLU gates, with or without biases and norms of queries and keys
    (Llama, Mistral, Qwen2, Qwen3, SmolLM).

    Attributes:
      implementation: of `pallas_kernels.skinny_matmul` and `rows_attention`, and of
        `top_logits` for what is drafted and verified.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.models import (
      ...     DecoderConfig, FusedRows, LanguageModel, prepare_decoder
      ... )
      >>> from angeljax.speculative import PromptLookup, generate
      >>> model = LanguageModel(DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=1,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=32,
      ... ))
      >>> params = model.init(jax.random.key(0))
      >>> ready = prepare_decoder(model, params, rows=FusedRows())
      >>> done = generate(*ready, [[1, 2]], drafter=PromptLookup(2), max_new_tokens=3)
      >>> len(done.tokens[0])
      3
    """

    implementation: str | None = None

    # Tokens of a row that are read this way, and slots of the cache.
    MOST, SLOTS = 16, 8192

    @classmethod
    def reads(cls, mask: jax.Array) -> bool:
        """Whether tokens with this mask, `[B, 1, T, S]`, are read this way."""
        return mask.shape[2] <= cls.MOST and mask.shape[3] <= cls.SLOTS

    def check(self, model: Any, params: dict[str, Any] | None = None) -> None:
        """Refuses what the kernels do not serve.

        Args:
          model: a `LanguageModel`.
          params: its tree; None leaves out what depends on it.

        Raises:
          ValueError: says in one line what is in the way.
        """
        why = _config_refused(model) or (params and _params_refused(model, params))
        if why:
            raise ValueError(f"rows=FusedRows() cannot serve this model: {why}")


def quickest_rows(model: Any, params: dict[str, Any]) -> FusedRows | None:
    """`FusedRows()` where its kernels serve a model on the current device, else None.

    Args:
      model, params: as `prepare_decoder` returns them.
    """
    if implementation_for() != "mosaic_gpu" or model.dtype != jnp.bfloat16:
        return None
    rows, config = FusedRows(), model.config
    try:
        rows.check(model, params)
    except ValueError:
        return None
    module = model.bind(params)
    if module.lm_head is None:
        weights = [TransposedTensor(module.embed_tokens.embedding[...])]
    else:
        weights = [module.lm_head.kernel[...]]
    for layer in module.layers:
        both = layer.attn, layer.mlp
        names = ("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj")
        weights += [
            getattr(part, name).kernel[...]
            for part, own in zip(both, names, strict=True)
            for name in own
        ]
    served = config.head_dim in (64, 128) and not any(map(_not_served, weights))
    return rows if served else None


def _not_served(weight: Any) -> str | None:
    """Why `skinny_matmul` has no kernel for a matrix `[K, N]`."""
    transposed = isinstance(weight, TransposedTensor)
    k, n = weight.shape
    return skinny_refused(k, n, weight.dtype, transposed)


_DENSE = (TransposedTensor, jax.Array, jax.ShapeDtypeStruct, np.ndarray)


def _config_refused(model: Any) -> str | None:
    config, fn = model.config, model.attention_fn
    if not model.fused:
        return "its projections are not fused (use prepare_decoder)"
    if model.scan_layers:
        return "its layers are one stack (use scan_layers=False and unstack_layers)"
    if config.activation != "silu":
        return f"its MLP has the activation {config.activation!r}, not 'silu'"
    dim = config.head_dim
    if dim & (dim - 1) or not 32 <= dim <= 256:
        return f"heads of {dim} features, and not a power of two from 32 to 256"
    if fn not in (dense_attention, causal_attention):
        if not isinstance(fn, SparseAttention):
            return "it has an attention_fn of its own"
    return None


def _params_refused(model: Any, params: dict[str, Any]) -> str | None:
    module = model.bind(params)
    for i, layer in enumerate(module.layers):
        linears = {
            "qkv_proj": layer.attn.qkv_proj,
            "o_proj": layer.attn.o_proj,
            "gate_up_proj": layer.mlp.gate_up_proj,
            "down_proj": layer.mlp.down_proj,
        }
        for name, linear in linears.items():
            if why := _refused(linear.kernel[...], model.dtype):
                return f"{name} of layer {i} is {why}"
    (table,) = model.head_params(params).values()
    why = _refused(table, model.dtype)
    return why and f"the head is {why}"


def _refused(weight: Any, dtype: Any) -> str | None:
    if not isinstance(weight, _DENSE):
        return "not dense"
    if weight.dtype != jnp.dtype(dtype):
        return f"{weight.dtype} and the model {jnp.dtype(dtype)}"
    return None


def _stored(weight: Any) -> dict[str, Any]:
    """The arguments of `skinny_matmul` for a matrix `[K, N]`."""
    if isinstance(weight, TransposedTensor):
        return {"w": weight.array, "transposed": True}
    return {"w": weight}


def read_fused(
    module: Any,
    cache: RowCache,
    tokens: jax.Array,
    *,
    positions: jax.Array,
    slots: jax.Array,
    mask: jax.Array,
    key_positions: jax.Array | None,
    layers: Sequence[int] | None,
    hidden: Sequence[int],
    inputs: RowInputs | None,
    implementation: str | None,
) -> Rows:
    """`read_rows` for up to 16 tokens of each row."""
    config = module.config
    run, wanted = which_layers(config, layers, hidden)
    masks, windows = masks_of(config, positions, mask, key_positions)
    x, planes, rotary, cache = entry_of(module, cache, tokens, positions, inputs)
    cos, sin = cos_sin(config, rotary)
    turn = cos[:, :, 0, 0], sin[:, :, 0, 1]
    k: list[Any] = list(cast(Any, cache.k))
    v: list[Any] = list(cast(Any, cache.v))
    held: Any = cache.held
    outputs = {}

    def product(x: jax.Array, linear: Any, **around: Any) -> jax.Array:
        bias = None if linear.bias is None else linear.bias[...]
        around |= _stored(linear.kernel[...])
        return skinny_matmul(x, bias=bias, implementation=implementation, **around)

    for i in run:
        layer = module.layers[i]
        attn, mlp = layer.attn, layer.mlp
        norms: dict[str, Any] = {}
        if attn.q_norm is not None:
            norms = {"q_norm": attn.q_norm.scale[...], "k_norm": attn.k_norm.scale[...]}
            norms["norm_eps"] = attn.q_norm.eps
        qkv = product(x, attn.qkv_proj, **layer.attn_norm.fused)
        y, k[i], v[i] = rows_attention(
            *(qkv, *turn, masks[windows[i]], slots, k[i], v[i]),
            held=None if held is None else Held(held.k[i], held.v[i], held.valid),
            implementation=implementation,
            **norms,
        )
        x = product(y, attn.o_proj, residual=x)
        y = product(x, mlp.gate_up_proj, swiglu=True, **layer.mlp_norm.fused)
        x = product(y, mlp.down_proj, residual=x)
        x = x if i >= len(planes) else x + planes[i].astype(x.dtype)
        outputs[i] = x
    found = tuple(outputs[i] for i in wanted)
    return Rows(x, found, dataclasses.replace(cache, k=tuple(k), v=tuple(v), held=None))


def head_fused(
    module: Any, final: jax.Array, *, implementation: str | None
) -> jax.Array:
    """float32 logits `[B, T, V]`, with the final norm in the same kernel."""
    if module.lm_head is None:
        weight = {"w": module.embed_tokens.embedding[...], "transposed": True}
    else:
        weight = _stored(module.lm_head.kernel[...])
    return skinny_matmul(
        final,
        **weight,
        **module.norm.fused,
        out_dtype=jnp.float32,
        implementation=implementation,
    )
