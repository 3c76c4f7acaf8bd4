"""Static scales of a cache, from what attention sees of some text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax._kv_cache_options import KVCacheOptions, KVFormat
from angeljax.kv_cache._quantized import encode, static_scale

# Magnitudes are counted in bins of a 64th of an octave, which is 1.1 %.
_PER_OCTAVE, _LOWEST, _HIGHEST = 64, -24, 16
_BINS = _PER_OCTAVE * (_HIGHEST - _LOWEST)
# Multipliers of the search: of twice the scale that fits the maximum for floating
# formats, whose small values have their own exponent, and of that scale for integers.
_MULTIPLIERS = {
    "float8_e4m3": 2 * np.geomspace(0.4, 8, 50),
    "int8": np.geomspace(0.2, 1, 50),
    "int4": np.geomspace(0.2, 1, 50),
}


@dataclasses.dataclass(frozen=True)
class KVStatistics:
    """Magnitudes of keys and values; statistics of other batches merge with `merge`.

    Attributes:
      amax: "k" and "v", float32 `[layers, num_kv_heads]`.
      histogram: likewise int64 `[layers, num_kv_heads, bins]`, how many magnitudes fell
        in bins of a 64th of an octave from 2^-24 on; None if it was not asked for.
    """

    amax: Mapping[str, np.ndarray]
    histogram: Mapping[str, np.ndarray] | None = None

    def merge(self, other: KVStatistics) -> KVStatistics:
        """As if all batches had been measured together.

        Raises:
          ValueError: of another model, or only one of them has histograms.
        """
        shapes = {s: x.shape for s, x in self.amax.items()}
        if shapes != {s: x.shape for s, x in other.amax.items()}:
            raise ValueError("statistics of keys and values are of two models")
        if (self.histogram is None) != (other.histogram is None):
            raise ValueError("only one of the statistics has histograms")
        amax = {s: np.maximum(x, other.amax[s]) for s, x in self.amax.items()}
        if self.histogram is None or other.histogram is None:
            return KVStatistics(amax)
        both = {s: x + other.histogram[s] for s, x in self.histogram.items()}
        return KVStatistics(amax, both)

    def magnitude(self, side: str, fmt: KVFormat, percentile: float) -> np.ndarray:
        """What is to be in range, `[layers]` or `[layers, num_kv_heads]`.

        Args:
          side: "k" or "v".
          fmt: its granularity is "tensor" or "head".
          percentile: 100 for the maximum; others are read off the histogram, at the
            upper end of a bin.
        """
        amax = self.amax[side]
        if fmt.granularity == "tensor":
            amax = amax.max(axis=1)
        if percentile == 100:
            return amax
        assert self.histogram is not None, "was asked for"
        counts = self.histogram[side]
        if fmt.granularity == "tensor":
            counts = counts.sum(axis=1)
        total = np.cumsum(counts, axis=-1)
        reached = total >= percentile / 100 * total[..., -1:]
        bins = np.argmax(reached, axis=-1)
        upper = 2.0 ** ((bins + 1) / _PER_OCTAVE + _LOWEST)
        return np.minimum(upper, amax).astype(np.float32)


def kv_statistics(
    model: Any, params: Any, batches: Iterable[Any], *, histogram: bool = False
) -> KVStatistics:
    """Measures keys and values as attention sees them: keys after norm and rotation.

    Args:
      model: a `LanguageModel`.
      params: its param tree, compressed or not.
      batches: int32 `[B, T]` tokens, or a mapping of `tokens` and bool `mask` `[B, T]`,
        which is True for real tokens.
      histogram: count magnitudes too, for percentiles.

    Returns:
      `KVStatistics`.

    Raises:
      ValueError: there are no batches, or values are not finite.
    """
    found: KVStatistics | None = None
    for batch in batches:
        tokens, mask = _batch(batch)
        one = jax.device_get(_measure(model, params, tokens, mask, histogram))
        new = KVStatistics(
            amax={side: np.asarray(x[0]) for side, x in one.items()},
            histogram={s: np.asarray(x[1], np.int64) for s, x in one.items()}
            if histogram
            else None,
        )
        for side, amax in new.amax.items():
            if not np.isfinite(amax).all():
                layer = int(np.argwhere(~np.isfinite(amax))[0, 0])
                raise ValueError(
                    f"the {'keys' if side == 'k' else 'values'} of layer {layer} hold "
                    "NaN or infinity: look at the model and the batches"
                )
        found = new if found is None else found.merge(new)
    if found is None:
        raise ValueError("there are no batches to calibrate with")
    return found


def calibrate_kv(
    model: Any,
    params: Any,
    batches: Iterable[Any],
    options: KVCacheOptions,
    *,
    statistics: KVStatistics | None = None,
) -> dict[str, jax.Array]:
    """Static scales for a quantized cache.

    FP8 follows `scale = amax / 448`, of keys after rotation. With `scale_method: mse`
    50 scales are tried for each layer (or head), log-uniform from 0.8 to 16 times that
    in FP8 and from 0.2 to 1 times `amax / largest code` in integer formats, and the one
    with the least squared error of the stored values is taken; the batches are then
    read a second time.

    Args:
      model: a `LanguageModel`.
      params: its param tree, compressed or not.
      batches: as in `kv_statistics`.
      options: granularities "tensor" or "head" of keys, values or both; `scale_method`
        and `percentile`.
      statistics: measured before, or merged from several runs. Then `batches` are read
        for the method "mse" only.

    Returns:
      "k" and "v", those with static scales: float32 `[layers]` or `[layers,
      num_kv_heads]`. `attach_kv_scales` puts them into the params.

    Raises:
      ValueError: the options need no calibration, there are no batches, or values are
        not finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.kv_cache import attach_kv_scales, calibrate_kv
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> from angeljax.recipe import KVCacheOptions
      >>> options = KVCacheOptions(format="float8_e4m3", granularity="head")
      >>> model = LanguageModel(DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=2,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... ), kv_cache=options)
      >>> params = model.init(jax.random.key(0))
      >>> tokens = jnp.arange(8, dtype=jnp.int32)[None]
      >>> scales = calibrate_kv(model, params, [tokens], options)
      >>> scales["k"].shape
      (2, 1)
      >>> params = attach_kv_scales(params, scales)
      >>> model.init_cache(1, 16, params).k[0].codes.dtype.name
      'float8_e4m3fn'
    """
    if not options.static:
        raise ValueError(
            "nothing to calibrate: only granularities tensor and head have static "
            "scales"
        )
    batches = list(batches)
    if statistics is None:
        wanted = options.scale_method == "percentile"
        statistics = kv_statistics(model, params, batches, histogram=wanted)
    q = options.percentile if options.scale_method == "percentile" else 100.0
    if q != 100 and statistics.histogram is None:
        raise ValueError(
            "scale_method percentile needs kv_statistics(..., histogram=True)"
        )
    scales = {}
    for side in options.static:
        fmt = options.of(side)
        scales[side] = static_scale(
            jnp.asarray(statistics.magnitude(side, fmt, q)), fmt
        )
    if options.scale_method != "mse":
        return scales
    if not batches:
        raise ValueError("scale_method mse reads the batches: there are none")
    tried = {
        side: scale[..., None] * jnp.asarray(_multipliers(options, side), jnp.float32)
        for side, scale in scales.items()
    }
    total: Any = None
    for batch in batches:
        new = _errors(model, params, *_batch(batch), tried, options)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    best = {s: jnp.argmin(e, axis=-1, keepdims=True) for s, e in total.items()}
    return {
        s: jnp.take_along_axis(t, best[s], axis=-1)[..., 0] for s, t in tried.items()
    }


def _multipliers(options: KVCacheOptions, side: str) -> np.ndarray:
    return _MULTIPLIERS[options.of(side).format]


def _batch(batch: Any) -> tuple[jax.Array, jax.Array]:
    """Tokens and mask of one batch."""
    if isinstance(batch, Mapping):
        tokens, mask = jnp.asarray(batch["tokens"]), batch.get("mask")
    else:
        tokens, mask = jnp.asarray(batch), None
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be [batch, length], not {list(tokens.shape)}")
    real = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
    return tokens, real


def _sides(
    model: Any, params: Any, tokens: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
    """Keys and values float32 `[layers, B, T, heads, head_dim]`, 0 for padding."""
    layers = range(model.config.num_layers)
    qkv = model.features(params, tokens, mask=mask, relations=layers).qkv
    real = mask[:, :, None, None]
    return {
        side: jnp.stack([jnp.where(real, x[n].astype(jnp.float32), 0) for x in qkv])
        for side, n in (("k", 1), ("v", 2))
    }


@functools.partial(jax.jit, static_argnums=(0, 4))
def _measure(
    model: Any, params: Any, tokens: jax.Array, mask: jax.Array, histogram: bool
) -> dict[str, Any]:
    found = {}
    for side, x in _sides(model, params, tokens, mask).items():
        size = jnp.abs(x)
        counts = _count(size, mask) if histogram else None
        found[side] = jnp.max(size, axis=(1, 2, 4)), counts
    return found


def _count(size: jax.Array, mask: jax.Array) -> jax.Array:
    """int32 `[layers, heads, bins]` of magnitudes `[layers, B, T, heads, head_dim]`."""
    layers, _, _, heads, _ = size.shape
    place = jnp.floor((jnp.log2(size) - _LOWEST) * _PER_OCTAVE)
    place = jnp.clip(place, 0, _BINS - 1).astype(jnp.int32)
    layer = jnp.arange(layers)[:, None, None, None, None]
    head = jnp.arange(heads)[:, None]
    one = jnp.broadcast_to(mask[:, :, None, None], size.shape).astype(jnp.int32)
    return jnp.zeros((layers, heads, _BINS), jnp.int32).at[layer, head, place].add(one)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _errors(
    model: Any,
    params: Any,
    tokens: jax.Array,
    mask: jax.Array,
    tried: dict[str, jax.Array],
    options: KVCacheOptions,
) -> dict[str, jax.Array]:
    """Squared errors of scales `[layers, (heads,) tries]`, of the same shape."""
    found = _sides(model, params, tokens, mask)

    def of(side: str, scales: jax.Array) -> jax.Array:
        x, fmt = found[side], options.of(side)
        # Padding is 0, which every format stores without an error.
        axes = (1, 2, 4) if scales.ndim == 3 else (1, 2, 3, 4)

        def error(scale: jax.Array) -> jax.Array:
            heads = scale if scale.ndim == 2 else scale[:, None]
            stored = encode(x, fmt, heads[:, None, None, :, None], "float32")
            return jnp.sum(jnp.square(stored.dequantize() - x), axis=axes)

        return jnp.moveaxis(jax.lax.map(error, jnp.moveaxis(scales, -1, 0)), 0, -1)

    return {side: of(side, scales) for side, scales in tried.items()}
