"""`angeljax allocate`: the recipe that loses least under a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from angeljax._cli import AsJson, Dtype, Model, one_line_errors, print_json, print_rich


@one_line_errors
def allocate(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Recipe to write, .yaml.")],
    formats: Annotated[
        str,
        typer.Option(
            help="Candidates format[:group_size][:algorithm], with commas; none leaves "
            "a weight as it is."
        ),
    ] = "int3:64,int4:128,int4:32,int8",
    budget_bits: Annotated[
        float | None,
        typer.Option(help="Bits per weight over the weights that are quantized."),
    ] = None,
    budget_mb: Annotated[
        float | None, typer.Option(help="Of the whole model, in 10^6 bytes.")
    ] = None,
    budget_ms: Annotated[
        float | None,
        typer.Option(help="Of all products of a token, timed on this device."),
    ] = None,
    measure: Annotated[
        str,
        typer.Option(
            help="kl runs the model for each weight and candidate, linear for each "
            "weight, error not at all."
        ),
    ] = "kl",
    group: Annotated[
        str, typer.Option(help="Who shares a format: weight, or layer.")
    ] = "weight",
    text: Annotated[
        str | None,
        typer.Option(
            help="A .txt or .jsonl file, or a dataset name[:config][:split]. "
            "Default: the Python language reference."
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Window length in tokens.")] = 256,
    tokens: Annotated[int, typer.Option(help="Use the first so many tokens.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Windows in a pass.")] = 4,
    latency_tokens: Annotated[
        int, typer.Option(help="Rows of activations that --budget-ms is for.")
    ] = 1,
    dtype: Dtype = "bfloat16",
    overwrite: Annotated[bool, typer.Option(help="Replace what is at --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Choose a format for each weight under a budget, and write the recipe."""
    from angeljax import _workflow
    from angeljax import allocation as mixed

    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists: choose another --out or pass --overwrite")
    candidates = [part.strip() for part in formats.split(",")]
    progress = False if as_json else None
    loaded = _workflow.open_model(model, dtype=dtype)
    windows = _workflow.text_windows(loaded, text, length, length, tokens)
    # Padding at the end is no text.
    whole = windows.tokens[windows.score_mask[:, 1:].all(axis=1)]
    if not len(whole):
        raise ValueError(f"the text fills no window of --length {length} tokens")
    batches = [whole[at : at + batch_size] for at in range(0, len(whole), batch_size)]
    stats = mixed.calibrate_for(
        loaded.model, loaded.params, batches, candidates, progress=progress
    )
    latency = None
    if budget_ms is not None:
        latency = mixed.measure_latency(
            loaded.params, candidates, tokens=latency_tokens, progress=progress
        )
    found = mixed.allocate(
        loaded.model,
        loaded.params,
        stats,
        formats=candidates,
        batches=batches,
        budget_bits=budget_bits,
        budget_mb=budget_mb,
        budget_ms=budget_ms,
        measure=measure,
        group=group,
        latency=latency,
        progress=progress,
    )
    found.recipe.save(out)
    if as_json:
        print_json({"path": str(out), **found.to_dict()})
        return
    print_rich(found)
    for name, same in found.uniform().items():
        print_rich(f"all {name}: {same}")
    print_rich(
        f"{found.passes} passes in {found.seconds:.1f} s; recipe written to {out}"
    )
