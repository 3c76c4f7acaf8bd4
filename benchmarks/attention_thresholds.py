"""From which length, and up to which density, sparse prefill beats dense prefill.

    python -m benchmarks.attention_thresholds [--tag h100] [--update]

One layer with 32 query heads on 8 key heads of 128 in bfloat16, Stem at a set density,
from queries to outputs, against causal attention by cuDNN; kernels take turns. Between
the measured points a straight line is assumed. Calls are chained inside one program,
since a short prompt takes less time than its launch from Python. `dense_below` is the
shortest length at which a quarter of the blocks costs no more than dense attention, in
whole hundreds of tokens; `dense_above` the highest density that does so at 16k tokens,
in percent.
`--update` puts both in `angeljax/attention/thresholds.json` under the device's name.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import angeljax.attention
from angeljax.attention import Place, Stem
from benchmarks._attention_timing import alternate
from benchmarks._results import Row, write
from benchmarks.stem import inputs
from pallas_kernels import block_sparse_attention

LENGTHS = (1024, 2048, 3072, 4096, 6144, 8192)
DENSITIES = (0.5, 0.7, 0.8, 0.9, 1.0)
SHARE, LONG = 0.25, 16384
CALLS = 16  # of one program
TABLE = Path(angeljax.attention.__file__).with_name("thresholds.json")


def measure(tokens: int, share: float) -> Row:
    """Dense over sparse time, at the density that was really read."""
    q, k, v = inputs(tokens)
    stem = Stem(
        budget_mode="density",
        keep_ratio=share,
        dense_layers=0,
        sink_blocks=1,
        window_blocks=1,
    )

    @jax.jit
    def select(q: Any, k: Any, v: Any) -> Any:
        return stem.select(q, k, v, Place())

    def chained(attend: Any) -> Any:
        def run(q: Any, k: Any, v: Any) -> Any:
            # The output as the next queries: nothing can be left out or shared.
            return jax.lax.fori_loop(0, CALLS, lambda _, q: attend(q, k, v), q)

        return jax.jit(run)

    sparse = chained(lambda q, k, v: block_sparse_attention(q, k, v, select(q, k, v)))
    dense = chained(
        functools.partial(
            jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
        )
    )
    lists = select(q, k, v)
    n = lists.counts.shape[-1]
    density = float(lists.counts.mean()) * 2 / (n + 1)
    calls = {"sparse": lambda: sparse(q, k, v), "dense": lambda: dense(q, k, v)}
    times = alternate(calls, seconds=0.05)
    us, base = (times[name] / CALLS * 1e6 for name in ("sparse", "dense"))
    print(f"{tokens}, {density:.3f}: {us:.0f} us, dense {base:.0f}", flush=True)
    case = {"tokens": tokens, "density": round(density, 4)}
    return Row(case, "time", us, "us", base, base / us)


def crossing(x: list[float], gain: list[float]) -> float:
    """Where the gain passes 1 between the last two points on its two sides."""
    sides = [i for i in range(1, len(x)) if (gain[i - 1] - 1) * (gain[i] - 1) <= 0]
    if not sides:
        return x[0] if abs(gain[0] - 1) < abs(gain[-1] - 1) else x[-1]
    i = sides[-1]
    return float(
        x[i - 1]
        + (1 - gain[i - 1]) / (gain[i] - gain[i - 1] or np.inf) * (x[i] - x[i - 1])
    )


def main() -> None:
    """Measures, writes, and updates the table if told to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", default="gpu")
    parser.add_argument("--update", action="store_true")
    args = parser.parse_args()
    by_length = [measure(tokens, SHARE) for tokens in LENGTHS]
    by_density = [measure(LONG, share) for share in DENSITIES]

    def gains(rows: list[Row]) -> list[float]:
        return [float(row.ratio or 0) for row in rows]

    below = crossing([float(n) for n in LENGTHS], gains(by_length))
    above = crossing([r.case["density"] for r in by_density], gains(by_density))
    found = {
        "dense_below": int(np.ceil(below / 100) * 100),
        "dense_above": float(np.floor(above * 100) / 100),
    }
    kind = jax.devices()[0].device_kind
    print(kind, found)
    rows = [
        *by_length,
        *by_density,
        Row({}, "dense_below", found["dense_below"], "tokens"),
        Row({}, "dense_above", found["dense_above"], "1"),
    ]
    print(write("attention_thresholds", rows, device_tag=args.tag))
    if args.update:
        table = json.loads(TABLE.read_text(encoding="utf-8")) | {kind: found}
        lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in table.items()]
        TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
