"""Compression as the command line does it: with or without calibration data."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax

from angeljax._jobs import BASE
from angeljax._workflow import Opened, open_model
from angeljax.compress import compress, plan
from angeljax.recipe import Recipe

# What `--calibrate` calls the text that needs no file.
DEFAULT = "default"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What `angeljax compress` is told of calibration.

    Attributes:
      source: text, or None for none; "default" is the Python language reference.
      rows: None takes 128, or as many as the text has.
      length: tokens in each; None takes 2048, or what the model can read.
      sequential: layer by layer.
      resume: folder of finished layers.
      base: the model before fine-tuning.
    """

    source: str | None = None
    rows: int | None = None
    length: int | None = None
    sequential: bool | None = None
    resume: Path | None = None
    base: str | None = None

    @property
    def text(self) -> str | None:
        """What `load_text` is given."""
        return None if self.source == DEFAULT else self.source

    def check(self, recipe: Recipe, params: Any) -> None:
        """Refuses options that a recipe does not need, and a recipe that lacks one.

        Args:
          recipe: what is to be done.
          params: the tree, of arrays or abstract ones.

        Raises:
          ValueError: names the option.
        """
        needs, why = needed(recipe, params)
        if needs - {BASE} and self.source is None:
            raise ValueError(
                f"{why} needs calibration: pass --calibrate with a .txt or .jsonl file "
                f"or a dataset, or --calibrate {DEFAULT}"
            )
        cache = recipe.kv_cache is not None and bool(recipe.kv_cache.static)
        if not needs - {BASE} and not cache and self.source is not None:
            raise ValueError("this recipe needs no calibration: leave --calibrate out")
        if self.source is None:
            for name in ("rows", "length", "sequential", "resume"):
                if getattr(self, name) is not None:
                    option = "sequential/--one-pass" if name == "sequential" else name
                    raise ValueError(f"--{option} goes with --calibrate")
        if self.sequential is False and self.resume is not None:
            raise ValueError("--resume goes on layer by layer: leave --one-pass out")
        if (BASE in needs) != (self.base is not None):
            raise ValueError(
                f"{why} compares with the model before fine-tuning: pass it as --base"
                if BASE in needs
                else "this recipe does not look at a base model: leave --base out"
            )


def needed(recipe: Recipe, params: Any) -> tuple[set[str], str]:
    """What the rules that take a leaf, and transforms, look at; and who is the first.

    Raises:
      RecipeError: the recipe does not fit the tree.
    """
    needs: set[str] = set()
    who = ""
    for transform in recipe.transforms:
        if transform.needs():
            who = who or f"transform {transform.to_dict()['name']}"
            needs |= set(transform.needs())
    for a in plan(params, recipe):
        if a.spec is None or a.rule is None:
            continue
        rule = recipe.rules[a.rule]
        if rule.needs():
            static = rule.activation_scale != "dynamic"
            more = f" with activation_scale {rule.activation_scale}" if static else ""
            who = who or f"algorithm {rule.algorithm}{more}"
            needs |= set(rule.needs())
    return needs, who


def compress_model(
    opened: Opened,
    recipe: Recipe,
    how: Calibration,
    *,
    dtype: str = "bfloat16",
    progress: bool | None = None,
) -> tuple[Any, float]:
    """The compressed tree and the seconds it took, text and base model not counted.

    Raises:
      RecipeError: the recipe is for another model, or does not fit the tree.
      ValueError: options do not go together, or there is too little text.
    """
    from angeljax.calibration import (
        calibrate,
        calibration_tokens,
        compress_sequential,
    )

    recipe.check_model(opened.config_dict)
    how.check(recipe, opened.params)
    base = None if how.base is None else open_model(how.base, dtype=dtype).params
    if how.source is None or not needed(recipe, opened.params)[0] - {BASE}:
        start = time.perf_counter()
        params = compress(opened.params, recipe, base=base, progress=progress or None)
        jax.block_until_ready(params)
        return params, time.perf_counter() - start
    limit = opened.model.config.max_positions
    tokens = calibration_tokens(
        opened.need_tokenizer(),
        how.text,
        rows=how.rows or 128,
        length=how.length or min(2048, limit or 2048),
        allow_fewer=how.rows is None,
    )
    start = time.perf_counter()
    if how.sequential is False:
        batches = [tokens[i : i + 8] for i in range(0, len(tokens), 8)]
        stats = calibrate(
            opened.model, opened.params, batches, recipe, progress=progress
        )
        params = compress(opened.params, recipe, stats, base=base, progress=progress)
    else:
        params = compress_sequential(
            opened.model,
            opened.params,
            recipe,
            tokens,
            base=base,
            folder=how.resume,
            progress=progress,
        )
    jax.block_until_ready(params)
    return params, time.perf_counter() - start
