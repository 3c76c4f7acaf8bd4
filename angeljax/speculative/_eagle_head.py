"""The arithmetic of an EAGLE-3 head: one function of what training and drafting share.

With f the features of a token (three layers of the target in one, by `fc`) and e the
embedding of the token after it,

    a = attention([norm(e); norm(f)]),  h = f + a,  h' = h + mlp(norm(h)),

the logits of the token after that are the head's of norm(h'). Where the target has not
been yet, h' of the step before stands for f. Names of parameters are those of the
published checkpoints, kernels are `[in, out]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax import ops
from angeljax.models.rope import cos_sin, rotate
from angeljax.speculative._eagle_config import EagleConfig
from pallas_kernels._fused import before

# (q [B,T,H,D], k and v [B,T,Hkv,D]) -> [B,T,H,D]; whoever reads knows the cache.
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Params = dict[str, Any]
# What `SpecExit` reads, in the order of its outputs.
EXIT_SIGNALS = ("confidence", "progress", "remaining")


def shapes(config: EagleConfig) -> dict[str, Any]:
    """`{path: shape}` of the parameters, as a nested dict."""
    d, ff = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    wide = len(config.target_layers) * config.target_hidden_size
    return {
        "fc": {"kernel": (wide, d)},
        "midlayer": {
            "hidden_norm": {"scale": (d,)},
            "input_layernorm": {"scale": (d,)},
            "post_attention_layernorm": {"scale": (d,)},
            "self_attn": {
                "q_proj": {"kernel": (2 * d, q)},
                "k_proj": {"kernel": (2 * d, kv)},
                "v_proj": {"kernel": (2 * d, kv)},
                "o_proj": {"kernel": (q, d)},
            },
            "mlp": {
                "gate_proj": {"kernel": (d, ff)},
                "up_proj": {"kernel": (d, ff)},
                "down_proj": {"kernel": (ff, d)},
            },
        },
        "norm": {"scale": (d,)},
        "lm_head": {"kernel": (d, config.draft_vocab_size)},
    }


def init_eagle(
    config: EagleConfig,
    key: jax.Array,
    *,
    target: Params | None = None,
    ids: Any = None,
    norm_scale: float = 0.15,
    exit: bool = False,
    std: float = 0.02,
) -> Params:
    """Parameters to begin training with, float32.

    Args:
      config: of the head.
      key: random key.
      target: params of the target, from which the rows of the head and the final norm
        come; None draws them too.
      ids: int `[draft_vocab_size]`, the tokens that the head proposes; None for all.
      norm_scale: factor on the target's final norm, so that the first logits are small:
        features of inner layers may be a hundred times as large as those of the last.
      exit: also `exit`, the outputs that `SpecExit` looks at, zeros to begin with.
      std: of what is drawn.

    Returns:
      A nested dict; see `eagle_ids` for `d2t`, which is there if `ids` are given.

    Raises:
      ValueError: ids that do not fit the draft vocabulary.

    Example:
      >>> import jax
      >>> from angeljax.models import DecoderConfig
      >>> from angeljax.speculative import EagleConfig, init_eagle
      >>> config = EagleConfig.of(DecoderConfig(
      ...     model_type="llama", vocab_size=64, hidden_size=32, num_layers=8,
      ...     intermediate_size=64, num_heads=2, num_kv_heads=1, head_dim=16,
      ... ))
      >>> init_eagle(config, jax.random.key(0))["fc"]["kernel"].shape
      (96, 32)
    """
    leaves, tree = jax.tree.flatten(
        shapes(config), is_leaf=lambda x: isinstance(x, tuple)
    )
    keys = jax.random.split(key, len(leaves))
    drawn = [
        jnp.ones(s) if len(s) == 1 else std * jax.random.normal(k, s)
        for s, k in zip(leaves, keys, strict=True)
    ]
    params: Params = jax.tree.unflatten(tree, drawn)
    found = None if ids is None else _checked(config, ids)
    if found is None and config.draft_vocab_size != config.vocab_size:
        raise ValueError(
            f"a draft vocabulary of {config.draft_vocab_size} of {config.vocab_size} "
            "tokens needs ids: which they are"
        )
    if target is not None:
        rows = target_head(target, found)
        if rows.shape != params["lm_head"]["kernel"].shape:
            raise ValueError(
                f"the target's head has the shape {rows.shape} and the draft head "
                f"{params['lm_head']['kernel'].shape}"
            )
        params["lm_head"]["kernel"] = rows
        norm = jnp.asarray(target["norm"]["scale"], jnp.float32)
        params["norm"]["scale"] = norm_scale * norm
    if exit:
        wide = len(config.target_layers) * config.target_hidden_size
        params["exit"] = {"kernel": jnp.zeros((wide, len(EXIT_SIGNALS)))}
    if found is not None:
        params["d2t"] = jnp.asarray(found - np.arange(len(found)), jnp.int32)
    return params


def _checked(config: EagleConfig, ids: Any) -> np.ndarray:
    found = np.asarray(ids)
    whole = found.shape == (config.draft_vocab_size,)
    if (
        not whole
        or len(np.unique(found)) < len(found)
        or found.max(initial=0) >= (config.vocab_size)
    ):
        raise ValueError(
            f"ids must be {config.draft_vocab_size} different tokens below "
            f"{config.vocab_size}"
        )
    return found


def target_head(target: Params, ids: Any = None) -> jax.Array:
    """float32 kernel `[D, Vd]` of the target's head, of some tokens or all."""
    if "lm_head" in target:
        kernel = _dense(target["lm_head"]["kernel"])
        return kernel if ids is None else kernel[:, jnp.asarray(ids)]
    table = _dense(target["embed_tokens"]["embedding"])
    return (table if ids is None else table[jnp.asarray(ids)]).T


def _dense(x: Any) -> jax.Array:
    x = x.dequantize() if hasattr(x, "dequantize") else x
    return jnp.asarray(x, jnp.float32)


def eagle_ids(params: Params) -> jax.Array | None:
    """int32 `[Vd]`: which token of the target each logit is of; None for all in order.

    Args:
      params: of a head; its `d2t` holds the differences to the order.
    """
    if (offsets := params.get("d2t")) is None:
        return None
    return offsets + jnp.arange(len(offsets), dtype=jnp.int32)


def fused_features(params: Params, features: Any) -> jax.Array:
    """f `[..., D]` of outputs of the target's layers `[..., D_target]`, in order."""
    return ops.dot(jnp.concatenate(features, axis=-1), params["fc"]["kernel"])


def embedded(params: Params, target: Any, tokens: jax.Array) -> jax.Array:
    """Embeddings of tokens, the head's own or else the target's.

    Args:
      params: of the head.
      target: has `model` and `params`.
      tokens: int32 `[B, T]`.
    """
    if (own := params.get("embed_tokens")) is None:
        return target.model.embed(target.params, tokens)
    return ops.embed(own["embedding"], tokens)


def read_step(
    config: EagleConfig,
    params: Params,
    embeds: jax.Array,
    features: jax.Array,
    positions: jax.Array,
    attend: Attend,
) -> jax.Array:
    """h' `[B, T, D]`, what the next step reads in place of features.

    Args:
      config: of the head.
      params: of the head.
      embeds: `[B, T, D]` of the tokens that follow.
      features: f or h', `[B, T, D]`; the dtype of compute.
      positions: int32 `[B, T]`.
      attend: attention over what is kept, with rotated queries and keys.
    """
    layer, eps = params["midlayer"], config.norm_eps
    embeds = embeds.astype(features.dtype)
    e = before(embeds, layer["input_layernorm"]["scale"], eps, None)
    f = before(features, layer["hidden_norm"]["scale"], eps, None)
    batch, count, _ = e.shape
    weights, rotation = layer["self_attn"], cos_sin(config.decoder, positions)
    x = jnp.concatenate([e, f], axis=-1)
    if "qkv_proj" in weights:  # as `_eagle_rows.joined` leaves them
        qkv = ops.dot(x, weights["qkv_proj"]["kernel"])
        kv = config.num_kv_heads * config.head_dim
        each = jnp.split(qkv, (qkv.shape[-1] - 2 * kv, -kv), axis=-1)
    else:
        names = ("q_proj", "k_proj", "v_proj")
        each = [ops.dot(x, weights[name]["kernel"]) for name in names]
    q, k, v = (y.reshape(batch, count, -1, config.head_dim) for y in each)
    q, k = rotate(q, *rotation), rotate(k, *rotation)
    y = attend(q, k, v).reshape(batch, count, -1)
    h = ops.dot(y, weights["o_proj"]["kernel"], residual=features)
    mlp = layer["mlp"]
    x = before(h, layer["post_attention_layernorm"]["scale"], eps, None)
    if "gate_up_proj" in mlp:
        gate, up = jnp.split(ops.dot(x, mlp["gate_up_proj"]["kernel"]), 2, axis=-1)
    else:
        gate, up = (ops.dot(x, mlp[f"{n}_proj"]["kernel"]) for n in ("gate", "up"))
    return ops.dot(jax.nn.silu(gate) * up, mlp["down_proj"]["kernel"], residual=h)


def draft_logits(config: EagleConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """float32 logits `[..., Vd]` of h' `[..., D]`."""
    x = before(hidden, params["norm"]["scale"], config.norm_eps, None)
    return ops.dot(x, params["lm_head"]["kernel"], preferred_element_type=jnp.float32)
