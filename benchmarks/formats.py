"""Claim `formats`: what each data-free recipe costs in quality, on a real model.

    python -m benchmarks.formats [--tokens 8192] [--text FILE] [--tag cpu]

SmolLM2-135M-Instruct from PyPI, evaluated on the Python language reference in windows
of 512 tokens. Writes benchmarks/results/formats.<tag>.json. On two CPU cores about ten
minutes for the 26 uniform recipes.
"""

from __future__ import annotations

import argparse

from rich.console import Console

from angeljax import _workflow
from angeljax._compare import compare, table
from angeljax._data import recipe_files
from angeljax.recipe import Recipe
from benchmarks import _results


def main() -> None:
    """Measures all recipes and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--text", default=None)
    parser.add_argument("--tag", default="cpu", help="names the device in the file")
    args = parser.parse_args()

    files = [f for f in recipe_files() if f.parent.name != "qat"]
    # Those about attention, tokens or caches alone change no weight; `ptq_quality` has
    # those that need data, or transforms.
    recipes = [r for r in map(Recipe.load, files) if r.rules and not r.transforms]
    recipes = [r for r in recipes if not any(rule.needs() for rule in r.rules)]
    opened = _workflow.open_model(args.model)
    windows = _workflow.text_windows(opened, args.text, 512, None, args.tokens)
    console, rows, results = Console(width=140), [], []
    for row in compare(opened, recipes, windows):
        rows.append(row)
        console.print(f"{row.name}: perplexity {row.perplexity:.4g}, KL {row.kl:.4g}")
        case = {
            "model": args.model,
            "recipe": row.name,
            "text": args.text or "pydoc_data.topics",
            "tokens": args.tokens,
            "window": 512,
        }
        base = rows[0].perplexity
        results += [
            _results.Row(
                case, "perplexity", row.perplexity, "1", base, base / row.perplexity
            ),
            _results.Row(case, "kl", row.kl, "nats"),
            _results.Row(case, "top1_agreement", row.top1, "1"),
            _results.Row(case, "bits_per_weight", row.bits_per_weight, "bit"),
            _results.Row(case, "checkpoint_size", row.megabytes, "MB"),
            _results.Row(case, "compress_time", row.compress_seconds, "s"),
        ]
    console.print(table(rows))
    print(_results.write("formats", results, device_tag=args.tag))


if __name__ == "__main__":
    main()
