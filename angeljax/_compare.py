"""Several recipes on one model and text, side by side: the table of the demo."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from angeljax import _workflow
from angeljax.evaluation import reference_logits
from angeljax.recipe import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One recipe, or the original (`recipe` is None); times in seconds.

    `megabytes` is the size of the checkpoint on disk in 10^6 bytes, tokenizer and
    manifest included; `bits_per_weight` counts the arrays of the whole model.
    """

    recipe: Recipe | None
    params: Any
    megabytes: float
    bits_per_weight: float
    perplexity: float
    kl: float
    top1: float
    compress_seconds: float
    eval_seconds: float

    @property
    def name(self) -> str:
        """What tables call it."""
        return "original" if self.recipe is None else self.recipe.name


def compare(
    opened: _workflow.Opened, recipes: Sequence[Recipe], windows: Any
) -> Iterator[Row]:
    """Yields the original and then each recipe, as soon as it is measured.

    The original is evaluated once; its predictions are kept on the host for the KL of
    the others. Each checkpoint is written to be weighed, and deleted.
    """
    logits = opened.model.logits
    cache = reference_logits(logits, opened.params, windows)
    weights = sum(x.size for x in jax.tree.leaves(opened.params))
    for recipe in (None, *recipes):
        params, seconds = opened.params, 0.0
        if recipe is not None:
            params, seconds = _workflow.compress_timed(opened, recipe)
        result = _workflow.evaluate(opened, params, windows, reference=cache)
        nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "checkpoint"
            _workflow.save_model(folder, opened, params, recipe)
            files = [f for f in folder.rglob("*") if f.is_file()]
            megabytes = sum(f.stat().st_size for f in files) / 1e6
        yield Row(
            recipe=recipe,
            params=params,
            megabytes=megabytes,
            bits_per_weight=8 * nbytes / weights,
            perplexity=result.perplexity,
            kl=result.kl or 0.0,
            top1=result.top1_agreement or 0.0,
            compress_seconds=seconds,
            eval_seconds=result.seconds,
        )


def table(rows: Sequence[Row]) -> Any:
    """The rows as a `rich` table; the first one is what the others are compared to."""
    from rich.table import Table

    out = Table("recipe")
    for name in (
        "MB on disk",
        "bit/weight",
        "perplexity",
        "vs. original",
        "KL (nats)",
        "top-1 agreement",
        "compress (s)",
        "evaluate (s)",
    ):
        out.add_column(name, justify="right")
    for r in rows:
        ratio = r.perplexity / rows[0].perplexity
        out.add_row(
            r.name,
            f"{r.megabytes:.1f}",
            f"{r.bits_per_weight:.2f}",
            f"{r.perplexity:.2f}" if r.perplexity < 1e5 else f"{r.perplexity:.1e}",
            f"{ratio - 1:+.2%}" if ratio < 10 else f"x {ratio:.2g}",
            f"{r.kl:.4f}",
            f"{r.top1:.2%}",
            f"{r.compress_seconds:.1f}",
            f"{r.eval_seconds:.1f}",
        )
    return out
