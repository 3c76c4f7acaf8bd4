"""Drafters as recipes describe them, and decoding as their section `draft` says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from angeljax._draft_options import DraftOptions, DraftSampling
from angeljax.formats import QTensor
from angeljax.speculative import _check, _learned_options
from angeljax.speculative._prompts import read_prompts
from angeljax.speculative.auto import Plan, auto_generate
from angeljax.speculative.core import Generated, generate
from angeljax.speculative.drafter import Drafter, NoDrafter
from angeljax.speculative.hybrid import Hybrid
from angeljax.speculative.lookup import PromptLookup
from angeljax.speculative.model_drafter import DraftModel, SelfDrafter
from angeljax.speculative.prepare import prepare_drafter
from angeljax.speculative.profile import profile_target
from angeljax.speculative.recycling import TokenRecycling, successors
from angeljax.speculative.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class _Ready:
    """What a drafter is made for."""

    options: DraftOptions
    model: Any
    params: Any
    dense: Any
    tokenizer: Any

    def given(self, *names: str) -> dict[str, Any]:
        """Fields of the section that are set; the others keep a drafter's defaults."""
        values = {name: getattr(self.options, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


def make_drafter(
    options: DraftOptions | Mapping[str, Any] | str,
    model: Any,
    params: Any,
    *,
    dense: Any = None,
    tokenizer: Any = None,
    prepare: bool = False,
    rows: FusedRows | None = None,
) -> Drafter:
    """The drafter that a recipe's section `draft` describes, for one target.

    Args:
      options: `Recipe.draft`, a mapping of its fields, or the name of a method.
      model, params: the target, compressed or not, before `prepare_decoder`.
      dense: its params before they were compressed, of which self_quant then makes the
        copy; default what `params` stand for.
      tokenizer: of the target. With one, a draft model must have the same tokens, where
        else it must have as many.
      prepare: whether the target will decode as `prepare_decoder` leaves it: the
        drafter then goes through `prepare_drafter`.
      rows: see `prepare_drafter`.

    Returns:
      A drafter; `NoDrafter` for the method "none". With `options.auto` it has the
      largest draft to consider; see `generate_as`.

    Raises:
      ValueError: a field that cannot be, a file that is not there or damaged, or a
        drafter that was made for another model; one line, before anything is compiled.

    Example:
      >>> import jax
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> from angeljax.speculative import make_drafter
      >>> config = DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=64, num_layers=2,
      ...     intermediate_size=64, num_heads=2, num_kv_heads=1, head_dim=32,
      ... )
      >>> model = LanguageModel(config)
      >>> params = model.init(jax.random.key(0))
      >>> make_drafter("prompt_lookup", model, params)
      PromptLookup(num_tokens=4, max_ngram=3, min_ngram=1)
      >>> how = {"method": "self_quant", "rules": [{"format": "int8"}], "num_tokens": 2}
      >>> drafter = make_drafter(how, model, params)
      >>> layer = drafter.params["layers"][0]
      >>> drafter.width, layer["attn"]["q_proj"]["kernel"].spec.label()
      (3, 'int8 channel')
    """
    parsed = DraftOptions.parse(options)
    if parsed is None:
        raise ValueError("no draft options: name a method, such as prompt_lookup")
    ready = _Ready(parsed, model, params, dense, tokenizer)
    drafter = _MAKERS[parsed.method](ready)
    drafter.check(model, sampling_of(parsed.sampling))
    return prepare_drafter(model, drafter, rows=rows) if prepare else drafter


def sampling_of(options: DraftSampling) -> Sampling:
    """The sampling of a recipe's section `draft`, as `generate` takes it.

    Args:
      options: `Recipe.draft.sampling`.

    Returns:
      A `Sampling`.

    Example:
      >>> from angeljax.recipe import Recipe
      >>> from angeljax.speculative import sampling_of
      >>> text = "draft: {method: prompt_lookup, sampling: {temperature: 0.5}}"
      >>> sampling_of(Recipe.from_yaml(text).draft.sampling).temperature
      0.5
    """
    return Sampling(**dataclasses.asdict(options))


def generate_as(
    options: DraftOptions,
    model: Any,
    params: Any,
    prompts: Any,
    lengths: Any = None,
    *,
    drafter: Drafter,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    cache: bool = True,
    **rest: Any,
) -> tuple[Generated, Plan | None]:
    """`generate` or `auto_generate`, as a recipe's section `draft` says.

    Args:
      options: the section.
      model, params, prompts, lengths, max_new_tokens: as in `generate`.
      drafter: of `make_drafter`.
      sampling: default that of the section.
      cache: as in `profile_target`.
      **rest: other arguments that both functions have.

    Returns:
      A `Generated`, and the plan where the section has `auto`.

    Raises:
      ValueError: as `generate`.
    """
    sampling = sampling_of(options.sampling) if sampling is None else sampling
    given = model, params, prompts, lengths
    rest |= {"drafter": drafter, "sampling": sampling, "max_new_tokens": max_new_tokens}
    auto = options.auto
    if auto is None or drafter.width == 1:
        return generate(*given, exact=options.exact, **rest), None
    profile = None
    if auto.widths:
        _, sizes, _ = read_prompts(model, prompts, lengths)
        room = _check.bucket(max_new_tokens + drafter.width)
        profile = profile_target(
            model,
            params,
            auto.widths,
            batch=len(sizes),
            slots=_check.bucket(int(sizes.max())) + room,
            cache=cache,
        )
    return auto_generate(
        *given,
        profile=profile,
        probe_rounds=auto.probe_rounds,
        off_below=auto.off_below,
        cache=cache,
        **rest,
    )


def _none(ready: _Ready) -> Drafter:
    return NoDrafter()


def _lookup(ready: _Ready) -> PromptLookup:
    given = ready.given("num_tokens", "max_ngram", "min_ngram")
    # The longest n-gram is at least as long as the shortest.
    if "max_ngram" not in given:
        given["max_ngram"] = max(3, given.get("min_ngram", 1))
    return PromptLookup(**given)


def _recycling(ready: _Ready) -> TokenRecycling:
    given = ready.given("nodes", "from_prompt")
    if ready.options.successors:
        given["table"] = successors(ready.model, ready.params)
    return TokenRecycling(**given)


def _hybrid(ready: _Ready) -> Hybrid:
    head = ready.options.path is not None
    drafter = _learned_options.eagle_tree(ready) if head else _recycling(ready)
    found = {"num_tokens": min(10, drafter.width - 1), "min_ngram": 2}
    found |= ready.given("num_tokens", "max_ngram", "min_ngram")
    least = max(found["min_ngram"], ready.options.flat_ngram or 1)
    found.setdefault("max_ngram", max(3, least))
    return Hybrid(drafter, PromptLookup(**found), **ready.given("flat_ngram"))


def _layer_skip(ready: _Ready) -> SelfDrafter:
    layers = ready.options.kept_layers(ready.model.config.num_layers)
    return SelfDrafter(layers=layers, **ready.given("num_tokens"))


def _self_quant(ready: _Ready) -> SelfDrafter:
    layers = ready.options.kept_layers(ready.model.config.num_layers)
    return SelfDrafter(_copy(ready), layers=layers, **ready.given("num_tokens"))


def _copy(ready: _Ready) -> Any:
    """The target's params, compressed as the section says."""
    from angeljax._ptq_workflow import needed
    from angeljax.compress import compress
    from angeljax.recipe import Recipe

    options = ready.options
    if options.recipe is None:
        what = Recipe(rules=tuple(options.rules or ()), name="draft.rules")
    else:
        what = Recipe.load(options.recipe)
        what.check_model(ready.model.config.to_dict())
    dense = ready.dense
    if dense is None:

        def whole(leaf: Any) -> Any:
            return leaf.dequantize() if isinstance(leaf, QTensor) else leaf

        def packed(leaf: Any) -> bool:
            return isinstance(leaf, QTensor)

        dense = jax.tree.map(whole, ready.params, is_leaf=packed)
    needs, why = needed(what, dense)
    if needs:
        raise ValueError(
            f"draft.recipe: {why} needs calibration; compress the model with it "
            "beforehand, and use method draft_model with the folder, or a recipe that "
            "needs none"
        )
    if not what.rules:
        raise ValueError(f"draft.recipe: {what.name} has no rules to compress with")
    return compress(dense, what, progress=False)


def _draft_model(ready: _Ready) -> DraftModel:
    from angeljax._workflow import open_model

    dtype = str(jax.numpy.dtype(ready.model.dtype))
    opened = open_model(str(ready.options.model), dtype=dtype)
    mine: Any = opened.tokenizer
    theirs = ready.tokenizer
    known = mine is not None and theirs is not None
    if known and mine.vocabulary != theirs.vocabulary:
        raise ValueError(
            f"draft.model {ready.options.model} has another vocabulary than the "
            "target: take a model with the same tokenizer"
        )
    plain = dataclasses.replace(opened.model, kv_cache=None)
    return DraftModel(plain, opened.params, **ready.given("num_tokens"))


_MAKERS: dict[str, Any] = {
    "none": _none,
    "prompt_lookup": _lookup,
    "recycling": _recycling,
    "hybrid": _hybrid,
    "layer_skip": _layer_skip,
    "self_quant": _self_quant,
    "draft_model": _draft_model,
    "eagle3": _learned_options.eagle,
    "mtp": _learned_options.mtp,
    "dflash": _learned_options.block,
}
