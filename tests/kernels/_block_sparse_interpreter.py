"""Runs block-sparse attention in Triton's interpreter; see `_triton_interpreter`.

A script. Prints `name|dtype|error of y|error of lse` for each case: the largest
differences from float64.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import BlockLists, _triton
from pallas_kernels.block_sparse_attention import triton
from tests.kernels import _attention
from tests.kernels._triton_interpreter import Interpreted, mend_bfloat16

# q_length, k_length, heads, kv_heads, dim, block_q, block_k, heads of the lists,
# q_offset of two rows, options
CASES = {
    "gqa": (150, 150, 4, 2, 16, 64, 64, 4, (0, 0), {"dtype": "float16"}),
    "chunk": (70, 200, 2, 1, 24, 48, 32, 1, (37, 130), {}),
    "soft cap": (40, 130, 2, 2, 16, 16, 128, 2, (90, 3), {"soft_cap": 2.0}),
    "wide": (20, 40, 1, 1, 144, 16, 16, 1, (20, 0), {"dtype": "bfloat16"}),
}


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    _triton.library = Interpreted  # type: ignore[assignment]
    mend_bfloat16()
    for name, case in CASES.items():
        t, s, heads, kv_heads, dim, block_q, block_k, list_heads, offsets, more = case
        rng = np.random.default_rng(0)
        dtype, soft_cap = more.get("dtype", "float32"), more.get("soft_cap")
        qkv = _attention.random_qkv(rng, 2, t, s, heads, kv_heads, dim, dtype)
        rows = 1 if len(set(offsets)) == 1 else 2
        lists = _attention.random_lists(
            rng, rows, list_heads, t, s, block_q, block_k, 0.5, offsets[:rows]
        )
        # One list is empty, and one lacks the block of its own queries.
        counts = lists.counts.at[-1, 0, 0].set(0)
        counts = counts.at[0, -1, -1].add(-1)
        lists = BlockLists(lists.indices, counts, block_q, block_k)
        y, lse = triton.attention(
            *qkv,
            lists,
            scale=0.3,
            q_offset=jnp.asarray(offsets, jnp.int32),
            soft_cap=soft_cap,
            capability=80,
        )
        want = _attention.oracle(
            *qkv, lists, scale=0.3, q_offset=offsets, soft_cap=soft_cap
        )
        blind = np.isinf(want[1])
        assert np.array_equal(np.isinf(lse), blind) and blind.any(), name
        assert not np.asarray(y, np.float32)[blind.swapaxes(1, 2)].any(), name
        errors = [
            np.abs(np.asarray(y, np.float64) - want[0]).max(),
            np.abs(np.asarray(lse)[~blind] - want[1][~blind]).max(),
        ]
        print(name, dtype, *errors, sep="|", flush=True)


if __name__ == "__main__":
    main()
