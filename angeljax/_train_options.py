"""What a recipe says about training: options of a rule and the Arenas schedule."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from angeljax._fields import build, choice, flag, number

ESTIMATORS = ("pass_through", "clipped")
FORMS = ("residual", "blend")
SCHEDULES = ("warmup_cosine", "cosine", "linear", "exponential", "constant", "none")
# How far an exponential schedule falls before its last value is subtracted.
_DECAY = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class QATOptions:
    """How the weights of one rule are trained.

    Attributes:
      scale: "dynamic" takes the scale from the latent weights at every step, as the
        data-free format does; "learned" makes it a parameter that starts there (LSQ,
        arXiv 1902.08153; SEQ, arXiv 2502.02631; DLT with a shift, arXiv 2406.07177).
      estimator: the straight-through gradient of a weight. "pass_through" hands the
        gradient on unchanged; "clipped" stops it where the weight lies beyond the
        levels. Default: "clipped" for learned scales, else "pass_through".
      arenas: whether the recipe's Arenas schedule applies.
      tequila: factor of the dead-zone bias (Tequila, arXiv 2509.23809, equation 3;
        1e-3 there), ternary formats only. The layer needs a bias, into which
        `finalize` merges it.
    """

    scale: str = "dynamic"
    estimator: str | None = None
    arenas: bool = True
    tequila: float | None = None

    def __post_init__(self) -> None:
        choice("qat.scale", self.scale, ("dynamic", "learned"))
        if self.estimator is not None:
            choice("qat.estimator", self.estimator, ESTIMATORS)
        flag("qat.arenas", self.arenas)
        if self.tequila is not None:
            number("qat.tequila", self.tequila, 0)
            object.__setattr__(self, "tequila", float(self.tequila))

    @property
    def gradient(self) -> str:
        """The estimator with its default filled in."""
        if self.estimator is not None:
            return self.estimator
        return "clipped" if self.scale == "learned" else "pass_through"

    @classmethod
    def parse(cls, value: Any) -> QATOptions | None:
        """From the `qat` entry of a rule: a mapping, an instance or None.

        Raises:
          ValueError: an unknown field or a value that cannot be.
        """
        if value is None or isinstance(value, cls):
            return value
        return build(cls, value, "qat")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arenas:
    """The annealed residual of Arenas: how its weight falls over the optimizer steps.

    A layer in training computes `Y = X Q(W) + lambda(t) X W` (Sherry, arXiv 2601.07892,
    equations 7-8), so that every latent weight keeps an effect of its own while the
    codes settle. lambda is exactly 0 from step `end * total_steps` on.

    Attributes:
      schedule: shape of lambda(t) between the warm-up and the end: "warmup_cosine" and
        "cosine" (half a cosine; the former alone warms up), "linear", "exponential",
        "constant" (cut at the end) or "none" (always 0).
      peak: largest value.
      warmup: share of the steps in which lambda rises from 0 ("warmup_cosine").
      end: share of the steps after which it is 0, in (0, 1].
      form: "residual" adds lambda W, as the paper does; "blend" computes with
        `(1 - lambda) Q(W) + lambda W` instead, which does not make the weights of a
        trained model larger: with `schedule="cosine"` it begins as the model itself.

    Example:
      >>> from angeljax.qat import Arenas
      >>> schedule = Arenas(warmup=0.1, end=1.0)
      >>> [round(float(schedule.at(t, 22111)), 4) for t in (1105, 2211, 12161, 22111)]
      [0.4998, 1.0, 0.5, 0.0]
    """

    schedule: str = "warmup_cosine"
    peak: float = 1.0
    warmup: float = 0.1
    end: float = 0.9
    form: str = "residual"

    def __post_init__(self) -> None:
        choice("arenas.form", self.form, FORMS)
        choice("arenas.schedule", self.schedule, SCHEDULES)
        for name in ("peak", "warmup", "end"):
            value = getattr(self, name)
            number(f"arenas.{name}", value, 0)
            object.__setattr__(self, name, float(value))
        if self.form == "blend" and self.peak > 1:
            raise ValueError(f"arenas.peak={self.peak} of a blend must be at most 1")
        if not 0 < self.end <= 1:
            raise ValueError(
                f"arenas.end={self.end}: the residual must reach 0 before training "
                "ends, at a share of its steps in (0, 1]"
            )
        if not 0 <= self.warmup < self.end:
            raise ValueError(
                f"arenas.warmup={self.warmup}: a share of the steps below arenas.end="
                f"{self.end}"
            )

    def at(self, step: jax.Array | int, total_steps: int) -> jax.Array:
        """lambda of an optimizer step, a float32 scalar.

        Args:
          step: number of optimizer steps taken; may be traced.
          total_steps: steps of the whole training.

        Returns:
          lambda, at least 0.
        """
        t = jnp.asarray(step, jnp.float32)
        end = math.floor(self.end * total_steps)
        first = self.schedule == "warmup_cosine"
        start = math.floor(self.warmup * total_steps) if first else 0
        x = jnp.clip((t - start) / max(end - start, 1), 0.0, 1.0)
        if self.schedule in ("warmup_cosine", "cosine"):
            value = 0.5 * (1.0 + jnp.cos(jnp.pi * x))
        elif self.schedule == "linear":
            value = 1.0 - x
        elif self.schedule == "exponential":
            floor = math.exp(-_DECAY)
            value = (jnp.exp(-_DECAY * x) - floor) / (1.0 - floor)
        else:
            value = jnp.full((), float(self.schedule == "constant"))
        value = jnp.where(t < start, t / max(start, 1), value)
        return self.peak * jnp.where(t >= end, 0.0, value)

    @classmethod
    def parse(cls, value: Any) -> Arenas | None:
        """From the `arenas` entry of a recipe's `train` section.

        Raises:
          ValueError: an unknown field or a value that cannot be.
        """
        if value is None or isinstance(value, cls):
            return value
        return build(cls, value, "arenas")


def to_dict(options: QATOptions | Arenas) -> dict[str, Any]:
    """The fields that differ from their defaults, as plain values."""
    return {
        f.name: getattr(options, f.name)
        for f in dataclasses.fields(options)
        if getattr(options, f.name) != f.default
    }
