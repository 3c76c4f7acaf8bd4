"""The benchmark of the largest logits, on one small shape."""

import json

import jax
import jax.numpy as jnp

from benchmarks.top_logits import main, passes


def test_smoke(tmp_path):
    main(["--smoke", "--tag", "here", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "top_logits.here.json").read_text())["rows"]
    assert [row["case"]["way"] for row in rows] == ["loop", "xla"]
    assert all(row["unit"] == "us" for row in rows)


def test_each_pass_selects():
    x = jnp.asarray([[9.0, 1.0, 5.0, 3.0]])
    # The first logit is replaced by what the pass before found last.
    ids = jax.jit(passes(1, 4, 2, "xla"))(x, jnp.int32(1))
    logs = jax.nn.log_softmax(jnp.asarray([0.0, 1.0, 5.0, 3.0]))
    assert jnp.allclose(ids, jnp.asarray([[2 + logs[2], 3 + logs[3]]]), atol=1e-5)
