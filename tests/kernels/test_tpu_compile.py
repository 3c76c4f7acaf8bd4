"""The TPU kernels through the whole compiler, on a machine without a TPU.

Needs libtpu (pip install libtpu), else skips. A change that makes a decoder longer, or
the compiler refuse it, shows here; the bounds lie a little above what was counted.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.tpu_bundles import GENERATIONS, count

pytestmark = pytest.mark.tpu_compile

# Bundles of one block of 1024 x 512 weights, int8 activations: M = 16, M = 256.
BOUNDS = {
    "v5e": {
        "int8": (215, 1180),
        "int4": (225, 1170),
        "t2": (280, 1170),
        "sherry": (313, 1210),
    },
    "v6e": {
        "int8": (205, 500),
        "int4": (190, 500),
        "t2": (205, 505),
        "sherry": (259, 550),
    },
    "v7x": {
        "int8": (215, 530),
        "int4": (160, 480),
        "t2": (155, 520),
        "sherry": (220, 690),
    },
}
OTHERS = [
    ("t2", 128, True, "int8"),
    ("sherry", 128, True, "bfloat16"),
    ("int4", 32, False, "bfloat16"),
    ("int8", None, False, "int8"),
    ("int4", 64, True, "float32"),
    ("float8_e4m3", None, True, "bfloat16"),
    ("float8_e5m2", 128, True, "bfloat16"),
    ("mxfp8", 32, True, "bfloat16"),
    ("nvfp4", 16, True, "bfloat16"),
    ("mxfp4", 32, True, "int8"),
    ("nf4", 64, True, "bfloat16"),
]


def _case(m: int, fmt: str, activations: str, **more: Any) -> dict[str, Any]:
    sizes = {"m": m, "k": 1024, "n": 512}
    return {**sizes, "format": fmt, "activations": activations, **more}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_no_kernel_takes_more_bundles_than_it_did(generation: str) -> None:
    bounds = BOUNDS[generation]
    cases = [_case(m, fmt, "int8") for fmt in bounds for m in (16, 256)]
    counts = iter(count(generation, cases))
    found = {fmt: (next(counts), next(counts)) for fmt in bounds}
    for fmt, most in bounds.items():
        assert found[fmt][0] <= most[0] and found[fmt][1] <= most[1], found


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_format_compiles(generation: str) -> None:
    cases = [
        _case(m, fmt, activations, group=group, symmetric=symmetric)
        for fmt, group, symmetric, activations in OTHERS
        for m in (5, 300)
    ]
    # Several blocks of N and of K, the last ones not full.
    cases.append({**_case(40, "sherry", "int8"), "k": 2304, "n": 1000})
    assert min(count(generation, cases)) > 0
