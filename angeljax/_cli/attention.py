"""`angeljax attention`: what a selector reads of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from angeljax._cli import (
    MODEL_HELP,
    AsJson,
    Dtype,
    one_line_errors,
    print_json,
    print_rich,
)

app = typer.Typer(help="See what sparse attention reads.", no_args_is_help=True)


# One command alone would be taken for the group itself.
@app.callback()
def group() -> None:
    """See what sparse attention reads."""


@app.command()
@one_line_errors
def show(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="A recipe with a section `attention`."),
    ] = None,
    selector: Annotated[
        str | None, typer.Option(help="Name of a selector, instead of a recipe.")
    ] = None,
    set: Annotated[
        list[str] | None, typer.Option(help="An option of --selector: alpha=0.5.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="As for `eval`. Default: the Python language reference."),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens to read.")] = 8192,
    rows: Annotated[
        int, typer.Option(help="Queries whose attention mass is measured.")
    ] = 64,
    layer: Annotated[
        list[int] | None, typer.Option(help="Only this layer. May be repeated.")
    ] = None,
    head: Annotated[
        int | None, typer.Option(help="Only this head, in the picture.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Draw the blocks of the first --layer here."),
    ] = None,
    dtype: Dtype = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Measure density and kept attention mass of each layer, and draw a layer's blocks.

    The model runs densely; what the selector would read of it is compared with that.
    """
    from angeljax import _attention_workflow as workflow
    from angeljax._workflow import open_model

    loaded = open_model(model, dtype=dtype)
    what = workflow.selector_of(loaded, recipe, selector, set or [])
    report = workflow.report(loaded, what, text, length=length, rows=rows, layers=layer)
    if out is not None:
        shown = layer[0] if layer else 0
        workflow.draw(loaded, what, text, out, length, shown, head)
    if as_json:
        print_json(report.to_dict())
        return
    print_rich(report)
    if out is not None:
        print_rich(f"blocks of layer {shown} written to {out}")
