"""What a teacher writes before a training: text of its own, and predictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from angeljax import _workflow
from angeljax._fields import ConfigError, count
from angeljax.models import Tokenizer
from angeljax.models.generate import check_sampling
from angeljax.train.data import document_separator, load_tokens
from angeljax.train.generated import generate_tokens
from angeljax.train.teacher import write_teacher


def write_text(
    model: str,
    out: Path,
    *,
    shards: int,
    rows: int,
    max_new_tokens: int,
    prompts: Path | None,
    chat: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    dtype: str,
    progress: bool | None,
) -> int:
    """`generate_tokens` with a model and prompts by name; returns the tokens written.

    Raises:
      ValueError: an option, the prompts or the folder do not fit; one line.
    """
    count("shards", shards)
    count("rows", rows)
    count("seed", seed, 0)
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    lines = None if prompts is None else _lines(prompts)
    if chat and lines is None:
        raise ConfigError("--chat wraps the prompts of --prompts, and there are none")
    opened = _workflow.open_model(model, dtype=dtype)
    files = generate_tokens(
        out,
        opened.model,
        opened.params,
        shards=shards,
        rows=rows,
        max_new_tokens=max_new_tokens,
        prompts=_ids(opened.need_tokenizer(), lines, chat, model),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        progress=progress,
    )
    return sum(len(np.load(file, mmap_mode="r")) for file in files)


def write_predictions(
    model: str,
    out: Path,
    *,
    sources: Sequence[str],
    seq_length: int,
    top_k: int,
    batch_size: int,
    shard_rows: int,
    dtype: str,
    progress: bool | None,
) -> int:
    """`write_teacher` with a model and texts by name; returns the rows written.

    Raises:
      ValueError: an option, the data or the folder do not fit; one line.
    """
    from angeljax.models import causal_attention

    for name, value in (
        ("seq-length", seq_length),
        ("top-k", top_k),
        ("batch-size", batch_size),
        ("shard-rows", shard_rows),
    ):
        count(f"--{name}", value)
    opened = _workflow.open_model(model, dtype=dtype)
    ids = load_tokens(sources, opened.tokenizer)
    teacher = dataclasses.replace(opened.model, attention_fn=causal_attention)
    write_teacher(
        out,
        teacher,
        opened.params,
        ids,
        length=seq_length,
        top_k=top_k,
        batch_size=batch_size,
        shard_rows=shard_rows,
        progress=progress,
    )
    return (len(ids) - 1) // seq_length


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"--prompts {path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--prompts {path} is no text in UTF-8") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"--prompts {path} holds no prompt")
    return lines


def _ids(
    tokenizer: Tokenizer, lines: list[str] | None, chat: bool, model: str
) -> list[list[int]]:
    if lines is None:
        end, _ = document_separator(tokenizer)
        if end is None:
            raise ConfigError(
                f"{model} has no token between documents to begin with: pass --prompts"
            )
        return [[end]]
    if chat:
        return [tokenizer.encode(tokenizer.chat(line)) for line in lines]
    return [tokenizer.encode(line, special=True) for line in lines]
