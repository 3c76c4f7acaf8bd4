"""Compresses a language model and writes it as an Orbax checkpoint.

    python scripts/export_orbax.py --model smollm2 \
        --recipe configs/ternary/sherry.yaml --out smollm2-sherry

What it writes opens with `angeljax generate --model smollm2-sherry`, or in Python with
`angeljax.load`. A template for scripts of one's own: public functions only.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

import angeljax as aj
from angeljax.models import load_model


def export(
    model: str, recipe: str, out: Path, *, dtype: str, overwrite: bool
) -> tuple[Path, aj.CompressionReport]:
    """Loads, compresses and saves; returns the checkpoint and what was saved."""
    rules = aj.Recipe.load(recipe)
    if out.exists() and not overwrite:  # now, and not after an hour of work
        raise FileExistsError(f"{out} exists: choose another --out or --overwrite")
    loaded = load_model(model, dtype=jnp.dtype(dtype))
    config = loaded.model.config.to_dict()
    rules.check_model(config)
    params = jax.block_until_ready(aj.compress(loaded.params, rules))
    path = aj.save(
        out,
        params,
        rules,
        model_config={**config, "scan_layers": loaded.model.scan_layers},
        source=loaded.source,
        tokenizer=loaded.tokenizer.files if loaded.tokenizer else None,
        overwrite=overwrite,
    )
    return path, aj.report(loaded.params, params)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", required=True, help="smollm2, a folder, a .gguf file or a hub name"
    )
    parser.add_argument(
        "--recipe", required=True, help="a file, or the name of a shipped recipe"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32")
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the checkpoint at --out"
    )
    args = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        path, report = export(**vars(args))
    except (ValueError, OSError) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 1
    print(
        f"{path}: {report.bits_per_weight:.3f} bits per weight, "
        f"{report.nbytes / 1e6:.1f} MB, in {time.perf_counter() - start:.1f} s"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
