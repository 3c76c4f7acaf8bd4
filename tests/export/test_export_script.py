"""`scripts/export_orbax.py`, from a Hugging Face folder to a loaded checkpoint."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import angeljax as aj
from angeljax.formats import QTensor
from angeljax.models import load_model
from tests.export._helpers import ROOT, assert_same

SCRIPT = ROOT / "scripts" / "export_orbax.py"


@pytest.fixture(scope="module")
def main() -> Any:
    return runpy.run_path(str(SCRIPT))["main"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer with random weights and no tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    config = {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"embed_tokens": (32, 64), "norm": (64,)}
    layer = {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_proj": (128, 64),
        "mlp.up_proj": (128, 64),
        "mlp.down_proj": (64, 128),
        "input_layernorm": (64,),
        "post_attention_layernorm": (64,),
    }
    shapes |= {f"layers.0.{name}": shape for name, shape in layer.items()}
    rng = np.random.default_rng(0)
    save_file(
        {
            f"model.{name}.weight": rng.normal(size=shape).astype(np.float32)
            for name, shape in shapes.items()
        },
        folder / "model.safetensors",
    )
    return folder


def test_it_writes_what_compress_gives(
    main: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    arguments = ["--model", str(model), "--recipe", "int4-g64", "--out", str(out)]
    assert main(arguments) == 0
    assert "bits per weight" in capsys.readouterr().out
    params, recipe = aj.load(out)
    want = aj.compress(load_model(str(model), dtype=jnp.bfloat16).params, recipe)
    assert_same(params, want)
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QTensor))
    assert sum(isinstance(x, QTensor) for x in leaves) == 7
    assert main(arguments) == 1
    assert "exists: choose another --out or --overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_mistakes_give_one_line(
    main: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "small")
    assert main(["--model", str(model), "--recipe", "int44", "--out", out]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
