"""`angeljax compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from angeljax._cli import (
    AsJson,
    Dtype,
    Model,
    RecipeFile,
    one_line_errors,
    print_json,
    print_rich,
)


@one_line_errors
def compress(
    model: Model,
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    dtype: Dtype = "bfloat16",
    html: Annotated[
        Path | None, typer.Option(help="Also write a report as one HTML page.")
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            help="Text to calibrate on: a .txt or .jsonl file, a dataset "
            "name[:config][:split], or `default`, the Python language reference."
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(help="Rows of text. Default: 128, or as many as there are."),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens in a row. Default: 2048.")
    ] = None,
    sequential: Annotated[
        bool | None,
        typer.Option(
            "--sequential/--one-pass",
            help="Calibrate each layer on what the quantized layers before it give "
            "(the default), or all in one pass over the model as it is.",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Folder of finished layers, to go on after an interruption."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The model before fine-tuning, as --model, for recipes that compare "
            "with it."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is at --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compress a model and write an orbax checkpoint."""
    from angeljax import _ptq_workflow, _workflow
    from angeljax._report import report
    from angeljax.recipe import Recipe

    what = Recipe.load(recipe)
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists: choose another --out or pass --overwrite")
    loaded = _workflow.open_model(model, dtype=dtype)
    how = _ptq_workflow.Calibration(
        source=calibrate,
        rows=rows,
        length=length,
        sequential=sequential,
        resume=resume,
        base=base,
    )
    cparams, seconds = _ptq_workflow.compress_model(
        loaded, what, how, dtype=dtype, progress=False if as_json else None
    )
    result = report(loaded.params, cparams)
    cparams = _workflow.kv_scaled(loaded, cparams, what, how.text)
    _workflow.save_model(out, loaded, cparams, what, overwrite=overwrite)
    if html is not None:
        result.to_html(html, title=f"{model} · {what.name}")
    if as_json:
        print_json({"seconds": seconds, "path": str(out), **result.to_dict()})
        return
    print_rich(_workflow.summary_table(result))
    print_rich(
        f"{result.bits_per_weight:.3f} bits per weight over the whole model, "
        f"{result.nbytes / 1e6:.1f} MB ({result.ratio:.2f}x smaller), "
        f"compressed in {seconds:.1f} s, written to {out}"
    )
