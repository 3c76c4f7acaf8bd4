"""A training step for an H100: flash attention, and nothing of the size of its weights.

Needs the wheels of `jax[cuda13]` (`JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1`), else skips.
"""

import math
import re

import jax
import jax.numpy as jnp
import pytest

import angeljax as aj
from angeljax import qat
from angeljax.models import DecoderConfig, LanguageModel
from angeljax.train import (
    LMTask,
    OptimizerConfig,
    init_state,
    make_optimizer,
    make_step,
)
from angeljax.train.language_model import ready
from angeljax.train.losses import DistillOptions
from angeljax.train.objective import Objective
from tests.kernels import _h100

pytestmark = [
    pytest.mark.gpu_compile,
    pytest.mark.skipif(not _h100.has_plugin(), reason="needs jax[cuda13]"),
]
ROWS, LENGTH = 4, 2048
CONFIG = DecoderConfig(
    model_type="llama",
    vocab_size=512,
    hidden_size=128,
    num_layers=1,
    intermediate_size=256,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    tied=True,
)


def test_step_with_teacher_uses_flash_attention():
    model = ready(LanguageModel(CONFIG), "bfloat16", scan_layers=False)
    objective = Objective(model=model, teacher=model, options=DistillOptions())
    recipe = aj.Recipe.load("sherry")
    task = LMTask(objective, qat.make(recipe, total_steps=9, arenas=qat.Arenas()))
    optimizer = make_optimizer(OptimizerConfig(), 9)
    step = make_step(task.loss, optimizer, clip=1.0)
    params = model.init(jax.random.key(0))
    trainable, frozen = task.init(params, teacher=params)
    state = init_state(trainable, optimizer)

    def run(state, frozen, tokens):
        return step(state, frozen, {"tokens": tokens}, jax.random.key(0))

    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH + 1), jnp.int32)
    text = _h100.compile_for_h100(run, state, frozen, tokens).as_text()
    # Forward of student and teacher, backward of the student.
    assert len(re.findall(r'custom_call_target="__cudnn\$fmha', text)) == 3
    shapes = {
        tuple(map(int, s.split(","))) for s in re.findall(r"\w\[([\d,]+)\]", text)
    }
    assert (ROWS, LENGTH, 128) in shapes
    square = [s for s in shapes if s.count(LENGTH) > 1 and math.prod(s) > LENGTH**2]
    assert not square, "weights or a mask of attention are in memory"
