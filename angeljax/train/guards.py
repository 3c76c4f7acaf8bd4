"""When a training must stop: numbers that are not finite, and a loss that runs away."""

from __future__ import annotations

import dataclasses

from angeljax._fields import count, number


class TrainingStopped(ValueError):
    """A training that cannot go on; one line that says why and what was kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence:
    """When a loss counts as diverging; 0 for `ratio` never does.

    The loss is smoothed (exponential moving average). Training stops when the average
    exceeds its best value both by a factor of `ratio` and by `margin`.

    Attributes:
      ratio: factor over the best average.
      margin: distance to the best average, in nats; a distilled student with a loss
        near 0 may double it without harm.
      patience: steps before the first check.
      decay: of the moving average.

    Raises:
      ConfigError: a field is out of range.
    """

    ratio: float = 3.0
    margin: float = 1.0
    patience: int = 20
    decay: float = 0.95

    def __post_init__(self) -> None:
        number("divergence.ratio", self.ratio, 0)
        number("divergence.margin", self.margin, 0)
        count("divergence.patience", self.patience, 0)
        number("divergence.decay", self.decay, 0, 0.99999)


class LossWatch:
    """The moving average of a loss and its best value."""

    def __init__(self, rule: Divergence) -> None:
        self._rule = rule
        self._sum = self._weight = 0.0
        self._seen = 0
        self.average = self.best = float("inf")

    def add(self, loss: float, step: int) -> None:
        """Takes the loss of one step, in order.

        Raises:
          TrainingStopped: the loss diverges.
        """
        rule = self._rule
        self._sum = rule.decay * self._sum + (1 - rule.decay) * loss
        self._weight = rule.decay * self._weight + (1 - rule.decay)
        self.average = self._sum / self._weight
        self._seen += 1
        self.best = min(self.best, self.average)
        if not rule.ratio or self._seen <= rule.patience:
            return
        far = self.average > self.best + rule.margin
        if far and self.average > rule.ratio * self.best:
            raise TrainingStopped(
                f"the loss diverges: {self.average:.4g} on average at step {step}, "
                f"after {self.best:.4g}: lower optimizer.lr or lengthen its warm-up"
            )
