"""The parts of the vision towers of Qwen2.5-VL and Qwen3-VL (nnx)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from angeljax.models._qwen_vl_config import QwenVisionConfig
from angeljax.models._qwen_vl_layout import Frames
from angeljax.models.layers import LayerNorm, Linear, RMSNorm
from angeljax.models.rope import rotate
from angeljax.tokens import received_attention
from pallas_kernels._devices import has_flash

_INIT = nnx.initializers.normal(0.02)
_EPS = 1e-6
# Patches that see each other from which on no weights of attention are stored.
_LONG = 512
# Patches of a frame from which on AngelSlim takes the mean query for all of them.
_MANY = 6144


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


def norm_of(c: QwenVisionConfig, size: int, **around: Any) -> Any:
    kind = RMSNorm if c.model_type == "qwen2_5_vl" else LayerNorm
    return kind(size, _EPS, **around)


class VisionBlock(nnx.Module):
    """One layer: attention and MLP, each after a norm and beside a residual."""

    def __init__(self, c: QwenVisionConfig, layer: int, **around: Any) -> None:
        windowed = c.window_size > 0 and layer not in c.full_layers
        self.attn_norm = norm_of(c, c.hidden_size, **around)
        self.attn = VisionAttention(c, windowed=windowed, **around)
        self.mlp_norm = norm_of(c, c.hidden_size, **around)
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
        self.norm = norm_of(c, wide if norm_after else c.hidden_size, **around)
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
