"""`WeightLayout`: what the plain arrays of a packed weight mean to a kernel.

A packed weight is a dict of arrays, its *planes*, and a static `WeightLayout`. In the
order `canonical` the planes are those of a stored checkpoint; each implementation has
an order of its own, into which its `prepare` permutes them once.

Canonical planes of a weight W [K, N], K contracted. `G = k_padded / group_size`.

  format       planes
  t2           codes uint8 [K/4, N]: value + 1, planar in runs of `run` along K: in each
               run, byte j holds elements j, j + run/4, j + run/2, j + 3 run/4 in bits
               0-1, 2-3, 4-5, 6-7
  sherry       codes uint8 [K/8, N], high uint8 [K/32, N]: the parity code, below
  int8         codes int8 [K, N]; uint8 if not `symmetric`
  int4         codes uint8 [K/2, N], even k in the low nibble; two's complement, or
               unsigned with `zero` if not `symmetric`
  float8_e4m3, float8_e5m2, mxfp8   codes of that float8 type [K, N] (mxfp8: e4m3)
  nvfp4, mxfp4 codes uint8 [K/2, N], even k in the low nibble, E2M1
  nf4          codes uint8 [K/2, N], even k in the low nibble, index of a level

`scale` is [G, N], float32 / bfloat16 / float16 (nvfp4: float8_e4m3fn times the float32
`scale2` [1, 1]; mxfp4 and mxfp8: uint8 biased exponents, 2^(e-127)). `zero` is uint8
[G, N]. W = scale * (code - zero). Codes need not hold the padding of the last group:
units of padding only may be cut off.

The parity code: bytes 4w..4w+3 of `codes` hold the signs (1 is negative) of 32 weights
in eight groups of four: byte p, bit j is lane p of group j. The bit of the zero lane
z = 2h + l is chosen so that the parity of the four sign bits of a group is l; bit j of
byte w of `high` is h. With `group_stride` 1 group j of word w is k = 32w + 4j + p; with
16 groups take weights i, i+16, i+32, i+48 of each run of 64 (i = 0..15, p = 0..3), and
word w holds groups 8 (w % 2) .. + 7 of run w // 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

TERNARY = ("t2", "sherry")
QUANTIZED = (
    "int8",
    "int4",
    "float8_e4m3",
    "float8_e5m2",
    "mxfp8",
    "nvfp4",
    "mxfp4",
    "nf4",
)
CANONICAL = "canonical"
# Weights that one byte of `codes` holds.
_PER_BYTE = {"t2": 4, "sherry": 8, "int4": 2, "nvfp4": 2, "mxfp4": 2, "nf4": 2}

Planes = Mapping[str, jax.Array]


class KernelError(ValueError):
    """Arguments that no kernel, or not the one asked for, can take."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightLayout:
    """Static description of the planes of one packed weight `[K, N]`.

    Attributes:
      format: one of `TERNARY` or `QUANTIZED`.
      k, n: logical sizes; `k` is contracted.
      group_size: weights along K under one scale; at least `k` for one scale a channel.
      symmetric: integers without (True) or with a `zero` plane.
      run: length of a planar run (t2).
      group_stride: 1 or 16 (sherry).
      order: "canonical", or the order of the implementation that prepared the planes.
      scale_dtype: dtype of the canonical scales, noted where an order has another.
    """

    format: str
    k: int
    n: int
    group_size: int
    symmetric: bool = True
    run: int = 128
    group_stride: int = 1
    order: str = CANONICAL
    scale_dtype: str = ""

    @property
    def groups(self) -> int:
        """Scales along K."""
        return -(-self.k // self.group_size)

    @property
    def per_byte(self) -> int:
        """Weights in a byte of `codes`."""
        return _PER_BYTE.get(self.format, 1)

    @property
    def stored_k(self) -> int:
        """Weights along K that `codes` holds at least: whole units of the packing."""
        unit = {"t2": self.run, "sherry": 32 if self.group_stride == 1 else 64}.get(
            self.format, self.per_byte
        )
        return -(-self.k // unit) * unit

    def replace(self, **changes: Any) -> WeightLayout:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)


def package_of(layout: WeightLayout) -> str:
    """The package of the product of one weight of that format.

    Raises:
      KernelError: no kernel reads the format.
    """
    if layout.format not in TERNARY + QUANTIZED:
        raise KernelError(
            f"no kernel for the format {layout.format!r}: there are some for "
            f"{', '.join(TERNARY + QUANTIZED)}"
        )
    op = "ternary" if layout.format in TERNARY else "quantized"
    return f"pallas_kernels.{op}_matmul"


def check_planes(planes: Planes, layout: WeightLayout) -> None:
    """Refuses canonical planes `[..., *, N]` that do not fit their layout.

    Raises:
      KernelError: a plane is missing, superfluous or has another shape.
    """
    names = {"codes", "scale"}
    if layout.format == "sherry":
        names.add("high")
    if layout.format == "nvfp4":
        names.add("scale2")
    if not layout.symmetric:
        names.add("zero")
    if set(planes) != names:
        raise KernelError(
            f"{layout.format} takes the planes {', '.join(sorted(names))}, "
            f"not {', '.join(sorted(planes))}"
        )
    if layout.order != CANONICAL:
        return
    rows = {
        "codes": layout.stored_k // layout.per_byte,
        "high": layout.stored_k // 32,
        "scale": layout.groups,
        "zero": layout.groups,
        "scale2": 1,
    }
    for name, plane in planes.items():
        n = 1 if name == "scale2" else layout.n
        exact = name not in ("codes", "high")
        found = plane.shape[-2:]
        if len(found) != 2 or found[1] != n or found[0] < rows[name]:
            fits = False
        else:
            fits = found[0] == rows[name] or not exact
        if not fits:
            raise KernelError(
                f"{layout.format}: plane {name} of a [{layout.k}, {layout.n}] weight "
                f"has shape [{rows[name]}, {n}], not {list(plane.shape)}"
            )


def scales(planes: Planes, layout: WeightLayout) -> jax.Array:
    """The scales of canonical planes as float32 `[..., G, N]`."""
    scale = planes["scale"]
    if layout.format in ("mxfp4", "mxfp8"):
        # Exponent 0 means 2^-127, a float32 denormal.
        bits = scale.astype(jnp.uint32) << 23
        bits = jnp.where(scale == 0, jnp.uint32(1 << 22), bits)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)
    scale = scale.astype(jnp.float32)
    return scale * planes["scale2"] if layout.format == "nvfp4" else scale
