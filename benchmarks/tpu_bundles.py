"""Claim `tpu_bundles`: what the TPU kernels cost by the compiler's own schedule.

    python -m benchmarks.tpu_bundles [--tag aot]

Needs libtpu (pip install libtpu) and no TPU. Each product is compiled ahead of time and
the VLIW bundles of its kernel are counted, about a cycle each: a static count of one
block of 1024 x 512 weights in VMEM. Nothing is run on hardware; time to fetch the block
from HBM is not in it, nor is the overhead of a grid step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._results import ROOT, Row, write

# Generation: topology and accelerator type, as libtpu names them.
GENERATIONS = {
    "v5e": ("v5e:2x2", "v5litepod-4"),
    "v6e": ("v6e:2x2", "v6e-4"),
    "v7x": ("tpu7x:2x2x1", "tpu7x-4"),
}
KINDS = [
    ("bfloat16", "bfloat16"),
    ("int8", "int8"),
    ("int4", "int8"),
    ("t2", "int8"),
    ("sherry", "int8"),
    ("int8", "bfloat16"),
    ("int4", "bfloat16"),
    ("t2", "bfloat16"),
    ("sherry", "bfloat16"),
]


def count(generation: str, cases: Sequence[dict[str, Any]]) -> list[int]:
    """Bundles of the kernels of some products, by a process of their own.

    Args:
      generation: one of `GENERATIONS`.
      cases: `m`, `k`, `n`, `format`, `activations` and maybe `group`, `symmetric`.

    Returns:
      One count a case.

    Raises:
      RuntimeError: something does not compile.
    """
    topology, accelerator = GENERATIONS[generation]
    with tempfile.TemporaryDirectory() as dump:
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        env = {
            **os.environ,
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "JAX_PLATFORMS": "cpu",
            "LIBTPU_INIT_ARGS": flags,
            "TPU_ACCELERATOR_TYPE": accelerator,
            "TPU_BUNDLES_DUMP": dump,
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        }
        request = json.dumps({"topology": topology, "cases": list(cases)})
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks._tpu_count", request],
            env=env,
            cwd=Path(dump).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return list(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Counts and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", default="aot")
    args = parser.parse_args()
    # The results name this machine, where jax would look for a TPU as libtpu is there.
    os.environ["JAX_PLATFORMS"] = "cpu"
    cases: list[dict[str, Any]] = [
        {"k": 1024, "n": 512, "m": m, "format": fmt, "activations": x}
        for m in (16, 256)
        for fmt, x in KINDS
    ]
    rows = []
    for generation in GENERATIONS:
        plain: dict[int, int] = {}
        for case, number in zip(cases, count(generation, cases), strict=True):
            base = plain.setdefault(case["m"], number)
            name = {"generation": generation, "how": "static count, not run", **case}
            rows.append(
                Row(name, "bundles", number, "bundles", base, base / number)
                if case["format"] != "bfloat16"
                else Row(name, "bundles", number, "bundles")
            )
            print(
                f"{generation} m={case['m']} {case['format']} x {case['activations']}: "
                f"{number} ({base / number:.2f}x of bfloat16)",
                flush=True,
            )
    print(write("tpu_bundles", rows, device_tag=args.tag))


if __name__ == "__main__":
    main()
