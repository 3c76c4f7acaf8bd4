"""Prompts from files: what a drafter is measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from angeljax._fields import ConfigError

if TYPE_CHECKING:
    from angeljax.models import Tokenizer

_NAMES = "turns, prompt or question"


def read_prompts(
    source: str, tokenizer: Tokenizer, count: int, longest: int
) -> tuple[list[np.ndarray], list[str]]:
    """Prompts in the chat template, spread evenly over a file.

    Args:
      source: a text file with one prompt a line, or a `.jsonl` file whose objects have
        `turns` (the first counts), `prompt` or `question`, and perhaps a `category`.
      tokenizer: of the target; without a chat template prompts stay as they are.
      count: how many at most.
      longest: tokens of a prompt, template included; longer ones are left out.

    Returns:
      int32 ids of each prompt, and its category, "" without.

    Raises:
      ConfigError: the file cannot be read, or has no prompt that fits.
    """
    from angeljax.models.config import ModelError

    found: list[tuple[np.ndarray, str]] = []
    for text, kind in _texts(Path(source).expanduser()):
        try:
            ids = tokenizer.encode(tokenizer.chat(text))
        except ModelError:
            ids = tokenizer.encode(text)
        if 0 < len(ids) <= longest:
            found.append((np.asarray(ids, np.int32), kind))
    if not found:
        raise ConfigError(
            f"eval.source: {source} has no prompt of up to {longest} tokens: raise "
            "eval.prompt_tokens"
        )
    picked = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
    chosen = [found[i] for i in picked]
    return [ids for ids, _ in chosen], [kind for _, kind in chosen]


def _texts(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise ConfigError(f"eval.source: {path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"eval.source: {path} is no text in UTF-8") from None
    full = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if path.suffix != ".jsonl":
        return [(line, "") for _, line in full]
    return [_object(path, i, line) for i, line in full]


def _object(path: Path, number: int, line: str) -> tuple[str, str]:
    try:
        data: Any = json.loads(line)
    except ValueError:
        raise ConfigError(f"eval.source: {path}, line {number} is no JSON") from None
    data = data if isinstance(data, dict) else {}
    text: Any = data.get("prompt", data.get("question"))
    if isinstance(turns := data.get("turns"), list) and turns:
        text = turns[0]
    if not isinstance(text, str) or not text:
        raise ConfigError(f"eval.source: {path}, line {number} has no text as {_NAMES}")
    return text, str(data.get("category", ""))
