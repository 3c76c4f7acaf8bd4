"""Steps of `angeljax attention`: which selector, what it reads, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import yaml

from angeljax._workflow import Opened, text_windows
from angeljax.attention import AttentionReport, attention_report, plots
from angeljax.attention.telemetry import selected_blocks
from angeljax.recipe import AttentionOptions, Recipe


def selector_of(
    opened: Opened, recipe: str | None, name: str | None, options: Sequence[str]
) -> Any:
    """What a command names: a recipe's attention, a selector, or the checkpoint's own.

    Raises:
      ValueError: neither, both, or options that cannot be.
    """
    if (recipe is not None) + (name is not None) > 1:
        raise ValueError("pass --recipe or --selector, not both")
    if options and name is None:
        raise ValueError("--set goes with --selector")
    if name is not None:
        fields = dict(_option(text) for text in options)
        return AttentionOptions(selector=name, options=fields).attention_fn()
    what = opened.recipe if recipe is None else Recipe.load(recipe)
    if what is None or what.attention is None:
        raise ValueError(
            "nothing says which blocks are read: pass --selector, or --recipe with one "
            "that has a section `attention`"
        )
    what.check_model(opened.config_dict)
    return what.attention.attention_fn()


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set takes option=value, not {text!r}")
    return name, yaml.safe_load(value)


def report(
    opened: Opened,
    selector: Any,
    text: str | None,
    *,
    length: int,
    rows: int,
    layers: Sequence[int] | None,
) -> AttentionReport:
    """`angeljax.attention.attention_report` on the beginning of a text.

    Raises:
      ValueError: the text is too short, or a number cannot be.
    """
    tokens = text_windows(opened, text, length, max_tokens=length).tokens
    return attention_report(
        opened.model,
        opened.params,
        jnp.asarray(tokens[:1]),
        selector,
        rows=rows,
        layers=layers,
    )


def draw(
    opened: Opened,
    selector: Any,
    text: str | None,
    out: Path,
    length: int,
    layer: int,
    head: int | None,
) -> None:
    """Writes a picture of the blocks that one layer reads.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: the layer or the head does not exist.
    """
    config = opened.model.config
    if head is not None and not 0 <= head < config.num_heads:
        raise ValueError(f"head {head} is none of the model's {config.num_heads}")
    tokens = text_windows(opened, text, length, max_tokens=length).tokens
    mask = selected_blocks(
        opened.model, opened.params, jnp.asarray(tokens[:1]), selector, layer=layer
    )[0]
    chosen = selector.selector_of(layer, config.num_layers)
    title = f"{type(chosen).__name__}, layer {layer}"
    if head is not None:
        mask, title = mask[head], f"{title}, head {head}"
    plots.block_mask(mask, block_size=chosen.block_size, title=title).savefig(out)
