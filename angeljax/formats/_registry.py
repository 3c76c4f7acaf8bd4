"""The table of number formats and the resolution of options into a `Spec`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from angeljax.formats._spec import Spec

Planes = dict[str, jax.Array]
# Levels and the planes that hold one entry for each granule.
Snapped = tuple[jax.Array, Planes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """One number format over blocked arrays `[*lead, G, g]` (see `_blocks`).

    Attributes:
      name: the name that recipes use.
      payload_bits: bits per weight without scales.
      encode: float32 `[*lead, G, g]`, spec -> blocked planes `[*, n, b]`.
      decode: blocked planes, spec -> float32 `[*lead, G, g]`.
      unit: weights that one packed unit holds; groups are whole multiples of it.
      unit_for: the same for one spec, where it depends on the spec.
      granularities: what may share a scale, the default first.
      group_size: default group size; the only one if `fixed_group`.
      options: option name -> allowed values, the default first.
      snap: float32 `[*lead, G, g]`, spec, scale `[*lead', G, 1]` or None ->
        levels and granule planes. Levels are float32 `[*lead, G, g]`; they times the
        scale (plus `shift`, where there is one) are what `decode` gives, bit for bit.
        A scale that is given is used in place of one from the data. None: the format
        has no such scale.
      pack: levels, granule planes, spec -> all planes; with `snap` only.
      clip: spec -> lowest and highest level before rounding, beyond which a weight is
        clipped; with `snap` only.
      level_depends_on_scale: whether another scale chooses other levels.
      scales: blocks, spec -> granule planes from the data. Together with `nearest`,
        `values` and `pack` it takes a format apart, for algorithms that choose scales
        and levels by themselves.
      nearest: blocks, granule planes, spec -> levels; any blocks whose granule axes
        agree, such as one column of a group with the scales of the group.
      values: levels, granule planes, spec -> float32 weights, as `decode` gives them.
      scales_under: blocks, granule planes, spec -> granule planes from the data with
        the scale of the whole tensor (`scale2`) of the planes given; None for formats
        that have none.
      pointwise: whether `nearest` looks at each weight by itself.
    """

    name: str
    payload_bits: float
    encode: Callable[[jax.Array, Spec], Planes]
    decode: Callable[[Planes, Spec], jax.Array]
    unit: int = 1
    unit_for: Callable[[Spec], int] | None = None
    granularities: tuple[str, ...] = ("channel", "tensor", "group")
    group_size: int = 128
    fixed_group: bool = False
    fixed_scale_dtype: str | None = None
    options: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    summary: str = ""
    snap: Callable[[jax.Array, Spec, jax.Array | None], Snapped] | None = None
    pack: Callable[[jax.Array, Planes, Spec], Planes] | None = None
    clip: Callable[[Spec], tuple[float, float]] | None = None
    level_depends_on_scale: bool = True
    scales: Callable[[jax.Array, Spec], Planes] | None = None
    nearest: Callable[[jax.Array, Planes, Spec], jax.Array] | None = None
    values: Callable[[jax.Array, Planes, Spec], jax.Array] | None = None
    scales_under: Callable[[jax.Array, Planes, Spec], Planes] | None = None
    pointwise: bool = True

    def tail_unit(self, spec: Spec) -> int:
        """Weights in the smallest part of a group that can be stored by itself."""
        return self.unit if self.unit_for is None else self.unit_for(spec)


_FORMATS: dict[str, Format] = {}


def register(fmt: Format) -> Format:
    """Adds a format; its name must be new."""
    if fmt.name in _FORMATS:
        raise ValueError(f"format {fmt.name!r} is registered already")
    _FORMATS[fmt.name] = fmt
    return fmt


def format_names() -> tuple[str, ...]:
    """All format names.

    Returns:
      The names that `Rule.format` and `quantize` take, sorted.
    """
    return tuple(sorted(_FORMATS))


def get_format(name: str) -> Format:
    """Looks a format up.

    Args:
      name: one of `format_names()`.

    Returns:
      The format.

    Raises:
      ValueError: no such format; names the closest ones.
    """
    if name in _FORMATS:
        return _FORMATS[name]
    near = difflib.get_close_matches(str(name), _FORMATS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"unknown format {name!r}: {hint}known formats: {', '.join(format_names())}"
    )
