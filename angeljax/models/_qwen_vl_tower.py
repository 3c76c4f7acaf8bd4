"""The vision towers of Qwen2.5-VL and Qwen3-VL (nnx).

One transformer over the patches of all images. Qwen2.5-VL (arXiv 2502.13923, section
2.1.1) attends in windows but in a few layers; Qwen3-VL (arXiv 2511.21631) in whole
frames, adds learned positions, and hands the outputs of some layers on as well. Neither
attends from one frame to another.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from angeljax import ops
from angeljax.models._qwen_vl_config import QwenVisionConfig
from angeljax.models._qwen_vl_layers import Merger, Table, VisionBlock
from angeljax.models._qwen_vl_layout import Grids, layout, num_patches
from angeljax.models.language_model import bind_params
from angeljax.models.layers import Linear

_THETA = 10000.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisionTokens:
    """What the vision tower makes of images or videos.

    Attributes:
      embeds: `[N, D]`, the tokens of all of them, one after another.
      deepstack: planes `[N, D]` for the first layers of the decoder (Qwen3-VL).
      attn: float32 `[N]`, attention that each token receives in its frame, in the last
        layer or the one asked for; None where not asked for.
      object_attn: the same in a layer in the middle, for HiPrune.
      keys: float32 `[N, head_dim]` of the layer of `attn`, mean over heads and patches.
    """

    embeds: jax.Array
    deepstack: tuple[jax.Array, ...] = ()
    attn: jax.Array | None = None
    object_attn: jax.Array | None = None
    keys: jax.Array | None = None


class VisionTower(nnx.Module):
    """From patches to the embeddings of tokens."""

    def __init__(
        self, c: QwenVisionConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs
    ) -> None:
        around: dict[str, Any] = {"dtype": param_dtype, "rngs": rngs}
        self.config, self.dtype = c, dtype
        bias = c.model_type == "qwen3_vl"
        # The name keeps it out of recipes without a `match`.
        self.patch_embed = Linear(c.patch_dim, c.hidden_size, bias=bias, **around)
        self.pos_embed = (
            Table(c.num_positions, c.hidden_size, **around) if c.num_positions else None
        )
        self.blocks = nnx.List([VisionBlock(c, i, **around) for i in range(c.depth)])
        self.merger = Merger(c, **around)
        self.deepstack = nnx.List(
            [Merger(c, norm_after=True, **around) for _ in c.deepstack_layers]
        )

    def __call__(
        self, pixels: jax.Array, grids: Grids, *, attention: tuple[int, ...] = ()
    ) -> VisionTokens:
        """The tokens of images and videos.

        Args:
          pixels: `[P, patch_dim]`, the patches that become one token after another.
          grids: static, of each image and video.
          attention: the layers of `attn` (and `keys`) and `object_attn`; () for none.

        Raises:
          ValueError: pixels and grids do not go together, or there is no such layer.
        """
        c = self.config
        want = (num_patches(grids), c.patch_dim)
        if pixels.shape != want:
            raise ValueError(
                f"pixels must be {want} for the grids {grids}, not {pixels.shape}"
            )
        where = layout(c, grids)
        x = self.patch_embed(_reorder(pixels.astype(self.dtype), where.order, c))
        if self.pos_embed is not None:
            assert where.taps is not None and where.weights is not None
            table = self.pos_embed.embedding[...]
            near = ops.embed(table, jnp.asarray(where.taps), dtype=jnp.float32)
            x = x + jnp.sum(near * where.weights[..., None], axis=1).astype(x.dtype)
        rotation = _rotation(c, where.rows, where.columns)
        attention = tuple(n + c.depth if n < 0 else n for n in attention)
        if not all(0 <= n < c.depth for n in attention):
            raise ValueError(f"attention: the vision tower has {c.depth} layers")
        planes, signals = [], {}
        for i, block in enumerate(self.blocks):
            if i in attention:
                signals[i] = block.signals(x, rotation, where.groups, c.merge_unit)
            x = block(x, rotation, where.groups)
            if i in c.deepstack_layers:
                planes.append(self.deepstack[c.deepstack_layers.index(i)](x))
        found = VisionTokens(self.merger(x), tuple(planes))
        if attention:
            attn, keys = signals[attention[0]]
            middle = signals[attention[-1]][0]
            found = VisionTokens(found.embeds, found.deepstack, attn, middle, keys)
        if where.inverse is None:
            return found
        back = where.inverse
        return jax.tree.map(lambda y: y[back], found)


def _reorder(x: jax.Array, order: np.ndarray | None, c: QwenVisionConfig) -> jax.Array:
    if order is None:
        return x
    return x.reshape(-1, c.merge_unit, x.shape[-1])[order].reshape(x.shape)


def _rotation(
    c: QwenVisionConfig, rows: np.ndarray, columns: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """cos and sin for `rotate`: a quarter of each head turns with either axis."""
    half = c.hidden_size // c.num_heads // 2
    frequency = 1.0 / _THETA ** (np.arange(0, half, 2) / half)
    at = jnp.asarray(np.stack([rows, columns], axis=-1), jnp.float32)
    angles = at[..., None] * jnp.asarray(frequency, jnp.float32)
    angles = angles.reshape(1, len(rows), 1, 1, half)
    signs = jnp.asarray([[-1.0], [1.0]], jnp.float32)
    return jnp.cos(angles), jnp.sin(angles) * signs


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
        self,
        params: dict[str, Any],
        pixels: jax.Array,
        grids: Grids,
        *,
        attention: tuple[int, ...] = (),
    ) -> VisionTokens:
        """`VisionTower.__call__` as a pure function."""
        tower = bind_params(_skeleton(self), params)
        return tower(pixels, grids, attention=attention)


@functools.lru_cache(maxsize=16)
def _skeleton(model: QwenVision) -> tuple[Any, Any]:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: model.module(nnx.Rngs(0))))
    return graphdef, nnx.filter_state(state, nnx.Param)
