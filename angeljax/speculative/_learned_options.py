"""Learned drafters from the section `draft`: where they lie, and their own fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from angeljax._draft_options import DraftOptions
from angeljax._fields import build, known_fields
from angeljax.speculative.block import BlockDrafter
from angeljax.speculative.block_files import load_block
from angeljax.speculative.drafter import Drafter
from angeljax.speculative.eagle import (
    EagleConfig,
    EagleDrafter,
    EagleTree,
    load_eagle,
)
from angeljax.speculative.mtp import MTPDrafter
from angeljax.speculative.mtp_files import load_mtp
from angeljax.speculative.spec_exit import ExitRule, SpecExit


class Ready(Protocol):
    """What a drafter is made for; see `make_drafter`."""

    @property
    def options(self) -> DraftOptions:
        """The section."""

    @property
    def model(self) -> Any:
        """The target."""

    @property
    def tokenizer(self) -> Any:
        """Of the target, or None."""

    def given(self, *names: str) -> dict[str, Any]:
        """Fields of the section that are set."""


def eagle(ready: Ready) -> Drafter:
    """A head, as a chain or a tree, with a rule that ends thinking if one is given."""
    options = ready.options
    given = _learned(options, (*_names(EagleTree), "exit"))
    rule = given.pop("exit", None)
    if rule is not None:
        rule = _exit_rule(rule, ready.tokenizer)
    growth = None
    if given:
        if options.num_tokens is not None:
            raise ValueError(
                "draft.options describe a tree and draft.num_tokens a chain: give one"
            )
        growth = EagleTree(**given)
    drafter = EagleDrafter(*_head(ready), growth=growth, **ready.given("num_tokens"))
    return drafter if rule is None else SpecExit(drafter, rule)


def eagle_tree(ready: Ready) -> EagleDrafter:
    """A head with a tree, for what is joined with it."""
    given = _learned(ready.options, _names(EagleTree))
    # Small enough for rounds that cost little more than one token.
    growth = EagleTree(**{"nodes": 16, "branches": 5, "levels": 2, **given})
    return EagleDrafter(*_head(ready), growth=growth)


def _head(ready: Ready) -> tuple[EagleConfig, Any]:
    folder, dtype = _folder(ready.options), ready.model.dtype
    return load_eagle(folder, ready.model.config, dtype=dtype)


def _exit_rule(given: Any, tokenizer: Any) -> ExitRule:
    """When thinking ends; texts stand for their tokens, in `breaks` for all with it."""
    where = "draft.options.exit"
    known_fields(given if isinstance(given, Mapping) else {}, _names(ExitRule), where)
    if not isinstance(given, Mapping) or not {"end", "breaks"} <= set(given):
        raise ValueError(f"{where} must be a mapping with `end` and `breaks`")
    fields = dict(given)
    texts = {
        n: v for n in ("end", "begin", "breaks") if isinstance(v := fields.get(n), str)
    }
    if texts and tokenizer is None:
        raise ValueError(f"{where}.{next(iter(texts))}: a text needs a tokenizer")
    for name, text in texts.items():
        if name == "breaks":
            ids = tokenizer.vocabulary.values()
            fields[name] = tuple(
                sorted(i for i in ids if text in tokenizer.decode([i]))
            )
            continue
        tokens = tokenizer.encode(text)
        if name == "begin" and len(tokens) != 1:
            raise ValueError(
                f"{where}.begin: {text!r} is {len(tokens)} tokens, not one"
            )
        fields[name] = tokens[0] if name == "begin" else tuple(tokens)
    return build(ExitRule, fields, where)


def block(ready: Ready) -> BlockDrafter:
    """A block drafter."""
    _learned(ready.options, ())
    model, params = load_block(_folder(ready.options), dtype=ready.model.dtype)
    return BlockDrafter(model, params, **ready.given("num_tokens"))


def mtp(ready: Ready) -> MTPDrafter:
    """An MTP layer."""
    _learned(ready.options, ())
    model, params = load_mtp(_folder(ready.options), dtype=ready.model.dtype)
    return MTPDrafter(model, params, **ready.given("num_tokens"))


def _folder(options: DraftOptions) -> Path:
    folder = Path(str(options.path))
    if not folder.is_dir():
        raise ValueError(f"draft.path: no folder {folder} with a drafter")
    return folder


def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def _learned(options: DraftOptions, names: Sequence[str]) -> dict[str, Any]:
    """The fields of `draft.options`, which a kind of drafter must know."""
    given = dict(options.options or {})
    if given and not names:
        raise ValueError(f"draft.options: {options.method} takes none")
    known_fields(given, names, "draft.options")
    return given
