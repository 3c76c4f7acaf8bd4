"""The target of a drafter and its text: what it is trained and measured on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from angeljax import _shards, _workflow
from angeljax._fields import ConfigError
from angeljax._train_workflow.prompts import read_prompts
from angeljax._workflow import Opened
from angeljax.models import stack_layers, unstack_layers
from angeljax.train import load_tokens, make_schedule
from angeljax.train._draft_config import DraftEval, DraftTrainConfig, SelfText
from angeljax.train.eagle_data import MaskedTokens, answer_mask
from angeljax.train.self_text import template_of, write_conversations

# Names of the files that are read of a folder of documents.
_READ = (".npy", ".npy.xz", ".txt", ".jsonl", ".jsonl.gz")


def open_target(config: DraftTrainConfig, out: Path, resume: bool) -> Opened:
    """The target; refuses what cannot be before it is read.

    Raises:
      ValueError: the folder holds a run that is not to be continued, or the model
        cannot be read; one line.
    """
    kept = out / "checkpoints"
    if not resume and kept.is_dir() and any(kept.iterdir()):
        raise ValueError(f"{out} holds a run: choose another folder, or resume it")
    make_schedule(config.optimizer, config.total_steps)
    opened = _workflow.open_model(config.model, dtype=config.dtype)
    return _stacked(opened) if config.scan_layers else opened


def _stacked(opened: Opened) -> Opened:
    if opened.model.scan_layers:
        return opened
    try:
        params = jax.jit(stack_layers)(opened.params)
    except ValueError as e:
        raise ConfigError(f"scan_layers: {opened.source}: {e}") from None
    model = dataclasses.replace(opened.model, scan_layers=True)
    return dataclasses.replace(opened, model=model, params=params)


@dataclasses.dataclass(frozen=True)
class DraftData:
    """What a drafter is trained and measured on.

    Attributes:
      rows: to train on.
      prompts: int32 ids of each held-out prompt.
      kinds: their categories, or none.
    """

    rows: MaskedTokens
    prompts: list[np.ndarray]
    kinds: list[str]


def read_data(
    config: DraftTrainConfig,
    opened: Opened,
    out: Path,
    show: bool | None,
    more: Callable[[np.ndarray], dict[str, np.ndarray] | None] | None = None,
) -> DraftData:
    """Rows to train on and held-out prompts; the text is written if there is none.

    Args:
      config: of the training.
      opened: the target.
      out: its folder.
      show: progress.
      more: of the ids that are trained on, what else there is about each.

    Raises:
      ConfigError: the text does not suffice; one line.
    """
    e = config.eval
    prompts: list[np.ndarray] = []
    kinds: list[str] = []
    if e.source is not None and e.prompts:
        prompts, kinds = read_prompts(
            e.source, opened.need_tokenizer(), e.prompts, e.prompt_tokens
        )
    ids, mask = _text(config, opened, out, show)
    if e.source is None:
        ids, mask, prompts = _held_out(e, ids, mask)
    rows = MaskedTokens(
        ids,
        mask,
        None if more is None else more(ids),
        length=config.seq_length,
        batch_size=config.batch_size,
        seed=config.seed,
        vocab_size=opened.model.config.vocab_size,
    )
    return DraftData(rows, prompts, kinds)


def _text(
    config: DraftTrainConfig, opened: Opened, out: Path, show: bool | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Token ids, and which of them are answers; None for all."""
    data: Any = _folders(config.data)
    if data is None:
        data = write_text(config.generate, opened, out / "text", show)
    ids = load_tokens(data, opened.tokenizer)
    template = None if opened.tokenizer is None else template_of(opened.tokenizer)
    if not config.answers_only or template is None:
        return ids, None
    ends = list(opened.model.config.eos_ids)
    tokenizer, first = opened.need_tokenizer(), template.before[0]
    if not tokenizer.decode([first]):  # of no text: it begins what follows a cut
        ends.append(first)
    mask = answer_mask(ids, template.between, ends)
    if not mask.any():
        raise ConfigError(
            "data: no answer stands in the text by the model's chat template: set "
            "answers_only to false"
        )
    return ids, mask


def _folders(data: str | Sequence[str] | None) -> list[str] | None:
    """Sources, with those that `write_text` wrote in place of the folder of them."""
    if data is None:
        return None
    found: list[str] = []
    for source in [data] if isinstance(data, str) else data:
        folder, parts = Path(source).expanduser(), []
        if folder.is_dir() and _shards.kind_of(folder) is None:
            parts = sorted(folder.glob("temperature-*/tokens-00000.npy"))
        found += [str(part.parent) for part in parts] or [source]
    return found


def write_text(
    options: SelfText, opened: Opened, out: Path, show: bool | None
) -> list[Path]:
    """Lets a target write; goes on where it stopped.

    Args:
      options: see `SelfText`.
      opened: the target.
      out: folder of the text.
      show: progress.

    Returns:
      The folders of answers.

    Raises:
      ValueError: a file cannot be read, or the folder was begun otherwise; one line.
    """
    lines = documents = None
    if options.prompts is not None:
        from angeljax._train_workflow.data import _lines

        lines = _lines(Path(options.prompts))
    tokenizer = opened.need_tokenizer()
    if options.documents is not None:
        documents = load_tokens(_files(options.documents), tokenizer)
    model, params = opened.model, opened.params
    if options.batch is not None and model.scan_layers:
        model = dataclasses.replace(model, scan_layers=False)
        params = jax.jit(unstack_layers)(params)
    return write_conversations(
        out,
        model,
        params,
        tokenizer,
        shards=options.shards,
        rows=options.rows,
        max_new_tokens=options.max_new_tokens,
        temperatures=options.temperatures,
        questions=lines,
        question_tokens=options.question_tokens,
        question_temperature=options.question_temperature,
        question_starts=options.question_starts,
        documents=documents,
        document_share=options.document_share,
        document_tokens=options.document_tokens,
        tasks=options.tasks,
        batch=options.batch,
        seed=options.seed,
        max_minutes=options.max_minutes,
        progress=show,
    )


def _files(sources: str | Sequence[str]) -> list[str]:
    """Sources, with the files of folders that nothing else is known of."""
    found: list[str] = []
    for source in [sources] if isinstance(sources, str) else sources:
        folder, parts = Path(source).expanduser(), []
        if folder.is_dir() and _shards.kind_of(folder) is None:
            parts = [p for p in sorted(folder.iterdir()) if p.name.endswith(_READ)]
        found += [str(part) for part in parts] or [source]
    return found


def _held_out(
    e: DraftEval, ids: np.ndarray, mask: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None, list[np.ndarray]]:
    """The text to train on, and prompts from a part of it that is not trained on.

    A prompt ends where an answer begins, or anywhere if there is no mask.
    """
    if not e.prompts:
        return ids, mask, []
    starts: Any
    size = e.prompt_tokens
    if mask is None:
        first = len(ids) - e.prompts * size
        starts = first + size * np.arange(1, e.prompts + 1)
    else:
        starts = np.flatnonzero(mask[1:] & ~mask[:-1]) + 1
        # Few answers: leave most of them to be trained on.
        starts = starts[-e.prompts :]
        first = int(starts[0]) - size
    if first < len(ids) // 2:
        raise ConfigError(
            f"eval.prompts: {e.prompts} of up to {size} tokens take more than half of "
            f"the text of {len(ids)} tokens: lower them, or name more data"
        )
    prompts = [ids[max(s - size, 0) : s].astype(np.int32) for s in starts]
    return ids[:first], None if mask is None else mask[:first], prompts
