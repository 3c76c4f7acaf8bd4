"""Every format in numpy float64, granule by granule, from its published definition.

Shares nothing with `angeljax`: no packing, no blocked form, no jax.
"""

import ml_dtypes
import numpy as np

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
E2M1 = ml_dtypes.float4_e2m1fn
# QLoRA (arXiv 2305.14314), appendix E.
NF4 = np.float32(
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 "
    "-0.28444138169288635 -0.18477343022823334 -0.09105003625154495 0.0 "
    "0.07958029955625534 0.16093020141124725 0.24611230194568634 "
    "0.33791524171829224 0.44070982933044434 0.5626170039176941 "
    "0.7229568362236023 1.0".split()
)


def to(x, dtype):
    """`x` rounded to a dtype, as float64."""
    return np.asarray(x, np.float32).astype(dtype).astype(np.float64)


def granules(k, n, granularity, size):
    """Slices of [k, n] that share a scale."""
    rows, columns = {
        "tensor": (k, n),
        "channel": (k, 1),
        "group": (size, 1),
        "block": (128, 128),
    }[granularity]
    for i in range(0, k, rows):
        for j in range(0, n, columns):
            yield slice(i, min(i + rows, k)), slice(j, min(j + columns, n))


def integer(w, bits, scale, symmetric, narrow_range):
    top = 2 ** (bits - 1) - 1
    if symmetric:
        narrow = narrow_range == "yes" or (narrow_range == "auto" and bits == 8)
        s = scale(np.abs(w).max() / (top if narrow else top + 0.5)) or 1.0
        return np.clip(np.rint(w / s), -top if narrow else -top - 1, top) * s
    low, high = min(w.min(), 0), max(w.max(), 0)
    s = scale((high - low) / (2**bits - 1)) or 1.0
    z = np.clip(np.rint(-low / s), 0, 2**bits - 1)
    return (np.clip(np.rint(w / s + z), 0, 2**bits - 1) - z) * s


def float8(w, dtype, scale):
    top = float(ml_dtypes.finfo(dtype).max)
    s = scale(np.abs(w).max() / top) or 1.0
    return to(np.clip(w / s, -top, top), dtype) * s


def microscaling(w, dtype, rounding):
    top, largest = {E2M1: (6, 2), E4M3: (448, 8)}[dtype]
    amax = np.abs(w).max()
    if amax == 0:
        return np.zeros_like(w)
    if rounding == "ceil":
        s = 2.0 ** np.ceil(np.log2(amax / top))
    else:
        s = 2.0 ** (np.floor(np.log2(amax)) - largest)
    return to(np.clip(w / s, -top, top), dtype) * s


def nvfp4(w, s2):
    s = to(np.clip(np.abs(w).max() / 6 / s2, 2.0**-9, 448), E4M3) * s2
    return to(np.clip(w / s, -6, 6), E2M1) * s


def int4_fp8(w, s2, scale):
    s = scale(np.abs(w).max() / 7.5) or 1.0
    values = to(np.clip(np.arange(-8, 8) * s / s2, -448, 448), E4M3) * s2
    return values[np.abs(w[..., None] - values).argmin(-1)]


def nf4(w, scale):
    s = scale(np.abs(w).max()) or 1.0
    return NF4[np.abs(w[..., None] / s - NF4).argmin(-1)] * s


def ternary(w, scale, method):
    a = np.abs(w)
    if method == "absmean":
        s, keep = a.mean(), a >= a.mean() / 2
    else:
        keep = a >= 0.75 * a.mean()
        s = a[keep].mean()
    for _ in range(10 if method == "lstsq" else 0):
        keep = a >= s / 2
        s = a[keep].mean()
    return np.sign(w) * keep * scale(s)


def seq2(w, scale, method):
    a, levels = np.abs(w), np.array([-1.5, -0.5, 0.5, 1.5])

    def nearest(x, s):  # ties go to even multiples of 2 s: -3/2, 1/2
        x = np.clip(x / max(s, 1e-30), -1.98, 1.98)
        return levels[(np.rint(x - 0.5) + 2).astype(int)]

    s = a.max() / 2 if method == "amax" else a.mean()
    for _ in range(10 if method == "lstsq" else 0):
        q = nearest(a, s)
        s = (a * q).sum() / (q * q).sum()
    s = scale(s)
    return nearest(w, s) * s


def two_planes(w, scale, tied):
    """Pairs and scales by turns, from several starts; nine pairs for each weight."""
    top = np.abs(w).max()
    if top == 0:
        return np.zeros_like(w)
    pairs = [(t, u) for t in (-1, 0, 1) for u in (-1, 0, 1)]
    pairs = np.array(sorted(pairs, key=lambda p: p != (0, 0)))  # a tie is 0 for 0

    def choose(a, b):
        return pairs[np.abs(w[..., None] - pairs @ [a, b]).argmin(-1)]

    best = (np.inf, 0.0, 0.0)
    starts = [(1, 0.35), (1, 0.65), (0.8, 0.65), (0.6, 0.65)]
    for f, r in [(f, 1 / 3) for f in (1, 0.85, 0.7, 0.55)] if tied else starts:
        a, b = f * top / (1 + r), f * top * r / (1 + r)
        for _ in range(10):
            t = choose(a, b).reshape(-1, 2)
            if tied:
                q = t @ [3, 1]
                b = q @ w.ravel() / max(q @ q, 1)
                a = 3 * b
            elif np.linalg.matrix_rank(t) < 2:
                gram = t.T @ t
                gram = gram + 1e-3 * np.trace(gram) * np.eye(2)
                b, a = sorted(np.abs(np.linalg.solve(gram, t.T @ w.ravel())))
            else:
                b, a = sorted(np.abs(np.linalg.lstsq(t, w.ravel(), rcond=None)[0]))
        error = ((w - choose(a, b) @ [a, b]) ** 2).sum()
        if error < best[0] * (1 - 1e-9):
            best = (error, a, b)
    a, b = (3 * scale(best[2]) if tied else scale(best[1])), scale(best[2])
    return choose(a, b) @ [a, b]


def sherry(w, scale, stride, size):
    inside = np.zeros((size, w.shape[1]), bool)
    inside[: len(w)] = True
    x = np.zeros(inside.shape)
    x[: len(w)] = w
    t = np.where(x < 0, -1.0, 1.0)
    for group in range(size // 4):
        first = group * 4 if stride == 1 else group // 16 * 64 + group % 16
        lanes = first + stride * np.arange(4)
        for column in range(w.shape[1]):
            t[lanes[np.abs(x[lanes, column]).argmin()], column] = 0
    kept = np.abs(x)[inside & (t != 0)]
    return (t * scale(kept.mean() if kept.size else 0.0))[: len(w)]


def reference(w, spec):
    """`w` [K, N] as the format of `spec` holds it, float64."""
    w = np.asarray(w, np.float64)
    o, name = dict(spec.options), spec.format

    def scale(x):
        return float(to(x, spec.scale_dtype))

    s2 = to(np.abs(w).max() / (6 * 448), np.float32)
    out = np.empty_like(w)
    for tile in granules(*w.shape, spec.granularity, spec.group_size):
        x = w[tile]
        if name == "int4_fp8":
            s2 = to(np.abs(w).max() / 448, np.float32)
            y = int4_fp8(x, s2, scale)
        elif name.startswith("int"):
            y = integer(x, int(name[3:]), scale, **o)
        elif name.startswith("float8"):
            y = float8(x, {"4": E4M3, "5": E5M2}[name[8]], scale)
        elif name.startswith("mx"):
            dtype = {"mxfp4": E2M1, "mxfp8": E4M3}[name]
            y = microscaling(x, dtype, o["scale_rounding"])
        elif name == "nvfp4":
            y = nvfp4(x, s2)
        elif name == "nf4":
            y = nf4(x, scale)
        elif name == "sherry":
            unit = 64 if o["group_stride"] == 16 else 32
            y = sherry(x, scale, o["group_stride"], -(-len(x) // unit) * unit)
        elif name == "seq2":
            y = seq2(x, scale, o["scale_method"])
        elif name == "ptqtp":
            y = two_planes(x, scale, **o)
        elif name == "binary":
            y = np.where(x < 0, -1, 1) * scale(np.abs(x).mean())
        else:
            y = ternary(x, scale, o["scale_method"])
            if o["shift"]:
                y = y + scale((x - y).mean())
        out[tile] = y
    return out
