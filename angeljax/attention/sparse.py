"""`sparse_attention`: a selector names key blocks, the kernel attends to them."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.attention._selector import Place, Selector
from angeljax.attention.mean_correction import mean_correction as corrected
from pallas_kernels import block_sparse_attention
from pallas_kernels._devices import current_device, has_flash
from pallas_kernels.block_sparse_attention._lists import causal_lists


def sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    selector: Selector,
    *,
    layer: int | jax.Array = 0,
    num_layers: int = 1,
    q_offset: int | jax.Array = 0,
    total: int | None = None,
    lengths: jax.Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
    mean_correction: bool = False,
    dense_below: int | None = None,
    dense_above: float | None = None,
    kv_dtype: str | None = None,
    implementation: str | None = None,
) -> Any:
    """Causal attention of a prompt on the key blocks that a selector names.

    Where that would gain nothing the attention is dense, which is decided while
    tracing: the prompt is short, or the selector says beforehand that it will read
    nearly every block. Dense attention is cuDNN's on GPUs where the first query is at
    position 0, else the same kernel with every block listed.

    Args:
      q: `[B, T, H, D]`, bfloat16, float16 or float32.
      k, v: `[B, S, Hkv, D]`, dtype of q; Hkv divides H. Padding stands on the right.
      selector: names the blocks; see `angeljax.attention.selector`.
      layer: number of the layer, which some selectors look at; may be traced.
      num_layers: of the model.
      q_offset: position of the first query among the keys, an integer or int32 `[B]`.
        Traced it must be a multiple of the selector's block size; as an integer it
        need not, and the first block is then selected from the queries it has.
      total: tokens of the whole prompt, default S. Budgets follow it, so that a chunk
        selects what the whole prompt would.
      lengths: int32 `[B]`, real keys of each row, default S; queries past them give
        zeros.
      scale: of the logits, default `D ** -0.5`. The selector sees queries multiplied so
        that this is the default for it.
      soft_cap: logits become `soft_cap * tanh(logits / soft_cap)`; selectors do not
        see it.
      return_lse: also return the logarithm of the sum of exponentials.
      mean_correction: let each block that was not selected count as its mean key and
        value (FlashPrefill V2, arXiv 2608.19758).
      dense_below: prompts of fewer tokens are dense; default by device, from
        `thresholds.json`.
      dense_above: layers where the selector's predicted density is higher are dense;
        default by device.
      kv_dtype: "float8_e4m3fn" rounds q, k and v to 8 bits where attention is sparse;
        selectors see them before. Not differentiable. See
        `pallas_kernels.block_sparse_attention`.
      implementation: of `pallas_kernels.block_sparse_attention`.

    Returns:
      `[B, T, H, D]` in the dtype of q; with `return_lse` also float32 `[B, H, T]`.
      Differentiable in q, k and v; what was selected counts as constant.

    Raises:
      ValueError: an argument that cannot be; KernelError (one too) for arrays that do
        not fit together.

    Example:
      >>> import jax
      >>> from angeljax.attention import selector, sparse_attention
      >>> @jax.jit
      ... def attend(q, k, v):
      ...     stem = selector("stem", budget_mode="density", keep_ratio=0.25)
      ...     return sparse_attention(q, k, v, stem, layer=2, num_layers=32)
      >>> x = jax.ShapeDtypeStruct((1, 32768, 8, 64), jax.numpy.bfloat16)
      >>> jax.eval_shape(attend, x, x, x).shape
      (1, 32768, 8, 64)
    """
    total = k.shape[1] if total is None else total
    _check(q, k, v, selector, num_layers, total, dense_above)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    place = Place(
        layer=layer,
        num_layers=num_layers,
        q_offset=q_offset,
        total=total,
        lengths=lengths,
    )
    run = functools.partial(
        _dense,
        q_offset=q_offset,
        lengths=lengths,
        scale=scale,
        soft_cap=soft_cap,
        return_lse=return_lse,
        implementation=implementation,
    )
    some = functools.partial(
        _sparse,
        selector=selector,
        place=place,
        scale=scale,
        soft_cap=soft_cap,
        return_lse=return_lse,
        mean_correction=mean_correction,
        kv_dtype=kv_dtype,
        implementation=implementation,
    )
    gains = worthwhile(
        selector,
        total,
        num_layers,
        layer=layer if isinstance(layer, int) else None,
        dense_below=dense_below,
        dense_above=dense_above,
    )
    if len(set(gains)) == 1:
        return (some if gains[0] else run)(q, k, v)
    # A traced layer of a model that has both kinds: lists need not be as wide as those
    # of the dense ones would be.
    among = tuple(i for i, gain in enumerate(gains) if gain)
    some.keywords["place"] = dataclasses.replace(place, among=among)
    return jax.lax.cond(jnp.asarray(gains)[layer], some, run, q, k, v)


def worthwhile(
    selector: Selector,
    total: int,
    num_layers: int,
    *,
    layer: int | None = None,
    dense_below: int | None = None,
    dense_above: float | None = None,
) -> list[bool]:
    """Whether sparse attention gains anything over dense, for each layer.

    Args:
      selector: names the blocks.
      total: tokens of the prompt.
      num_layers: of the model.
      layer: one layer alone.
      dense_below, dense_above: see `sparse_attention`.

    Returns:
      One value for each layer from 0, or for the one asked for.
    """
    limits = thresholds()
    below = limits.dense_below if dense_below is None else dense_below
    above = limits.dense_above if dense_above is None else dense_above
    layers = range(num_layers) if layer is None else (layer,)
    if total < below or total <= selector.block_size:
        return [False] * len(layers)
    return [_least(selector, total, i, num_layers) <= above for i in layers]


def _least(selector: Selector, total: int, layer: int, num_layers: int) -> float:
    """The smallest share of the causal blocks that a layer may read."""
    density = selector.density(total, layer=layer, num_layers=num_layers)
    if density is None:
        bounds = getattr(selector, "density_bounds", None)
        if bounds is None:
            return 0.0
        density, _ = bounds(total, layer=layer, num_layers=num_layers)
    return density


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Where dense attention is the faster one, on a device.

    Attributes:
      dense_below: tokens of a prompt.
      dense_above: share of the causal blocks.
    """

    dense_below: int
    dense_above: float


def thresholds(device_kind: str | None = None) -> Thresholds:
    """The limits for a device; default the one that code is traced for.

    `thresholds.json` has a row by name for a device that was measured; the row
    "default" is an estimate.

    Example:
      >>> from angeljax.attention.sparse import thresholds
      >>> 0.5 < thresholds("NVIDIA H100 80GB HBM3").dense_above <= 1
      True
    """
    kind = current_device().device_kind if device_kind is None else device_kind
    table = _table()
    return table.get(kind, table["default"])


@functools.cache
def _table() -> dict[str, Thresholds]:
    text = Path(__file__).with_name("thresholds.json").read_text(encoding="utf-8")
    return {kind: Thresholds(**row) for kind, row in json.loads(text).items()}


def _check(
    q: Any, k: Any, v: Any, selector: Any, layers: int, total: int, above: float | None
) -> None:
    if not isinstance(selector, Selector):
        raise ValueError(
            f"selector must have block_size, select and density, which a "
            f"{type(selector).__name__} has not: use angeljax.attention.selector(name)"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, T, heads, D], not {list(x.shape)}")
    batch, _, heads, dim = q.shape
    if k.shape != v.shape or (k.shape[0], k.shape[3]) != (batch, dim):
        raise ValueError(
            f"k {list(k.shape)} and v {list(v.shape)} must be alike, and have the "
            f"batch and the head size of q {list(q.shape)}"
        )
    if not k.shape[2] or heads % k.shape[2]:
        raise ValueError(f"{heads} query heads cannot share {k.shape[2]} key heads")
    if total < 1:
        raise ValueError(f"total must be at least 1, not {total}")
    if layers < 1:
        raise ValueError(f"num_layers must be at least 1, not {layers}")
    if above is not None and not 0 <= above <= 1:
        raise ValueError(f"dense_above must be a share in [0, 1], not {above}")


def _sparse(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    selector: Selector,
    place: Place,
    mean_correction: bool,
    scale: float,
    soft_cap: float | None,
    return_lse: bool,
    kv_dtype: str | None,
    implementation: str | None,
) -> Any:
    """Selection and attention; moves the queries onto the grid of blocks."""
    offset, size = place.q_offset, selector.block_size
    before = offset % size if isinstance(offset, int) else 0
    if before:
        # The first query stands for those of its block that are not there.
        q = jnp.pad(q, ((0, 0), (before, 0), (0, 0), (0, 0)), mode="edge")
        place = dataclasses.replace(place, q_offset=offset - before)
    seen = jax.lax.stop_gradient((q, k, v))
    usual = q.shape[-1] ** -0.5
    if scale != usual:
        seen = (seen[0] * (scale / usual)).astype(q.dtype), *seen[1:]
    lists = selector.select(*seen, place)
    y, lse = block_sparse_attention(
        q,
        k,
        v,
        lists,
        scale=scale,
        q_offset=place.q_offset,
        lengths=place.lengths,
        soft_cap=soft_cap,
        return_lse=True,
        kv_dtype=kv_dtype,
        implementation=implementation,
    )
    if mean_correction:
        y, lse = corrected(
            q,
            k,
            v,
            lists,
            y,
            lse,
            scale=scale,
            q_offset=place.q_offset,
            soft_cap=soft_cap,
        )
    y, lse = y[:, before:], lse[..., before:]
    return (y, lse) if return_lse else y


def _dense(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_offset: int | jax.Array,
    lengths: jax.Array | None,
    scale: float,
    soft_cap: float | None,
    return_lse: bool,
    implementation: str | None,
) -> Any:
    first = isinstance(q_offset, int) and q_offset == 0
    if first and soft_cap is None and not return_lse and implementation is None:
        # The causal mask starts at the first query and the first key.
        y = jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=True, implementation=_flash(q)
        )
        if lengths is not None:
            real = jnp.arange(q.shape[1]) < lengths[:, None]
            y = jnp.where(real[..., None, None], y, 0)
        return y
    return block_sparse_attention(
        q,
        k,
        v,
        causal_lists(q.shape[1], k.shape[1], q_offset=q_offset),
        scale=scale,
        q_offset=q_offset,
        lengths=lengths,
        return_lse=return_lse,
        soft_cap=soft_cap,
        implementation=implementation,
    )


def _flash(q: jax.Array) -> Any:
    """ "cudnn" where it can run; decided while tracing, as gradients need."""
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and not q.shape[-1] % 8
    return "cudnn" if has_flash() and fits and q.shape[-1] <= 128 else None
