"""LLaVA (arXiv 2304.08485, 2310.03744): a vision tower, a projector and a decoder.

Images become tokens among those of the text. Which of them the decoder reads is decided
between the two, or behind one of its layers, by any function that gives a
`Selection`: see `LlavaModel.generate`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from angeljax.models._llava_config import LlavaConfig
from angeljax.models.attention import dense_attention
from angeljax.models.generate import Generated, generate, generate_after
from angeljax.models.language_model import LanguageModel, bind_params
from angeljax.models.layers import AttentionFn, Linear
from angeljax.models.prompts import decoder_inputs
from angeljax.models.staged import StagedPrefill, prefill_pruned
from angeljax.models.vision_tower import VisionTower
from angeljax.tokens import Prompt, Pruned, apply_selection, token_positions
from angeljax.tokens._signals import PruneFn, argument, choose, wanted_layers
from angeljax.tokens.apply import PositionPolicy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTokens:
    """Images as the decoder reads them, and what token pruning may go by.

    M images of N tokens each stand one after the other in each row.

    Attributes:
      embeds: `[B, M N, D]`, behind the projector.
      attn: float32 `[B, M N]`, attention of the class token (of all patches, in SigLIP)
        in the last layer of the tower that runs; None where not asked for.
      object_attn: the same in a layer in the middle, for HiPrune.
      keys: `[B, M N, head_dim]`, keys of the last layer, mean over heads.
    """

    embeds: jax.Array
    attn: jax.Array | None = None
    object_attn: jax.Array | None = None
    keys: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagePrompt:
    """A prompt with its images in place.

    Attributes:
      prompt: embeddings, ids and mask, `[B, L]`.
      where: int32 `[B, M N]`, where the image tokens stand; L for those of images that
        a row has no placeholders for.
      images: what stands there.
    """

    prompt: Prompt
    where: jax.Array
    images: ImageTokens

    def signals(self, image_size: int) -> dict[str, Any]:
        """What methods of pruning may take, by name."""
        prompt, images = self.prompt, self.images
        length = prompt.length
        rows = jnp.arange(len(self.where))[:, None]
        text = prompt.real().at[rows, self.where].set(False, mode="drop")
        groups = np.arange(self.where.shape[1], dtype=np.int32) // image_size
        return {
            "mask": self.where < length,
            "attn": images.attn,
            "object_attn": images.object_attn,
            "keys": images.keys,
            "text": jnp.where(text[..., None], prompt.embeds, 0),
            "groups": np.broadcast_to(groups, self.where.shape),
        }


class Projector(nnx.Module):
    """Two products with an activation between."""

    def __init__(self, c: LlavaConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        make = functools.partial(Linear, bias=c.projector_bias, dtype=dtype, rngs=rngs)
        self.linear_1 = make(c.vision.hidden_size, c.text.hidden_size)
        self.linear_2 = make(c.text.hidden_size, c.text.hidden_size)
        self.activation = c.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.linear_1(x)
        if self.activation == "silu":
            x = jax.nn.silu(x)
        else:
            x = jax.nn.gelu(x, approximate=self.activation != "gelu")
        return self.linear_2(x)


class Eyes(nnx.Module):
    """All but the decoder."""

    def __init__(
        self, c: LlavaConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ) -> None:
        self.vision = VisionTower(
            c.vision,
            rngs=rngs,
            dtype=dtype,
            param_dtype=param_dtype,
            num_layers=c.vision_layers,
        )
        self.projector = Projector(c, dtype=param_dtype, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class LlavaModel:
    """The architecture without parameters: hashable, so that `jit` can close over it.

    `params` is everywhere a nested dict of arrays or QTensors, such as `init` gives:
    `{"vision": ..., "projector": ..., "text": ...}`, the last as `LanguageModel` has
    it.

    Attributes:
      config: sizes and switches.
      dtype: of activations.
      attention_fn: of the decoder; see `Decoder`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.models import DecoderConfig, LlavaConfig, LlavaModel
      >>> from angeljax.models import VisionTowerConfig
      >>> config = LlavaConfig(
      ...     image_token_id=31,
      ...     text=DecoderConfig(
      ...         model_type="llama", vocab_size=32, hidden_size=16, num_layers=1,
      ...         intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ...     ),
      ...     vision=VisionTowerConfig(
      ...         model_type="clip_vision_model", hidden_size=8, intermediate_size=16,
      ...         num_layers=2, num_heads=2, image_size=8, patch_size=4,
      ...     ),
      ... )
      >>> model = LlavaModel(config)
      >>> tokens = jnp.array([[1, 31, 31, 31, 31, 2]])  # an image of 4 tokens
      >>> jax.eval_shape(
      ...     model.logits, model.abstract(), tokens, jnp.zeros((1, 3, 8, 8))
      ... ).shape
      (1, 6, 32)
    """

    config: LlavaConfig
    dtype: Any = jnp.float32
    attention_fn: AttentionFn = dense_attention

    @property
    def text(self) -> LanguageModel:
        """The decoder; its parameters are `params["text"]`."""
        return LanguageModel(
            self.config.text, self.dtype, attention_fn=self.attention_fn
        )

    def _eyes(self, rngs: nnx.Rngs, param_dtype: Any = jnp.float32) -> Eyes:
        return Eyes(self.config, dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)

    def init(self, key: jax.Array, param_dtype: Any = jnp.float32) -> dict[str, Any]:
        """Random parameters as a nested dict."""
        one, two = jax.random.split(key)
        eyes = self._eyes(nnx.Rngs(params=one), param_dtype)
        seeing = nnx.to_pure_dict(nnx.state(eyes, nnx.Param))
        return {**seeing, "text": self.text.init(two, param_dtype)}

    def abstract(self, param_dtype: Any = jnp.float32) -> dict[str, Any]:
        """The tree of `init` with `jax.ShapeDtypeStruct` leaves; takes no memory."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0), param_dtype))

    def encode_images(
        self,
        params: dict[str, Any],
        pixels: jax.Array,
        *,
        attention: bool = False,
        attn_layer: int | None = None,
        object_layer: int | None = None,
    ) -> ImageTokens:
        """Image tokens.

        Args:
          params: its param tree, compressed or not.
          pixels: float `[B, 3, H, W]`, or `[B, M, 3, H, W]` with several images, as a
            Hugging Face image processor gives them.
          attention: also give attention and keys of the tower, which costs two more
            products and a softmax in each of two layers.
          attn_layer: the layer of `attn` and `keys`, from 0; negative ones count from
            the last of the tower. Default the last that runs.
          object_layer: the layer of `object_attn`; default 9 of 24, as AngelSlim has
            HiPrune for LLaVA.

        Returns:
          `ImageTokens`.

        Raises:
          ValueError: pixels of another shape, or attention with `select="full"` and a
            class token, which has none.
        """
        c = self.config
        if pixels.ndim not in (4, 5):
            raise ValueError(
                f"pixels must be [B, 3, H, W] or [B, M, 3, H, W], not {pixels.shape}"
            )
        if attention and c.select == "full" and c.vision.class_token:
            raise ValueError(
                "attention is of patches, and the class token is none: it needs "
                'select="default"'
            )
        batch = pixels.shape[0]
        run = c.vision_layers
        middle = 9 * run // 23 if object_layer is None else object_layer
        last = run - 1 if attn_layer is None else attn_layer
        seen = bind_params(_skeleton(self), params)
        found = seen.vision(
            pixels.reshape(-1, *pixels.shape[-3:]),
            layer=c.vision_layer,
            attention=(middle, last) if attention and run else (),
        )
        x = found.patches
        if c.select == "full" and found.class_token is not None:
            x = jnp.concatenate([found.class_token[:, None], x], axis=1)

        def by_row(x: jax.Array) -> jax.Array:
            return x.reshape(batch, -1, *x.shape[2:])

        middle_attn, attn = map(by_row, found.attn) if found.attn else (None, None)
        return ImageTokens(
            embeds=by_row(seen.projector(x)),
            attn=attn,
            object_attn=middle_attn,
            keys=None if found.keys is None else by_row(found.keys),
        )

    def prompt(
        self,
        params: dict[str, Any],
        tokens: jax.Array,
        pixels: jax.Array,
        mask: jax.Array | None = None,
        **signals: Any,
    ) -> ImagePrompt:
        """Puts images where their placeholders are.

        Args:
          params: its param tree.
          tokens: int32 `[B, L]` with `num_image_tokens` placeholders for each image, in
            their order. A row may have fewer images than others: the last ones of
            `pixels` are then not read.
          pixels: see `encode_images`.
          mask: bool `[B, L]`, True for real tokens.
          **signals: `attention`, `attn_layer`, `object_layer` of `encode_images`.

        Returns:
          `ImagePrompt`.
        """
        images = self.encode_images(params, pixels, **signals)
        count = images.embeds.shape[1]
        where = token_positions(
            tokens == self.config.image_token_id,
            length=tokens.shape[1],
            num_tokens=count,
        )
        embeds = self.text.embed(params["text"], tokens)
        rows = jnp.arange(len(tokens))[:, None]
        new = images.embeds.astype(embeds.dtype)
        embeds = embeds.at[rows, where].set(new, mode="drop")
        return ImagePrompt(
            prompt=Prompt(embeds=embeds, tokens=tokens, mask=mask),
            where=where,
            images=images,
        )

    def logits(
        self,
        params: dict[str, Any],
        tokens: jax.Array,
        pixels: jax.Array,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """float32 next-token logits `[B, L, V]` of a prompt with all its images."""
        prompt = self.prompt(params, tokens, pixels, mask).prompt
        return self.text.apply(params["text"], embeds=prompt.embeds, mask=mask)[0]

    def pruned_prompt(
        self,
        params: dict[str, Any],
        tokens: jax.Array,
        pixels: jax.Array,
        mask: jax.Array | None = None,
        *,
        prune: PruneFn,
        position_policy: PositionPolicy = "keep",
    ) -> Pruned:
        """The prompt without the image tokens that `prune` does not keep.

        Args:
          params, tokens, pixels, mask: see `prompt`.
          prune: see `generate`.
          position_policy: see `apply_selection`.

        Returns:
          `Pruned`, with rows that keep fewer padded on the left.
        """
        layers = wanted_layers(prune)
        whole = self.prompt(params, tokens, pixels, mask, attention=True, **layers)
        chosen = choose(
            prune, whole.images.embeds, **whole.signals(self.config.num_image_tokens)
        )
        return apply_selection(
            chosen,
            whole.prompt,
            whole.where,
            position_policy=position_policy,
            padding_side="left",
        )

    def generate(
        self,
        params: dict[str, Any],
        tokens: jax.Array,
        pixels: jax.Array,
        mask: jax.Array | None = None,
        *,
        max_new_tokens: int,
        prune: PruneFn | None = None,
        layer: int | None = None,
        position_policy: PositionPolicy = "keep",
        **sampling: Any,
    ) -> Generated:
        """Answers a batch of prompts with images.

        Args:
          params: its param tree, compressed or not.
          tokens: int32 `[B, L]`, padded on the left; see `prompt`.
          pixels: see `encode_images`.
          mask: bool `[B, L]`, True for real tokens.
          max_new_tokens: upper limit for each row.
          prune: which image tokens are read; None reads all. A function of
            `(embeds [B, M N, D], ...)` that gives a `Selection`, such as
            `recipe.tokens.prune_fn()`. It is given those of `mask`, `attn`,
            `object_attn`, `keys`, `text` and `groups` (one for each image) that it has
            parameters for. Compiled again for each new function, so make it once.
          layer: prune behind so many layers of the decoder; `prune` is then given what
            `prefill_pruned` says. None prunes what the decoder is given.
          position_policy: see `apply_selection`.
          **sampling: `temperature`, `top_k`, `top_p`, `key`, `eos_ids` of
            `angeljax.models.generate`.

        Returns:
          A `Generated` of device arrays.

        Raises:
          ValueError: as `angeljax.models.generate` and the method.
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        sampling["max_new_tokens"] = max_new_tokens
        given = params, tokens, pixels, mask
        if prune is None:
            if layer is not None:
                raise ValueError(f"layer={layer} needs a prune function")
            embeds = _plain(*given, model=self)
            return generate(
                self.text, params["text"], embeds=embeds, mask=mask, **sampling
            )
        fn = argument(prune)
        options: dict[str, Any] = {"model": self, "position_policy": position_policy}
        if layer is None:
            inputs = _pruned(*given, fn, **options)
            return generate(self.text, params["text"], **inputs, **sampling)
        first = _staged(*given, fn, layer=layer, room=max_new_tokens, **options)
        return generate_after(
            self.text, params["text"], first.logits, first.cache, **sampling
        )


@functools.partial(jax.jit, static_argnames=("model",))
def _plain(
    params: Any, tokens: Any, pixels: Any, mask: Any, *, model: LlavaModel
) -> jax.Array:
    return model.prompt(params, tokens, pixels, mask).prompt.embeds


@functools.partial(jax.jit, static_argnames=("model", "position_policy"))
def _pruned(
    params: Any,
    tokens: Any,
    pixels: Any,
    mask: Any,
    prune: Any,
    *,
    model: LlavaModel,
    position_policy: PositionPolicy,
) -> dict[str, Any]:
    short = model.pruned_prompt(
        params, tokens, pixels, mask, prune=prune, position_policy=position_policy
    )
    return decoder_inputs(short)


@functools.partial(
    jax.jit, static_argnames=("model", "position_policy", "layer", "room")
)
def _staged(
    params: Any,
    tokens: Any,
    pixels: Any,
    mask: Any,
    prune: Any,
    *,
    model: LlavaModel,
    position_policy: PositionPolicy,
    layer: int,
    room: int,
) -> StagedPrefill:
    whole = model.prompt(params, tokens, pixels, mask)
    size = model.config.num_image_tokens
    return prefill_pruned(
        model.text,
        params["text"],
        whole.prompt,
        whole.where,
        prune,
        layer=layer,
        room=room,
        position_policy=position_policy,
        groups=whole.signals(size)["groups"],
    )


@functools.lru_cache(maxsize=16)
def _skeleton(model: LlavaModel) -> tuple[Any, Any]:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: model._eyes(nnx.Rngs(0))))
    return graphdef, nnx.filter_state(state, nnx.Param)
