"""`QuantizedKV`: keys or values as codes and scales, written token by token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from angeljax._kv_cache_options import KVFormat
from angeljax.formats._blocks import rounded
from angeljax.formats._packing import pack_bits
from angeljax.formats.float8 import E4M3, cast
from angeljax.formats.integer import inverse

# Of scales that are taken from the tokens; static ones are float32.
SCALE_DTYPE = jnp.bfloat16
# Below it a scale's reciprocal is near the end of float32: such tokens are zeros.
TINY = 2.0**-100
_LARGEST = {"float8_e4m3": 448.0, "int8": 127.0, "int4": 7.0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedKV:
    """Keys or values `[..., head_dim]` in a `KVFormat`; a pytree of static shapes.

    A value is `code * scale`, plus `offset` where the format is not symmetric.

    Attributes:
      codes: `[..., head_dim]`, float8_e4m3fn, int8, or uint8 without symmetry; int4 as
        uint8 `[..., head_dim / 2]`, the even channel in the low four bits.
      scale: static: float32, of as many axes as `codes`, 1 where all share one. Else
        bfloat16 `[..., groups]`, one group for the granularity "token".
      offset: as `scale`; None with symmetry.
      format: how it is stored.
      dtype: name of the dtype in which values are read.
    """

    codes: jax.Array
    scale: jax.Array
    offset: jax.Array | None
    format: KVFormat = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the keys or values."""
        *lead, last = self.codes.shape
        return (*lead, last * (2 if self.format.format == "int4" else 1))

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The values `[..., head_dim]`; in `dtype`, default that of what was stored."""
        scale = self.scale.astype(jnp.float32)
        offset = None if self.offset is None else self.offset.astype(jnp.float32)
        x = _unpacked(self.codes, self.format)
        shape = x.shape
        if not self.format.static:
            x = x.reshape(*shape[:-1], scale.shape[-1], -1)
            scale = scale[..., None]
            offset = None if offset is None else offset[..., None]
        x = x * scale if offset is None else x * scale + offset
        return x.reshape(shape).astype(self.dtype if dtype is None else dtype)

    def encode(self, new: jax.Array) -> QuantizedKV:
        """More values `[..., head_dim]` in the same format, with its static scales."""
        return encode(new, self.format, self.scale, self.dtype)

    def at(self, layer: Any) -> QuantizedKV:
        """One entry of the first axis of every array."""
        return self._map(
            lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
        )

    def put(self, part: QuantizedKV, start: tuple[Any, ...]) -> QuantizedKV:
        """Writes what `encode` gave; `start` is the place of its first value.

        Args:
          part: as many axes as this or fewer, which are then the last ones.
          start: an index for each axis of this.
        """

        def write(store: jax.Array, new: jax.Array) -> jax.Array:
            new = jnp.expand_dims(new, tuple(range(store.ndim - new.ndim)))
            return jax.lax.dynamic_update_slice(store, new, start)

        codes = write(self.codes, part.codes)
        if self.format.static:
            return dataclasses.replace(self, codes=codes)
        offset = None
        if self.offset is not None:
            assert part.offset is not None, "of the same format"
            offset = write(self.offset, part.offset)
        scale = write(self.scale, part.scale)
        return dataclasses.replace(self, codes=codes, scale=scale, offset=offset)

    def _map(self, fn: Callable[[jax.Array], jax.Array]) -> QuantizedKV:
        return jax.tree.map(fn, self)


def encode(
    x: jax.Array, fmt: KVFormat, scale: jax.Array | None, dtype: str
) -> QuantizedKV:
    """Codes of `[..., head_dim]`, with the given scales if the format's are static."""
    offset = None
    if fmt.static:
        assert scale is not None, "static scales are known"
        y = x.astype(jnp.float32) * (1.0 / scale)
        codes = _packed(_nearest(y, fmt), fmt)
        return QuantizedKV(codes, scale, None, fmt, dtype)
    groups = 1 if fmt.group_size is None else x.shape[-1] // fmt.group_size
    y = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, -1)
    if fmt.symmetric:
        scale = jnp.max(jnp.abs(y), axis=-1) * inverse(_LARGEST[fmt.format])
    else:
        steps = 2.0 ** int(fmt.format[3:]) - 1
        offset = rounded(jnp.min(y, axis=-1), SCALE_DTYPE)
        y = y - offset.astype(jnp.float32)[..., None]
        scale = jnp.max(y, axis=-1) * inverse(steps)
    scale = rounded(jnp.where(scale < TINY, 1.0, scale), SCALE_DTYPE)
    y = y * (1.0 / scale.astype(jnp.float32))[..., None]
    codes = _packed(_nearest(y, fmt).reshape(x.shape), fmt)
    return QuantizedKV(codes, scale, offset, fmt, dtype)


def _nearest(y: jax.Array, fmt: KVFormat) -> jax.Array:
    """The nearest codes of values in units of their scale; ties to even."""
    if fmt.format == "float8_e4m3":
        return cast(y, E4M3)
    if not fmt.symmetric:
        return jnp.clip(jnp.round(y), 0, 2.0 ** int(fmt.format[3:]) - 1)
    top = _LARGEST[fmt.format]
    return jnp.clip(jnp.round(y), -top, top)


def _packed(codes: jax.Array, fmt: KVFormat) -> jax.Array:
    if fmt.format == "float8_e4m3":
        return codes
    if fmt.format == "int8":
        return codes.astype(jnp.int8 if fmt.symmetric else jnp.uint8)
    return pack_bits((codes + (8 if fmt.symmetric else 0)).astype(jnp.uint8), 4)


def _unpacked(codes: jax.Array, fmt: KVFormat) -> jax.Array:
    """float32 `[..., head_dim]`."""
    if fmt.format != "int4":
        return codes.astype(jnp.float32)
    # A shift for each of two copies: one loop that fuses with what reads it, where
    # halves that are put side by side would be written out.
    both = codes[..., None] >> jnp.arange(0, 8, 4, dtype=jnp.uint8)
    x = (both & 15).reshape(*codes.shape[:-1], -1).astype(jnp.float32)
    return x - 8 if fmt.symmetric else x


def empty(
    shape: tuple[int, ...], fmt: KVFormat, dtype: Any, scale: jax.Array | None = None
) -> QuantizedKV:
    """Zeros `[..., head_dim]`; `scale` broadcasts to them if it is static."""
    dtype = jnp.dtype(dtype).name
    like = jax.eval_shape(
        lambda s: encode(jnp.zeros(shape, jnp.float32), fmt, s, dtype), scale
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return zeros if scale is None else dataclasses.replace(zeros, scale=scale)


def static_scale(amax: jax.Array, fmt: KVFormat) -> jax.Array:
    """The float32 scale that puts magnitudes up to `amax` in range."""
    scale = amax.astype(jnp.float32) * inverse(_LARGEST[fmt.format])
    return jnp.where(scale < TINY, 1.0, scale)


def quantize_kv(
    x: jax.Array,
    options: KVFormat | str,
    *,
    scale: jax.Array | None = None,
    head_axis: int = -2,
) -> QuantizedKV:
    """Keys or values of anybody's model, as codes and scales.

    Works under `jit`, `vmap` and `jax.eval_shape`; the result is a pytree that goes
    through `scan` and into checkpoints. `update_kv` writes more tokens into it.

    Args:
      x: float `[..., head_dim]`, such as a whole cache; keys after rotation.
      options: how to store it; a bare name is a format with its defaults.
      scale: float32, broadcasts to `x`: static scales, for the granularities "tensor"
        and "head". Default: from the magnitudes of `x`.
      head_axis: which axis counts heads, for the granularity "head".

    Returns:
      A `QuantizedKV`.

    Raises:
      ValueError: an option that cannot be, a size that the format cannot store, or a
        scale that is not wanted or does not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.kv_cache import quantize_kv, update_kv
      >>> k = jax.random.normal(jax.random.key(0), (1, 16, 2, 64))  # 16 slots
      >>> cache = quantize_kv(k, "int4")
      >>> cache.nbytes, k.nbytes
      (1152, 8192)
      >>> cache = update_kv(cache, jnp.full((1, 1, 2, 64), 7.0), 3)
      >>> float(cache.dequantize()[0, 3].min())
      7.0
    """
    found = KVFormat.parse(options, "options")
    assert found is not None, "given"
    fmt = found
    if fmt.format == "none":
        raise ValueError("options.format is none: there is nothing to quantize")
    fmt.check(x.shape[-1])
    if fmt.static:
        if scale is None:
            keep = head_axis % x.ndim if fmt.granularity == "head" else None
            axes = tuple(i for i in range(x.ndim) if i != keep)
            amax = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=axes, keepdims=True)
            scale = static_scale(amax, fmt)
        scale = jnp.asarray(scale, jnp.float32)
        scale = scale.reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
        sizes = zip(scale.shape, x.shape, strict=False)
        if scale.ndim > x.ndim or any(s not in (1, n) for s, n in sizes):
            raise ValueError(
                f"scale {list(scale.shape)} does not broadcast to x {list(x.shape)}"
            )
    elif scale is not None:
        raise ValueError(
            f"granularity {fmt.granularity} takes its scales from x: leave scale out"
        )
    return encode(x, fmt, scale, jnp.dtype(x.dtype).name)


def update_kv(
    cache: QuantizedKV, new: jax.Array, index: int | jax.Array, *, axis: int = -3
) -> QuantizedKV:
    """Writes new tokens into a quantized cache; in place if the cache is donated.

    Args:
      cache: of `quantize_kv`.
      new: float, as many axes as the cache, the new tokens along `axis`.
      index: int32 scalar, slot of the first of them.
      axis: which axis counts slots: -3 for `[..., slots, heads, head_dim]`, -2 for
        `[..., heads, slots, head_dim]`.

    Returns:
      The cache with the tokens. Static scales stay as they are.

    Raises:
      ValueError: `new` does not fit the cache.
    """
    rank = len(cache.shape)
    at = axis % rank
    fits = new.ndim == rank and at != rank - 1
    if (
        not fits
        or any(
            n != c
            for i, (n, c) in enumerate(zip(new.shape, cache.shape, strict=True))
            if i != at
        )
        or new.shape[at] > cache.shape[at]
    ):
        raise ValueError(
            f"new {list(new.shape)} does not fit a cache of {list(cache.shape)} with "
            f"slots along axis {axis}"
        )
    if cache.format.static and cache.scale.shape[at] != 1:
        raise ValueError(f"the cache has static scales along axis {axis}, of its slots")
    start = tuple(index if i == at else 0 for i in range(rank))
    return cache.put(cache.encode(new), start)


def fake_quantize_kv(
    x: jax.Array,
    options: KVFormat | str,
    *,
    scale: jax.Array | None = None,
    head_axis: int = -2,
) -> jax.Array:
    """What a quantized cache would give back of `x`, in its dtype.

    Inside an attention function it measures what a format costs in one parallel pass.
    Arguments and errors are those of `quantize_kv`.
    """
    return quantize_kv(x, options, scale=scale, head_axis=head_axis).dequantize()
