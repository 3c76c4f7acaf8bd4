"""Two processes, each with half of every array, as on two hosts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import angeljax as aj
from angeljax.export import orbax as ckpt
from tests.export._helpers import ROOT, assert_same

CODE = """
import sys
import jax, jax.numpy as jnp, numpy as np
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
from angeljax.export import orbax
from tests.export.test_orbax_hosts import params
mesh = jax.make_mesh((4,), ("x",))
host = jax.tree.map(np.asarray, params())
def spread(p):
    cut = jax.P(None, "x") if p.ndim == 2 and p.shape[1] % 4 == 0 else jax.P()
    sharding = jax.NamedSharding(mesh, cut)
    return jax.make_array_from_callback(p.shape, sharding, lambda i: p[i])
orbax.save(sys.argv[1], jax.tree.map(spread, host))
got, _ = orbax.load(sys.argv[1], mesh=mesh, shardings=jax.P(None, "x"))
for new, old in zip(jax.tree.leaves(got), jax.tree.leaves(host), strict=True):
    for shard in new.addressable_shards:
        assert np.array_equal(np.asarray(shard.data), old[shard.index])
try:
    orbax.save(sys.argv[1], host)
except orbax.CheckpointError as e:
    assert "exists" in str(e)
else:
    raise AssertionError("an existing checkpoint was replaced")
"""


def params() -> dict[str, object]:
    """Codes and scales of one byte and of two."""
    w = jax.random.normal(jax.random.key(0), (256, 64))
    return {
        "int4": aj.quantize(w, format="int4", group_size=64),
        "nvfp4": [aj.quantize(w, format="nvfp4")],
        "plain": jnp.ones((8, 8), jnp.bfloat16),
    }


def test_two_processes_save_and_load_their_shards(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(tmp_path / "m"), address, str(i)],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        for process in processes:
            _, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, stderr
    finally:
        for process in processes:
            process.kill()
    # What two processes wrote, one reads.
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert_same(ckpt.load(tmp_path / "m")[0], params())
