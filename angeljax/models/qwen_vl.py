"""Qwen2.5-VL and Qwen3-VL: images and videos among the tokens of a language model.

The steps of a prompt are functions of their own, so that tokens can be pruned between
them: `vision` gives the embeddings of images, `merge` puts them among those of text,
`angeljax.tokens` takes some out, and `generate` reads what is left and goes on at the
position at which the whole prompt would have ended.

Grids of images are static: each combination of them compiles once. To bound how many
there are, resize images to few sizes (`image_patches` takes one), and pad prompts on
the left to few lengths, with a `mask`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from angeljax.models import hub
from angeljax.models._assemble import Shardings
from angeljax.models._qwen_vl_config import QwenVisionConfig, QwenVLConfig
from angeljax.models._qwen_vl_layout import Grid, Grids, check_grids
from angeljax.models._qwen_vl_loading import read_qwen_config, read_qwen_params
from angeljax.models._qwen_vl_pixels import image_patches, smart_resize, video_patches
from angeljax.models._qwen_vl_positions import rope_index
from angeljax.models._qwen_vl_tower import VisionTower
from angeljax.models.attention import dense_attention
from angeljax.models.config import ModelError
from angeljax.models.generate import Generated, generate
from angeljax.models.language_model import LanguageModel, bind_params
from angeljax.models.layers import AttentionFn
from angeljax.models.prompts import decoder_inputs
from angeljax.models.tokenizer import Tokenizer
from angeljax.tokens import Prompt, Pruned

__all__ = [
    "LoadedQwenVL",
    "QwenVL",
    "QwenVLConfig",
    "QwenVision",
    "QwenVisionConfig",
    "VisionTokens",
    "image_patches",
    "load_qwen_vl",
    "rope_index",
    "smart_resize",
    "video_patches",
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisionTokens:
    """What the vision tower makes of images or videos.

    Attributes:
      embeds: `[N, D]`, the tokens of all of them, one after another.
      deepstack: planes `[N, D]` for the first layers of the decoder (Qwen3-VL).
    """

    embeds: jax.Array
    deepstack: tuple[jax.Array, ...] = ()


@dataclasses.dataclass(frozen=True)
class QwenVision:
    """The vision tower without parameters: hashable; see `QwenVL.vision`.

    Attributes:
      config: sizes and switches.
      dtype: of activations.
    """

    config: QwenVisionConfig
    dtype: Any = jnp.float32

    def module(self, rngs: nnx.Rngs, param_dtype: Any = jnp.float32) -> VisionTower:
        """A `VisionTower` with fresh parameters."""
        return VisionTower(
            self.config, dtype=self.dtype, param_dtype=param_dtype, rngs=rngs
        )

    def init(self, key: jax.Array, param_dtype: Any = jnp.float32) -> dict[str, Any]:
        """Random parameters as a nested dict."""
        module = self.module(nnx.Rngs(params=key), param_dtype)
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    def abstract(self, param_dtype: Any = jnp.float32) -> dict[str, Any]:
        """The tree of `init` with `jax.ShapeDtypeStruct` leaves; takes no memory."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0), param_dtype))

    def apply(
        self, params: dict[str, Any], pixels: jax.Array, grids: Grids
    ) -> VisionTokens:
        """`VisionTower.__call__` as a pure function."""
        tower = bind_params(_skeleton(self), params)
        return VisionTokens(*tower(pixels, grids))


@functools.lru_cache(maxsize=16)
def _skeleton(model: QwenVision) -> tuple[Any, Any]:
    abstract = nnx.eval_shape(lambda: model.module(nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    return graphdef, nnx.filter_state(state, nnx.Param)


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
        self, params: dict[str, Any], pixels: jax.Array, grids: Sequence[Grid]
    ) -> VisionTokens:
        """Tokens of images, or of videos.

        Args:
          params: the tree.
          pixels: `[P, patch_dim]`, as `image_patches` and the processors of
            `transformers` give them; of several images one after another.
          grids: `(t, h, w)` of each, in patches; static.

        Returns:
          `VisionTokens` of P / 4 tokens.

        Raises:
          ValueError: pixels and grids do not go together.
        """
        checked = check_grids(grids, self.config.vision.spatial_merge_size)
        return self.tower.apply(params["vision"], pixels, checked)

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
          A `Prompt` for `generate`, `decoder_inputs` and `apply_selection`.
        """
        embeds = self.language.embed(params["language"], tokens)
        planes: list[jax.Array] = []
        if images is not None or videos is not None:
            planes = [jnp.zeros_like(embeds) for _ in self._planes(images, videos)]
        for found, token in (
            (images, self.config.image_token_id),
            (videos, self.config.video_token_id),
        ):
            if found is None:
                continue
            here = tokens == token
            # A gather: each placeholder takes the next row.
            row = jnp.cumsum(here.reshape(-1), dtype=jnp.int32) - 1
            row = jnp.clip(row.reshape(tokens.shape), 0, len(found.embeds) - 1)

            def put(into: jax.Array, rows: jax.Array, at: Any = (here, row)) -> Any:
                here, row = at
                return jnp.where(here[..., None], rows[row].astype(into.dtype), into)

            embeds = put(embeds, found.embeds)
            planes = [put(*pair) for pair in zip(planes, found.deepstack, strict=True)]
        return Prompt(
            embeds=embeds,
            mask=mask,
            positions=positions,
            tokens=tokens,
            deepstack=tuple(planes),
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

        Returns:
          A `Prompt` for `generate`, `decoder_inputs` and `apply_selection`.

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
        )

    def generate(
        self, params: dict[str, Any], prompt: Prompt | Pruned, **options: Any
    ) -> Generated:
        """Generates after a prompt, pruned or not; see `angeljax.models.generate`."""
        inputs = decoder_inputs(prompt)
        return generate(self.language, params["language"], **inputs, **options)

    def logits(self, params: dict[str, Any], prompt: Prompt | Pruned) -> jax.Array:
        """float32 next-token logits `[B, T, V]`."""
        return self.language.apply(params["language"], **decoder_inputs(prompt))[0]

    def _planes(self, *found: VisionTokens | None) -> tuple[jax.Array, ...]:
        """The planes of one of them; refuses such as do not have the model's number."""
        count = len(self.config.vision.deepstack_layers)
        given = [tokens for tokens in found if tokens is not None]
        for tokens in given:
            if len(tokens.deepstack) != count:
                raise ValueError(
                    f"VisionTokens have {len(tokens.deepstack)} planes of DeepStack, "
                    f"the model {count}"
                )
        return given[0].deepstack


@functools.partial(jax.jit, static_argnames=("model", "grids", "video_grids"))
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
) -> Prompt:
    images = None if pixels is None else model.vision(params, pixels, grids)
    videos = None
    if video_pixels is not None:
        videos = model.vision(params, video_pixels, video_grids)
    return model.merge(
        params, tokens, images=images, videos=videos, positions=positions, mask=mask
    )


@dataclasses.dataclass(frozen=True)
class LoadedQwenVL:
    """A model, its parameters and its tokenizer.

    Attributes:
      model: the architecture, a pure function of the parameters.
      params: `{"vision": ..., "language": ...}`.
      tokenizer: None if the source has none.
      source: where it was loaded from.
    """

    model: QwenVL
    params: dict[str, Any]
    tokenizer: Tokenizer | None
    source: str


def load_qwen_vl(
    source: str | os.PathLike[str],
    *,
    dtype: Any = jnp.bfloat16,
    compute_dtype: Any = None,
    scan_layers: bool = False,
    shardings: Shardings | None = None,
) -> LoadedQwenVL:
    """Loads Qwen2.5-VL or Qwen3-VL.

    Args:
      source: a Hugging Face folder, or a hub name `org/name`.
      dtype: of the parameters.
      compute_dtype: of the activations; default `dtype`.
      scan_layers: stack the layers of the decoder; see `Decoder`.
      shardings: `(path, shape) -> sharding or None`; each array is put straight onto
        its devices.

    Returns:
      A `LoadedQwenVL`.

    Raises:
      ModelError: one line that names the file and what would work.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if not path.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            raise ModelError(f"{name!r} is no folder and no hub name (org/name)")
        path = hub.fetch_from_hub(name)
    compute = jnp.dtype(dtype if compute_dtype is None else compute_dtype)
    model = QwenVL(read_qwen_config(path), compute, scan_layers)
    params = read_qwen_params(
        path, model.tower, model.language, dtype=dtype, shardings=shardings
    )
    tokenizer = None
    if (path / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_folder(path)
    return LoadedQwenVL(model, params, tokenizer, name)
