"""Number formats and the `QTensor` that carries them.

| module | formats |
| --- | --- |
| `integer` | int8, int4, int3, int2 |
| `int4_fp8` | int4_fp8 (values on a grid of FP8) |
| `float8` | float8_e4m3, float8_e5m2 |
| `microscaling` | nvfp4, mxfp4, mxfp8 |
| `nf4` | nf4 |
| `ternary` | t2 (2 bits), t1_6 (base 3) |
| `sherry` | sherry (1.25 bits) |
| `seq2` | seq2 (2 bits, no zero) |
| `two_planes` | ptqtp (two ternary planes) |
| `binary` | binary (1 bit) |
"""

from angeljax.formats import (  # noqa: F401  (registers the formats)
    binary,
    float8,
    int4_fp8,
    integer,
    microscaling,
    nf4,
    seq2,
    sherry,
    ternary,
    two_planes,
)
from angeljax.formats._qtensor import QTensor
from angeljax.formats._quantize import quantize, quantize_to
from angeljax.formats._registry import Format, format_names, get_format
from angeljax.formats._resolve import make_spec
from angeljax.formats._spec import Spec
from angeljax.formats.two_planes import split_planes

__all__ = [
    "Format",
    "QTensor",
    "Spec",
    "format_names",
    "get_format",
    "make_spec",
    "quantize",
    "quantize_to",
    "split_planes",
]
