"""What the training of an EAGLE-3 head gave: its curve, and tau on other prompts.

    angeljax spec train --config configs/train/eagle3-smollm2-5min.yaml --out DIR \
        --set eval.source=PROMPTS.jsonl
    python -m benchmarks.eagle_training DIR --seconds 247 --tag h100

Run on the machine that trained. It reads `DIR/acceptance.json` and measures nothing
itself; `--seconds` is what the training took, text and evaluation included.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._results import RESULTS, Row, write


def rows_of(found: dict[str, Any], seconds: float | None = None) -> list[Row]:
    """The rows of an `acceptance.json`; of the curve one to two dozen steps."""
    rows, curve = [], found["curve"]
    every = 100 * max(1, curve["step"][-1] // 1500)
    lines = zip(*(curve[k] for k in ("step", "tokens", "top1", "tau")), strict=True)
    for i, (step, tokens, top1, tau) in enumerate(lines):
        if i and step % every:
            continue
        case = {"part": "training", "step": step, "tokens": int(tokens)}
        rows += [
            Row({**case, "draft": k + 1}, "top-1 agreement", share, "1")
            for k, share in enumerate(top1)
        ]
        rows.append(Row(case, "tau", tau, "1"))
    for name, value in found["evaluation"].items():
        _, what, *rest = name.split("/")
        if what == "tau":
            case = {"part": "prompts", "task": rest[0] if rest else "all"}
            rows.append(Row(case, "tau", value, "1"))
        elif what == "accepted":
            case = {"part": "prompts", "draft": int(rest[0]) + 1}
            rows.append(Row(case, "rounds that accept", value, "1"))
    whole: dict[str, Any] = {"part": "training"}
    rows.append(Row(whole, "coverage of the draft vocabulary", found["coverage"], "1"))
    if seconds is not None:
        rows.append(Row(whole, "time, text and evaluation included", seconds, "s"))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the rows of one finished run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the training")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--tag", default=None)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    found = json.loads((args.run / "acceptance.json").read_text(encoding="utf-8"))
    rows = rows_of(found, args.seconds)
    print(write("eagle_training", rows, device_tag=args.tag, directory=args.out))


if __name__ == "__main__":
    main()
