"""Biases for a decoder that has none, for methods that need a place to put them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from angeljax.models.language_model import LanguageModel


def add_biases(
    model: LanguageModel, params: dict[str, Any]
) -> tuple[LanguageModel, dict[str, Any]]:
    """Gives every projection of a decoder a bias of zeros; the function is unchanged.

    Tequila (`QATOptions.tequila`) merges its dead-zone bias into it.

    Args:
      model: the architecture.
      params: its params, dense; one subtree for each layer, or stacked.

    Returns:
      The architecture and the params with biases. Those that exist already stay.

    Raises:
      ValueError: the projections are fused: add the biases first.

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

    def walk(tree: dict[str, Any]) -> dict[str, Any]:
        out = {k: walk(v) if isinstance(v, dict) else v for k, v in tree.items()}
        kernel: Any = out.get("kernel")
        if kernel is not None and "bias" not in out:
            shape = (*kernel.shape[:-2], kernel.shape[-1])
            out["bias"] = jnp.zeros(shape, kernel.dtype)
        return out

    config = dataclasses.replace(
        model.config, attention_bias=True, output_bias=True, mlp_bias=True
    )
    layers = walk(params["layers"])
    return dataclasses.replace(model, config=config), {**params, "layers": layers}
