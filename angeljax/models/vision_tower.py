"""Vision towers of CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343) (nnx).

Transformers over the patches of an image with learned positions; CLIP's has a class
token and a norm before its layers. Every product with a weight goes through
`angeljax.ops`, and parameters lie under names such as `layers/0/attn/q_proj/kernel`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from angeljax import ops
from angeljax.models.config import ModelError
from angeljax.models.layers import LayerNorm, Linear
from angeljax.tokens import cls_attention, received_attention

_INIT = nnx.initializers.normal(0.02)
# Defaults of the fields that a config.json of the kind leaves out.
_DEFAULTS = {
    "clip_vision_model": {"image_size": 224, "patch_size": 32, "layer_norm_eps": 1e-5,
                          "hidden_act": "quick_gelu", "hidden_size": 768,
                          "intermediate_size": 3072, "num_hidden_layers": 12,
                          "num_attention_heads": 12},
    "siglip_vision_model": {"image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6,
                            "hidden_act": "gelu_pytorch_tanh", "hidden_size": 768,
                            "intermediate_size": 3072, "num_hidden_layers": 12,
                            "num_attention_heads": 12},
}  # fmt: skip
_FIELDS = {  # ours: name in config.json
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
}
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionTowerConfig:
    """Sizes of a CLIP or SigLIP vision tower.

    Attributes:
      model_type: "clip_vision_model" or "siglip_vision_model".
      hidden_size, intermediate_size, num_layers, num_heads: of the transformer.
      image_size, patch_size: pixels of the square image and of a patch.
      norm_eps: added to the variance in layer normalisation.
      activation: "quick_gelu", "gelu" or "gelu_pytorch_tanh".
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    norm_eps: float = 1e-6
    activation: str = "gelu_pytorch_tanh"

    def __post_init__(self) -> None:
        if self.model_type not in _DEFAULTS:
            raise ModelError(
                f"vision model_type {self.model_type!r} is not supported: use one of "
                f"{', '.join(_DEFAULTS)}"
            )
        for ours, theirs in _FIELDS.items():
            value = getattr(self, ours)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ModelError(
                    f"vision_config: {theirs} must be a positive integer, not {value!r}"
                )
        if self.image_size < self.patch_size:
            raise ModelError(
                f"vision_config: image_size={self.image_size} is smaller than a patch"
            )
        if self.hidden_size % self.num_heads:
            raise ModelError(
                f"vision_config: num_attention_heads={self.num_heads} does not divide "
                f"hidden_size={self.hidden_size}"
            )
        if self.activation not in _ACTIVATIONS:
            raise ModelError(
                f"vision_config: hidden_act {self.activation!r} is not supported: use "
                f"one of {', '.join(_ACTIVATIONS)}"
            )

    @property
    def class_token(self) -> bool:
        """Whether a class token precedes the patches."""
        return self.model_type == "clip_vision_model"

    @property
    def width(self) -> int:
        """Patches of a row of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.width**2

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> VisionTowerConfig:
        """Reads a Hugging Face `config.json`, or the `vision_config` in one.

        Raises:
          ModelError: a field asks for what is not supported.
        """
        data = data.get("vision_config") or data
        kind = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}.get(
            data.get("model_type", ""), data.get("model_type", "clip_vision_model")
        )
        full: dict[str, Any] = {**_DEFAULTS.get(kind, {}), **data}
        if full.get("num_channels", 3) != 3:
            raise ModelError("vision_config: num_channels must be 3")
        sizes: dict[str, Any]
        sizes = {ours: full.get(theirs) for ours, theirs in _FIELDS.items()}
        return cls(
            model_type=kind,
            norm_eps=full.get("layer_norm_eps", 1e-6),
            activation=full.get("hidden_act", "gelu"),
            **sizes,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionFeatures:
    """What a tower makes of a batch of images.

    Attributes:
      patches: `[B, N, D]` behind the layer that was asked for.
      class_token: `[B, D]`; None in SigLIP.
      attn: float32 `[B, N]` for each layer that was asked for: attention of the class
        token to the patches, or that each patch receives from all of them.
      keys: `[B, N, head_dim]`, mean over heads of the keys of the last of those layers;
        None if there are none.
    """

    patches: jax.Array
    class_token: jax.Array | None
    attn: tuple[jax.Array, ...] = ()
    keys: jax.Array | None = None


class VisionTower(nnx.Module):
    """From pixels to one vector for each patch.

    Args:
      config: sizes and kind.
      rngs: for the initial parameters.
      dtype: of activations.
      param_dtype: of the parameters.
      num_layers: how many layers there are; those behind the one whose output is read
        need no parameters. Default all of the configuration.
    """

    def __init__(
        self,
        config: VisionTowerConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        num_layers: int | None = None,
    ) -> None:
        around: dict[str, Any] = {"dtype": param_dtype, "rngs": rngs}
        self.config, self.dtype = config, dtype
        self.embed = PatchEmbed(config, **around)
        norm = functools.partial(
            LayerNorm, config.hidden_size, config.norm_eps, **around
        )
        self.pre_norm = norm() if config.class_token else None
        count = config.num_layers if num_layers is None else num_layers
        self.layers = nnx.List([VisionLayer(config, **around) for _ in range(count)])
        self.post_norm = norm() if count == config.num_layers else None

    def __call__(
        self,
        pixels: jax.Array,
        *,
        layer: int = -1,
        attention: tuple[int, ...] = (),
    ) -> VisionFeatures:
        """Features of images.

        Args:
          pixels: float `[B, 3, H, W]`, as a Hugging Face image processor gives them.
          layer: which of the hidden states, where 0 are the embeddings and -1 is behind
            the last layer, before the norm that follows. (`post_norm` is that norm.)
          attention: layers whose attention is wanted, from 0; negative ones count from
            the last of all, whether it runs or not.

        Returns:
          `VisionFeatures`.

        Raises:
          ValueError: another size of image, or a layer that is not there.
        """
        c, total = self.config, self.config.num_layers
        if pixels.ndim != 4 or pixels.shape[1:] != (3, c.image_size, c.image_size):
            raise ValueError(
                f"pixels must be [B, 3, {c.image_size}, {c.image_size}], not "
                f"{list(pixels.shape)}"
            )
        last = layers_run(layer, total)
        if last > len(self.layers):
            raise ValueError(f"layer={layer}: the tower has {len(self.layers)} layers")
        wanted = [n + total if n < 0 else n for n in attention]
        for given, number in zip(attention, wanted, strict=True):
            if not 0 <= number < last:
                raise ValueError(
                    f"attention of layer {given}: layers 0 to {last - 1} of {total} run"
                )
        x = self.embed(pixels.astype(self.dtype))
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        found: dict[int, tuple[jax.Array, jax.Array]] = {}
        for i in range(last):
            block = self.layers[i]
            if i in wanted:
                found[i] = block.attention(x, class_token=c.class_token)
            x = block(x)
        first = int(c.class_token)
        return VisionFeatures(
            patches=x[:, first:],
            class_token=x[:, 0] if first else None,
            attn=tuple(found[i][0] for i in wanted),
            keys=found[wanted[-1]][1] if wanted else None,
        )


class PatchEmbed(nnx.Module):
    """Patches as vectors, behind the class token, with their positions."""

    def __init__(self, c: VisionTowerConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        size, tokens = c.hidden_size, c.num_patches + c.class_token
        shape = (c.patch_size, c.patch_size, 3, size)  # columns, rows, colours
        self.kernel = nnx.Param(_INIT(rngs.params(), shape, dtype))
        make = functools.partial(nnx.initializers.zeros_init(), rngs.params())
        self.bias = None if c.class_token else nnx.Param(make((size,), dtype))
        token = _INIT(rngs.params(), (size,), dtype)
        self.class_token = nnx.Param(token) if c.class_token else None
        self.embedding = nnx.Param(_INIT(rngs.params(), (tokens, size), dtype))
        self.patch, self.width = c.patch_size, c.width

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """`[B, 3, H, W]` to `[B, N, D]` or `[B, 1 + N, D]`."""
        b, n, p = pixels.shape[0], self.width, self.patch
        whole = pixels[:, :, : n * p, : n * p]  # what is no whole patch is cut off
        parts = whole.reshape(b, 3, n, p, n, p).transpose(0, 2, 4, 5, 3, 1)
        x = ops.einsum("byxwhc,whcd->byxd", parts, self.kernel[...])
        x = x.reshape(b, n * n, -1)
        if self.bias is not None:
            x = x + self.bias[...].astype(x.dtype)
        if self.class_token is not None:
            token = self.class_token[...].astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (b, 1, *token.shape)), x], 1)
        return x + self.embedding[...].astype(x.dtype)


class VisionAttention(nnx.Module):
    """Attention of all patches on all, with biases."""

    def __init__(self, c: VisionTowerConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        size = c.hidden_size
        make = functools.partial(Linear, size, size, bias=True, dtype=dtype, rngs=rngs)
        self.q_proj, self.k_proj, self.v_proj = make(), make(), make()
        self.out_proj, self.heads = make(), c.num_heads

    def split(self, x: jax.Array) -> jax.Array:
        """`[B, N, heads, head_dim]`."""
        return x.reshape(*x.shape[:-1], self.heads, -1)

    def __call__(self, x: jax.Array, residual: jax.Array) -> jax.Array:
        """`residual + attention(x)`."""
        q, k, v = (self.split(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = jax.nn.dot_product_attention(q, k, v)
        return self.out_proj(y.reshape(x.shape), residual=residual)


class VisionMLP(nnx.Module):
    """Two products with an activation between."""

    def __init__(self, c: VisionTowerConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        make = functools.partial(Linear, bias=True, dtype=dtype, rngs=rngs)
        self.fc1 = make(c.hidden_size, c.intermediate_size)
        self.fc2 = make(c.intermediate_size, c.hidden_size)
        self.activation = c.activation

    def __call__(self, x: jax.Array, residual: jax.Array) -> jax.Array:
        """`residual + mlp(x)`."""
        return self.fc2(_ACTIVATIONS[self.activation](self.fc1(x)), residual=residual)


class VisionLayer(nnx.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, c: VisionTowerConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        around: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        norm = functools.partial(LayerNorm, c.hidden_size, c.norm_eps, **around)
        self.attn_norm, self.mlp_norm = norm(), norm()
        self.attn = VisionAttention(c, **around)
        self.mlp = VisionMLP(c, **around)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.attn(self.attn_norm(x), residual=x)
        return self.mlp(self.mlp_norm(x), residual=x)

    def attention(
        self, x: jax.Array, *, class_token: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Saliency of the patches, float32 `[B, N]`, and the mean of their keys."""
        y, attn = self.attn_norm(x), self.attn
        q, k = attn.split(attn.q_proj(y)), attn.split(attn.k_proj(y))
        if not class_token:
            return received_attention(q, k), jnp.mean(k, axis=-2)
        k = k[:, 1:]
        return cls_attention(q[:, 0], k), jnp.mean(k, axis=-2)


def layers_run(layer: int, num_layers: int) -> int:
    """How many layers run for a hidden state, where 0 are the embeddings.

    Raises:
      ValueError: there is no such hidden state.
    """
    if not -num_layers - 1 <= layer <= num_layers:
        raise ValueError(f"layer={layer}: the tower has {num_layers} layers")
    return layer % (num_layers + 1)
