"""A whole decode step for an H100: one command buffer, and no dense weight in memory.

Needs the wheels of `jax[cuda13]` (`JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1`), else skips.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks.decode_step import count_kernels

pytestmark = pytest.mark.gpu_compile

_SCRIPT = """
import dataclasses, sys
import jax, jax.numpy as jnp
import angeljax as aj
from angeljax.models import DecoderConfig, LanguageModel, decode_step, prepare_decoder
from tests.kernels._h100 import compile_for_h100

model = LanguageModel(
    DecoderConfig(
        model_type="llama", vocab_size=96, hidden_size=512, num_layers=2,
        intermediate_size=1024, num_heads=8, num_kv_heads=4, head_dim=64,
    ),
    dtype=jnp.bfloat16,
)
recipe = aj.Recipe(rules=[aj.Rule(format=sys.argv[1], granularity="channel")])

def make(key):
    small = aj.compress(model.init(key, jnp.bfloat16), recipe)
    return prepare_decoder(
        model, small, implementation="mosaic_gpu", activation="int8"
    )[1]

fused = dataclasses.replace(model, fused=True)
ready = jax.eval_shape(make, jax.random.key(0))
cache = jax.eval_shape(lambda: fused.init_cache(1, 128))
token = jax.ShapeDtypeStruct((1,), jnp.int32)
compiled = compile_for_h100(
    lambda params, cache, token: decode_step(fused, params, cache, token),
    ready, cache, token,
)
print("TEMP", compiled.memory_analysis().temp_size_in_bytes)
print(compiled.as_text())
"""


def _has_plugin() -> bool:
    try:
        return bool(metadata.version("jax-cuda13-plugin"))
    except metadata.PackageNotFoundError:
        return False


_DENSE = """
import jax, jax.numpy as jnp
from angeljax.models import DecoderConfig, LanguageModel, decode_step, prepare_decoder
from tests.kernels._h100 import compile_for_h100

model = LanguageModel(
    DecoderConfig(
        model_type="llama", vocab_size=96, hidden_size=576, num_layers=3,
        intermediate_size=1536, num_heads=9, num_kv_heads=3, head_dim=64, tied=True,
    ),
    dtype=jnp.bfloat16, fused=True,
)

def run(params, steps):
    def step(_, carry):
        token, cache = carry
        return decode_step(model, params, cache, token)
    carry = jnp.zeros((1,), jnp.int32), model.init_cache(1, 128)
    return jax.lax.fori_loop(0, steps, step, carry)[0]

ready = jax.eval_shape(
    lambda p: prepare_decoder(model, p, transpose=True)[1], model.abstract(jnp.bfloat16)
)
steps = jax.ShapeDtypeStruct((), jnp.int32)
compiled = compile_for_h100(run, ready, steps)
print("TEMP", compiled.memory_analysis().temp_size_in_bytes)
print(compiled.as_text())
"""


@pytest.mark.skipif(not _has_plugin(), reason="needs jax[cuda13]")
def test_a_dense_decode_step_is_a_few_fusions() -> None:
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    env = {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "JAX_PLATFORMS": "cpu",
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    done = subprocess.run(
        [sys.executable, "-c", _DENSE],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # Three layers of at most ten kernels, and what is done once.
    assert count_kernels(done.stdout)["fusion"] <= 3 * 10 + 12
    temp = re.search(r"^TEMP (\d+)", done.stdout, re.M)
    assert temp and int(temp[1]) < 2**20, "neither a product nor a copied weight"


@pytest.mark.skipif(not _has_plugin(), reason="needs jax[cuda13]")
@pytest.mark.parametrize("fmt", ["t2", "sherry"])
def test_a_decode_step_is_one_command_buffer(fmt: str) -> None:
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    env = {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "JAX_PLATFORMS": "cpu",
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        # Lists the operations of each command buffer, and what cannot be in one.
        "TF_CPP_MIN_LOG_LEVEL": "0",
        "TF_CPP_VMODULE": "command_buffer_conversion_pass=3",
    }
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, fmt],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    _, found, log = done.stderr.rpartition("Module jit_")
    assert found, "no log of the command buffers"
    buffers = re.findall(r"Creating command buffer thunk with .*thunks: (.*)", log)
    assert len(buffers) == 1, buffers
    assert "is not enabled" not in log and "not convertible" not in log
    # Two layers of qkv, o, gate and up, down.
    assert len(re.findall(r"\bmpmd_map", buffers[0])) == 8
    # Dense weights of qkv, o, gate and up, down, in any dtype.
    for k, n in ((512, 1024), (512, 512), (512, 2048), (1024, 512)):
        assert not re.search(rf"\[(1,)?({k},{n}|{n},{k})\]", done.stdout)
    temp = re.search(r"^TEMP (\d+)", done.stdout, re.M)
    assert temp and int(temp[1]) < 2 * 512 * 512, "the smallest of them in bfloat16"
