"""Rounds of speculative decoding for an H100: one CUDA graph, and few kernels.

Needs the wheels of `jax[cuda13]` (`JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1`), else skips.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels._h100 import has_plugin

pytestmark = pytest.mark.gpu_compile

_SCRIPT = """
import dataclasses, sys
import jax, jax.numpy as jnp
from angeljax.models import DecoderConfig, FusedRows, LanguageModel, prepare_decoder
from angeljax.speculative import (
    EagleConfig, EagleDrafter, EagleTree, Hybrid, NoDrafter, PromptLookup, Sampling,
    SelfDrafter, Target, TokenRecycling, decode, init_eagle, prefill, prepare_drafter,
)
from benchmarks._speculative_runs import kernels_of_round
from angeljax._graph import ONE_GRAPH
from tests.kernels._h100 import compile_for_h100

model = LanguageModel(
    DecoderConfig(
        model_type="llama", vocab_size=960, hidden_size=576, num_layers=2,
        intermediate_size=1536, num_heads=9, num_kv_heads=3, head_dim=64, tied=True,
    ),
    dtype=jnp.bfloat16, fused=True,
)
shape = jax.ShapeDtypeStruct
config = EagleConfig.of(model.config)
head = jax.tree.map(
    lambda x: shape(x.shape, jnp.bfloat16),
    jax.eval_shape(lambda: init_eagle(config, jax.random.key(0))),
)
lookup = PromptLookup(7)
drafter = {
    "plain": NoDrafter(1), "wide": NoDrafter(16), "lookup": lookup,
    "recycling": TokenRecycling(16), "hybrid": Hybrid(TokenRecycling(16), lookup),
    "skip": SelfDrafter(num_tokens=2, layers=(0,)),
    "chain": EagleDrafter(config, head),
    "head": Hybrid(EagleDrafter(config, head, growth=EagleTree(16, 5, 3)), lookup),
}[sys.argv[1]]
rows = FusedRows() if sys.argv[2:] == ["fused"] else None
if sys.argv[1] in ("chain", "head"):
    drafter = jax.eval_shape(
        lambda d: prepare_drafter(model, d, transpose=True, rows=rows), drafter
    )
plain, abstract = model, model.abstract(jnp.bfloat16)
params = jax.eval_shape(
    lambda p: prepare_decoder(plain, p, transpose=True, rows=rows)[1], abstract
)
model = dataclasses.replace(model, rows=rows)
target = jax.eval_shape(lambda p: Target(model, p, Sampling().sampler(1)), params)
one = shape((1,), jnp.int32)
state = jax.eval_shape(
    lambda *args: prefill(*args, slots=256),
    *(target, drafter, shape((1, 64), jnp.int32), one, one),
)
compiled = compile_for_h100(decode, target, drafter, state, one, shape((), jnp.int32),
                            **ONE_GRAPH)
print("KERNELS", kernels_of_round(compiled.as_text()))
"""


def _compiled(*name: str) -> int:
    """Kernels of a round; the loop must be inside of a command buffer."""
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
        [sys.executable, "-c", _SCRIPT, *name],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    _, found, log = done.stderr.rpartition("Module jit_")
    assert found and "not convertible" not in log
    (buffer,) = re.findall(r"Creating command buffer thunk with .*thunks: (.*)", log)
    assert re.search(r"\bwhile", buffer)
    counted = re.search(r"^KERNELS (\d+)", done.stdout, re.M)
    assert counted is not None
    return int(counted[1])


@pytest.mark.skipif(not has_plugin(), reason="needs jax[cuda13]")
def test_rounds_are_one_graph_and_drafts_cost_few_kernels() -> None:
    plain, wide = _compiled("plain"), _compiled("wide")
    # Two layers of nine kernels at most, fourteen if wide, and what is done once.
    assert plain <= 2 * 9 + 11 and wide <= 2 * 14 + 12
    assert _compiled("lookup") <= wide + 5
    assert _compiled("skip") <= wide + 2 * (9 + 12)


@pytest.mark.skipif(not has_plugin(), reason="needs jax[cuda13]")
def test_rounds_of_six_kernels_a_layer() -> None:
    wide = _compiled("wide", "fused")
    assert wide <= 2 * 6 + 14
    assert _compiled("recycling", "fused") <= wide + 6
    assert _compiled("hybrid", "fused") <= wide + 9
    # Of a chain three readings of the head, of a tree four.
    assert _compiled("chain", "fused") <= wide + 3 * 13
    assert _compiled("head", "fused") <= wide + 4 * 13 + 9
