"""What an algorithm is: one weight and its statistics in, a QTensor out."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.formats import QTensor, Spec, get_format

Found = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One way to choose the codes and scales of a weight.

    Attributes:
      name: what recipes call it.
      quantize: `(weight, spec, statistics, options) -> QTensor`, pure and traceable.
        The weight is `[*batch, *spec.shape]`; statistics are those of this weight
        (`angeljax.calibration.Statistics`), with the same batch axes. They are of
        inputs as the weight is stored for: rotated, if the spec has a rotation.
      options: a frozen dataclass of its options, hashable, that checks itself.
      needs: options -> names of the statistics that it reads. "base" stands for the
        weight of the model before fine-tuning.
      formats: formats that it can produce; None for all that have the parts.
      check: options and spec -> None; raises ValueError for what does not go together.
    """

    name: str
    quantize: Callable[[jax.Array, Spec, Found, Any], QTensor]
    options: type
    needs: Callable[[Any], tuple[str, ...]] = lambda options: ()
    formats: tuple[str, ...] | None = None
    check: Callable[[Any, Spec], None] = lambda options, spec: None
    summary: str = ""

    def parse(self, data: Any) -> Any:
        """Options from a mapping of a recipe, or None for the defaults.

        Raises:
          ValueError: an unknown option, or a value that it does not take.
        """
        if isinstance(data, self.options):
            return data
        if data is None:
            return self.options()
        if not isinstance(data, Mapping):
            raise ValueError(
                f"options must be a mapping for algorithm {self.name}, not {data!r}"
            )
        names = [f.name for f in dataclasses.fields(self.options)]
        for name in data:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, 1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                known = ", ".join(names) or "none"
                raise ValueError(
                    f"algorithm {self.name} has no option {name!r}{hint}; it has: "
                    f"{known}"
                )
        return self.options(**data)

    def takes(self, format: str) -> None:
        """Checks the format.

        Raises:
          ValueError: it cannot produce it.
        """
        fmt = get_format(format)
        if self.formats is not None and format not in self.formats:
            raise ValueError(
                f"algorithm {self.name} makes {', '.join(self.formats)}, not {format}"
            )
        if fmt.scales is None or fmt.pack is None:
            raise ValueError(f"algorithm {self.name} cannot make format {format}")


# Message -> whether all is well, of the algorithm that is being traced.
_REQUIRED: contextvars.ContextVar[dict[str, jax.Array] | None] = contextvars.ContextVar(
    "required", default=None
)


def require(ok: jax.Array, otherwise: str) -> None:
    """Says what must hold of the data of a weight, for an error after the fact.

    Traced code cannot raise. `angeljax.compress` on concrete arrays raises ValueError
    with this message, after the path of the weight, if `ok` is not True everywhere;
    outside of it nothing happens.

    Args:
      ok: bool, any shape; not inside `vmap` or a loop.
      otherwise: one line.
    """
    required = _REQUIRED.get()
    if required is not None:
        required[otherwise] = jnp.all(ok)


@contextlib.contextmanager
def requirements() -> Iterator[dict[str, jax.Array]]:
    """Collects what `require` is told: message -> bool `[]`."""
    required: dict[str, jax.Array] = {}
    token = _REQUIRED.set(required)
    try:
        yield required
    finally:
        _REQUIRED.reset(token)


_ALGORITHMS: dict[str, Algorithm] = {}


def register(algorithm: Algorithm) -> Algorithm:
    """Adds an algorithm; its name must be new."""
    if algorithm.name in _ALGORITHMS:
        raise ValueError(f"algorithm {algorithm.name!r} is registered already")
    _ALGORITHMS[algorithm.name] = algorithm
    return algorithm


def algorithm_names() -> tuple[str, ...]:
    """All names that `Rule.algorithm` takes, sorted."""
    return tuple(sorted(_ALGORITHMS))


def get_algorithm(name: str) -> Algorithm:
    """Looks an algorithm up.

    Raises:
      ValueError: there is none of this name; names the closest.
    """
    if name in _ALGORITHMS:
        return _ALGORITHMS[name]
    near = difflib.get_close_matches(str(name), _ALGORITHMS, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"unknown algorithm {name!r}: {hint}use {', '.join(algorithm_names())}"
    )
