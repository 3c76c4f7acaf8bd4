"""The architectures of Qwen2.5-VL and Qwen3-VL as pure functions of their params."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.models._qwen_vl_config import QwenVLConfig
from angeljax.models._qwen_vl_layout import Grid, Grids, check_grids
from angeljax.models._qwen_vl_positions import rope_index
from angeljax.models._qwen_vl_prompt import merge_prompt, prune_prompt, vision_places
from angeljax.models._qwen_vl_tower import QwenVision, VisionTokens
from angeljax.models.attention import dense_attention
from angeljax.models.generate import Generated, generate, generate_after
from angeljax.models.language_model import LanguageModel
from angeljax.models.layers import AttentionFn
from angeljax.models.prompts import decoder_inputs
from angeljax.models.staged import StagedPrefill, prefill_pruned
from angeljax.tokens import Prompt, Pruned
from angeljax.tokens._signals import PruneFn, argument
from angeljax.tokens.apply import PositionPolicy


@dataclasses.dataclass(frozen=True)
class QwenVL:
    """The architecture without parameters: hashable, so that `jit` can close over it.

    `params` is a dict of two trees, `vision` and `language`; the latter is that of a
    `LanguageModel`, and all that works on one works on it. With a compressed tree
    everything runs from its packed planes.

    Attributes:
      config: sizes and switches.
      dtype: of activations.
      scan_layers, attention_fn, fused: of the decoder; see `LanguageModel`. The layers
        of the vision tower differ from each other and stand apart in any case.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.models.qwen_vl import QwenVL, QwenVLConfig
      >>> model = QwenVL(QwenVLConfig.from_hf({
      ...     "model_type": "qwen2_5_vl", "vocab_size": 32, "hidden_size": 16,
      ...     "intermediate_size": 32, "num_hidden_layers": 2,
      ...     "num_attention_heads": 2, "num_key_value_heads": 1,
      ...     "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
      ...     "image_token_id": 30, "video_token_id": 31,
      ...     "vision_config": {
      ...         "depth": 1, "hidden_size": 16, "intermediate_size": 32,
      ...         "num_heads": 2, "out_hidden_size": 16, "patch_size": 4,
      ...         "window_size": 16,
      ...     },
      ... }))
      >>> params = model.init(jax.random.key(0))
      >>> tokens = jnp.array([[1, 30, 30, 2]])  # an image of 2 x 4 patches: 2 tokens
      >>> prompt = model.prompt(
      ...     params, tokens, pixels=jnp.ones((8, 96)), grids=[(1, 2, 4)]
      ... )
      >>> prompt.positions[:, 0].tolist()  # time, height, width
      [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]]
      >>> model.generate(params, prompt, max_new_tokens=3).tokens.shape
      (1, 3)
    """

    config: QwenVLConfig
    dtype: Any = jnp.float32
    scan_layers: bool = False
    attention_fn: AttentionFn = dense_attention
    fused: bool = False

    @property
    def tower(self) -> QwenVision:
        """The vision tower."""
        return QwenVision(self.config.vision, self.dtype)

    @property
    def language(self) -> LanguageModel:
        """The decoder."""
        return LanguageModel(
            self.config.text,
            self.dtype,
            self.scan_layers,
            self.attention_fn,
            self.fused,
        )

    def init(self, key: jax.Array, param_dtype: Any = jnp.float32) -> dict[str, Any]:
        """Random parameters as a nested dict."""
        keys = jax.random.split(key)
        return {
            "vision": self.tower.init(keys[0], param_dtype),
            "language": self.language.init(keys[1], param_dtype),
        }

    def abstract(self, param_dtype: Any = jnp.float32) -> dict[str, Any]:
        """The tree of `init` with `jax.ShapeDtypeStruct` leaves; takes no memory."""
        return {
            "vision": self.tower.abstract(param_dtype),
            "language": self.language.abstract(param_dtype),
        }

    def vision(
        self,
        params: dict[str, Any],
        pixels: jax.Array,
        grids: Sequence[Grid],
        *,
        attention: bool = False,
        attn_layer: int | None = None,
        object_layer: int | None = None,
    ) -> VisionTokens:
        """Tokens of images, or of videos.

        Args:
          params: the tree.
          pixels: `[P, patch_dim]`, as `image_patches` and the processors of
            `transformers` give them; of several images one after another.
          grids: `(t, h, w)` of each, in patches; static.
          attention: also give attention and keys of the tower, which some methods of
            pruning go by. Costs two more products in each of two layers, and an
            attention whose weights are written out, one head at a time.
          attn_layer: the layer of `attn` and `keys`, from 0; negative ones count from
            the last. Default the last.
          object_layer: the layer of `object_attn`; default that in the middle.

        Returns:
          `VisionTokens` of P / 4 tokens.

        Raises:
          ValueError: pixels and grids do not go together.
        """
        checked = check_grids(grids, self.config.vision.spatial_merge_size)
        layers: tuple[int, ...] = ()
        if attention:
            middle = self.config.vision.depth // 2
            layers = (
                -1 if attn_layer is None else attn_layer,
                middle if object_layer is None else object_layer,
            )
        return self.tower.apply(params["vision"], pixels, checked, attention=layers)

    def num_tokens(self, grids: Sequence[Grid]) -> list[int]:
        """Tokens of each image or video: the placeholders that it needs.

        With one placeholder for each in `tokens`, `angeljax.tokens.expand_placeholders`
        makes them as many as this.
        """
        c = self.config.vision
        checked = check_grids(grids, c.spatial_merge_size)
        return [t * h * w // c.merge_unit for t, h, w in checked]

    def is_vision(self, tokens: jax.Array) -> jax.Array:
        """bool like `tokens`: True for the placeholders of images and videos."""
        return (tokens == self.config.image_token_id) | (
            tokens == self.config.video_token_id
        )

    def merge(
        self,
        params: dict[str, Any],
        tokens: jax.Array,
        *,
        images: VisionTokens | None = None,
        videos: VisionTokens | None = None,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> Prompt:
        """Puts the tokens of images and videos where their placeholders are.

        Args:
          params: the tree.
          tokens: int32 `[B, T]`. The placeholders of all rows together are as many as
            the tokens of images (of videos), in that order.
          images, videos: from `vision`.
          positions: int32 `[3, B, T]`, from `rope_index`. Default: as if all were text.
          mask: bool `[B, T]`, True for real tokens.

        Returns:
          A `Prompt` for `generate`, `prune` and `apply_selection`. `extra` has `attn`,
          `object_attn` and `keys` where they were asked for.
        """
        embeds = self.language.embed(params["language"], tokens)
        return merge_prompt(
            self.config, tokens, embeds, images, videos, positions, mask
        )

    def prompt(
        self,
        params: dict[str, Any],
        tokens: Any,
        *,
        pixels: jax.Array | None = None,
        grids: Sequence[Grid] = (),
        video_pixels: jax.Array | None = None,
        video_grids: Sequence[Grid] = (),
        seconds_per_grid: Sequence[float] | None = None,
        mask: Any = None,
        **attention: Any,
    ) -> Prompt:
        """All of a prompt, from pixels: `rope_index`, `vision` and `merge`.

        The last two are compiled, once for each combination of grids.

        Args:
          params: the tree.
          tokens: int `[B, T]`, not traced, with one placeholder for each token of an
            image or video; padded on the left for `generate`.
          pixels, grids: images; see `vision`. A processor of `transformers` calls them
            `pixel_values` and `image_grid_thw`.
          video_pixels, video_grids: videos (`pixel_values_videos`, `video_grid_thw`).
          seconds_per_grid: see `rope_index` (`second_per_grid_ts`).
          mask: bool `[B, T]`, True for real tokens; default all.
          **attention: `attention`, `attn_layer`, `object_layer` of `vision`.

        Returns:
          A `Prompt` for `generate`, `prune` and `apply_selection`. `extra` has `attn`,
          `object_attn` and `keys` where they were asked for.

        Raises:
          ValueError: placeholders, grids and pixels do not go together.
        """
        merge = self.config.vision.spatial_merge_size
        checked = check_grids(grids, merge, "grids")
        video_checked = check_grids(video_grids, merge, "video_grids")
        if (pixels is None) != (not checked):
            raise ValueError("pixels and grids of images go together")
        if (video_pixels is None) != (not video_checked):
            raise ValueError("video_pixels and video_grids go together")
        positions = rope_index(
            self.config,
            tokens,
            images=checked,
            videos=video_checked,
            seconds_per_grid=seconds_per_grid,
            mask=mask,
        )
        return _prompt(
            params,
            jnp.asarray(tokens, jnp.int32),
            pixels,
            video_pixels,
            jnp.asarray(positions),
            None if mask is None else jnp.asarray(mask, bool),
            model=self,
            grids=checked,
            video_grids=video_checked,
            attention=tuple(sorted(attention.items())),
        )

    def prune(
        self,
        prompt: Prompt,
        prune: PruneFn,
        *,
        position_policy: PositionPolicy = "keep",
        num_tokens: int | None = None,
    ) -> Pruned:
        """The prompt without the vision tokens that `prune` does not keep.

        Args:
          prompt: from `prompt` or `merge`.
          prune: a function of `(embeds [B, N, D], ...)` that gives a `Selection`, such
            as `recipe.tokens.prune_fn()`. It is given those of `mask`, `text`, `groups`
            (one for each image, or frame with text between), and `attn`, `object_attn`
            and `keys` where they were asked for, that it has parameters for.
          position_policy: see `apply_selection`.
          num_tokens: N, vision tokens of the row that has most. Only needed where the
            tokens are traced.

        Returns:
          `Pruned`, with rows that keep fewer padded on the left.
        """
        if num_tokens is None:
            num_tokens = self._most_tokens(prompt)
        fn = argument(prune)
        options = {"policy": position_policy, "num_tokens": num_tokens}
        return _pruned(prompt, fn, model=self, **options)

    def _most_tokens(self, prompt: Prompt) -> int:
        assert prompt.tokens is not None, "prompts of this model have their tokens"
        return int(self.is_vision(prompt.tokens).sum(-1).max())

    def generate(
        self,
        params: dict[str, Any],
        prompt: Prompt | Pruned,
        *,
        max_new_tokens: int,
        prune: PruneFn | None = None,
        layer: int | None = None,
        position_policy: PositionPolicy = "keep",
        **sampling: Any,
    ) -> Generated:
        """Generates after a prompt.

        Args:
          params: the tree.
          prompt: from `prompt`, `merge`, `prune` or `apply_selection`; rows padded on
            the left.
          max_new_tokens: upper limit for each row.
          prune: which vision tokens are read; see `QwenVL.prune`. None reads all.
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
        sampling["max_new_tokens"] = max_new_tokens
        own = params["language"]
        if prune is None and layer is not None:
            raise ValueError(f"layer={layer} needs a prune function")
        if prune is not None:
            if isinstance(prompt, Pruned):
                raise ValueError("prune: the prompt is pruned already")
            if layer is None:
                prompt = self.prune(prompt, prune, position_policy=position_policy)
            else:
                first = _staged(
                    own,
                    prompt,
                    argument(prune),
                    model=self,
                    policy=position_policy,
                    num_tokens=self._most_tokens(prompt),
                    layer=layer,
                    room=max_new_tokens,
                )
                return generate_after(
                    self.language, own, first.logits, first.cache, **sampling
                )
        return generate(self.language, own, **decoder_inputs(prompt), **sampling)

    def logits(self, params: dict[str, Any], prompt: Prompt | Pruned) -> jax.Array:
        """float32 next-token logits `[B, T, V]`."""
        return self.language.apply(params["language"], **decoder_inputs(prompt))[0]


@functools.partial(
    jax.jit, static_argnames=("model", "grids", "video_grids", "attention")
)
def _prompt(
    params: Any,
    tokens: jax.Array,
    pixels: jax.Array | None,
    video_pixels: jax.Array | None,
    positions: jax.Array,
    mask: jax.Array | None,
    *,
    model: QwenVL,
    grids: Grids,
    video_grids: Grids,
    attention: tuple[tuple[str, Any], ...],
) -> Prompt:
    def vision(pixels: jax.Array | None, grids: Grids) -> VisionTokens | None:
        if pixels is None:
            return None
        return model.vision(params, pixels, grids, **dict(attention))

    images, videos = vision(pixels, grids), vision(video_pixels, video_grids)
    return model.merge(
        params, tokens, images=images, videos=videos, positions=positions, mask=mask
    )


@functools.partial(jax.jit, static_argnames=("model", "policy", "num_tokens"))
def _pruned(
    prompt: Prompt,
    fn: Any,
    *,
    model: QwenVL,
    policy: PositionPolicy,
    num_tokens: int,
) -> Pruned:
    return prune_prompt(prompt, _there(model, prompt), fn, policy, num_tokens)


@functools.partial(
    jax.jit, static_argnames=("model", "policy", "num_tokens", "layer", "room")
)
def _staged(
    params: Any,
    prompt: Prompt,
    fn: Any,
    *,
    model: QwenVL,
    policy: PositionPolicy,
    num_tokens: int,
    layer: int,
    room: int,
) -> StagedPrefill:
    where, groups = vision_places(_there(model, prompt), num_tokens)
    return prefill_pruned(
        model.language,
        params,
        prompt,
        where,
        fn,
        layer=layer,
        room=room,
        position_policy=policy,
        groups=groups,
    )


def _there(model: QwenVL, prompt: Prompt) -> jax.Array:
    assert prompt.tokens is not None, "prompts of this model have their tokens"
    return model.is_vision(prompt.tokens) & prompt.real()
