"""How much a training reads: what the configurations of all trainings share."""

from __future__ import annotations

from typing import Protocol

from angeljax._fields import ConfigError, count

__all__ = ["Amounts", "check_amounts", "steps_of"]


class Amounts(Protocol):
    """Fields of a configuration: `steps` or `tokens`, and the shape of a batch."""

    @property
    def steps(self) -> int | None: ...
    @property
    def tokens(self) -> int | None: ...
    @property
    def seq_length(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def accumulate(self) -> int: ...


def check_amounts(config: Amounts) -> None:
    """Refuses numbers that do not go together.

    Raises:
      ConfigError: names the field.
    """
    if (config.steps is None) == (config.tokens is None):
        raise ConfigError("give steps or tokens, one of them")
    for name in ("steps", "tokens"):
        if getattr(config, name) is not None:
            count(name, getattr(config, name))
    for name in ("seq_length", "batch_size", "accumulate"):
        count(name, getattr(config, name))
    if config.batch_size % config.accumulate:
        raise ConfigError(
            f"batch_size of {config.batch_size} cannot be divided into "
            f"{config.accumulate} micro-batches (accumulate)"
        )


def steps_of(config: Amounts) -> int:
    """Optimizer steps of the whole training."""
    if config.steps is not None:
        return config.steps
    assert config.tokens is not None
    return -(-config.tokens // (config.batch_size * config.seq_length))
