"""`angeljax transcribe`: speech to text with a Whisper model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from angeljax._cli import RECIPE_HELP, AsJson, one_line_errors, print_json, print_rich


@one_line_errors
def transcribe(
    model: Annotated[
        str,
        typer.Argument(
            help="A Whisper folder in Hugging Face's layout, or a hub name."
        ),
    ],
    audio: Annotated[
        list[Path],
        typer.Argument(
            help="Sound files. 16-bit WAV needs nothing else, others soundfile."
        ),
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", "-r", help=f"Compress, and prune by `tokens`. {RECIPE_HELP}"
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Share of the encoder tokens of speech that stay."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="How tokens are pruned, with --keep.")
    ] = "samp",
    language: Annotated[
        str | None, typer.Option(help="Such as en; for multilingual models.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="transcribe or translate; for multilingual models."),
    ] = None,
    beams: Annotated[int, typer.Option(help="1 is greedy.")] = 1,
    length_penalty: Annotated[
        float, typer.Option(help="Exponent of the length in the score of beams.")
    ] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Windows of 30 s at a time.")] = 8,
    dtype: Annotated[
        str, typer.Option(help="Dtype of the weights: bfloat16 or float32.")
    ] = "float32",
    as_json: AsJson = False,
) -> None:
    """Transcribe sound files with a Whisper model, compressed and pruned if asked."""
    import jax.numpy as jnp

    from angeljax import models
    from angeljax._workflow import DTYPES, compute_dtype
    from angeljax.compress import compress
    from angeljax.recipe import Recipe

    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: use {', '.join(DTYPES)}")
    what = None if recipe is None else Recipe.load(recipe)
    prune = None
    if keep is not None:
        prune = models.audio_pruner(method, keep=keep)
    elif what is not None and what.tokens is not None:
        if what.tokens.layer != "input":
            raise ValueError("tokens.layer must be input: Whisper prunes no later")
        prune = models.audio_pruner(what.tokens.prune_fn())
    recordings = [models.read_audio(file) for file in audio]
    loaded = models.load_whisper(
        model, dtype=jnp.dtype(dtype), compute_dtype=compute_dtype()
    )
    params = loaded.params
    if what is not None and what.rules:
        params = compress(params, what)
    start = time.perf_counter()
    texts = models.transcribe(
        loaded,
        recordings,
        params=params,
        prune=prune,
        language=language,
        task=task,
        batch_size=batch_size,
        num_beams=beams,
        length_penalty=length_penalty,
    )
    seconds = time.perf_counter() - start
    if as_json:
        rows = [{"file": str(f), "text": t} for f, t in zip(audio, texts, strict=True)]
        print_json({"seconds": seconds, "transcripts": rows})
        return
    for file, text in zip(audio, texts, strict=True):
        print_rich(text if len(texts) == 1 else f"{file}: {text}")
