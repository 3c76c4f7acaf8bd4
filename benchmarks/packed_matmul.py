"""Packed products on a GPU against bfloat16 by XLA, in one run.

    python -m benchmarks.packed_matmul [--tag h200] [--seconds 400] [--quick]

Random codes; times of whole products: float activations in (A16), or int8 ones with
their scales (A8), scales applied, bfloat16 out. `roofline` is the share of the device's
memory bandwidth (packed bytes and activations over time) or of its peak, the larger.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._device import microseconds
from benchmarks._results import Row, write
from pallas_kernels import WeightLayout
from pallas_kernels.quantized_matmul import mosaic_gpu as quantized
from pallas_kernels.ternary_matmul import mosaic_gpu as ternary

# Measured device copies and products (bytes/s, bf16 FLOP/s); 8-bit counts double.
LIMITS = {"H100": (3.0e12, 790e12), "H200": (4.3e12, 790e12)}
GRID = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SHAPES = [(4096, 4096), (4096, 14336), (8192, 28672), (14336, 4096), (8192, 8192)]
BITNET = [(2560, 2560), (2560, 13824), (3200, 10240), (20480, 3200)]
# format, weights under a scale (None: one for each output), activations
KINDS: list[tuple[str, int | None, str]] = [
    ("t2", None, "int8"),
    ("sherry", None, "int8"),
    ("sherry", 128, "int8"),
    ("sherry", None, "bfloat16-a8"),
    ("t2", None, "bfloat16-a8"),
    ("sherry", None, "bfloat16"),
    ("int4", 128, "bfloat16"),
    ("int8", None, "bfloat16"),
    ("int8", None, "int8"),
    ("float8_e4m3", None, "bfloat16"),
    ("nvfp4", 16, "bfloat16"),
]
CACHE = 150e6  # rotate at least this many bytes of weights


def layout_of(fmt: str, k: int, n: int, group: int | None) -> WeightLayout:
    """A layout with bfloat16 scales for groups and float32 ones for outputs."""
    return WeightLayout(format=fmt, k=k, n=n, group_size=group or k)


def random_planes(layout: WeightLayout, count: int) -> tuple[list[Any], WeightLayout]:
    """`count` prepared weights of random codes."""
    k, n, groups = layout.k, layout.n, layout.groups
    module = ternary if layout.format in ("t2", "sherry") else quantized

    def make(key: jax.Array) -> Any:
        kinds = {"int8": jnp.int8, "float8_e4m3": jnp.float8_e4m3fn}
        codes = jax.random.bits(key, (k // layout.per_byte, n), jnp.uint8)
        if layout.format == "t2":
            codes = codes & 0b01010101  # 0 and -1
        if layout.format == "float8_e4m3":
            codes = codes & 0b10110111  # no NaN
        dtype = kinds.get(layout.format, jnp.uint8)
        planes = {"codes": jax.lax.bitcast_convert_type(codes, dtype)}
        scale_dtype = jnp.float32 if groups == 1 else jnp.bfloat16
        if layout.format == "nvfp4":
            scale_dtype = jnp.float8_e4m3fn
            planes["scale2"] = jnp.ones((1, 1))
        planes["scale"] = jnp.ones((groups, n), scale_dtype)
        if layout.format == "sherry":
            planes["high"] = jax.random.bits(key, (k // 32, n), jnp.uint8)
        return module.prepare(planes, layout)[0]

    make_one = jax.jit(make)
    scale = "float32" if groups == 1 else "bfloat16"
    if layout.format == "nvfp4":
        scale = "float8_e4m3fn"
    ready = layout.replace(order="hopper", scale_dtype=scale)
    return [make_one(jax.random.key(i)) for i in range(count)], ready


def cases(quick: bool) -> list[tuple[tuple[int, int], int, list[Any]]]:
    """(shape, tokens, kinds), what matters most first."""
    out: list[Any] = []
    main, first, big = SHAPES[1], SHAPES[0], SHAPES[2]
    for m in (1, 8):
        out += [(shape, m, KINDS[:5]) for shape in (main, first, big)]
    out += [(main, 2048, KINDS[:3] + KINDS[8:9]), (main, 256, KINDS[:3] + KINDS[8:9])]
    out += [((8192, 8192), 1, KINDS[6:]), (main, 1, KINDS[5:])]
    out += [((8192, 8192), m, KINDS[6:7]) for m in (16, 64, 128)]
    if quick:
        return out
    done = {(shape, m) for shape, m, _ in out}
    rest = [(main, m) for m in GRID]
    rest += [(shape, 1) for shape in BITNET]
    rest += [(first, m) for m in GRID]
    out += [
        (s, m, [KINDS[0], KINDS[1], KINDS[6]]) for s, m in rest if (s, m) not in done
    ]
    return out


def main() -> None:
    """Measures until the time is over and writes what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", default="gpu")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    start = time.time()
    kind = jax.devices()[0].device_kind
    bandwidth, peak = next((v for k, v in LIMITS.items() if k in kind), (1e12, 1e14))
    rows: list[Row] = []
    held: dict[Any, Any] = {}

    def weights(key: Any, make: Any) -> Any:
        if key not in held:
            if len(held) > 8:
                held.pop(next(iter(held)))
            held[key] = make()
        return held[key]

    for (k, n), m, kinds in cases(args.quick):
        if time.time() - start > args.seconds:
            break
        count = max(2, int(CACHE / (2 * k * n)) + 1)
        dense = weights(
            ("bf16", k, n),
            lambda count=count, k=k, n=n: [
                jax.random.normal(jax.random.key(i), (k, n), jnp.bfloat16)
                for i in range(count)
            ],
        )
        x = jnp.ones((m, k), jnp.bfloat16)
        # XLA's choice of tiles varies between compilations: the better of two.
        plain = min(microseconds(jnp.matmul, x, dense) for _ in range(2))
        shape = {"k": k, "n": n, "m": m}
        floor = max(2 * k * n / bandwidth, 2 * m * k * n / peak) * 1e6
        case = {**shape, "format": "bfloat16", "group": "", "activations": "bfloat16"}
        rows.append(Row(case, "time", plain, "us", roofline=floor / plain))
        for fmt, group, activations in kinds:
            if time.time() - start > args.seconds:
                break
            layout = layout_of(fmt, k, n, group)
            bits = {"t2": 2, "sherry": 1.25, "int4": 4, "nvfp4": 4}.get(fmt, 8)
            bits += 0 if group is None else (8 if fmt == "nvfp4" else 16) / group
            size = k * n * bits / 8
            count = max(2, int(CACHE / size) + 1)
            planes, ready = weights(
                (layout,),
                lambda layout=layout, count=count: random_planes(layout, count),
            )
            module = ternary if fmt in ("t2", "sherry") else quantized
            x = jnp.ones((m, k), jnp.dtype(activations.removesuffix("-a8")))
            activation = "int8" if activations.endswith("-a8") else None

            def product(
                x: Any,
                w: Any,
                module: Any = module,
                ready: Any = ready,
                activation: Any = activation,
            ) -> jax.Array:
                return module.matmul(
                    x,
                    w,
                    ready,
                    x_scale=None,
                    bias=None,
                    activation=activation,
                    out_dtype=jnp.bfloat16,
                )

            us = microseconds(product, x, planes)
            rate = peak if activations == "bfloat16" else 2 * peak
            floor = max((size + m * k) / bandwidth, 2 * m * k * n / rate) * 1e6
            case = {
                **shape,
                "format": fmt,
                "group": group or "",
                "activations": activations,
            }
            rows.append(
                Row(
                    case,
                    "time",
                    us,
                    "us",
                    baseline=plain,
                    ratio=plain / us,
                    roofline=floor / us,
                )
            )
            print(
                f"{k}x{n} m={m} {fmt} {group or ''} {activations}: {us:.2f} us, "
                f"bf16 {plain:.2f} us, {plain / us:.2f}x, {floor / us:.0%}",
                flush=True,
            )
    write("packed_matmul", rows, device_tag=args.tag)


if __name__ == "__main__":
    main()
