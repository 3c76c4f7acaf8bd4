"""Formats of a KV cache in numpy, one vector after another."""

from __future__ import annotations

from typing import Any

import numpy as np


def _e4m3_values() -> np.ndarray:
    """All finite magnitudes: 4 bits of exponent, bias 7, and 3 of mantissa."""
    found = []
    for code in range(127):  # 127 is NaN
        exponent, mantissa = code >> 3, code & 7
        if exponent == 0:
            found.append(mantissa / 8 * 2.0**-6)
        else:
            found.append((1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return np.asarray(found)


E4M3 = _e4m3_values()


def e4m3(y: float) -> float:
    """The nearest value; of two that are as near, the one with an even code."""
    distance = np.abs(E4M3 - min(abs(float(y)), 448.0))
    near = np.flatnonzero(distance == distance.min())
    code = near[0] if near[0] % 2 == 0 else near[-1]
    return float(np.copysign(E4M3[code], y))


def bf16(x: Any) -> np.float32:
    """The nearest bfloat16, ties to even, by its bits."""
    bits = int(np.float32(x).view(np.uint32))
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return np.uint32(bits).view(np.float32)


def group(x: np.ndarray, name: str, symmetric: bool, scale: Any = None) -> np.ndarray:
    """What is read back of the values that share a scale."""
    f32 = np.float32
    largest = {"float8_e4m3": 448, "int8": 127, "int4": 7}[name]
    offset = f32(0)
    top: float = largest
    low: float = -largest
    if not symmetric:
        low, top = 0, 2 ** int(name[3:]) - 1
        offset = bf16(x.min())
    if scale is None:
        size = (x - offset).max() if not symmetric else np.abs(x).max()
        scale = f32(size) * f32(1 / top)
        scale = bf16(scale) if scale >= 2.0**-100 else f32(1)
    reciprocal = f32(1) / f32(scale)
    out = []
    for value in x:
        y = (value - offset) * reciprocal
        code = e4m3(y) if name == "float8_e4m3" else np.clip(np.rint(y), low, top)
        out.append(f32(code) * f32(scale) + offset)
    return np.asarray(out, np.float32)


def stored(x: np.ndarray, fmt: Any, scale: np.ndarray | None = None) -> np.ndarray:
    """What a cache gives back of `[..., head_dim]`; static scales broadcast to it."""
    x = np.asarray(x, np.float32)
    if fmt.format == "none":
        return x
    out = np.empty_like(x)
    for at in np.ndindex(x.shape[:-1]):
        if fmt.static:
            one = np.broadcast_to(scale, x.shape)[at][0]
            out[at] = group(x[at], fmt.format, fmt.symmetric, one)
            continue
        size = fmt.group_size or x.shape[-1]
        for start in range(0, x.shape[-1], size):
            part = slice(start, start + size)
            out[at][part] = group(x[at][part], fmt.format, fmt.symmetric)
    return out
