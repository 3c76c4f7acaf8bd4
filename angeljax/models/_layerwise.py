"""A decoder layer by layer, as `angeljax.compress_sequential` walks it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from angeljax import ops
from angeljax.attention.prefill import SparseAttention
from angeljax.models._entry import Entry, Reading
from angeljax.models.attention import attend_mask, causal_attention, dense_attention
from angeljax.models.rope import cos_sin
from pallas_kernels._fused import before

if TYPE_CHECKING:
    from angeljax.models.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class DecoderLayers:
    """The `angeljax.calibration.LayerwiseModel` of a language model.

    A batch is an array of tokens `[B, T]`, or a dict with `tokens` or `embeds` and, if
    need be, `mask` and `positions`, as `LanguageModel.apply` takes them. Sparse
    attention is replaced by dense attention.

    Attributes:
      model: the architecture.
    """

    model: LanguageModel
    # In the order of the forward pass.
    subsets = (
        r"attn/(q|k|v|qkv)_proj/.*",
        r"attn/o_proj/.*",
        r"mlp/(gate|up|gate_up)_proj/.*",
        r"mlp/down_proj/.*",
    )

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self.model.config.num_layers

    def layer_path(self, i: int) -> str:
        """`layers/3`, or `layers` of a stack."""
        return "layers" if self.model.scan_layers else f"layers/{i}"

    def embed(self, params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Embeddings `[B, T, D]`, and where the tokens stand."""
        given = batch if isinstance(batch, Mapping) else {"tokens": batch}
        odd = sorted(set(given) - {"tokens", "embeds", "mask", "positions"})
        if odd:
            raise ValueError(f"a batch has no entry {odd[0]!r}: use tokens and mask")
        mask, config = given.get("mask"), self.model.config
        read = Reading.of(
            config,
            given.get("tokens"),
            given.get("embeds"),
            given.get("positions"),
            None,
            mask,
        )
        order = Entry.of(config, read, None).order
        context = {"order": order}
        if read.positions is not None:
            # Rows come first in a context.
            axes = read.positions
            context["rotary"] = jnp.moveaxis(axes, 0, 1) if axes.ndim == 3 else axes
        if mask is not None:
            context["mask"] = mask
        if read.embeds is not None:
            return read.embeds.astype(self.model.dtype), context
        assert read.tokens is not None, "one of the two is given"
        table = params["embed_tokens"]["embedding"]
        return ops.embed(table, read.tokens, dtype=self.model.dtype), context

    def layer(self, params: Any, state: Any, context: Any, i: Any) -> jax.Array:
        """One block."""
        windows = self.model.config.windows
        order = context["order"]
        window = jnp.asarray(windows, jnp.int32)[i] if windows else 0
        rotary = context.get("rotary", jnp.maximum(order, 0))
        if rotary.ndim == 3:
            rotary = jnp.moveaxis(rotary, 1, 0)
        rotation = cos_sin(self.model.config, rotary)
        plain = "mask" not in context and not any(windows)
        fn = self.model.attention_fn
        if isinstance(fn, SparseAttention) or (fn is causal_attention and not plain):
            fn = dense_attention
        mask = attend_mask(order, order, window)
        return self.model.bind_block(params)(state, rotation, mask, None, fn)[0]

    def head(self, params: Any, state: Any, context: Any) -> jax.Array:
        """float32 logits."""
        del context
        config = self.model.config
        x = before(state, params["norm"]["scale"], config.norm_eps, None)
        if config.tied:
            return ops.attend(x, params["embed_tokens"]["embedding"])
        kernel = params["lm_head"]["kernel"]
        return ops.dot(x, kernel, preferred_element_type=jnp.float32)
