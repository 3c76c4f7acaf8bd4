"""`Spec`: the static description of one quantized array."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

# Fields that a stored spec may lack.
_LATER = ("activation", "rotation")

Granularity = Literal["tensor", "channel", "group", "block"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """How one array is stored. Hashable, without arrays: static under `jit`.

    `shape` is the *core* shape: leading batch axes (a scanned layer axis, experts) are
    not part of it, so that `vmap` and `lax.scan` over a stack need no new spec.
    """

    format: str
    # Logical core shape and dtype of the array that this stands for.
    shape: tuple[int, ...]
    dtype: str
    # Contraction axes, negative, ascending and adjacent; their product is K.
    axis: tuple[int, ...]
    granularity: Granularity
    # Elements along K (padding included) that share a scale.
    group_size: int
    # Outputs (last output axis) that share a scale; 0 means all of them.
    out_block: int
    scale_dtype: str
    # Format options that change the meaning of the codes, sorted by name.
    options: tuple[tuple[str, Any], ...] = ()
    # What products quantize their other operand to, each token by itself.
    activation: str | None = None
    # Inputs that a Hadamard matrix mixes before the product, in blocks of this many; 0
    # for none. What is stored is the weight for such inputs; the array that it stands
    # for is the original.
    rotation: int = 0

    @property
    def k(self) -> int:
        """Length of the contraction: the product over `axis`."""
        return math.prod(self.shape[a] for a in self.axis)

    @property
    def groups(self) -> int:
        """Number of scale groups along K."""
        return -(-self.k // self.group_size)

    @property
    def k_padded(self) -> int:
        """K with the padding of the last group."""
        return self.groups * self.group_size

    @property
    def rank(self) -> int:
        """Axes of a stored plane without batch axes: contraction axes merged to one."""
        return len(self.shape) - len(self.axis) + 1

    @property
    def k_position(self) -> int:
        """Index, from the end, of the merged contraction axis in a stored plane."""
        return self.axis[-1]

    @property
    def merged_shape(self) -> tuple[int, ...]:
        """Core shape with the contraction axes merged into one."""
        first, n = len(self.shape) + self.axis[0], len(self.axis)
        return (*self.shape[:first], self.k, *self.shape[first + n :])

    def option(self, name: str, default: Any = None) -> Any:
        """Value of one entry of `options`."""
        return dict(self.options).get(name, default)

    def label(self) -> str:
        """Short form for tables: `int4 g128`, `float8_e4m3 channel`, `sherry g128`."""
        if self.granularity == "group":
            return f"{self.format} g{self.group_size}"
        return f"{self.format} {self.granularity}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        out = {
            **dataclasses.asdict(self),
            "shape": list(self.shape),
            "axis": list(self.axis),
            "options": dict(self.options),
        }
        # Left out where there is none: older versions did not know them.
        return {k: v for k, v in out.items() if k not in _LATER or v}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Spec:
        """Inverse of `to_dict`.

        Raises:
          ValueError: a field is missing or unknown.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        if {*data, *_LATER} != names:
            odd = sorted({*data, *_LATER} ^ names)
            raise ValueError(f"spec has missing or unknown fields: {', '.join(odd)}")
        return cls(
            **{
                **data,
                "shape": tuple(int(n) for n in data["shape"]),
                "axis": tuple(int(a) for a in data["axis"]),
                "options": tuple(sorted(data["options"].items())),
            }
        )
