"""Quantized KV caches: fewer bytes for what a decoder has read.

Decoders of `angeljax.models` take a `KVCacheOptions` (`LanguageModel.kv_cache`, or the
section `kv_cache` of a recipe); the caches of other models go through `quantize_kv` and
`update_kv`.
"""

from angeljax._kv_cache_options import KVCacheOptions, KVFormat
from angeljax.kv_cache._calibrate import KVStatistics, calibrate_kv, kv_statistics
from angeljax.kv_cache._quantized import (
    QuantizedKV,
    fake_quantize_kv,
    quantize_kv,
    update_kv,
)
from angeljax.kv_cache._scales import attach_kv_scales, kv_scales

__all__ = [
    "KVCacheOptions",
    "KVFormat",
    "KVStatistics",
    "QuantizedKV",
    "attach_kv_scales",
    "calibrate_kv",
    "fake_quantize_kv",
    "kv_scales",
    "kv_statistics",
    "quantize_kv",
    "update_kv",
]
