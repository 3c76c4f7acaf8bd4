"""What fake quantization costs a training step, and what the GPU makes of it.

    python -m benchmarks.qat_throughput --model M --data ids.npy [--tag h100]

Trains the same model on the same tokens in bfloat16 and fake-quantized, with the cross
entropy alone and with a teacher, and prints tokens/s and model FLOP utilisation (work
of the model over the peak of the device; fake quantizers do none).
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax

from angeljax.train.language_model import training_flops
from angeljax.train.losses import DistillOptions
from angeljax.train.metrics import peak_flops
from benchmarks import _qat, _results


def measure(run: Any, begin: Any, data: Any, args: Any) -> float:
    """Seconds of a step, the best of three dispatches after one that warms up."""
    rows = _qat.windows_of(len(data), args.length, args.batch, 4 * args.steps, 0)
    trainable, state, best = run.trainable, run.opt_state, float("inf")
    for i in range(4):
        part = rows[i * args.steps : (i + 1) * args.steps]
        began = time.perf_counter()
        (trainable, state, _), losses = run.run(
            trainable, state, data, part, i * args.steps, 1e-4
        )
        losses["loss"].block_until_ready()
        if i:
            best = min(best, (time.perf_counter() - began) / args.steps)
    return best


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--rows", default="bfloat16,sherry+arenas,absmean,seq2,int4")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--unrolled", action="store_true")
    parser.add_argument("--tag", default=None)
    args = parser.parse_args()
    begin = _qat.start(args.model, scan_layers=not args.unrolled)
    data = _qat.token_stream(args.data)
    peak = peak_flops(jax.devices()[0].device_kind)
    found, tokens = [], args.batch * args.length
    for teacher in (False, True):
        distill = DistillOptions(weight=1.0, lm_weight=0.0) if teacher else None
        base = None
        for row in args.rows.split(","):
            began = time.perf_counter()
            run = _qat.training(
                begin, row, steps=1000, length=args.length, distill=distill
            )
            seconds = measure(run, begin, data, args)
            rate = tokens / seconds
            work = training_flops(run.task.objective, args.length) * rate
            base = rate if base is None else base
            share = None if peak is None else work / peak
            case = {
                "row": row,
                "teacher": teacher,
                "batch": args.batch,
                "length": args.length,
                "layers": "unrolled" if args.unrolled else "scanned",
            }
            found.append(
                _results.Row(
                    case, "throughput", rate, "tokens/s", base, rate / base, share
                )
            )
            print(
                f"{row:16} teacher={teacher!s:5} {seconds * 1e3:7.1f} ms "
                f"{rate:9.0f} tokens/s  {rate / base:.3f} of bfloat16  "
                + ("" if share is None else f"MFU {share:.3f}")
                + f"  ({time.perf_counter() - began:.0f} s)",
                flush=True,
            )
            del run
    _results.write("qat_throughput", found, device_tag=args.tag)


if __name__ == "__main__":
    main()
