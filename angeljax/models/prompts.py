"""A `Prompt` as the arguments of a decoder, pruned or not."""

from __future__ import annotations

from typing import Any

import jax

from angeljax.tokens import Prompt, Pruned


def decoder_inputs(prompt: Prompt | Pruned) -> dict[str, Any]:
    """The keyword arguments that `LanguageModel.apply` and `generate` take.

    Args:
      prompt: embeddings with all that goes with them; of a pruned one also where
        decoding goes on.

    Returns:
      A dict of `embeds`, `positions`, `deepstack`, `mask` and `next_position`.

    Raises:
      ValueError: the prompt has what a decoder does not take.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.models.prompts import decoder_inputs
      >>> from angeljax.tokens import Prompt
      >>> inputs = decoder_inputs(Prompt(embeds=jnp.ones((1, 7, 16))))
      >>> sorted(name for name, value in inputs.items() if value is not None)
      ['embeds']
    """
    after: jax.Array | None = None
    planes: tuple[jax.Array, ...]
    if isinstance(prompt, Pruned):
        after = prompt.next_position
        # Those that stood beside the vision tokens alone are spread out.
        planes = tuple(map(prompt.spread, prompt.prompt.deepstack))
        prompt = prompt.prompt
    else:
        planes = tuple(prompt.deepstack)
    if prompt.attention_mask is not None:
        raise ValueError(
            "Prompt.attention_mask: a decoder is causal and takes `mask` only"
        )
    if prompt.cache is not None:
        raise ValueError("Prompt.cache: pass it as the argument `cache`")
    return {
        "embeds": prompt.embeds,
        "positions": prompt.positions,
        "deepstack": planes or None,
        "next_position": after,
        "mask": prompt.mask,
    }
