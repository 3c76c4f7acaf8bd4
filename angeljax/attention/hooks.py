"""Sparse prefill in other people's models: replacements of their attention functions.

Each factory gives a frozen callable with the arguments of the function that it stands
for. Prompts go through `sparse_attention`; calls with one query go to the original, so
a model's own decoding is untouched. What a sparse kernel cannot do is refused.

A mask is looked at for its shape only: in `jit` its values are not known, and comparing
them would cost what sparsity saves. Masks must be causal. Where they are concrete, and
under `jax.experimental.checkify`, that is checked.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from angeljax.attention._selector import Selector
from angeljax.attention.prefill import Packing
from angeljax.attention.sparse import sparse_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hook:
    """What the three kinds have in common.

    Attributes:
      selector: names the blocks.
      layer, num_layers: which layer this is, for selectors that look at it.
      causal: attention is causal though neither a mask nor an argument says so; a
        prompt is then read without any mask `[T, T]`.
      padding: masks also leave out padding, on either side; by default they do not.
      dense_below, dense_above, mean_correction, implementation: see `sparse_attention`.
    """

    selector: Selector
    layer: int = 0
    num_layers: int = 1
    causal: bool = False
    padding: bool = False
    dense_below: int | None = None
    dense_above: float | None = None
    mean_correction: bool = False
    implementation: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.selector, Selector):
            raise ValueError(
                "selector must be one of angeljax.attention.selector(name), not a "
                f"{type(self.selector).__name__}"
            )

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: jax.Array | None,
        is_causal: bool,
        lengths: jax.Array | None = None,
        scale: float | None = None,
    ) -> jax.Array:
        """Sparse attention of q `[..., T, H, D]` on k and v `[..., T, Hkv, D]`."""
        lead, t = q.shape[:-3], q.shape[-3]
        if k.shape[-3] != t:
            raise ValueError(
                f"{t} queries on {k.shape[-3]} keys: sparse attention is for prompts "
                "that attend to themselves, not for cross-attention or chunks"
            )
        real = self._real(mask, q, is_causal or self.causal)
        if real is not None:
            real = jnp.broadcast_to(real, (*lead, t)).reshape(-1, t)
            lengths = real.sum(-1, dtype=jnp.int32)
        packing = Packing.of(real)
        q, k, v = (packing.pack(x.reshape(-1, *x.shape[-3:])) for x in (q, k, v))
        y = sparse_attention(
            q,
            k,
            v,
            self.selector,
            layer=self.layer,
            num_layers=self.num_layers,
            lengths=lengths,
            scale=scale,
            mean_correction=self.mean_correction,
            dense_below=self.dense_below,
            dense_above=self.dense_above,
            implementation=self.implementation,
        )
        return packing.unpack(y).reshape(*lead, *y.shape[1:])

    def _real(self, mask: Any, q: jax.Array, causal: bool) -> jax.Array | None:
        """bool `[..., T]`, tokens that are no padding; None if there is none."""
        t = q.shape[-3]
        if mask is None:
            if causal:
                return None
            raise ValueError(
                "attention without a mask sees all keys, and sparse attention is "
                "causal: pass a causal mask, or causal=True where the hook is made"
            )
        shape = jnp.shape(mask)
        keys_only = shape[-2:] == (1, t) and causal
        if len(shape) != q.ndim or (shape[-2:] != (t, t) and not keys_only):
            raise ValueError(
                f"mask {list(shape)} is none of a causal prompt: sparse attention of "
                f"{t} tokens takes [..., 1, {t}, {t}]"
            )
        if shape[-3] != 1:
            raise ValueError(
                f"mask {list(shape)} differs between heads, which sparse attention "
                "cannot: use one mask for all of them"
            )
        mask = jnp.asarray(mask)[..., 0, :, :].astype(bool)
        if keys_only and not self.padding:
            raise ValueError(
                f"mask {list(shape)} is one of padding: pass padding=True where the "
                "hook is made"
            )
        # What a token sees of itself says whether it is one.
        real = mask[..., 0, :]
        if not keys_only:
            real = jnp.diagonal(mask, axis1=-2, axis2=-1)
            self._check_values(mask, real)
        return real if self.padding else None

    def _check_values(self, mask: jax.Array, real: jax.Array) -> None:
        t = mask.shape[-1]
        causal = jnp.tril(jnp.ones((t, t), bool))
        if self.padding:
            # Of what padding sees nothing matters.
            some = real[..., None]
            fits = jnp.all(~some | (mask == causal & real[..., None, :]))
        else:
            fits = jnp.all(mask == causal)
        what = "causal but for padding" if self.padding else "causal"
        hint = "" if self.padding else "; where rows are padded pass padding=True"
        message = f"the mask is not {what}, and sparse attention is{hint}"
        if not isinstance(mask, jax.core.Tracer):
            if not bool(fits):
                raise ValueError(message)
            return
        checkify.debug_check(fits, message)


def _refuse(**given: tuple[Any, str]) -> None:
    for name, (wrong, instead) in given.items():
        if wrong:
            raise ValueError(f"sparse attention cannot do {name}: {instead}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinenAttention(Hook):
    """See `linen_attention_fn`."""

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: Any = None,
        mask: Any = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
    ) -> jax.Array:
        """As `flax.linen.dot_product_attention`."""
        if query.shape[-3] == 1:
            from flax import linen

            return linen.dot_product_attention(
                query,
                key,
                value,
                bias,
                mask,
                broadcast_dropout,
                dropout_rng,
                dropout_rate,
                deterministic,
                dtype,
                precision,
                module,
                force_fp32_for_softmax,
                None,
                qk_attn_weights_einsum,
                attn_weights_value_einsum,
            )
        einsum = qk_attn_weights_einsum or attn_weights_value_einsum
        _refuse(
            bias=(bias is not None, "use a mask"),
            dropout=(dropout_rate and not deterministic, "set dropout_rate=0"),
            sow_weights=(module is not None, "there are no weights [T, T] to keep"),
            einsum=(einsum is not None, "leave qk_attn_weights_einsum out"),
        )
        q, k, v = _promoted(query, key, value, dtype)
        return self.attend(q, k, v, mask, False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NnxAttention(Hook):
    """See `nnx_attention_fn`."""

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: Any = None,
        mask: Any = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
        **more: Any,
    ) -> jax.Array:
        """As `flax.nnx.dot_product_attention`."""
        if query.shape[-3] == 1:
            from flax import nnx

            return nnx.dot_product_attention(
                query,
                key,
                value,
                bias,
                mask,
                broadcast_dropout,
                dropout_rng,
                dropout_rate,
                deterministic,
                dtype,
                precision,
                module,
                is_causal=is_causal,
                **more,
            )
        _refuse(
            bias=(bias is not None, "use a mask"),
            dropout=(dropout_rate and not deterministic, "set dropout_rate=0"),
            sow_weights=(module is not None, "there are no weights [T, T] to keep"),
            **{name: (True, "leave it out") for name in more},
        )
        q, k, v = _promoted(query, key, value, dtype)
        return self.attend(q, k, v, mask, is_causal)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JaxAttention(Hook):
    """See `jax_attention_fn`."""

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: Any = None,
        mask: Any = None,
        *,
        scale: float | None = None,
        is_causal: bool = False,
        query_seq_lengths: Any = None,
        key_value_seq_lengths: Any = None,
        local_window_size: Any = None,
        implementation: Any = None,
        return_residual: bool = False,
    ) -> jax.Array:
        """As `jax.nn.dot_product_attention`."""
        if query.shape[-3] == 1:
            original: Any = jax.nn.dot_product_attention
            return original(
                query,
                key,
                value,
                bias,
                mask,
                scale=scale,
                is_causal=is_causal,
                query_seq_lengths=query_seq_lengths,
                key_value_seq_lengths=key_value_seq_lengths,
                local_window_size=local_window_size,
                implementation=implementation,
                return_residual=return_residual,
            )
        lengths = key_value_seq_lengths
        _refuse(
            bias=(bias is not None, "use a mask"),
            local_window_size=(local_window_size is not None, "leave it out"),
            return_residual=(return_residual, "leave it out"),
            query_seq_lengths=(
                query_seq_lengths is not None and lengths is None,
                "pass key_value_seq_lengths, the same for both",
            ),
            key_value_seq_lengths=(
                lengths is not None and self.padding and mask is not None,
                "padding=True reads the padding from the mask: pass one of them",
            ),
        )
        return self.attend(query, key, value, mask, is_causal, lengths, scale)


def linen_attention_fn(selector: Selector, **options: Any) -> LinenAttention:
    """The `attention_fn` of `flax.linen.MultiHeadDotProductAttention`.

    Args:
      selector: names the blocks; see `angeljax.attention.selector`.
      **options: fields of `Hook`: `layer`, `num_layers`, `causal`, `padding`,
        `dense_below`, `dense_above`, `mean_correction`, `implementation`.

    Returns:
      A hashable callable. It raises a ValueError for a bias, dropout, kept weights, a
      mask that is not `[..., 1, T, T]`, and cross-attention.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from angeljax.attention import linen_attention_fn, selector
      >>> sparse = linen_attention_fn(selector("a_shape"), causal=True, dense_below=0)
      >>> layer = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=sparse)
      >>> x = jnp.ones((1, 256, 16))
      >>> y, _ = layer.init_with_output(jax.random.key(0), x)
      >>> y.shape
      (1, 256, 16)
    """
    return LinenAttention(selector=selector, **options)


def nnx_attention_fn(selector: Selector, **options: Any) -> NnxAttention:
    """The `attention_fn` of `flax.nnx.MultiHeadAttention`.

    Args:
      selector, **options: as for `linen_attention_fn`. A call with `is_causal=True`
        needs neither a mask nor `causal`.

    Returns:
      As `linen_attention_fn`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from angeljax.attention import nnx_attention_fn, selector
      >>> sparse = nnx_attention_fn(selector("a_shape"), dense_below=0)
      >>> layer = nnx.MultiHeadAttention(
      ...     num_heads=2, in_features=16, attention_fn=sparse, rngs=nnx.Rngs(0)
      ... )
      >>> layer(jnp.ones((1, 256, 16)), is_causal=True, decode=False).shape
      (1, 256, 16)
    """
    return NnxAttention(selector=selector, **options)


def jax_attention_fn(selector: Selector, **options: Any) -> JaxAttention:
    """A function in the shape of `jax.nn.dot_product_attention`.

    Args:
      selector, **options: as for `nnx_attention_fn`.

    Returns:
      As `linen_attention_fn`. `key_value_seq_lengths` are the real tokens of each row.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.attention import jax_attention_fn, selector
      >>> attend = jax_attention_fn(selector("a_shape"), dense_below=0)
      >>> x = jnp.ones((1, 256, 2, 8))
      >>> attend(x, x, x, is_causal=True).shape
      (1, 256, 2, 8)
    """
    return JaxAttention(selector=selector, **options)


def _promoted(q: Any, k: Any, v: Any, dtype: Any) -> Any:
    wanted = jnp.result_type(q, k, v) if dtype is None else dtype
    return tuple(x.astype(wanted) for x in (q, k, v))
