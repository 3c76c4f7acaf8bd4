"""Where each tensor of a foreign checkpoint goes in our param tree.

A destination is a path in the tree of `LanguageModel.init` (unstacked) and says whether
the matrix is transposed: Hugging Face and GGUF store `[out, in]`, Flax `[in, out]`.
"""

from __future__ import annotations

import re
from typing import Any

Path = tuple[Any, ...]

_HF_LAYER = {
    "input_layernorm.weight": ("attn_norm", "scale"),
    "post_attention_layernorm.weight": ("mlp_norm", "scale"),
    "self_attn.q_norm.weight": ("attn", "q_norm", "scale"),
    "self_attn.k_norm.weight": ("attn", "k_norm", "scale"),
}
for _p in ("q_proj", "k_proj", "v_proj", "o_proj"):
    _HF_LAYER[f"self_attn.{_p}.weight"] = ("attn", _p, "kernel")
    _HF_LAYER[f"self_attn.{_p}.bias"] = ("attn", _p, "bias")
for _p in ("gate_proj", "up_proj", "down_proj"):
    _HF_LAYER[f"mlp.{_p}.weight"] = ("mlp", _p, "kernel")
    _HF_LAYER[f"mlp.{_p}.bias"] = ("mlp", _p, "bias")
_HF_TOP = {
    "model.embed_tokens.weight": ("embed_tokens", "embedding"),
    "model.norm.weight": ("norm", "scale"),
    "lm_head.weight": ("lm_head", "kernel"),
}

_GGUF_LAYER = {
    "attn_norm.weight": ("attn_norm", "scale"),
    "ffn_norm.weight": ("mlp_norm", "scale"),
    "attn_q_norm.weight": ("attn", "q_norm", "scale"),
    "attn_k_norm.weight": ("attn", "k_norm", "scale"),
}
for _g, _p in (
    ("attn_q", "q_proj"),
    ("attn_k", "k_proj"),
    ("attn_v", "v_proj"),
    ("attn_output", "o_proj"),
):
    _GGUF_LAYER[f"{_g}.weight"] = ("attn", _p, "kernel")
    _GGUF_LAYER[f"{_g}.bias"] = ("attn", _p, "bias")
for _p in ("gate", "up", "down"):
    _GGUF_LAYER[f"ffn_{_p}.weight"] = ("mlp", f"{_p}_proj", "kernel")
_GGUF_TOP = {
    "token_embd.weight": ("embed_tokens", "embedding"),
    "output_norm.weight": ("norm", "scale"),
    "output.weight": ("lm_head", "kernel"),
}


def hf_path(name: str) -> Path | None:
    """Path of a Hugging Face tensor; None if our decoder has no place for it."""
    if name in _HF_TOP:
        return _HF_TOP[name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if match and match[2] in _HF_LAYER:
        return ("layers", int(match[1]), *_HF_LAYER[match[2]])
    return None


def gguf_path(name: str) -> Path | None:
    """Path of a GGUF tensor; None if our decoder has no place for it."""
    if name in _GGUF_TOP:
        return _GGUF_TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if match and match[2] in _GGUF_LAYER:
        return ("layers", int(match[1]), *_GGUF_LAYER[match[2]])
    return None
