"""The target, the drafter and the prompts, from what the command line names."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import yaml

from angeljax import _workflow
from angeljax._draft_options import METHODS, DraftOptions
from angeljax._workflow import Opened
from angeljax.attention.prefill import SparseAttention
from angeljax.models._fused_rows import quickest_rows
from angeljax.models.attention import dense_attention
from angeljax.recipe import Recipe, RecipeError
from angeljax.speculative import Drafter, make_drafter

# What is drafted where nobody says how. Without `successors`, whose table takes a CPU
# minutes.
AUTO = DraftOptions(method="hybrid", nodes=31, auto=True)  # type: ignore[arg-type]
SHORT = {"lookup": "prompt_lookup", "eagle": "eagle3", "block": "dflash"}
# What stands behind the colon of a short name.
_MAIN = {
    "prompt_lookup": "num_tokens",
    "recycling": "nodes",
    "hybrid": "nodes",
    "self_quant": "recipe",
    "layer_skip": "skip_layers",
    "draft_model": "model",
    "eagle3": "path",
    "mtp": "path",
    "dflash": "path",
}


@dataclasses.dataclass(frozen=True)
class Ready:
    """A target that is ready to decode.

    Attributes:
      opened: as it was opened, or compressed.
      dense: its params before a recipe compressed them; None if it came as it is.
      model, params: as they decode.
      prepared: whether these went through `prepare_decoder`.
      draft: the section of the recipe, or of the checkpoint; None without.
      notes: what was left out of the recipe, for the user to know.
    """

    opened: Opened
    dense: Any
    model: Any
    params: Any
    prepared: bool
    draft: DraftOptions | None
    notes: tuple[str, ...]

    def drafter(self, options: DraftOptions) -> Drafter:
        """What the options describe, for this target.

        Raises:
          ValueError: as `make_drafter`.
        """
        return make_drafter(
            options,
            self.opened.model,
            self.opened.params,
            dense=self.dense,
            tokenizer=self.opened.tokenizer,
            prepare=self.prepared,
            rows=self.model.rows,
        )


def open_target(source: str, recipe: str | None, *, dtype: str) -> Ready:
    """Opens a model, and compresses it if the recipe has rules.

    Raises:
      ValueError: there is no such model or recipe, or they do not go together.
    """
    from angeljax import models

    what = None if recipe is None else Recipe.load(recipe)
    opened = _workflow.open_model(source, dtype=dtype)
    dense, draft = None, None if opened.recipe is None else opened.recipe.draft
    sections = [] if opened.recipe is None else [opened.recipe]
    if what is not None:
        what.check_model(opened.config_dict)
        sections.append(what)
        draft = what.draft or draft
        if what.rules or what.transforms:
            dense = opened.params
            opened = dataclasses.replace(opened, params=_compressed(opened, what))
    notes = tuple(
        f"speculative decoding {why}: the section `{name}` is left out"
        for name, why in (
            ("attention", "reads with dense attention"),
            ("kv_cache", "keeps keys and values as they are"),
        )
        if any(getattr(r, name) is not None for r in sections)
    )
    plain = opened.model
    if isinstance(plain.attention_fn, SparseAttention):
        plain = dataclasses.replace(plain, attention_fn=dense_attention)
    plain = dataclasses.replace(plain, kv_cache=None)
    opened = dataclasses.replace(opened, model=plain)
    model, params = opened.model, opened.params
    prepared = jax.default_backend() != "cpu"
    if prepared:
        model, params = models.prepare_decoder(model, params)
        model = dataclasses.replace(model, rows=quickest_rows(model, params))
    return Ready(opened, dense, model, params, prepared, draft, notes)


def _compressed(opened: Opened, recipe: Recipe) -> Any:
    from angeljax._ptq_workflow import needed

    needs, why = needed(recipe, opened.params)
    if needs:
        raise ValueError(
            f"{why} needs calibration: compress the model with `angeljax compress`, "
            "and give its folder as --model"
        )
    return _workflow.compress_timed(opened, recipe, progress=False)[0]


def parse_drafter(text: str) -> DraftOptions:
    """A drafter as `angeljax spec --drafter` names it.

    Raises:
      ValueError: neither a method nor a recipe, or fields that cannot be.

    Example:
      >>> from angeljax._spec_workflow.setup import parse_drafter
      >>> parse_drafter("prompt_lookup:7,min_ngram=2").to_dict()
      {'method': 'prompt_lookup', 'num_tokens': 7, 'min_ngram': 2}
    """
    # Commas may stand in a list: only those before a field count.
    head, *fields = re.split(r",(?=\w+=)", text)
    name, colon, main = head.partition(":")
    name = SHORT.get(name, name)
    if text == "auto":
        return AUTO
    if name not in METHODS:
        if fields:
            raise ValueError(f"--drafter {text}: no method {name!r} that takes fields")
        return _of_recipe(text)
    data: dict[str, Any] = {"method": name}
    if colon:
        if name not in _MAIN or not main:
            raise ValueError(f"--drafter {text}: nothing goes behind {name}:")
        key = _MAIN[name]
        value: Any = main
        if key in ("num_tokens", "nodes"):
            value = _yaml(text, main)
        elif key == "skip_layers":
            value = _yaml(text, f"[{main}]")
        data[key] = value
    for field in fields:
        key, _, value = field.partition("=")
        data[key] = _yaml(text, value)
    return DraftOptions(**_known(data))


def _known(data: dict[str, Any]) -> dict[str, Any]:
    from angeljax._fields import known_fields

    names = [f.name for f in dataclasses.fields(DraftOptions)]
    known_fields(data, names, "--drafter")
    return data


def _yaml(text: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"--drafter {text}: {value!r} is not valid YAML") from None


def _of_recipe(name: str) -> DraftOptions:
    try:
        recipe = Recipe.load(name)
    except RecipeError as e:
        if Path(name).is_file():
            raise
        raise ValueError(
            f"--drafter {name} is neither a method ({', '.join(METHODS)}) nor a "
            f"recipe: {e}"
        ) from None
    if recipe.draft is None:
        raise ValueError(f"--drafter {name}: the recipe has no section `draft`")
    return recipe.draft


def settle(
    options: DraftOptions,
    *,
    num_tokens: int | None = None,
    exact: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    rule: str | None = None,
    seed: int | None = None,
) -> DraftOptions:
    """The options with what the command line says otherwise; None leaves them.

    Raises:
      ValueError: a value that cannot be, or that does not go with the method.
    """
    given: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "rule": rule,
        "seed": seed,
    }
    changes: dict[str, Any] = {}
    new = {name: value for name, value in given.items() if value is not None}
    if new:
        changes["sampling"] = dataclasses.replace(options.sampling, **new)
    if num_tokens is not None:
        changes["num_tokens"] = num_tokens
    if exact:
        changes["exact"] = "same_width"
    return dataclasses.replace(options, **changes)


def read_prompts(path: Path) -> list[Any]:
    """Prompts of a file.

    Args:
      path: .txt with a prompt in each line, or .jsonl with a text in each line, or an
        object with `prompt`, `question`, `text`, `turns` (the first counts) or
        `messages` of a chat.

    Returns:
      Texts, or lists of messages.

    Raises:
      ValueError: no such file, or one that has no prompts; names the line.
    """
    if not path.is_file():
        raise ValueError(f"no file of prompts at {path}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found.append(
            _prompt(line, f"{path}, line {number}")
            if path.suffix == ".jsonl"
            else line.strip()
        )
    if not found:
        raise ValueError(f"{path} has no prompts")
    return found


def _prompt(line: str, where: str) -> Any:
    try:
        entry = json.loads(line)
    except ValueError:
        raise ValueError(f"{where}: not valid JSON") from None
    if isinstance(entry, dict):
        names = ("prompt", "question", "text", "turns", "messages")
        key = next((n for n in names if entry.get(n)), None)
        if key is None:
            raise ValueError(f"{where}: has none of {', '.join(names)}")
        entry = entry[key][0] if key == "turns" else entry[key]
    if not isinstance(entry, str | list) or not entry:
        raise ValueError(f"{where}: a prompt must be a text, not {entry!r}")
    return entry


def encode(opened: Opened, prompts: Sequence[Any], *, chat: bool) -> list[list[int]]:
    """Tokens of prompts, as chat turns if the model has a template.

    Raises:
      ValueError: there is no tokenizer or no template, or a prompt is empty.
    """
    tokenizer = opened.need_tokenizer()
    wrap = chat and tokenizer.chat_template is not None
    rows = []
    for number, prompt in enumerate(prompts, 1):
        if not wrap and not isinstance(prompt, str):
            raise ValueError(
                f"prompt {number} is a chat: it needs a model with a chat template, "
                "and no --raw"
            )
        text = tokenizer.chat(prompt) if wrap else prompt
        ids = tokenizer.encode(text, special=not wrap)
        if not ids:
            raise ValueError(f"prompt {number} is empty")
        rows.append(ids)
    return rows
