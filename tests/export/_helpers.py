"""Trees to save, and what equal means for what comes back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import angeljax as aj
from angeljax.formats import QTensor

ROOT = Path(__file__).resolve().parents[2]


def small_tree() -> dict[str, Any]:
    """Quantized and plain leaves in every container, of many dtypes."""
    w = jax.random.normal(jax.random.key(0), (3, 256, 32))
    return {
        "layers": [
            {"kernel": aj.quantize(w[0], format="int4", group_size=64)},
            ({"kernel": aj.quantize(w[1], format="sherry")}, jnp.arange(5)),
        ],
        "stack": {"kernel": aj.quantize(w, format="t2", batch_axes=1)},
        0: {"a.b": jnp.float32(2.5), "a/b": jnp.ones((2, 3), jnp.bfloat16)},
        "numbers": {
            name: jnp.arange(6).astype(name)
            for name in ("bool", "int8", "uint32", "float16", "float8_e5m2", "int4")
        },
        "numpy": np.linspace(0, 1, 7, dtype=np.float32),
        "nothing": None,
        "empty": {"dict": {}, "list": [], "tuple": (), "array": jnp.zeros((0, 4))},
        "é %": jnp.zeros((2, 0), jnp.int8),
    }


def assert_same(got: Any, want: Any) -> None:
    """Same containers, keys, specs, shapes, dtypes and bytes."""
    if isinstance(want, QTensor):
        assert isinstance(got, QTensor)
        assert got.spec == want.spec and hash(got.spec) == hash(want.spec)
        got, want = got.planes, want.planes
    if isinstance(want, dict):
        assert type(got) is dict and list(got) == list(want)
        assert [type(k) for k in got] == [type(k) for k in want]
        for key in want:
            assert_same(got[key], want[key])
    elif isinstance(want, list | tuple):
        assert type(got) is type(want) and len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            assert_same(g, w)
    elif want is None:
        assert got is None
    else:
        assert isinstance(got, jax.Array)
        assert got.dtype == want.dtype and got.shape == want.shape
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def run_python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Runs code in a second interpreter that knows only the repository."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", code, *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
