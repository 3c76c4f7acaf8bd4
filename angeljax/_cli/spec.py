"""`angeljax spec`: speculative decoding."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from angeljax._cli import (
    RECIPE_HELP,
    AsJson,
    Dtype,
    Model,
    one_line_errors,
    print_json,
    print_rich,
)

app = typer.Typer(
    help="Decode speculatively: the same text sooner. Without --drafter and --recipe "
    "it is done as --drafter auto does.",
    no_args_is_help=True,
)
_DRAFTER = (
    "prompt_lookup[:drafts], recycling[:nodes], hybrid[:nodes], self_quant:RECIPE, "
    "layer_skip:LAYERS, draft_model:MODEL, eagle3:FOLDER, mtp:FOLDER, dflash:FOLDER, "
    "or none, each with other fields of `draft` behind commas "
    "(prompt_lookup:7,min_ngram=2; hybrid,path=FOLDER for one with an EAGLE-3 head); "
    "auto, which is hybrid:31 as far as it pays; or a "
    "recipe with a section `draft`."
)
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        help="Compress the model by its rules, and draft as its section `draft` says. "
        + RECIPE_HELP,
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help="Upper limit for each prompt.")]
Temperature = Annotated[
    float | None,
    typer.Option(help="0 takes the likeliest token each time. Default: the recipe's."),
]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest that sum to p.")]
Rule = Annotated[
    str | None,
    typer.Option(
        help="coupled: the text of plain decoding with this seed; rejection: another "
        "text of the same law."
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed for sampling.")]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact",
        help="Read as many tokens in every round, so that chains give the text of "
        "plain decoding of that width to the last bit.",
    ),
]
Raw = Annotated[
    bool, typer.Option("--raw", help="Do not wrap the prompts as chat turns.")
]
NumTokens = Annotated[
    int | None, typer.Option(help="Drafts of a round, instead of the drafter's own.")
]


@app.command()
@one_line_errors
def generate(
    model: Model,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="What to answer. May be repeated."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A file of prompts: .txt with one in each line, or .jsonl with "
            "`prompt`, `question`, `text`, `turns` or `messages`."
        ),
    ] = None,
    recipe: Recipe = None,
    drafter: Annotated[
        str | None, typer.Option("--drafter", "-d", help=_DRAFTER)
    ] = None,
    num_tokens: NumTokens = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    rule: Rule = None,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text that ends an answer; repeatable."),
    ] = None,
    exact: Exact = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Decode plainly as well, and say if the text is the same."
        ),
    ] = False,
    raw: Raw = False,
    dtype: Dtype = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Generate text with drafts, shown as it comes, and say how well they did."""
    from angeljax._spec_workflow import setup
    from angeljax._spec_workflow.answers import answer, shared_slots

    if (prompt is None) == (prompts is None):
        raise ValueError("pass --prompt or --prompts, one of them")
    texts: list[Any] = list(prompt or [])
    if prompts is not None:
        texts = setup.read_prompts(prompts)
    named = None if drafter is None else setup.parse_drafter(drafter)
    ready = _open(model, recipe, dtype)
    options = setup.settle(
        named or ready.draft or setup.AUTO,
        num_tokens=num_tokens,
        exact=exact,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        rule=rule,
        seed=seed,
    )
    sampling = options.sampling
    if compare and sampling.rule == "rejection" and sampling.temperature > 0:
        raise ValueError(
            "--compare: rule rejection writes another text; use --rule coupled"
        )
    rows = setup.encode(ready.opened, texts, chat=not raw)
    made = ready.drafter(options)
    if options.auto is not None:
        typer.echo("note: rounds are timed, once for each machine", err=True)
    slots = shared_slots(rows, max_new_tokens, [made])
    found = []
    for text, ids in zip(texts, rows, strict=True):
        if not as_json and len(texts) > 1:
            print_rich(f"> {text if isinstance(text, str) else text[-1]}")
        done = answer(
            ready,
            ids,
            options,
            made,
            max_new_tokens=max_new_tokens,
            stop_strings=stop or (),
            compare=compare,
            slots=slots,
            show=None if as_json else _show,
        )
        found.append({"prompt": text, **dataclasses.asdict(done)})
        if not as_json:
            typer.echo()
            print_rich(f"[{done.summary()}]")
    if as_json:
        print_json({"draft": options.to_dict(), "answers": found})


@app.command()
@one_line_errors
def bench(
    model: Model,
    prompts: Annotated[
        Path, typer.Option(help="A file of prompts, as for `generate`.")
    ],
    drafter: Annotated[
        list[str] | None,
        typer.Option(
            "--drafter",
            "-d",
            help="May be repeated; default prompt_lookup, recycling, hybrid and auto. "
            + _DRAFTER,
        ),
    ] = None,
    recipe: Recipe = None,
    max_new_tokens: MaxNewTokens = 128,
    batch: Annotated[int, typer.Option(help="Prompts at a time.")] = 1,
    limit: Annotated[
        int | None, typer.Option(help="The first so many prompts.")
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    rule: Rule = None,
    seed: Seed = None,
    exact: Exact = False,
    raw: Raw = False,
    dtype: Dtype = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Time drafters against plain decoding on a file of prompts, and compare texts."""
    from angeljax._spec_workflow import bench as workflow
    from angeljax._spec_workflow import setup

    if batch < 1 or (limit is not None and limit < 1):
        raise ValueError("--batch and --limit are at least 1")
    texts = setup.read_prompts(prompts)[:limit]
    names = drafter or ["prompt_lookup", "recycling", "hybrid", "auto"]
    named = {name: setup.parse_drafter(name) for name in names}
    ready = _open(model, recipe, dtype)
    if drafter is None and ready.draft is not None:
        named[str(recipe or model)] = ready.draft
    options = {
        name: setup.settle(
            what,
            # A width that changes cannot be the same in every round.
            exact=exact and what.auto is None,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            rule=rule,
            seed=seed,
        )
        for name, what in named.items()
    }
    rows = setup.encode(ready.opened, texts, chat=not raw)
    lines = workflow.bench(
        ready,
        rows,
        {name: (what, ready.drafter(what)) for name, what in options.items()},
        max_new_tokens=max_new_tokens,
        batch=batch,
        report=None if as_json else lambda text: typer.echo(text, err=True),
    )
    if as_json:
        print_json(
            {
                "model": model,
                "prompts": len(rows),
                "batch": batch,
                "max_new_tokens": max_new_tokens,
                "drafters": [dataclasses.asdict(line) for line in lines],
            }
        )
        return
    print_rich(workflow.table(lines, len(rows)))


@app.command()
@one_line_errors
def train(
    config: Annotated[
        Path,
        typer.Option(
            "--config",
            "-c",
            help="YAML file of a training; its field `kind` names the drafter, "
            "eagle3 if it is missing.",
        ),
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
    """Train a drafter on text of the target, and write it for `--drafter`."""
    from angeljax._spec_workflow import training

    done = training.train(
        config, out, set or [], resume=resume, show=False if as_json else None
    )
    if as_json:
        print_json({**dataclasses.asdict(done), "path": str(done.path)})
        return
    numbers = {**done.metrics, **done.evaluation}
    shown = ("loss", "tau", "eval/tau", "eval/same_text", "coverage")
    parts = [f"{name} {numbers[name]:.4g}" for name in shown if name in numbers]
    print_rich(
        f"{done.steps} steps, {', '.join(parts)}; use it with "
        f"--drafter {done.kind}:{done.path}"
    )


@app.command()
@one_line_errors
def text(
    config: Annotated[
        Path,
        typer.Option(
            "--config",
            "-c",
            help="YAML file of a training; its fields `model`, `dtype` and `generate` "
            "count.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder of the text; one in it goes on."),
    ],
    set: Annotated[
        list[str] | None,
        typer.Option(help="Replace a field of the file: generate.seed=1."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Let a model write the text that its drafter is trained on, and stop there."""
    from angeljax._spec_workflow import training

    done = training.write(config, out, set or [], show=False if as_json else None)
    if as_json:
        paths = [str(path) for path in done.paths]
        print_json({**dataclasses.asdict(done), "paths": paths})
        return
    print_rich(
        f"{done.tokens} tokens in {done.seconds:.0f} s; train on them with data={out}"
    )


@app.command()
@one_line_errors
def profile(
    model: Model,
    widths: Annotated[
        str, typer.Option(help="Tokens that are read at once, with commas.")
    ] = "1,2,4,8,16,32",
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    slots: Annotated[int, typer.Option(help="Tokens that the cache can hold.")] = 512,
    drafter: Annotated[
        str | None,
        typer.Option(
            "--drafter",
            "-d",
            help="Count the cost of its drafts, a chain; default: they cost nothing.",
        ),
    ] = None,
    recipe: Recipe = None,
    cache: Annotated[
        bool, typer.Option(help="Keep the times on this machine, and take them.")
    ] = True,
    dtype: Dtype = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Time rounds by how many tokens they read, and say which drafts then pay."""
    from angeljax._spec_workflow import setup
    from angeljax._spec_workflow import widths as workflow
    from angeljax.speculative import cache_folder

    sizes = [int(w) if w.strip().isdigit() else 0 for w in widths.split(",")]
    if min(sizes) < 1:
        raise ValueError(f"--widths takes numbers from 1 with commas, not {widths!r}")
    named = None if drafter is None else setup.parse_drafter(drafter)
    ready = _open(model, recipe, dtype)
    found = workflow.measure(
        ready,
        sizes,
        batch=batch,
        slots=slots,
        name=drafter or "",
        drafter=None if named is None else ready.drafter(named),
        cache=cache,
    )
    if as_json:
        print_json(found.to_dict())
        return
    print_rich(f"{found.profile.device}, batch {batch}, {found.profile.slots} slots")
    for table in workflow.tables(found):
        print_rich(table)
    if cache:
        print_rich(f"times are kept in {cache_folder()}")


def _open(model: str, recipe: str | None, dtype: str) -> Any:
    from angeljax._spec_workflow.setup import open_target

    ready = open_target(model, recipe, dtype=dtype)
    for note in ready.notes:
        typer.echo(f"note: {note}", err=True)
    return ready


def _show(text: str) -> None:
    typer.echo(text, nl=False)
