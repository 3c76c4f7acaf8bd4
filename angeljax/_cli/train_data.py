"""`angeljax train-data`: text and predictions that a teacher writes before training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from angeljax._cli import AsJson, Dtype, Model, one_line_errors, print_json, print_rich

app = typer.Typer(
    help="Write what a training reads: text or predictions of a teacher. The same "
    "command continues one that was stopped.",
    no_args_is_help=True,
)
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder, new or begun before.")]


@app.command()
@one_line_errors
def generate(
    model: Model,
    out: Out,
    shards: Annotated[int, typer.Option(help="Files of documents in all.")] = 16,
    rows: Annotated[int, typer.Option(help="Documents of a file, one batch.")] = 64,
    max_new_tokens: Annotated[
        int, typer.Option(help="Where a document that has not ended is cut off.")
    ] = 1024,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A text file with one prompt a line, taken in turn. Default: the "
            "model begins as it likes."
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap each prompt as a chat turn.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 is greedy.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep the likeliest that sum to p.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0,
    dtype: Dtype = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Write text that a model samples; `data` of a training names the folder."""
    from angeljax._train_workflow import data

    written = data.write_text(
        model,
        out,
        shards=shards,
        rows=rows,
        max_new_tokens=max_new_tokens,
        prompts=prompts,
        chat=chat,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        dtype=dtype,
        progress=False if as_json else None,
    )
    if as_json:
        print_json({"path": str(out), "shards": shards, "tokens": written})
    else:
        print_rich(f"{written} tokens in {shards} files, written to {out}")


@app.command()
@one_line_errors
def teacher(
    model: Model,
    out: Out,
    text: Annotated[
        list[str],
        typer.Option(
            "--data",
            "-d",
            help="What the student will be trained on, as `data` in its "
            "configuration. May be repeated.",
        ),
    ],
    seq_length: Annotated[
        int, typer.Option(help="Tokens in a row, as in the configuration.")
    ] = 1024,
    top_k: Annotated[int, typer.Option(help="Entries kept for each token.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Rows at once.")] = 8,
    shard_rows: Annotated[int, typer.Option(help="Rows of a file.")] = 512,
    dtype: Dtype = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Write the likeliest tokens of a teacher; `distill.teacher` names the folder."""
    from angeljax._train_workflow import data

    rows = data.write_predictions(
        model,
        out,
        sources=text,
        seq_length=seq_length,
        top_k=top_k,
        batch_size=batch_size,
        shard_rows=shard_rows,
        dtype=dtype,
        progress=False if as_json else None,
    )
    if as_json:
        print_json({"path": str(out), "rows": rows, "tokens": rows * seq_length})
    else:
        print_rich(f"{rows} rows of {seq_length} tokens, written to {out}")
