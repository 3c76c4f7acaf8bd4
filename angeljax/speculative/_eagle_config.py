"""Shape of an EAGLE-3 head, and which layers of the target it looks at."""

from __future__ import annotations

import dataclasses
from typing import Any

from angeljax.models import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EagleConfig:
    """One decoder layer that reads the target's features (arXiv 2503.01840).

    Attributes:
      hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim: of the layer.
      vocab_size: of the target.
      draft_vocab_size: tokens that the head can propose; `vocab_size` for all of them.
      target_hidden_size: width of the target's features.
      target_layers: layers of the target whose outputs are read, from 0, in order.
      norm_eps: added to the mean square in RMS normalisation.
      rope_theta, rope_scaling, rope_factors: see `DecoderConfig`.
      max_positions: context length.

    Raises:
      ValueError: a size that cannot be.

    Example:
      >>> from angeljax.models import DecoderConfig
      >>> from angeljax.speculative import EagleConfig
      >>> target = DecoderConfig(
      ...     model_type="llama", vocab_size=64, hidden_size=32, num_layers=8,
      ...     intermediate_size=64, num_heads=2, num_kv_heads=1, head_dim=16,
      ... )
      >>> EagleConfig.of(target, draft_vocab_size=16).target_layers
      (1, 3, 4)
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int
    target_layers: tuple[int, ...]
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    rope_factors: tuple[float, ...] = ()
    max_positions: int = 2048

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_layers", tuple(self.target_layers))
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size must be from 1 to {self.vocab_size}, not "
                f"{self.draft_vocab_size}"
            )
        if not self.target_layers or min(self.target_layers) < 0:
            raise ValueError(
                f"target_layers must be numbers of layers, not {self.target_layers}"
            )
        self.decoder  # refuses the rest  # noqa: B018

    @property
    def decoder(self) -> DecoderConfig:
        """The layer as a decoder of its own: sizes and rotary positions."""
        return DecoderConfig(
            model_type="llama",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=1,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_positions=self.max_positions,
            norm_eps=self.norm_eps,
            rope_theta=self.rope_theta,
            rope_scaling=self.rope_scaling,
            rope_factors=self.rope_factors,
        )

    @classmethod
    def of(
        cls,
        target: DecoderConfig,
        *,
        draft_vocab_size: int | None = None,
        intermediate_size: int | None = None,
        target_layers: tuple[int, ...] | None = None,
    ) -> EagleConfig:
        """The head that suits a target: a layer of the same shape.

        Args:
          target: its configuration.
          draft_vocab_size: default all tokens of the target.
          intermediate_size: default that of the target.
          target_layers: default `default_layers(target.num_layers)`.

        Raises:
          ValueError: a size that cannot be, a layer that the target does not have, or a
            target whose positions have several axes.
        """
        if target.mrope_section:
            raise ValueError("a head needs positions of one axis, not mrope_section")
        layers = target_layers or default_layers(target.num_layers)
        config = cls(
            hidden_size=target.hidden_size,
            intermediate_size=intermediate_size or target.intermediate_size,
            num_heads=target.num_heads,
            num_kv_heads=target.num_kv_heads,
            head_dim=target.head_dim,
            vocab_size=target.vocab_size,
            draft_vocab_size=draft_vocab_size or target.vocab_size,
            target_hidden_size=target.hidden_size,
            target_layers=layers,
            norm_eps=target.norm_eps,
            rope_theta=target.rope_theta,
            rope_scaling=target.rope_scaling,
            rope_factors=target.rope_factors,
            max_positions=target.max_positions,
        )
        config.check_target(target)
        return config

    def check_target(self, target: Any, *, own_embedding: bool = False) -> None:
        """Refuses a target that the head was not made for.

        Args:
          target: its configuration.
          own_embedding: the head has an embedding of its own.

        Raises:
          ValueError: one line that says what differs.
        """
        if target.vocab_size != self.vocab_size:
            raise ValueError(
                f"the head is for a vocabulary of {self.vocab_size} and the target has "
                f"one of {target.vocab_size}: it belongs to another model"
            )
        if target.hidden_size != self.target_hidden_size:
            raise ValueError(
                f"the head reads features of width {self.target_hidden_size} and the "
                f"target has {target.hidden_size}: it belongs to another model"
            )
        if max(self.target_layers) >= target.num_layers:
            raise ValueError(
                f"the head reads layers {self.target_layers} and the target has "
                f"{target.num_layers}, 0 first: it belongs to another model"
            )
        if self.hidden_size != target.hidden_size and not own_embedding:
            raise ValueError(
                f"the head is {self.hidden_size} wide and the target "
                f"{target.hidden_size}: it needs an embed_tokens of its own"
            )


def default_layers(num_layers: int) -> tuple[int, int, int]:
    """An early, a middle and a late layer: 1, L//2 - 1 and L - 4, counted from 0.

    Engines that count what goes into a layer call them 2, L//2 and L - 3.

    Args:
      num_layers: L; where there are too few the nearest that exist.
    """
    wanted = 1, num_layers // 2 - 1, num_layers - 4
    low, middle, high = (min(max(i, 0), num_layers - 1) for i in wanted)
    return low, middle, high
