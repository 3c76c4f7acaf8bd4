"""Static scales of a cache as leaves of the param tree, so that they travel with it.

They lie under `layers/<i>/attn/k_cache/scale` and `.../v_cache/scale`, or in a stack
(`scan_layers`) under `layers/attn/k_cache/scale` with a leading layer axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from angeljax._kv_cache_options import KVCacheOptions

_NAMES = {"k": "k_cache", "v": "v_cache"}


def attach_kv_scales(
    params: Mapping[str, Any], scales: Mapping[str, jax.Array]
) -> dict[str, Any]:
    """Puts static scales into the tree of a decoder of `angeljax.models`.

    Args:
      params: the tree, compressed or not, with numbered layers or a stack.
      scales: "k" and "v", or one of them, float32 `[layers]` or `[layers,
        num_kv_heads]`, as `calibrate_kv` gives them.

    Returns:
      The tree with leaves `layers/<i>/attn/k_cache/scale`; models that do not look for
      them run as before.

    Raises:
      ValueError: the scales are of another number of layers.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.kv_cache import attach_kv_scales
      >>> params = {"layers": {0: {"attn": {}}, 1: {"attn": {}}}}
      >>> params = attach_kv_scales(params, {"k": jnp.asarray([0.5, 0.25])})
      >>> float(params["layers"][1]["attn"]["k_cache"]["scale"])
      0.25
    """
    layers = params["layers"]
    own = {_NAMES[side]: {"scale": jnp.asarray(s)} for side, s in scales.items()}
    count = len(jax.tree.leaves(layers)[0]) if "attn" in layers else len(layers)
    for name, scale in own.items():
        if scale["scale"].shape[:1] != (count,):
            raise ValueError(
                f"{name} scales {list(scale['scale'].shape)} are not of {count} layers"
            )
    if "attn" in layers:
        return {**params, "layers": _beside(layers, own)}
    done = {
        i: _beside(layer, jax.tree.map(lambda s, i=i: s[int(i)], own))
        for i, layer in layers.items()
    }
    return {**params, "layers": done}


def _beside(layer: Mapping[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    return {**layer, "attn": {**layer["attn"], **own}}


def kv_scales(
    params: Mapping[str, Any] | None,
    options: KVCacheOptions,
    num_layers: int,
    num_kv_heads: int,
) -> dict[str, jax.Array]:
    """Static scales of a tree, float32 `[layers, 1, num_kv_heads or 1, 1, 1]`.

    They broadcast to `[layers, B, num_kv_heads, slots, head_dim]`.

    Raises:
      ValueError: the options need scales and there are none, or of other shapes.
    """
    found = {}
    for side in options.static:
        name, fmt = _NAMES[side], options.of(side)
        what = f"kv_cache {fmt.format} with granularity {fmt.granularity}"
        if params is None:
            raise ValueError(
                f"{what} has static scales, which lie in the params: pass "
                "model.init_cache(batch, slots, params)"
            )
        layers = params["layers"]
        try:
            if "attn" in layers:
                scale = layers["attn"][name]["scale"]
            else:
                ordered = [layers[i] for i in sorted(layers, key=int)]
                scale = jnp.stack([i["attn"][name]["scale"] for i in ordered])
        except KeyError:
            raise ValueError(
                f"{what} needs layers/<i>/attn/{name}/scale in the params: use "
                "calibrate_kv and attach_kv_scales of angeljax.kv_cache, or "
                "granularity: token"
            ) from None
        heads = num_kv_heads if fmt.granularity == "head" else 1
        want = (num_layers, heads) if heads > 1 or scale.ndim > 1 else (num_layers,)
        if scale.shape != want:
            raise ValueError(
                f"{what} needs {name} scales of {list(want)}, layers first, and the "
                f"params have {list(scale.shape)}: calibrate for this granularity"
            )
        scale = jnp.asarray(scale, jnp.float32)
        found[side] = scale.reshape(num_layers, 1, heads, 1, 1)
    return found
