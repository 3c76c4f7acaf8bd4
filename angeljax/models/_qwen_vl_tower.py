"""The vision towers of Qwen2.5-VL and Qwen3-VL (nnx).

One transformer over the patches of all images. Qwen2.5-VL (arXiv 2502.13923, section
2.1.1) attends in windows but in a few layers; Qwen3-VL (arXiv 2511.21631) in whole
frames, adds learned positions, and hands the outputs of some layers on as well. Neither
attends from one frame to another.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from angeljax import ops
from angeljax.models._qwen_vl_config import QwenVisionConfig
from angeljax.models._qwen_vl_layout import Frames, Grids, layout, num_patches
from angeljax.models.layers import LayerNorm, Linear, RMSNorm
from angeljax.models.rope import rotate
from angeljax.tokens import received_attention
from pallas_kernels._devices import has_flash

_INIT = nnx.initializers.normal(0.02)
_EPS = 1e-6
_THETA = 10000.0
# Patches that see each other from which on no weights of attention are stored.
_LONG = 512
# Patches of a frame from which on AngelSlim takes the mean query for all of them.
_MANY = 6144


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


class Table(nnx.Module):
    """Learned positions `[num_positions, D]`."""

    def __init__(self, rows: int, size: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Param(_INIT(rngs.params(), (rows, size), dtype))


class VisionAttention(nnx.Module):
    """Attention within frames or windows, rotated by height and width."""

    def __init__(
        self, c: QwenVisionConfig, *, windowed: bool, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        make = functools.partial(Linear, bias=True, dtype=dtype, rngs=rngs)
        self.qkv_proj = make(c.hidden_size, 3 * c.hidden_size)
        self.o_proj = make(c.hidden_size, c.hidden_size)
        self.heads, self.windowed = c.num_heads, windowed

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        groups: tuple[Frames, ...],
        *,
        residual: jax.Array,
    ) -> jax.Array:
        """`residual + attention(x)`, `[P, D]`."""
        parts = [
            _in_frames(qkv, frames, self.windowed)
            for qkv, frames in self._frames(x, rotation, groups)
        ]
        y = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        return self.o_proj(y.reshape(len(x), -1), residual=residual)

    def signals(
        self, x: jax.Array, rotation: Any, groups: Any, unit: int
    ) -> tuple[jax.Array, jax.Array]:
        """What tokens receive of each other's attention, and their mean keys.

        Within whole frames, also where the layer attends in windows.

        Returns:
          float32 `[N]` and `[N, head_dim]`.
        """
        received, keys = [], []
        for (q, k, _), frames in self._frames(x, rotation, groups):
            many = frames.size >= _MANY
            got = received_attention(q, k, merge_unit=unit, mean_query=many)
            received.append(got.reshape(-1))
            mean = k.astype(jnp.float32).reshape(-1, unit * self.heads, k.shape[-1])
            keys.append(jnp.mean(mean, axis=1))
        return jnp.concatenate(received), jnp.concatenate(keys)

    def _frames(
        self, x: jax.Array, rotation: tuple[jax.Array, jax.Array], groups: Any
    ) -> Iterator[tuple[list[jax.Array], Frames]]:
        """Queries, keys and values `[count, size, H, D]` of frames of each size."""
        q, k, v = (
            y.reshape(1, len(x), self.heads, -1)
            for y in jnp.split(self.qkv_proj(x), 3, axis=-1)
        )
        q, k, at = rotate(q, *rotation), rotate(k, *rotation), 0
        for frames in groups:
            end = at + frames.count * frames.size
            shape = (frames.count, frames.size, *q.shape[2:])
            yield [y[0, at:end].reshape(shape) for y in (q, k, v)], frames
            at = end


def _in_frames(qkv: list[jax.Array], frames: Frames, windowed: bool) -> jax.Array:
    """`[count * size, H, D]`; all of a frame, or its windows by size."""
    heads = qkv[0].shape[2:]
    pieces = frames.windows if windowed else ((1, frames.size),)
    parts, at = [], 0
    for count, size in pieces:
        end = at + count * size
        shape = (frames.count * count, size, *heads)
        q, k, v = (x[:, at:end].reshape(shape) for x in qkv)
        parts.append(_attend(q, k, v).reshape(frames.count, count * size, *heads))
        at = end
    y = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    return y.reshape(-1, *heads)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Every query on every key, `[B, T, H, D]`."""
    wide = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0
    flash = q.shape[1] >= _LONG and wide and has_flash()
    return jax.nn.dot_product_attention(
        q, k, v, implementation="cudnn" if flash else None
    )


class VisionMLP(nnx.Module):
    """SwiGLU (Qwen2.5-VL), or two products with an activation between (Qwen3-VL)."""

    def __init__(self, c: QwenVisionConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        make = functools.partial(Linear, bias=True, dtype=dtype, rngs=rngs)
        gated = c.model_type == "qwen2_5_vl"
        self.gate_proj = make(c.hidden_size, c.intermediate_size) if gated else None
        self.up_proj = make(c.hidden_size, c.intermediate_size)
        self.down_proj = make(c.intermediate_size, c.hidden_size)
        self.activation = c.activation

    def __call__(self, x: jax.Array, *, residual: jax.Array) -> jax.Array:
        """`residual + mlp(x)`."""
        up = self.up_proj(x)
        if self.gate_proj is not None:
            up = _activate(self.gate_proj(x), self.activation) * up
        else:
            up = _activate(up, self.activation)
        return self.down_proj(up, residual=residual)


def _activate(x: jax.Array, name: str) -> jax.Array:
    if name == "silu":
        return jax.nn.silu(x)
    return jax.nn.gelu(x, approximate=name != "gelu")


def _norm(c: QwenVisionConfig, size: int, **around: Any) -> Any:
    kind = RMSNorm if c.model_type == "qwen2_5_vl" else LayerNorm
    return kind(size, _EPS, **around)


class VisionBlock(nnx.Module):
    """One layer: attention and MLP, each after a norm and beside a residual."""

    def __init__(self, c: QwenVisionConfig, layer: int, **around: Any) -> None:
        windowed = c.window_size > 0 and layer not in c.full_layers
        self.attn_norm = _norm(c, c.hidden_size, **around)
        self.attn = VisionAttention(c, windowed=windowed, **around)
        self.mlp_norm = _norm(c, c.hidden_size, **around)
        self.mlp = VisionMLP(c, **around)

    def __call__(self, x: jax.Array, rotation: Any, groups: Any) -> jax.Array:
        x = self.attn(self.attn_norm(x), rotation, groups, residual=x)
        return self.mlp(self.mlp_norm(x), residual=x)

    def signals(
        self, x: jax.Array, rotation: Any, groups: Any, unit: int
    ) -> tuple[jax.Array, jax.Array]:
        """See `VisionAttention.signals`; `x` is what the layer is given."""
        return self.attn.signals(self.attn_norm(x), rotation, groups, unit)


class Merger(nnx.Module):
    """From the patches of a token to its embedding, with a norm before or after."""

    def __init__(
        self, c: QwenVisionConfig, *, norm_after: bool = False, **around: Any
    ) -> None:
        wide = c.hidden_size * c.merge_unit
        self.norm = _norm(c, wide if norm_after else c.hidden_size, **around)
        self.fc1 = Linear(wide, wide, bias=True, **around)
        self.fc2 = Linear(wide, c.out_hidden_size, bias=True, **around)
        self.norm_after, self.wide = norm_after, wide

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[P, D]` to `[N, out_hidden_size]`."""
        if self.norm_after:
            x = self.norm(x.reshape(-1, self.wide))
        else:
            x = self.norm(x).reshape(-1, self.wide)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


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
