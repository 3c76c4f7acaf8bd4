"""`Prompt`: a sequence of embeddings with all that goes with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A sequence as it goes into a language model; a pytree.

    Everything that has an axis of L belongs in here: what is left out is not shortened.
    A prompt without the batch axis B works as well, so that `jax.vmap` does.

    Attributes:
      embeds: float `[B, L, D]`, text and vision in one.
      mask: bool `[B, L]`, True for real tokens; None if all are.
      positions: int32 `[B, L]`, or `[3, B, L]` for M-RoPE (time, height, width). None
        counts the real tokens of each row.
      attention_mask: `[B, H, L, L]` (H may be 1), bool, or float that is added to the
        scores.
      tokens: int32 `[B, L]`, the ids.
      token_types: int32 `[B, L]`.
      labels: int32 `[B, L]`, for training.
      deepstack: planes that are added behind the first layers (Qwen3-VL), each
        `[B, N, D]` beside the vision tokens or `[B, L, D]` beside the sequence.
      cache: keys and values of a model that has read this sequence already, an
        `angeljax.models.KVCache` whose first L slots it fills.
      extra: anything else by name, `[B, L, ...]`; padding is 0.

    Example:
      >>> import jax.numpy as jnp
      >>> Prompt(embeds=jnp.ones((2, 7, 4))).length
      7
    """

    embeds: jax.Array
    mask: jax.Array | None = None
    positions: jax.Array | None = None
    attention_mask: jax.Array | None = None
    tokens: jax.Array | None = None
    token_types: jax.Array | None = None
    labels: jax.Array | None = None
    deepstack: tuple[jax.Array, ...] = ()
    cache: Any = None
    extra: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)

    @property
    def length(self) -> int:
        """L."""
        return self.embeds.shape[-2]

    def real(self) -> jax.Array:
        """bool `[B, L]`: `mask`, or all."""
        if self.mask is None:
            return jnp.ones(self.embeds.shape[:-1], bool)
        return self.mask

    def where_they_stand(self) -> jax.Array:
        """`positions`, or the count of the real tokens of each row from 0."""
        if self.positions is not None:
            return self.positions
        count = jnp.cumsum(self.real(), axis=-1, dtype=jnp.int32) - 1
        return jnp.maximum(count, 0)


def check_prompt(prompt: Prompt, num_tokens: int) -> None:
    """Refuses fields whose shapes do not go together, by name.

    Raises:
      ValueError: one line that names the field.
    """
    if prompt.embeds.ndim not in (2, 3):
        raise ValueError(
            f"Prompt.embeds must be [B, L, D] or [L, D], not {prompt.embeds.shape}"
        )
    lead = prompt.embeds.shape[:-1]
    for name in ("mask", "tokens", "token_types", "labels"):
        value = getattr(prompt, name)
        if value is not None and value.shape != lead:
            _refuse(name, value, str(list(lead)), prompt)
    if prompt.mask is not None and prompt.mask.dtype != bool:
        raise ValueError(
            f"Prompt.mask must be bool, True for real tokens, not {prompt.mask.dtype}"
        )
    where = prompt.positions
    if where is not None and where.shape not in (lead, (3, *lead)):
        _refuse("positions", where, f"{list(lead)} or {[3, *lead]}", prompt)
    both, length = prompt.attention_mask, lead[-1]
    if both is not None and not (
        both.ndim == len(lead) + 2
        and both.shape[-2:] == (length, length)
        and both.shape[: len(lead) - 1] in (lead[:-1], (1,) * (len(lead) - 1))
    ):
        _refuse("attention_mask", both, f"{[*lead[:-1], 1, length, length]}", prompt)
    if not isinstance(prompt.deepstack, tuple | list):
        raise ValueError("Prompt.deepstack must be a tuple of planes")
    for i, plane in enumerate(prompt.deepstack):
        short = (*lead[:-1], num_tokens)
        if plane.ndim != len(lead) + 1 or plane.shape[:-1] not in (lead, short):
            what = f"{[*short, 'D']} or {[*lead, 'D']}".replace("'", "")
            _refuse(f"deepstack[{i}]", plane, what, prompt)
    for name, value in prompt.extra.items():
        if value.shape[: len(lead)] != lead:
            _refuse(f"extra[{name!r}]", value, f"{list(lead)} first", prompt)


def _refuse(name: str, value: jax.Array, want: str, prompt: Prompt) -> None:
    raise ValueError(
        f"Prompt.{name} has shape {value.shape}, and embeds {prompt.embeds.shape} need "
        f"{want}"
    )
