"""The command line: compress, train, evaluate, generate, export and inspect."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from angeljax._cli import (
    RECIPE_HELP,
    AsJson,
    Dtype,
    Model,
    one_line_errors,
)
from angeljax._cli import print_json as _print_json
from angeljax._cli import print_rich as _print
from angeljax._cli.allocate import allocate
from angeljax._cli.attention import app as attention_app
from angeljax._cli.compress import compress
from angeljax._cli.spec import app as spec_app
from angeljax._cli.train_data import app as train_data_app
from angeljax._cli.transcribe import transcribe

app = typer.Typer(
    name="angeljax",
    help="Compress JAX and Flax models. Start with: "
    "angeljax compress --model smollm2 --recipe int4-g64 --out small",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipe_app = typer.Typer(help="List, show and check recipes.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")
app.add_typer(attention_app, name="attention")
app.add_typer(train_data_app, name="train-data")
app.add_typer(spec_app, name="spec")
app.command()(compress)
app.command()(transcribe)
app.command()(allocate)
Attention = Annotated[
    str | None,
    typer.Option(
        help="A recipe whose section `attention` says how long prompts are read. "
        "Default: that of the checkpoint, if it has one."
    ),
]
KVCache = Annotated[
    str | None,
    typer.Option(
        help="A recipe whose section `kv_cache` says how keys and values are stored. "
        "Default: that of the checkpoint, if it has one."
    ),
]


@app.command()
@one_line_errors
def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help=RECIPE_HELP)
    ] = None,
    format: Annotated[str, typer.Option(help="Output format: orbax.")] = "orbax",
    dtype: Dtype = "bfloat16",
    overwrite: Annotated[bool, typer.Option(help="Replace what is at --out.")] = False,
) -> None:
    """Write a model, compressed or as it is, in a format for others."""
    from angeljax import _workflow
    from angeljax.recipe import Recipe

    if format != "orbax":
        raise ValueError(f"unknown export format {format!r}: use orbax")
    what = None if recipe is None else Recipe.load(recipe)
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists: choose another --out or pass --overwrite")
    loaded = _workflow.open_model(model, dtype=dtype)
    params = loaded.params
    if what is not None:
        params, _ = _workflow.compress_timed(loaded, what, progress=True)
    else:
        what = loaded.recipe
    _workflow.save_model(out, loaded, params, what, overwrite=overwrite)
    _print(f"written to {out}")


@app.command(name="eval")
@one_line_errors
def evaluate(
    model: Model,
    reference: Annotated[
        str | None,
        typer.Option(help="Model to compare with (KL, top-1 agreement), as --model."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="A .txt or .jsonl file, or a dataset name[:config][:split]. "
            "Default: the Python language reference."
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Window length in tokens.")] = 512,
    stride: Annotated[
        int | None, typer.Option(help="Step between windows. Default: the length.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="Use the first so many tokens; 0 for all.")
    ] = 8192,
    batch_size: Annotated[int, typer.Option(help="Windows in a step.")] = 4,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(
            help="Measure accuracy on multiple-choice tasks instead: a .jsonl file or "
            "a folder of them. May be repeated."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="At most so many examples of a task.")
    ] = None,
    attention: Attention = None,
    kv_cache: KVCache = None,
    dtype: Dtype = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Measure perplexity, and KL and top-1 agreement against a reference; or tasks."""
    import dataclasses

    from angeljax import _workflow

    if tasks:
        if text is not None or reference is not None:
            raise ValueError("--tasks goes with neither --text nor --reference")
        examples = _workflow.load_tasks(tasks, limit)
        loaded = _open(model, dtype, attention, kv_cache)
        results = _workflow.evaluate_tasks(
            loaded, loaded.params, examples, progress=False if as_json else None
        )
        if as_json:
            _print_json([r.to_dict() for r in results])
        else:
            _print(_workflow.tasks_table(results))
        return
    if limit is not None:
        raise ValueError("--limit goes with --tasks; --tokens limits a text")
    loaded = _open(model, dtype, attention, kv_cache)
    base = None if reference is None else _workflow.open_model(reference, dtype=dtype)
    windows = _workflow.text_windows(loaded, text, length, stride, tokens)
    result = _workflow.evaluate(
        loaded,
        loaded.params,
        windows,
        reference=None if base is None else base.params,
        # Training may have changed the architecture: biases where there were none.
        reference_fn=None if base is None else base.model.logits,
        batch_size=batch_size,
        progress=False if as_json else None,
    )
    if as_json:
        _print_json(dataclasses.asdict(result))
    else:
        _print(str(result))


@app.command()
@one_line_errors
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to answer.")],
    max_new_tokens: Annotated[int, typer.Option(help="Upper limit.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token each time.")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep the likeliest that sum to p.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Do not wrap the prompt as a chat turn.")
    ] = False,
    attention: Attention = None,
    kv_cache: KVCache = None,
    dtype: Dtype = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Generate text with a model or a compressed checkpoint."""
    from angeljax import _workflow

    loaded = _open(model, dtype, attention, kv_cache)
    start = time.perf_counter()
    text = _workflow.generate(
        loaded,
        loaded.params,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        chat=not raw,
    )
    if as_json:
        seconds = time.perf_counter() - start
        _print_json({"prompt": prompt, "text": text, "seconds": seconds})
    else:
        _print(text)


@app.command()
@one_line_errors
def train(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="YAML file; see TrainConfig.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.")],
    set: Annotated[
        list[str] | None,
        typer.Option(help="Replace a field of the file: optimizer.lr=1e-4."),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Continue the run in --out, if there is one.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Train a model for its recipe, with a teacher, and write it packed.

    End to end, layer by layer or with LoRA: `mode` in the configuration.
    """
    from angeljax.train import TrainConfig

    what = TrainConfig.load(config, set or [])
    from angeljax import _train_workflow

    done = _train_workflow.train(
        what, out, resume=resume, show=False if as_json else None
    )
    if as_json:
        _print_json(
            {
                "path": str(done.path),
                "steps": done.steps,
                "metrics": done.metrics,
                "evaluation": done.evaluation,
            }
        )
        return
    numbers = {**done.metrics, **done.evaluation}
    shown = ("loss", "error_before", "error", "eval/perplexity", "eval/kl")
    parts = [f"{name} {numbers[name]:.4g}" for name in shown if name in numbers]
    _print(f"{done.steps} steps, {', '.join(parts)}; written to {done.path}")


@app.command()
@one_line_errors
def tune(
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Table to write; an old one is extended."),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Tune the packed weights of a checkpoint."),
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="Weight to tune, in x out: 4096x14336.")
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(help="Format of --shape, with its group: sherry, int4:128."),
    ] = None,
    tokens: Annotated[
        str, typer.Option(help="Rows of activations, with commas.")
    ] = "1,2,4,8,16,64,256,2048",
    activations: Annotated[
        str,
        typer.Option(help="int8, int8-from-bfloat16 or bfloat16, with commas."),
    ] = "int8,bfloat16",
    seconds: Annotated[float, typer.Option(help="Length of a measurement.")] = 0.01,
) -> None:
    """Time the kernels' parameters on this device, and keep the fastest in a table.

    Set PALLAS_KERNELS_TUNING to the table to have it used.
    """
    from angeljax import _workflow

    _workflow.tune(
        out,
        model=model,
        shapes=shape or [],
        formats=format or [],
        tokens=tokens,
        activations=activations,
        seconds=seconds,
        report=_print,
    )
    _print(f"written to {out}; use it with PALLAS_KERNELS_TUNING={out}")


@app.command()
@one_line_errors
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of angeljax.")],
    leaves: Annotated[bool, typer.Option(help="One row for each leaf.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint holds, without loading its arrays."""
    from angeljax import _workflow
    from angeljax.export import load_manifest

    manifest = load_manifest(checkpoint)
    if as_json:
        _print_json(_workflow.manifest_dict(manifest))
        return
    _print(_workflow.manifest_table(manifest, leaves=leaves))


@recipe_app.command(name="list")
@one_line_errors
def recipe_list() -> None:
    """List the recipes that come with angeljax."""
    from rich.table import Table

    from angeljax._data import recipe_files
    from angeljax.recipe import Recipe

    table = Table("recipe", "description")
    for file in recipe_files():
        table.add_row(file.stem, Recipe.load(file).description)
    _print(table)


@recipe_app.command(name="show")
@one_line_errors
def recipe_show(
    recipe: Annotated[str, typer.Argument(help=RECIPE_HELP)],
) -> None:
    """Print a recipe as YAML."""
    from angeljax.recipe import Recipe

    typer.echo(Recipe.load(recipe).to_yaml(), nl=False)


@recipe_app.command(name="check")
@one_line_errors
def recipe_check(
    recipe: Annotated[str, typer.Argument(help=RECIPE_HELP)],
    model: Model,
    as_json: AsJson = False,
) -> None:
    """Print which rule takes which leaf of a model, and check that all fits."""
    from rich.table import Table

    from angeljax import _workflow
    from angeljax.compress import plan
    from angeljax.recipe import Recipe

    what = Recipe.load(recipe)
    config, tree = _workflow.abstract_params(model)
    what.check_model(config)
    rows: list[dict[str, Any]] = [
        {
            "leaf": a.path,
            "shape": list(a.shape),
            "rule": None if a.rule is None else a.rule + 1,
            "match": None if a.rule is None else what.rules[a.rule].label(),
            "format": a.spec.label() if a.spec else None,
            "reason": a.reason,
        }
        for a in plan(tree, what)
    ]
    if as_json:
        _print_json(rows)
        return
    table = Table("leaf", "shape", "rule", "format or reason")
    for row in rows:
        table.add_row(
            str(row["leaf"]),
            "x".join(map(str, row["shape"])),
            "" if row["rule"] is None else f"{row['rule']} {row['match']}",
            str(row["format"] or row["reason"]),
        )
    _print(table)


def _open(model: str, dtype: str, attention: str | None, kv_cache: str | None) -> Any:
    """A model that reads its prompts, and stores what it read, as recipes say."""
    from angeljax import _workflow
    from angeljax.recipe import Recipe

    loaded = None
    for name, section, apply in (
        (attention, "attention", _workflow.read_sparsely),
        (kv_cache, "kv_cache", _workflow.cached_as),
    ):
        what = None if name is None else Recipe.load(name)
        if what is not None and getattr(what, section) is None:
            raise ValueError(f"recipe {what.name} has no section `{section}`")
        loaded = loaded or _workflow.open_model(model, dtype=dtype)
        if what is not None:
            what.check_model(loaded.config_dict)
        loaded = apply(loaded, what)
    return loaded


if __name__ == "__main__":
    app()
