"""Pruning in other people's models: functions over the arrays that they pass around.

Nothing here imports those libraries. Each function says where it belongs in the forward
pass of the model, and what else there has to follow. All of them count positions as the
array does, so that pruning is "compact": as if the tokens had never been there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.tokens._prompt import Prompt
from angeljax.tokens._signals import PruneFn, choose
from angeljax.tokens._where import token_positions
from angeljax.tokens.apply import Pruned, apply_selection


def prune_paligemma(
    inputs: tuple[jax.Array, jax.Array, jax.Array],
    prune: PruneFn,
    *,
    num_image_tokens: int,
    **signals: Any,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Pruned]:
    """PaliGemma of big_vision: between `embed_image_and_text` and `prefill_cache`.

    The image stands in the first columns; the rest is text, with its padding at the
    end. `x, input_mask, mask_ar` come out as short as the tokens that stay, and rows
    that keep fewer are padded at the end, where the model expects padding:

        inputs, _ = model.apply(params, image, text, method="embed_image_and_text")
        inputs, _ = prune_paligemma(inputs, fn, num_image_tokens=256)
        logits, cache = model.apply(params, *inputs, cache_size=size,
                                    method="prefill_cache", mutable=("cache",))

    Args:
      inputs: `x` `[B, L, D]`, `input_mask` bool `[B, L]`, `mask_ar` int `[B, L]`.
      prune: `prune(embeds [B, N, D], ...)` -> `Selection`, such as
        `recipe.tokens.prune_fn()`.
      num_image_tokens: N: 256, 1024 or 4096 for images of 224, 448 or 896 pixels, times
        the frames of a video.
      **signals: what `prune` may take besides, such as `attn` `[B, N]`.

    Returns:
      The three arrays for `prefill_cache`, and the `Pruned` that they are of.

    Raises:
      ValueError: shapes do not go together.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.recipe import TokensOptions
      >>> inputs = jnp.ones((2, 20, 8)), jnp.ones((2, 20), bool), jnp.ones((2, 20), int)
      >>> fn = TokensOptions(method="uniform", keep=4).prune_fn()
      >>> (x, mask, mask_ar), _ = prune_paligemma(inputs, fn, num_image_tokens=16)
      >>> x.shape, mask_ar.shape
      ((2, 8, 8), (2, 8))
    """
    x, mask, mask_ar = inputs
    if x.ndim != 3 or not 1 <= num_image_tokens <= x.shape[1]:
        raise ValueError(
            f"num_image_tokens={num_image_tokens} must be from 1 to the tokens of x, "
            f"[B, L, D], which is {list(x.shape)}"
        )
    image, rest = x[:, :num_image_tokens], x[:, num_image_tokens:]
    there = mask[:, num_image_tokens:, None]
    given = {"mask": mask[:, :num_image_tokens], "text": jnp.where(there, rest, 0)}
    chosen = choose(prune, image, **{**given, **signals})
    short = apply_selection(
        chosen,
        Prompt(embeds=x, mask=mask, extra={"mask_ar": mask_ar}),
        (0, num_image_tokens),
        position_policy="compact",
    )
    out = short.prompt
    assert out.mask is not None, "a pruned prompt has a mask"
    return (out.embeds, out.mask, out.extra["mask_ar"]), short


def prune_soft_tokens(soft: jax.Array, prune: PruneFn, **signals: Any) -> jax.Array:
    """Gemma 3 of the library `gemma`: what `_encode_vision` gives, for each image.

    Every image keeps the same number K of its tokens, so that shapes stay fixed. The
    model has to insert as many placeholders: the `num_tokens_per_image` that its input
    is prepared with, and that `remove_mm_logits` is given, must be K. The mask among
    the tokens of an image is made from the placeholders and follows by itself.

        class Pruned(gm.nn.Gemma3_4B):
          def _encode_vision(self, images):
            return prune_soft_tokens(super()._encode_vision(images), fn)

    Args:
      soft: `[B, M, P, D]`, M images of P tokens.
      prune: see `prune_paligemma`; it chooses within one image, and `keep` must give
        every image as many.
      **signals: what `prune` may take besides, `[B, M, P, ...]`.

    Returns:
      `[B, M, K, D]`.

    Raises:
      ValueError: `soft` has other axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.recipe import TokensOptions
      >>> fn = TokensOptions(method="uniform", keep=64).prune_fn()
      >>> prune_soft_tokens(jnp.ones((1, 2, 256, 8)), fn).shape
      (1, 2, 64, 8)
    """
    if soft.ndim != 4:
        raise ValueError(
            f"soft tokens must be [B, images, tokens, D], not {list(soft.shape)}"
        )
    b, m, p, d = soft.shape
    rows = soft.reshape(b * m, p, d)
    given = {k: v.reshape(b * m, *v.shape[2:]) for k, v in signals.items()}
    chosen = choose(prune, rows, **given)
    kept = chosen.take(rows) if chosen.merged is None else chosen.merged
    return kept.astype(soft.dtype).reshape(b, m, -1, d)


def prune_placeholders(
    images: jax.Array,
    tokens: jax.Array,
    token_types: jax.Array,
    prune: PruneFn,
    *,
    mask: jax.Array | None = None,
    extra: Mapping[str, jax.Array] | None = None,
    deepstack: Sequence[jax.Array] = (),
    **signals: Any,
) -> tuple[jax.Array, jax.Array, jax.Array, Pruned]:
    """Gemma 3 and Qwen3-VL of bonsai: before `batched_merge_modalities`.

    That puts the rows of `img_emb` where `token_type_ids` is 1, in order. Here rows go,
    and as many placeholders with them; rows that keep fewer are padded at the end with
    id and type 0. Masks and rotary positions follow from the length of the ids.

    Args:
      images: `img_emb` `[B, N, D]`.
      tokens: `input_ids` int `[B, L]`, with N placeholders in each row, or fewer.
      token_types: `token_type_ids` int `[B, L]`, 1 for placeholders.
      prune: see `prune_paligemma`.
      mask: bool `[B, L]`, True for real tokens; needed where rows have fewer
        placeholders than others, and padding for them.
      extra: other arrays `[B, L, ...]` by name, such as `segment_ids`.
      deepstack: planes `[B, N, D]` that go with the images.
      **signals: what `prune` may take besides, such as `attn` `[B, N]`.

    Returns:
      `img_emb` `[B, K, D]`, `input_ids` and `token_type_ids` `[B, L - (N - K)]`, and
      the `Pruned`, whose `prompt` has `extra`, `deepstack` `[B, K, D]` and the mask.

    Raises:
      ValueError: shapes do not go together.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.recipe import TokensOptions
      >>> ids = jnp.array([[2, 9, 9, 9, 9, 5]])
      >>> fn = TokensOptions(method="uniform", keep=2).prune_fn()
      >>> rows, ids, types, _ = prune_placeholders(
      ...     jnp.ones((1, 4, 8)), ids, (ids == 9).astype(int), fn
      ... )
      >>> rows.shape, ids.tolist(), types.tolist()
      ((1, 2, 8), [[2, 9, 9, 5]], [[0, 1, 1, 0]])
    """
    if images.ndim != 3 or tokens.ndim != 2 or tokens.shape != token_types.shape:
        raise ValueError(
            f"images must be [B, N, D], tokens and token_types [B, L], not "
            f"{list(images.shape)}, {list(tokens.shape)} and {list(token_types.shape)}"
        )
    n, length = images.shape[1], tokens.shape[1]
    where = token_positions(token_types == 1, length=length, num_tokens=n)
    there = where < length
    if mask is not None:
        there &= jnp.take_along_axis(mask, jnp.minimum(where, length - 1), axis=1)
    chosen = choose(prune, images, **{"mask": there, **signals})
    # The embeddings of text are not there yet; ids stand for them.
    stand_in = tokens[..., None].astype(jnp.float32)
    short = apply_selection(
        dataclasses.replace(chosen, merged=None),
        Prompt(
            embeds=stand_in,
            mask=mask,
            tokens=tokens,
            token_types=token_types,
            deepstack=tuple(deepstack),
            extra=dict(extra or {}),
        ),
        where,
        position_policy="compact",
    )
    rows = chosen.take(images) if chosen.merged is None else chosen.merged
    out = short.prompt
    assert out.tokens is not None and out.token_types is not None, "they went in"
    return rows.astype(images.dtype), out.tokens, out.token_types, short
