"""Biases for a decoder that has none, for methods that need a place to put them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp

from angeljax.models.language_model import LanguageModel

# What the architecture gives biases to, and the field of the configuration.
PARTS = {
    "attention": "attention_bias",
    "output": "output_bias",
    "mlp": "mlp_bias",
}


def add_biases(
    model: LanguageModel,
    params: dict[str, Any],
    *,
    parts: Collection[str] = tuple(PARTS),
) -> tuple[LanguageModel, dict[str, Any]]:
    """Gives the projections of a decoder biases of zeros; the function is unchanged.

    Tequila (`QATOptions.tequila`) merges its dead-zone bias into them.

    Args:
      model: the architecture.
      params: its params, dense; one subtree for each layer, or stacked.
      parts: which projections: "attention" for queries, keys and values, "output" for
        that after attention, "mlp" for the three of the MLP. Default all.

    Returns:
      The architecture and the params with biases. Those that exist already stay.

    Raises:
      ValueError: the projections are fused (add the biases first), or a part has
        another name.

    Example:
      >>> import jax
      >>> from angeljax.models import DecoderConfig, LanguageModel, add_biases
      >>> model = LanguageModel(DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=2,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... ))
      >>> model, params = add_biases(model, model.init(jax.random.key(0)))
      >>> params["layers"][0]["mlp"]["up_proj"]["bias"].shape
      (32,)
    """
    if model.fused:
        raise ValueError("the projections are fused: add biases before fusing them")

    for part in parts:
        if part not in PARTS:
            raise ValueError(f"parts are {', '.join(PARTS)}, not {part!r}")

    def walk(tree: dict[str, Any], path: str) -> dict[str, Any]:
        out = {
            k: walk(v, f"{path}/{k}") if isinstance(v, dict) else v
            for k, v in tree.items()
        }
        kernel: Any = out.get("kernel")
        if kernel is not None and "bias" not in out and part_of(path) in parts:
            shape = (*kernel.shape[:-2], kernel.shape[-1])
            out["bias"] = jnp.zeros(shape, kernel.dtype)
        return out

    flags: dict[str, Any] = {PARTS[part]: True for part in parts}
    config = dataclasses.replace(model.config, **flags)
    layers = walk(params["layers"], "layers")
    return dataclasses.replace(model, config=config), {**params, "layers": layers}


def part_of(path: str) -> str | None:
    """Which part of a layer a projection belongs to; None for anything else."""
    names = path.split("/")
    if names[0] != "layers":
        return None
    if "mlp" in names:
        return "mlp"
    if "attn" in names:
        return "output" if "o_proj" in names else "attention"
    return None
