"""Runs greedy selection in Triton's interpreter; see `_triton_interpreter`.

A script. Prints the number of tokens of each case that chose as the oracle does.
"""

from __future__ import annotations

import jax
import numpy as np

from pallas_kernels import _triton
from pallas_kernels.greedy_select import triton
from tests.kernels._triton_interpreter import Interpreted
from tests.kernels.test_greedy_select import _given


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    _triton.library = Interpreted  # type: ignore[assignment]
    for n, k in ((300, 30), (130, 130), (7, 7)):
        args, settings, want = _given(n, n, k)
        order = triton.select(*args, settings, capability=80)
        assert np.asarray(order).tolist() == want, n
        print(n, flush=True)


if __name__ == "__main__":
    main()
